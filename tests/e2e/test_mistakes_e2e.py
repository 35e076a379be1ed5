"""Configurations with mistakes, ports that strangers reach, commands without a daemon: what is wrong is said in a line or two."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import budget_pb2, run_pb2, token_pb2
from tests.e2e.conftest import DaemonProcess
from tests.e2e.device import QUICK, Device, seen
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_State = budget_pb2.Budgets.State
Run = run_pb2.Run
DEADLINE_S = 30.0
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with Device(tmp_path, extra=QUICK).made().running() as running:
        yield running


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def readings(client: Client) -> dict[str, float]:
    return {each.name: each.value for each in client.budgets().readings}


def state_of(client: Client, name: str) -> int:
    return next(each.state for each in client.budgets().budgets if each.name == name)


def ended(client: Client, run: run_pb2.Run) -> run_pb2.Run:
    return list(client._runs.WatchRun(run_pb2.WatchRunRequest(name=run.name), timeout=DEADLINE_S))[-1].run


def refusal(call: Callable[[], object]) -> AgentdError:
    with pytest.raises(AgentdError) as caught:
        call()
    return caught.value


# Mistakes in agentd.toml


MISTAKES = [
    ('[budgets.memory]\nmax_anon_mib = "900"\n', "budgets.memory.max_anon_mib"),
    ("[budgets.memory]\nmax_anon_mib = true\n", "budgets.memory.max_anon_mib"),
    ("[budgets.memory]\nmax_anon_mib = nan\n", "budgets.memory.max_anon_mib"),
    ("[budgets.memory]\nleast_context = 0\n", "budgets.memory.least_context"),
    ("[budgets.memory]\nleast_context = 1.5\n", "budgets.memory.least_context"),
    ("[budgets.memory]\nreduce_reread_pct = -2\n", "budgets.memory.reduce_reread_pct"),
    ("[budgets.memory]\nidle_unload_s = nan\n", "budgets.memory.idle_unload_s"),
    ("[budgets.memory]\nreduce_available_mib = 100\nshed_available_mib = 200\n", "budgets.memory"),
    ("[budgets.thermal]\nsetpoint_f = 170\n", "budgets.thermal.setpoint_f"),
    ('[budgets.thermal]\nzones = "cpu-thermal"\n', "budgets.thermal.zones"),
    ("[budgets.thermal]\nzones = [3]\n", "budgets.thermal.zones"),
    ("[budgets.thermal]\npause_c = 60\n", "budgets.thermal"),
    ("[budgets.thermal]\ncritical_c = inf\n", "budgets.thermal.critical_c"),
    ('[budgets.battery]\nprovider = "acpi"\n', "budgets.battery.provider"),
    ('[budgets.battery]\nprovider = "command"\n', "budgets.battery"),
    ('[budgets.battery]\nprovider = "nut"\naddress = "localhost"\n', "budgets.battery"),
    ('[budgets.battery]\nprovider = "nut"\naddress = "ups@localhost:nut"\n', "budgets.battery"),
    ('[budgets.battery]\nprovider = "command"\ncommand = "cat x"\n', "budgets.battery.command"),
    ('[budgets.battery]\nprovider = "nut"\naddress = 3\n', "budgets.battery.address"),
    ("[budgets.battery]\nreduce_below_pct = 150\n", "budgets.battery"),
    ("[budgets.battery]\npause_below_pct = 5\n", "budgets.battery"),
    ("[budgets.states]\nhold_s = -1\n", "budgets.states.hold_s"),
    ("[budgets.states]\npoll_s = 0\n", "budgets.states.poll_s"),
    ("[budgets.states]\nhold_ms = 5\n", "budgets.states.hold_ms"),
    ("[budgets.admission]\nqueue_max = -1\n", "budgets.admission.queue_max"),
    ("[budgets.admission]\nqueue_max = 1.5\n", "budgets.admission.queue_max"),
    ("[budgets.admission]\nwait_s = 0\n", "budgets.admission.wait_s"),
    ("[budgets.admission]\ndefer_s = -1\n", "budgets.admission.defer_s"),
    ("[budgets.network]\nx = 1\n", "budgets.network"),
    ("[budgets]\nthermal = 75\n", "budgets.thermal"),
    ('[[quotas]]\nprincipal = "*"\nper = "week"\ntokens = 5\n', "quotas[0].per"),
    ('[[quotas]]\nprincipal = "*"\nper = "day"\ntokens = -5\n', "quotas[0].tokens"),
    ('[[quotas]]\nprincipal = "*"\nper = "day"\nminutes = 5\n', "quotas[0].minutes"),
    ('[quotas]\nprincipal = "*"\nper = "day"\ntokens = 5\n', "quotas"),
    ('[metrics]\nlisten = "9464"\n', "metrics.listen"),
    ('[metrics]\notlp = "localhost:4318"\n', "metrics.otlp"),
    ('[metrics]\notlp = "ftp://localhost/v1/metrics"\n', "metrics.otlp"),
    ("[metrics]\nevery_s = 0\n", "metrics.every_s"),
    ("[metrics]\nport = 9464\n", "metrics.port"),
    ("[runs]\ntokens = 0\n", "runs.tokens"),
]


@pytest.mark.parametrize(("text", "key"), MISTAKES)
def test_a_mistake_in_the_configuration_is_refused_with_its_key(tmp_path: Path, text: str, key: str):
    """Exit status 1, a line or two."""
    config = tmp_path / "agentd.toml"
    config.write_text(f'state = "{tmp_path}/state"\nsocket = "{tmp_path}/agentd.sock"\n{text}')
    told = subprocess.run(
        [sys.executable, "-m", "agentd", "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=8,
        check=False,
    )
    assert told.returncode == 1
    assert key.replace("[0]", "") in re.sub(r"\[\d+\]|\.\d+(?=\.|\b)", "", told.stderr), told.stderr
    assert "Traceback" not in told.stderr
    assert 1 <= len(told.stderr.strip().splitlines()) <= 3, told.stderr


def test_doctor_finds_the_same_mistakes(tmp_path: Path):
    config = tmp_path / "agentd.toml"
    config.write_text("[budgets.memory]\nshed_available_mib = -1\n")
    command = [sys.executable, "-m", "agentd", "doctor", "--config", str(config)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert told.returncode == 1
    assert "budgets.memory.shed_available_mib" in told.stdout + told.stderr
    assert "Traceback" not in told.stderr


def test_doctor_says_how_to_get_a_model_that_is_not_here(tmp_path: Path):
    config = tmp_path / "agentd.toml"
    config.write_text('[engine]\nmodel = "e2b"\n')
    command = [sys.executable, "-m", "agentd", "doctor", "--json", "--config", str(config)]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path)}
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)
    (found,) = [each for each in map(json.loads, told.stdout.splitlines()) if each["what"] == "model"]
    assert not found["ok"]
    assert found["hint"].startswith("Fetch it: agentd models pull e2b")


def test_doctor_tells_what_is_missing_with_what_mends_it(tmp_path: Path):
    """What bundles of the configuration need, and automations that can't work."""
    (tmp_path / "automations").mkdir()
    (tmp_path / "automations" / "wrong.toml").write_text("nonsense")
    (tmp_path / "automations" / "gone.toml").write_text('prompt = "x"\n[on.file]\npath = "/nowhere/inbox"\n')
    daemon = DaemonProcess(tmp_path, tools='bundled = ["gpio", "termux", "notify"]\n')
    daemon.environment = {"PATH": "/usr/bin:/bin"}
    with daemon.running() as device:
        command = [sys.executable, "-m", "agentd", "--socket", str(device.socket), "doctor", "--json"]
        command += ["--config", str(tmp_path / "agentd.toml")]
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False, env=os.environ | daemon.environment
        )
    assert told.returncode == 1
    found = [json.loads(line) for line in told.stdout.splitlines()]
    missing = {finding["what"]: finding["found"] + " " + finding["hint"] for finding in found if not finding["ok"]}
    assert "pkg install termux-api" in missing["termux"]
    if not list(Path("/dev").glob("gpiochip*")):
        assert "/dev/gpiochip" in missing["gpio"]
    broken = [finding for finding in found if finding["what"] == "automation"]
    assert [finding["hint"] for finding in broken] == ["agentd automations check gone", "agentd automations check wrong"]


