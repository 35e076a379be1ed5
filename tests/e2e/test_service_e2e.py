"""As a service: what is told to systemd, a socket that it opens, units that it accepts."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentd.client import Client
from tests.e2e.conftest import DaemonProcess

UNITS = Path(__file__).parent.parent.parent / "systemd"
GIVES_A_SOCKET = """
import os, socket, sys
path, *command = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(command[0], command)
"""


def test_systemd_is_told_of_start_life_and_end(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(20)
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        daemon = DaemonProcess(tmp_path, environment=told).start()
        first = ear.recv(4096).decode().splitlines()
        assert first[0] == "READY=1"
        assert f"MAINPID={daemon.process.pid if daemon.process else 0}" in first
        assert [ear.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert daemon.stop() == 0
        rest = []
        while not rest or rest[-1] != b"STOPPING=1":
            rest.append(ear.recv(100))
        assert set(rest[:-1]) <= {b"WATCHDOG=1"}


def test_a_socket_that_was_opened_for_it_is_used_and_left(tmp_path: Path):
    daemon = DaemonProcess(tmp_path)
    daemon.before = (sys.executable, "-c", GIVES_A_SOCKET, str(daemon.socket))
    daemon.start()
    with Client(daemon.socket) as client:
        assert client.status().pid
    assert daemon.stop() == 0
    assert daemon.socket.exists()  # it belongs to systemd


def test_what_the_environment_says_of_others_is_not_believed(tmp_path: Path):
    """LISTEN_PID and WATCHDOG_PID of a parent; a notify socket that is not there."""
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "x", "NOTIFY_SOCKET": "/nowhere"}
    with DaemonProcess(tmp_path, environment=environment).running() as daemon, Client(daemon.socket) as client:
        assert client.status().pid


@pytest.mark.parametrize("journal", [True, False])
def test_what_it_logs_has_a_priority_in_the_journal(tmp_path: Path, *, journal: bool):
    """`journalctl -p warning` finds warnings. A stream that is somebody else's is not taken for the journal's."""
    log = tmp_path / "daemon.log"
    log.touch()
    status = log.stat()
    told = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not journal)}"}
    (tmp_path / "automations").mkdir()
    (tmp_path / "automations" / "wrong.toml").write_text("nonsense")
    with DaemonProcess(tmp_path, environment=told).running() as daemon:
        warnings = [line for line in daemon.log.splitlines() if "wrong.toml" in line]
    assert warnings
    for line in warnings:
        assert line.startswith("<4>agentd." if journal else "20"), line


def units(tmp_path: Path, folder: Path) -> list[Path]:
    """With a command that is there."""
    made = []
    for source in (*folder.glob("*.service"), *folder.glob("*.socket")):
        made.append(tmp_path / source.name)
        made[-1].write_text(source.read_text().replace("@AGENTD@", sys.executable).replace("Documentation=man:agentd(1)\n", ""))
    return made


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
@pytest.mark.parametrize("which", ["system", "user"])
def test_systemd_accepts_the_units(tmp_path: Path, which: str):
    made = units(tmp_path, UNITS if which == "system" else UNITS / "user")
    command = ["systemd-analyze", "verify", f"--{which}", "--man=no", *map(str, made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not re.search(r"agentd\.(service|socket):", done.stderr), done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_of_the_system_is_rated_2_5_or_better(tmp_path: Path):
    (unit,) = (path for path in units(tmp_path, UNITS) if path.suffix == ".service")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"exposure level for agentd\.service: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 2.5


@pytest.mark.skipif(not shutil.which("systemctl"), reason="needs systemd")
def test_the_command_prints_what_it_would_install():
    done = subprocess.run(
        [sys.executable, "-m", "agentd", "service", "install", "--print"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Type=notify" in done.stdout
    assert "@AGENTD@" not in done.stdout
    assert "agentd serve" in done.stdout


def test_the_scripts_of_termux_are_shell_and_fork_nothing_away():
    install = UNITS.parent / "scripts" / "termux-install.sh"
    for script in (*(UNITS / "termux").iterdir(), install):
        text = script.read_text()
        assert text.startswith("#!/data/data/com.termux/files/usr/bin/sh\n")
        assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
        assert "nohup" not in text
        assert "setsid" not in text
