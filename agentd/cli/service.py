"""`agentd service`: agentd as a service of systemd, or of Termux's runit."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentd import places
from agentd.cli.output import console, json_option, print_json, shown
from agentd.errors import ConfigError, DaemonError, Reason

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_TIMEOUT_S = 150  # longer than a stop and a start may take
_PEOPLES = ("/home/", "/root/", "/run/user/")  # what a service of the system does not see
_WORK = Path("/srv/agentd")
_TRIES, _PAUSE_S = 20, 1.0  # until runit has seen a new service
_TERMUX = Path("/data/data/com.termux/files/usr")
_RUNIT = _TERMUX / "var" / "service" / "agentd"
_SYSTEM = Path("/etc/systemd/system")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the service: where it goes, its text, its mode."""

    path: Path
    text: str
    mode: int = 0o644
    once: bool = False
    """Whether one that is there stays as it is: people write in it."""


@click.group()
def service() -> None:
    """Let agentd start by itself: a service of systemd, or on a phone of Termux."""


@service.command(epilog="Example: agentd service install")
@click.option("--system", is_flag=True, help="For the whole machine, as the user `agentd`; for root.")
@click.option("--no-start", is_flag=True, help="Put the files in place only.")
@click.option("--print", "show", is_flag=True, help="Print the files, and change nothing.")
@json_option
def install(*, system: bool, no_start: bool, show: bool, as_json: bool) -> None:
    """Put the service in place and start it: of this user, unless --system. What was there before is replaced."""
    wanted = _files(system=system)
    if show and as_json:
        print_json({"files": {str(file.path): file.text for file in wanted}})
        return
    if show:
        for file in wanted:
            click.echo(f"# {file.path}\n{file.text}")
        return
    _put(wanted, system=system)
    steps = [] if no_start else _start(system=system)
    if as_json:
        print_json({"files": [str(file.path) for file in wanted], "done": steps})
        return
    for file in wanted:
        console.print(f"[green]written[/]  {shown(str(file.path))}")
    for step in steps:
        console.print(f"[green]done[/]     {shown(step)}")
    for note in _notes(system=system):
        console.print(f"[dim]{shown(note)}[/]")


def _put(wanted: list[_File], *, system: bool) -> None:
    """Raises ConfigError, DaemonError."""
    if system and os.geteuid() != 0:
        hint = "Call it with sudo, or leave --system out for a service of your own."
        raise ConfigError(Reason.CONFIG_INVALID, "Only root can install a service of the system.", hint=hint)
    if system:
        _require_visible()
    for file in wanted:
        if file.once and file.path.exists():
            continue
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_text(file.text)
        file.path.chmod(file.mode)
    if system:
        _prepare()


@service.command(epilog="Example: agentd service status")
@click.option("--system", is_flag=True, help="The one of the whole machine.")
@json_option
def status(*, system: bool, as_json: bool) -> None:
    """Show whether the service is in place and runs. Exit status: 0 if it runs, 3 if not."""
    there = all(file.path.exists() for file in _files(system=system))
    if _on_termux():
        done = _run("sv", "status", "agentd")
        words, runs = (done.stdout or done.stderr).strip(), done.stdout.startswith("run:")
    else:
        done = _run(
            *_systemctl(system=system), "show", "agentd.service", "-p", "ActiveState,SubState,MainPID,NRestarts,StatusText"
        )
        words = ", ".join(done.stdout.split("\n")).strip(", ") or done.stderr.strip()
        runs = "ActiveState=active" in done.stdout
    if as_json:
        print_json({"installed": there, "running": runs, "said": words})
    else:
        mark = "[green]runs[/]" if runs else "[yellow]does not run[/]"
        console.print(f"{mark}  {'installed' if there else 'not installed: agentd service install'}\n[dim]{shown(words)}[/]")
    sys.exit(0 if runs else 3)


@service.command(epilog="Example: agentd service uninstall")
@click.option("--system", is_flag=True, help="The one of the whole machine.")
@json_option
def uninstall(*, system: bool, as_json: bool) -> None:
    """Stop the service and take its files away. State, configuration and models stay."""
    gone = [file.path for file in _files(system=system) if file.path.exists() and not file.once]
    if _on_termux():
        _run("sv", "exit", "agentd")
    else:
        _run(*_systemctl(system=system), "disable", "--now", "agentd.socket", "agentd.service")
    for path in gone:
        path.unlink()
    if _on_termux():
        shutil.rmtree(_RUNIT, ignore_errors=True)
    if not _on_termux():
        _run(*_systemctl(system=system), "daemon-reload")
    if as_json:
        print_json({"removed": [str(path) for path in gone]})
        return
    for path in gone:
        console.print(f"[green]removed[/]  {shown(str(path))}")
    if not gone:
        console.print("[dim]it was not installed[/]")


