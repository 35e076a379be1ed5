"""Commands that are broken off: Ctrl-C, the end of the terminal, a pipe that nobody reads, a daemon that goes away."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.v1 import run_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 20
ASKS = '[approvals]\nnotify = false\n\n[[grants]]\ntool = "files.append"\nscope = "write:{home}/asked"\ndecision = "ask"\n'
PROMPT = 'add "buy milk" to asked/todo.txt'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    root = tmp_path_factory.mktemp("agentd").resolve()
    with DaemonProcess(root, extra=ASKS.format(home=root / "home")).running() as running:
        yield running


def started(daemon: DaemonProcess, *arguments: str, terminal: int | None = None) -> subprocess.Popen[bytes]:
    """A run that waits for a person's answer."""
    # What starts the tests may have ignored these signals (nohup, `&` in a script), and a child inherits that.
    heard = ["env", "--default-signal=INT,HUP"]
    command = [*heard, sys.executable, "-m", "agentd", "--socket", str(daemon.socket), "run", PROMPT, *arguments]
    streams = {"stdin": terminal, "stdout": terminal or subprocess.PIPE, "stderr": terminal or subprocess.PIPE}
    environment = os.environ | {"TERM": "dumb"}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **streams)  # type: ignore[call-overload]
    deadline = time.monotonic() + DEADLINE_S
    with Client(daemon.socket) as client:
        while not client.approvals():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    return process  # type: ignore[no-any-return]


def last_state(daemon: DaemonProcess) -> str:
    """Of the run, once it has ended."""
    deadline = time.monotonic() + DEADLINE_S
    with Client(daemon.socket) as client:
        while True:
            run = next(client.list_runs())
            if run.state in (run_pb2.Run.STATE_CANCELLED, run_pb2.Run.STATE_FAILED, run_pb2.Run.STATE_SUCCEEDED):
                return run_pb2.Run.State.Name(run.state)
            assert time.monotonic() < deadline
            time.sleep(0.05)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)]


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_run_that_is_broken_off_is_cancelled(daemon: DaemonProcess, number: int, status: int):
    with Client(daemon.socket) as client, client.watching_approvals():
        process = started(daemon)
        process.send_signal(number)
        said, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status
    assert b"Traceback" not in errors + said, errors
    assert b"broken off, and cancelled" in said
    assert last_state(daemon) == "STATE_CANCELLED"
    with Client(daemon.socket) as client:
        assert not client.approvals()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_question_on_a_terminal_that_ends_answers_nothing(daemon: DaemonProcess, number: int):
    screen, terminal = pty.openpty()
    process = started(daemon, terminal=terminal)
    os.close(terminal)
    said = b""
    while b"allow?" not in said:
        said += os.read(screen, 4096)
    process.send_signal(number)
    process.wait(DEADLINE_S)
    while chunk := _read(screen):
        said += chunk
    assert b"Traceback" not in said, said
    assert last_state(daemon) == "STATE_CANCELLED"
    assert not (daemon.home / "asked" / "todo.txt").exists()


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 4096)
    except OSError:  # EIO: nobody has its other end any more
        return b""


def test_a_daemon_that_goes_away_is_said_in_two_lines(daemon: DaemonProcess):
    with Client(daemon.socket) as client, client.watching_approvals():
        process = started(daemon)
        daemon.kill()
    daemon.start()
    said, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert b"Traceback" not in errors + said, errors
    assert len(errors.splitlines()) <= 2, errors


@pytest.mark.parametrize("arguments", [("audit", "list"), ("audit", "list", "--json"), ("tools", "list"), ("--help",)])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(daemon: DaemonProcess, arguments: tuple[str, ...]):
    for _ in range(20):
        daemon.command("tools", "call", "files.list", "path=.", check=False)
    command = [sys.executable, "-m", "agentd", "--socket", str(daemon.socket), *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=DEADLINE_S, check=False)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode != 0
