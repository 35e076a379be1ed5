"""`agentd doctor`: whether everything that agentd needs is there, and how well tools are confined."""

from __future__ import annotations

import getpass
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from agentd_sandbox import probe

from agentd import config as configuration
from agentd import extras, models, parts, places
from agentd.cli.output import console, json_option, print_json, shown
from agentd.client import Client
from agentd.devices import Programs, Screen
from agentd.errors import AgentdError, Reason

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from agentd.v1 import automation_pb2, budget_pb2, journal_pb2

_PI_KERNEL = Path("/boot/firmware/cmdline.txt")
_LINGERING = Path("/var/lib/systemd/linger")  # loginctl(1): a file for each user


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `ok` false makes the exit status 1; `hint` says what to do."""

    what: str
    ok: bool
    found: str
    hint: str = ""


@click.command(epilog="Example: agentd doctor --json")
@click.option("--config", "file", type=click.Path(path_type=Path), help="Configuration to check.")
@json_option
@click.pass_obj
def doctor(socket: Path | None, file: Path | None, *, as_json: bool) -> None:
    """Check this machine, the configuration and the daemon. Exit status: 0, or 1 if something is missing."""
    findings = _look(socket, file)
    for finding in findings:
        if as_json:
            print_json(asdict(finding))
            continue
        mark = "[green]ok[/]  " if finding.ok else "[red]no[/]  "
        console.print(f"{mark} [bold]{finding.what:10}[/] {shown(finding.found)}")
        if finding.hint:
            console.print(f"                [dim]{shown(finding.hint)}[/]")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


def _look(socket: Path | None, file: Path | None) -> list[Finding]:
    findings = [Finding("python", True, f"{sys.version.split()[0]} ({sys.executable})"), _sandbox()]
    try:
        config = configuration.load(file)
    except AgentdError as e:
        return [*findings, Finding("config", False, e.message, e.hint)]
    try:
        parts.policy(config)
    except AgentdError as e:
        findings.append(Finding("budgets", False, e.message, e.hint))
    findings += [_config(config, file), _model(config), *_extras(config), *_bundles(config.tools.bundled), *_service()]
    return [*findings, *_daemon(socket or config.socket)]


def _sandbox() -> Finding:
    level = probe()
    found = f"{level.name}: filter, {', '.join(layer for layer in level.layers if layer != 'filter')}"
    if not level.confines:
        found = "L0: no tool can run on this kernel; it needs seccomp, and for the broker Linux 5.9"
    elif level.name == "L1":
        found = "L1: the filter alone; tools in Python work, other programs can't be started"
    hint = f"not there: {'; '.join(level.missing)}" if level.missing else ""
    if "cgroup" not in level.layers and _PI_KERNEL.exists():
        hint += f". A Pi has it with cgroup_enable=memory in {_PI_KERNEL}, from the next start on"
    return Finding("sandbox", level.confines, f"{found} ({level.architecture}, Linux {level.kernel})", hint)


def _config(config: configuration.Config, file: Path | None) -> Finding:
    path = file or places.default_file()
    where = str(path) if path.exists() else f"defaults ({path} does not exist)"
    asks = "Without grants there a person is asked for each call: `agentd approvals`, `agentd grants add`."
    return Finding("config", True, f"{where}, {len(config.grants)} grants", "" if config.grants else asks)


def _model(config: configuration.Config) -> Finding:
    path = models.locate(config.engine.model)
    there = os.access(path, os.R_OK)
    size = f"{path.stat().st_size / 1e6:.1f} MB" if there else "cannot be read"
    hint = ""
    if not there:
        hint = "`agentd models list` says what there is; `agentd models use NAME` sets engine.model."
        if models.catalogue.named(config.engine.model):
            hint = f"Fetch it: agentd models pull {config.engine.model}"
    elif path == models.locate(models.POCKET):
        hint = "For trying out only. Others: agentd models list"
    if hint and not extras.is_there("pull"):
        hint += f" (fetching needs: {extras.install('pull')})"
    return Finding("model", there, f"{path}, {size}", hint)


def _extras(config: configuration.Config) -> list[Finding]:
    """Optional packages that the configuration asks for and that are not there."""
    wanted = {"gpio": "gpio" in config.tools.bundled, "metrics": config.metrics.listen, "otel": config.metrics.otlp}
    missing = [extra for extra, asked in wanted.items() if asked and not extras.is_there(extra)]
    return [
        Finding(extra, False, f"needs {extras.MODULES[extra].partition('.')[0]}, which is not installed", extras.install(extra))
        for extra in missing
    ]


def _bundles(bundled: Container[str]) -> Iterator[Finding]:
    """What bundles need beside Python."""
    if "gpio" in bundled:
        nodes = sorted(Path("/dev").glob("gpiochip*"))
        usable = [node for node in nodes if os.access(node, os.R_OK | os.W_OK)]
        if usable:
            yield Finding("gpio", True, ", ".join(map(str, usable)))
        elif nodes:
            hint = f"sudo usermod -aG gpio {getpass.getuser()}, then log in again."
            yield Finding("gpio", False, f"{nodes[0]} may not be used by this user", hint)
        else:
            yield Finding("gpio", False, "this device has no /dev/gpiochip*", "The bundle gpio can't work here.")
    if "termux" in bundled and not shutil.which("termux-battery-status"):
        yield Finding("termux", False, "no program of Termux:API", "Install the app Termux:API, and: pkg install termux-api")
    if "notify" in bundled and not Screen(Programs()).there:
        yield Finding(
            "notify", True, "no screen for notify.show", "Termux:API, or notify-send (libnotify-bin) in a desktop's session."
        )


def _service() -> Iterator[Finding]:
    """A user's service, which lives as long as somebody is logged in."""
    unit = places.default_file().parent.parent / "systemd" / "user" / "agentd.service"
    if unit.exists() and not (_LINGERING / getpass.getuser()).exists():
        yield Finding("service", True, f"{unit}; it ends with the last login", "loginctl enable-linger")


