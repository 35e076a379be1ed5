"""The daemon's own life: start, stop, being killed, and everything that can be wrong around it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import apsw
import pytest

from agentd import models
from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import run_pb2
from tests.e2e.test_calls_e2e import wait_for

if TYPE_CHECKING:
    from tests.e2e.conftest import DaemonProcess

POCKET = models.locate("pocket")


def one_line_error(daemon: DaemonProcess) -> str:
    """What a daemon that could not start said: an error and a hint, no traceback."""
    assert daemon.ended() == 1
    lines = [line for line in daemon.log.splitlines() if line.strip()]
    assert "Traceback" not in daemon.log
    assert lines[-2].startswith("error:") or lines[-1].startswith("error:")
    return daemon.log


def test_the_socket_is_for_its_owner_alone_and_gone_after_the_end(own_daemon: DaemonProcess):
    """Mode 0600 from the start; removed at a clean stop, whose last event is `stop`."""
    own_daemon.start()
    assert own_daemon.socket.stat().st_mode & 0o777 == 0o600
    assert own_daemon.stop() == 0
    assert not own_daemon.socket.exists()
    with apsw.Connection(str(own_daemon.state / "agentd.db")) as db:
        assert '"kind":"stop"' in db.execute("SELECT body FROM event ORDER BY seq DESC LIMIT 1").get


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(
    own_daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory
):
    """After kill -9 the daemon starts again; beside a living one it refuses."""
    own_daemon.start()
    own_daemon.kill()
    assert own_daemon.socket.exists()
    own_daemon.start()
    second = type(own_daemon)(tmp_path_factory.mktemp("second"), extra="")
    config = second.write_config()
    config.write_text(config.read_text().replace(str(second.socket), str(own_daemon.socket)))
    text = config.read_text()
    second.write_config = lambda: config  # type: ignore[method-assign]
    assert str(own_daemon.socket) in text
    second.start(wait=False)
    assert "listens on" in one_line_error(second)
    with Client(own_daemon.socket) as client:
        assert client.status().pid == own_daemon.process.pid  # type: ignore[union-attr]


def test_a_second_daemon_on_the_same_state_folder_is_refused(own_daemon: DaemonProcess, tmp_path: Path):
    """It names the first one's process id and writes nothing."""
    own_daemon.start()
    second = type(own_daemon)(tmp_path / "second")
    second.root.mkdir()
    config = second.write_config()
    config.write_text(config.read_text().replace(str(second.state), str(own_daemon.state)))
    second.write_config = lambda: config  # type: ignore[method-assign]
    second.start(wait=False)
    said = one_line_error(second)
    assert f"pid {own_daemon.process.pid}" in said  # type: ignore[union-attr]


def test_a_socket_path_that_is_too_long_is_refused(own_daemon: DaemonProcess):
    """The error says how long it may be."""
    own_daemon.root = own_daemon.root / ("x" * 120)
    own_daemon.root.mkdir()
    own_daemon.start(wait=False)
    assert "107" in one_line_error(own_daemon)


def test_a_file_where_the_socket_should_be_is_not_touched(own_daemon: DaemonProcess):
    """Only sockets are ever removed."""
    own_daemon.socket.write_text("precious")
    own_daemon.start(wait=False)
    assert "something else" in one_line_error(own_daemon)
    assert own_daemon.socket.read_text() == "precious"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("[engin]\n", "engin"),
        ("[engine]\ncontext = 1\n", "engine.context"),
        ("[[grants]]\ntool = 'x'\nscope = 'everything'\n", "scope"),
        ("nonsense", "agentd.toml"),
    ],
)
def test_a_wrong_configuration_is_named_to_the_key(own_daemon: DaemonProcess, extra: str, says: str):
    """File and key, in a line."""
    own_daemon.extra = extra
    own_daemon.start(wait=False)
    assert says in one_line_error(own_daemon)