def test_a_port_for_metrics_that_is_taken_is_said_at_the_start(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = DaemonProcess(tmp_path, extra=f'[metrics]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n')
        assert daemon.start(wait=False).ended() == 1
        assert "[metrics] listen" in daemon.log
        assert "Traceback" not in daemon.log


# Servers that speak as NUT's upsd and pisugar-server do


@dataclass
class Ups:
    """A server of lines. What `answer` gives for a line is sent; bytes as they are, None ends the connection."""

    answer: Callable[[str], str | bytes | None]
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Ups]:
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            timeout = 20

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    for line in self.rfile:
                        outer.lines.append(line.decode(errors="replace").strip())
                        reply = outer.answer(outer.lines[-1])
                        if reply is None:
                            return
                        self.wfile.write(reply if isinstance(reply, bytes) else f"{reply}\n".encode())

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        with Server(("127.0.0.1", self.port), Handler) as server:
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join(10)


def nut(values: dict[str, str]) -> Callable[[str], str]:
    def answer(line: str) -> str:
        words = line.split()
        match words:
            case ["GET", "VAR", ups, name]:
                return f'VAR {ups} {name} "{values[name]}"' if name in values else "ERR VAR-NOT-SUPPORTED"
            case ["LIST", "VAR", ups]:
                lines = [f'VAR {ups} {name} "{value}"' for name, value in values.items()]
                return "\n".join([f"BEGIN LIST VAR {ups}", *lines, f"END LIST VAR {ups}"])
            case ["LOGOUT"]:
                return "OK Goodbye"
        return "ERR UNKNOWN-COMMAND"

    return answer