def _files(*, system: bool) -> list[_File]:
    """Raises ConfigError where there is no service manager that is known."""
    ours = files("agentd.units")
    if _on_termux():
        boot = Path("~/.termux/boot/agentd").expanduser()
        made = {_RUNIT / "run": "run", _RUNIT / "finish": "finish", _RUNIT / "log" / "run": "log", boot: "boot"}
        return [_File(path, _text(ours / "termux" / name), 0o755) for path, name in made.items()]
    if not shutil.which("systemctl"):
        hint = "Start `agentd serve` with what your system has; docs/service.md says what it needs."
        raise ConfigError(Reason.CONFIG_INVALID, "There is neither systemd nor Termux here.", hint=hint)
    folder = _SYSTEM if system else places.default_file().parent.parent / "systemd" / "user"
    source = ours if system else ours / "user"
    units = [_File(folder / name, _text(source / name)) for name in ("agentd.service", "agentd.socket")]
    return [*units, _File(Path("/etc/agentd/agentd.toml"), _text(ours / "agentd.toml"), once=True)] if system else units


def _text(source: Traversable) -> str:
    return source.read_text(encoding="utf-8").replace("@AGENTD@", _command())


def _command() -> str:
    """This very agentd, as a unit and a shell can say it."""
    beside = Path(sys.executable).with_name("agentd")
    words = [str(beside)] if beside.exists() else [sys.executable, "-I", "-m", "agentd"]
    return " ".join(f'"{word}"' if " " in word else word for word in words).replace("%", "%%")


def _require_visible() -> None:
    """Raises ConfigError for an agentd, or a Python, that lies where a service of the system does not look."""
    for path in (Path(sys.executable), Path(sys.executable).resolve()):
        if str(path).startswith(_PEOPLES):
            message = f"A service of the system can't see {path}."
            hint = "Install agentd for all, in /opt/agentd (docs/service.md), or leave --system out."
            raise ConfigError(Reason.CONFIG_INVALID, message, hint=hint, metadata={"path": str(path)})


def _prepare() -> None:
    """The user, and the folder that its tools work in. Raises DaemonError."""
    _require(("systemd-sysusers", "--inline", 'u agentd - "agentd" /var/lib/agentd'))
    _WORK.mkdir(parents=True, exist_ok=True)
    shutil.chown(_WORK, "agentd", "agentd")


def _start(*, system: bool) -> list[str]:
    """Raises DaemonError."""
    if _on_termux():
        os.environ.setdefault("SVDIR", str(_RUNIT.parent))  # a shell that is older than termux-services does not have it
        _require(("sv-enable", "agentd"))
        for _ in range(_TRIES):
            if _run("sv", "up", "agentd").returncode == 0:
                return ["sv-enable agentd", "sv up agentd"]
            time.sleep(_PAUSE_S)
        hint = "Open a new session of Termux, which starts them, then: sv up agentd."
        raise DaemonError(Reason.DAEMON_UNREACHABLE, "The services of Termux do not run yet.", hint=hint)
    control = _systemctl(system=system)
    steps = [(*control, "daemon-reload"), (*control, "enable", "agentd.service"), (*control, "restart", "agentd.service")]
    for step in steps:
        _require(step)
    return [" ".join(step) for step in steps]


def _require(step: tuple[str, ...]) -> None:
    """Raises DaemonError."""
    done = _run(*step)
    if done.returncode != 0:
        why = " ".join((done.stderr or done.stdout).split())[:300]
        hint = (
            "Look at it: sv status agentd." if _on_termux() else "Look at it: journalctl -u agentd -n 20 (--user for your own)."
        )
        raise DaemonError(Reason.DAEMON_UNREACHABLE, f"`{' '.join(step)}` failed: {why}.", hint=hint)


def _notes(*, system: bool) -> list[str]:
    if _on_termux():
        return [
            "Needs the packages termux-services and termux-api; open Termux:Boot once, so that it starts with the phone.",
            "Take Termux out of battery optimisation, or Android ends it: docs/service.md.",
        ]
    if system:
        return [
            "Configuration: /etc/agentd/agentd.toml, which says who may ask: members of the group agentd that it names.",
            "They need AGENTD_SOCKET=/run/agentd/agentd.sock in their environment.",
        ]
    return ["It ends when you log out, unless: loginctl enable-linger"]


def _systemctl(*, system: bool) -> tuple[str, ...]:
    return ("systemctl",) if system else ("systemctl", "--user")


def _on_termux() -> bool:
    return _TERMUX.is_dir() and "com.termux" in os.environ.get("PREFIX", "")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return subprocess.CompletedProcess(command, 127, "", f"{command[0]} can't be run, or did not end in {_TIMEOUT_S} s")