def test_a_manifest_with_a_typo_stops_the_start(own_daemon: DaemonProcess, tmp_path: Path):
    """A bundle that says anything unknown is refused whole, by file and key."""
    bundle = tmp_path / "bundles" / "mine"
    bundle.mkdir(parents=True)
    (bundle / "run.py").write_text("")
    (bundle / "tool.toml").write_text(
        'bundle="mine"\nversion="1"\ndescription="x"\nprogram="run.py"\n[[tool]]\nname="t"\ndescripton="x"\neffect="none"\n'
    )
    config = own_daemon.write_config()
    config.write_text(config.read_text().replace("bundles = [", f'bundles = ["{bundle.parent}", '))
    own_daemon.write_config = lambda: config  # type: ignore[method-assign]
    own_daemon.start(wait=False)
    said = one_line_error(own_daemon)
    assert "tool.toml" in said
    assert "descrip" in said


def broken_models(folder: Path) -> dict[str, tuple[Path, str]]:
    """Model files that are none, and what the error must name."""
    data = POCKET.read_bytes()
    made = {
        "missing": (None, "can't be read"),
        "empty": (b"", "not a GGUF"),
        "text": (b"hello, I am no model", "not a GGUF"),
        "truncated": (data[: len(data) // 2], "can't be loaded"),
        "header only": (data[:2000], "can't be loaded"),
        "foreign": (data.replace(b"gemma4", b"gemmaX"), "gemmaX"),
        "no turn token": (data.replace(b"<|turn>", b"<|torn>"), "<|turn>"),
        "scrambled": (data[:5000] + os.urandom(3000) + data[8000:], ""),
    }
    for name, (content, _) in made.items():
        if content is not None:
            (folder / f"{name}.gguf").write_bytes(content)
    return {name: (folder / f"{name}.gguf", says) for name, (_, says) in made.items()}


def test_model_files_that_are_none_fail_the_run_and_not_the_daemon(own_daemon: DaemonProcess, tmp_path: Path):
    """Missing, truncated, foreign, scrambled: each run says what is wrong; tools go on working."""
    for name, (path, says) in broken_models(tmp_path).items():
        own_daemon.extra = f'[engine]\nmodel = "{path}"\n'
        own_daemon.start()
        with Client(own_daemon.socket) as client:
            ended = list(client.run("hello"))[-1].run
            assert ended.state == run_pb2.Run.STATE_FAILED, name
            assert says in ended.error.message, name
            assert not client.call("system.time", {}).failed
        own_daemon.stop()


def test_killing_the_engine_fails_the_run_at_work_and_the_next_one_reloads(own_daemon: DaemonProcess):
    """Like an out-of-memory kill: a clear error, then everything as before."""
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        list(client.run("hello"))
        os.kill(client.status().engine_pid, signal.SIGSTOP)  # so that it can't finish first
        engine, run = client.status().engine_pid, client.create_run("what can you do")
        deadline = time.monotonic() + 20
        while client.get_run(run.name).state != run_pb2.Run.STATE_RUNNING:  # else it would begin with a new engine
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # it has begun, and is about to ask
        os.kill(engine, signal.SIGKILL)
        ended = list(client.watch_run(run.name))[-1].run
        assert ended.state == run_pb2.Run.STATE_FAILED
        assert "SIGKILL" in ended.error.message
        assert list(client.run("hello"))[-1].run.answer == "Hello! What should I do?"


def test_a_daemon_killed_in_a_call_puts_the_file_back_at_its_next_start(own_daemon: DaemonProcess):
    """kill -9 with a change half done: recovered, recorded, and the recovery itself can be undone."""
    own_daemon.start()
    file = own_daemon.home / "file.txt"
    file.write_text("before\n")
    with Client(own_daemon.socket) as client:
        waiting = threading.Thread(target=_ignore, args=(client, "probe.write_then_wait", {"path": "file.txt", "seconds": 15}))
        waiting.start()
        wait_for(lambda: file.read_text() == "half done\n")
        zygote = client.status().zygote_pid
        own_daemon.kill()
        waiting.join()
    wait_for(lambda: not Path(f"/proc/{zygote}").exists())
    own_daemon.start()
    assert file.read_text() == "before\n"
    with Client(own_daemon.socket) as client:
        assert len(client.status().recovered_calls) == 1
        recovered = [event for event in client.audit_events() if event.kind == "call.recovered"]
        assert len(recovered) == 1
        assert client.verify().first_bad_sequence == 0
        client.undo(f"calls/{recovered[0].body['call']}")
    assert file.read_text() == "half done\n"


def test_a_run_that_the_daemon_was_killed_in_is_failed_afterwards(own_daemon: DaemonProcess):
    """No run stays `running` for ever."""
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        list(client.run("hello"))
        os.kill(client.status().engine_pid, signal.SIGSTOP)
        run = client.create_run("what can you do")
        engine = client.status().engine_pid
        own_daemon.kill()
        os.kill(engine, signal.SIGKILL)
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        lost = client.get_run(run.name)
        assert lost.state == run_pb2.Run.STATE_FAILED
        assert "killed" in lost.error.message
        assert [event.run.state for event in client.watch_run(run.name)] == [run_pb2.Run.STATE_FAILED]


def test_no_process_is_left_when_the_daemon_is_killed(own_daemon: DaemonProcess):
    """Zygote, worker and engine go with it."""
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        list(client.run("what time is it"))
        status = client.status()
    own_daemon.kill()
    for pid in (status.zygote_pid, status.engine_pid):
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in _state(pid))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_stops_changes_loses_nothing_and_ends_when_there_is_space(own_daemon: DaemonProcess, tmp_path: Path):
    """STORE_FULL, files untouched, reading goes on; with space again everything works and the chain is whole."""
    own_daemon.extra = "[journal]\nlow_space_mib = 0\n"
    own_daemon.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", own_daemon.state], check=True)
    try:
        own_daemon.start()
        file = own_daemon.home / "file.txt"
        with Client(own_daemon.socket) as client:
            client.call("files.write", {"path": "file.txt", "text": "first"})
            filler = own_daemon.state / "filler"
            fill(filler)
            text, error = write_until_refused(client, file)
            assert error.reason is Reason.STORE_FULL
            assert file.read_text() == text
            assert client.verify().first_bad_sequence == 0
            assert client.status().pid
            filler.unlink()
            client.call("files.write", {"path": "file.txt", "text": "again"})
            assert file.read_text() == "again\n"
            assert client.verify().first_bad_sequence == 0
        assert own_daemon.stop() == 0
    finally:
        subprocess.run(["umount", "-l", own_daemon.state], check=True)


def test_a_changed_row_of_the_log_is_found(own_daemon: DaemonProcess):
    """`audit verify` names the first event that is not what was written, with exit status 3."""
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        client.call("system.time", {})
    own_daemon.stop()
    with apsw.Connection(str(own_daemon.state / "agentd.db")) as db:
        db.execute("UPDATE event SET body = replace(body, 'system.time', 'system.tame') WHERE seq = 2")
    own_daemon.start()
    done = own_daemon.command("audit", "verify", check=False)
    assert done.returncode == 3
    assert "event 2" in done.stdout


def test_a_daemon_without_a_socket_folder_makes_one_for_its_owner(own_daemon: DaemonProcess):
    """The folder of the socket is created 0700."""
    config = own_daemon.write_config()
    inner = own_daemon.root / "run" / "agentd.sock"
    config.write_text(config.read_text().replace(str(own_daemon.socket), str(inner)))
    own_daemon.write_config = lambda: config  # type: ignore[method-assign]
    own_daemon.start(wait=False)
    wait_for(inner.exists, 30)
    assert inner.parent.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as probe:
        wait_for(lambda: probe.connect_ex(str(inner)) == 0)


def fill(file: Path) -> None:
    """Take all the space there is."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as full:
        while True:
            full.write(bytes(4096))


def write_until_refused(client: Client, file: Path) -> tuple[str, AgentdError]:
    """Small writes until one is refused; the content of the file after the last one that was not, and the error."""
    for n in range(500):
        before = file.read_text()
        try:
            client.call("files.write", {"path": file.name, "text": f"more {n} " * 50})
        except AgentdError as e:
            return before, e
    raise AssertionError("the disk is not full")


def _ignore(client: Client, tool: str, arguments: dict[str, object]) -> None:
    try:
        client.call(tool, arguments)
    except AgentdError:
        time.sleep(0)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