def battery(device: Device, **settings: object) -> Device:
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    device.extra = QUICK + "stale_s = 1\n" + "[budgets.battery]\n" + table
    return device


def script(root: Path, text: str) -> str:
    path = root / "battery.sh"
    new = root / "battery.new"
    new.write_text(f"#!/bin/sh\n{text}\n")
    new.chmod(0o755)
    new.rename(path)
    return str(path)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_zones_that_are_not_there_are_said_with_what_is(tmp_path: Path):
    device = Device(tmp_path, extra=QUICK + '[budgets.thermal]\nzones = ["cpu-termal"]\n').made()
    with device.running(), Client(device.socket) as client:
        until(lambda: "thermal" in client.budgets().unenforced)
        told = device.command("doctor").stdout + device.command("budget").stdout
        assert "cpu-termal" in told


def test_a_zone_with_a_hostile_name_does_not_take_over_the_terminal(tmp_path: Path):
    device = Device(tmp_path, extra=QUICK).made()
    (device.zone / "type").write_text("cpu[/red]\x1b[31m-thermal\n")
    with device.running():
        for arguments in (("budget",), ("top", "--once"), ("doctor",)):
            assert "\x1b" not in device.command(*arguments).stdout


# Memory


def meminfo(device: Device, available_kb: object, total_kb: int = 8_000_000) -> None:
    path = device.root / "proc/meminfo"
    path.with_name("new").write_text(f"MemTotal: {total_kb} kB\nMemAvailable: {available_kb} kB\n")
    path.with_name("new").rename(path)


def test_a_model_that_is_too_large_is_said_in_two_lines_with_the_key(tmp_path: Path):
    text = "[budgets.memory]\nmax_anon_mib = 20\nreduce_available_mib = 20\nshed_available_mib = 10\n"
    with DaemonProcess(tmp_path, extra=text).running() as daemon:
        told = daemon.command("run", "hello", check=False)
        assert told.returncode == 1
        assert "max_anon_mib" in told.stdout + told.stderr
        assert len((told.stdout + told.stderr).strip().splitlines()) <= 2
        refused = daemon.command("calibrate", "--minutes", "0.1", check=False)
        assert refused.returncode == 1
        assert "max_anon_mib" in refused.stderr


# Calibration


@pytest.fixture
def two_threads(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path, extra=QUICK + "[engine]\nthreads = 2\n").made()
    (device.zone / "temp").unlink()
    (device.zone / "type").unlink()
    device.zone.rmdir()
    with device.running() as running:
        yield running


# Metrics


@dataclass
class Scraped:
    port: int

    def get(self, path: str = "/metrics") -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def value(self, name: str, **labels: str) -> float | None:
        for line in self.get().splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
                return float(value)
        return None


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Device, Scraped]]:
    scraped = Scraped(free_port())
    extra = QUICK + f'[metrics]\nlisten = "127.0.0.1:{scraped.port}"\n'
    with Device(tmp_path_factory.mktemp("measured"), extra=extra).made().running() as device:
        yield device, scraped


def test_metrics_are_those_of_the_documentation_and_say_nothing_else(measured: tuple[Device, Scraped]):
    device, scraped = measured
    with Client(device.socket) as client:
        ended(client, client.create_run("append swordfish to log.txt", session="swordfish"))
        device.charge(50, "Discharging")
        until(lambda: not client.budgets().background)
        waits = client.create_run("swordfish", priority=Run.PRIORITY_BACKGROUND)
        device.heat(86)
        seen(client, _State.STATE_SHED)
        refusal(lambda: client.create_run("swordfish"))
        until(lambda: scraped.value("agentd_budget_state", budget="thermal") == 3)
        assert scraped.value("agentd_deferred_jobs") == 1
        assert scraped.value("agentd_queue_depth", **{"class": "background"}) == 1
        assert scraped.value("agentd_battery_level_ratio") == 0.5
        assert scraped.value("agentd_battery_charging") == 0
        text = scraped.get()
        client.cancel_run(waits.name)
        device.heat(50)
        device.charge(80, "Discharging")
        seen(client, _State.STATE_NOMINAL)
    assert "swordfish" not in text
    documented = set(re.findall(r"`(agentd_\w+)`", (DOCS / "metrics.md").read_text()))
    kinds = dict(re.findall(r"^# TYPE (agentd_\w+) (\w+)", text, re.MULTILINE))
    names = {name for name in kinds if not name.endswith("_created")}
    assert names - documented == set()
    assert all(kinds[name] == "counter" for name in names if name.endswith("_total"))
    for budget in ("thermal", "battery", "memory"):
        assert f'agentd_budget_state{{budget="{budget}"}}' in text