def _automations(found: Iterable[automation_pb2.Automation]) -> Iterator[Finding]:
    for each in found:
        name = each.name.removeprefix("automations/")
        if each.error or each.trouble:
            hint = f"agentd automations check {name}"
            yield Finding("automation", False, f"{name}: {each.error or each.trouble}", hint)
        elif each.polled:
            hint = "sudo sysctl fs.inotify.max_user_watches=65536" if "inotify" in each.polled else ""
            yield Finding("automation", True, f"{name}: looked at every few seconds, as {each.polled}", hint)


def _daemon(socket: Path) -> list[Finding]:
    try:
        with Client(socket) as client:
            status, budgets, automations = client.status(), client.budgets(), client.automations.list()
            left = client.leftovers() if status.leftovers else []
    except AgentdError as e:
        running = e.reason is not Reason.DAEMON_UNREACHABLE
        if running:
            return [Finding("daemon", False, e.message, e.hint)]
        return [
            Finding("daemon", True, f"not running ({socket})", "Start it: agentd serve; or for good: agentd service install")
        ]
    model = status.model
    size = f"{model.parameters / 1e6:.1f} M parameters"
    loaded = f"{model.name}, {size}" if model.parameters else model.error or "no model loaded"
    found = f"version {status.version}, pid {status.pid}, {status.tools} tools; {loaded}"
    findings = [Finding("daemon", not model.error, found), _budgets(budgets), *_automations(automations)]
    if status.audit_closed:
        hint = "No tool may change anything. `agentd audit verify` says more, `agentd audit renew` begins a new log."
        findings.append(Finding("audit log", False, f"not what was signed: {status.audit_closed}", hint))
    return [*findings, *_leftovers(left)]


def _leftovers(left: Sequence[journal_pb2.Leftover]) -> Iterator[Finding]:
    """What failed calls have changed and could not be restored."""
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        found = f"{left[0].path} of a failed call is not restored{more}: {left[0].reason}"
        yield Finding("undo", False, found, "`agentd recover --list` has all of it; `agentd recover` tries again at once.")


def _budgets(budgets: budget_pb2.Budgets) -> Finding:
    """What is measured, what is taken for granted, what is not enforced."""
    sources = {reading.name: reading.source for reading in budgets.readings}
    wanted = {"temperature_c": "heat", "battery_pct": "battery", "available_mib": "memory", "pressure_some_pct": "pressure"}
    wanted |= {"power_w": "power"}
    measured = ", ".join(f"{what} by {sources[name]}" for name, what in wanted.items() if name in sources)
    not_kept = [f"{name}: {why}" for name, why in sorted(budgets.unenforced.items())]
    trouble = [f"{name}: {why}" for name, why in sorted(budgets.faults.items())]
    told = (("not enforced", not_kept), ("in trouble", trouble))
    hint = "; ".join(f"{word}: {', '.join(each)}" for word, each in told if each)
    return Finding("budgets", True, f"{measured or 'nothing is measured'} (thresholds of {budgets.device})", hint)