JUNK = [
    b"",
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00" + bytes(300),
    b"GET /metrics HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /metrics?name[]=%00&name[]=[ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
    b"POST /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text; version=x; q=nan\r\nAccept-Encoding: gzip;q=x\r\n\r\n",
]


def test_junk_at_the_port_of_metrics_harms_nothing(measured: tuple[Device, Scraped]):
    """Nor do 100 clients that connect and say nothing; no traceback lands in the log."""
    device, scraped = measured
    where = ("127.0.0.1", scraped.port)
    for junk in JUNK:
        with socket.create_connection(where, timeout=10) as peer, contextlib.suppress(OSError):
            peer.sendall(junk)
            peer.shutdown(socket.SHUT_WR)
            reply = peer.recv(65536)
            assert b"root:" not in reply
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(where, timeout=10)).sendall(b"GET /metrics HT")
        assert "agentd_budget_state" in scraped.get()
        with Client(device.socket) as client:
            assert ended(client, client.create_run("hello")).state == Run.STATE_SUCCEEDED
    assert "agentd_budget_state" in scraped.get()
    assert "Traceback" not in device.log


@contextlib.contextmanager
def collector(status: int = 200, delay_s: float = 0) -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP receiver: its address and what it was sent."""
    bodies: list[bytes] = []
    leave = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            leave.wait(delay_s)
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/metrics", bodies
    finally:
        leave.set()
        server.shutdown()
        thread.join(10)
        server.server_close()


# The commands


def test_the_help_of_each_command_has_an_example():
    for command in ("budget", "top", "calibrate", "doctor", "runs", "run", "serve"):
        told = subprocess.run(
            [sys.executable, "-m", "agentd", command, "--help"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        assert "Example: agentd " + command in " ".join(told.split()), command
        assert "--json" in told


def test_without_a_daemon_each_command_says_what_to_do(tmp_path: Path):
    for arguments in (("budget",), ("top", "--once"), ("runs",), ("calibrate",), ("budget", "--json"), ("runs", "cancel", "x")):
        told = DaemonProcess(tmp_path).command(*arguments, check=False)
        assert told.returncode == 1, arguments
        assert "agentd serve" in told.stdout + told.stderr
        assert len((told.stdout + told.stderr).strip().splitlines()) <= 2, told.stderr


@pytest.mark.parametrize("minutes", ["0", "-1", "61", "ten", "nan", "inf"])
def test_minutes_that_make_no_sense_are_a_mistake_of_usage(tmp_path: Path, minutes: str):
    told = DaemonProcess(tmp_path).command("calibrate", "--minutes", minutes, check=False)
    assert told.returncode == 2, told.stderr
    assert "--minutes" in told.stderr


def test_the_refusal_of_a_run_says_why_and_when_to_come_back(device: Device):
    with Client(device.socket) as client:
        device.heat(86)
        seen(client, _State.STATE_SHED)
        told = device.command("run", "hello", check=False)
        assert told.returncode == 1
        assert "86" in told.stderr
        assert re.search(r"\d+ (s|seconds|min)", told.stderr), told.stderr
        assert len(told.stderr.strip().splitlines()) <= 2


def test_budgets_are_open_to_every_token_and_watched_by_many(device: Device):
    with Client(device.socket) as client:
        secret = client.create_token(token_pb2.Token(label="eye", roles=["auditor"])).secret
        with Client(device.socket, token=secret) as eye:
            streams = [eye._budgets.WatchBudgets(budget_pb2.WatchBudgetsRequest(), timeout=DEADLINE_S) for _ in range(50)]
            assert {next(stream).state for stream in streams} == {_State.STATE_NOMINAL}
            device.heat(86)
            for stream in streams:
                while next(stream).state != _State.STATE_SHED:
                    pass
            for stream in streams:
                stream.cancel()
        with Client(device.socket, token="agentd_nonsense") as nobody:
            assert refusal(nobody.budgets).reason is Reason.UNAUTHENTICATED
