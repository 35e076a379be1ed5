"""Disks that get full, that of the files and that of the daemon's state: nothing is half done, and with room again all is well."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from tests.e2e.commands import (
    ENDS,
    Background,
    begin,
    differences,
    events,
    failure,
    fill,
    open_calls,
    run,
    shell_daemon,
    small_disk,
    tree,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import DaemonProcess

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system"),
    pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4"),
]
NO_MARK = "[journal]\nlow_space_mib = 0\n"  # the disks here never have 200 MiB
HOME_MIB = 8
STATE_MIB = 24
AT_ONCE_S = 3.0
AGAIN_S = 90.0  # 60 s are promised
OLD = b"old content\n" * 100_000


@pytest.fixture(params=["tmpfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stopped(daemon: DaemonProcess) -> None:
    if daemon.process and daemon.process.poll() is None:
        daemon.stop()
    assert "Traceback" not in daemon.log, daemon.log


# -- the disk of the files


@pytest.fixture
def crowded(tmp_path: Path, kind: str) -> Iterator[DaemonProcess]:
    """A daemon that works on a small disk, with its state elsewhere; a file that fills a good part of it."""
    daemon = shell_daemon(tmp_path, NO_MARK)
    with small_disk(daemon.home, HOME_MIB, kind):
        work = daemon.home / "work"
        work.mkdir()
        (work / "a").write_bytes(OLD)
        (work / "b").write_text("b\n")
        daemon.start()
        yield daemon
        stopped(daemon)


def is_full(directory: Path) -> bool:
    return os.statvfs(directory).f_bavail == 0


def cancel(client: Client, pending: Background) -> None:
    """Give a command up, and wait until the daemon is done with it."""
    pending.cancel()
    wait_until(lambda: not list(client.status().calls), 30, "the end of the call")


FILLING = "rm b; head -c 60000000 /dev/zero > a; "


def test_a_file_that_filled_the_disk_is_whole_again_when_its_command_is_given_up(crowded: DaemonProcess) -> None:
    """What the command wrote makes room for what was there: at once, without another start."""
    work = crowded.home / "work"
    before = tree(work)
    with Client(crowded.socket) as client:
        pending = begin(client, FILLING + "sleep 1000", work)
        wait_until(lambda: is_full(work) or pending.is_over, what="a full disk")
        cancel(client, pending)
        wait_until(lambda: not differences(before, tree(work)), AT_ONCE_S, "putting it back")
        assert open_calls(client) == []


def test_a_file_that_filled_the_disk_is_whole_again_when_its_command_fails(crowded: DaemonProcess) -> None:
    """The same for a status that is not 0."""
    work = crowded.home / "work"
    before = tree(work)
    with Client(crowded.socket) as client:
        failure(client, FILLING + "exit 3", work)
        wait_until(lambda: not differences(before, tree(work)), AT_ONCE_S, "putting it back")
        assert open_calls(client) == []


def emptied_with_no_room(client: Client, daemon: DaemonProcess) -> Path:
    """A command has emptied a file, somebody else has taken all the room, and the command is given up. What they took it with."""
    work, theirs = daemon.home / "work", daemon.home / "theirs"
    pending = begin(client, ": > a; rm b; : > begun; sleep 1000", work)
    wait_until(lambda: (work / "begun").exists() or pending.is_over, what="an empty file")
    fill(theirs)
    cancel(client, pending)
    return theirs


def test_a_file_that_there_is_no_room_for_is_put_back_as_soon_as_there_is(
    crowded: DaemonProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's data are in the way: when they are gone, it comes back by itself within a minute."""
    work = crowded.home / "work"
    before = tree(work)
    with Client(crowded.socket) as client:
        theirs = emptied_with_no_room(client, crowded)
        kept = theirs.stat().st_size
        theirs.unlink()
        took = wait_until(lambda: not differences(before, tree(work)), AGAIN_S, f"another try ({kept} bytes less)")
        wait_until(lambda: open_calls(client) == [], what="a record of it")
        assert client.verify().first_bad_sequence == 0
        assert not run(client, "echo x > b", work).failed
    with capsys.disabled():
        print(f"\nput back {took:.1f} s after there was room")


def test_what_a_person_writes_before_a_file_is_put_back_is_not_lost(crowded: DaemonProcess) -> None:
    """It stays, or is kept and can be had back; either is said with its path."""
    file = crowded.home / "work" / "a"
    with Client(crowded.socket) as client:
        theirs = emptied_with_no_room(client, crowded)
        os.truncate(theirs, theirs.stat().st_size - (64 << 10))
        file.write_text("mine\n")
        theirs.unlink()
        wait_until(lambda: file.read_bytes() == OLD or is_told(client, crowded, file), AGAIN_S, "another try")
        wait_and_see()
        if file.read_bytes() == OLD:
            client.undo(f"calls/{recovery(client)}")
        assert file.read_text() == "mine\n"
        assert str(file) in said(client, crowded)


def wait_and_see() -> None:
    """Whether it is left alone from now on, as well. AGENTD_SLOW=1 waits for longer than a daemon may between two tries."""
    time.sleep(65 if os.environ.get("AGENTD_SLOW") else 5)


def recovery(client: Client) -> str:
    """The call that has put something back."""
    return str([event["call"] for event in events(client) if event["kind"] == "call.recovered"][-1])


def said(client: Client, daemon: DaemonProcess) -> str:
    """What daemon and log have said since the newest call was asked for, that itself apart."""
    told = [event["text"] for event in events(client)]
    last = max(n for n, event in enumerate(events(client)) if event["kind"] == "call.intent")
    return "\n".join(told[last + 1 :]) + daemon.log


def is_told(client: Client, daemon: DaemonProcess, file: Path) -> bool:
    """Whether that this file is another's now is on record as the end of the matter."""
    return open_calls(client) == [] and str(file) in said(client, daemon)


# -- the disk of the state


@pytest.fixture
def cramped(tmp_path: Path, kind: str) -> Iterator[DaemonProcess]:
    """A daemon with its state on a small disk; files in a directory elsewhere."""
    daemon = shell_daemon(tmp_path, NO_MARK + "[engine]\nprefixes_mib = 0\n")
    work = daemon.home / "work"
    work.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (work / name).write_text(f"{name}\n" * 1000)
    with small_disk(daemon.state, STATE_MIB, kind):
        daemon.state.chmod(0o700)
        daemon.start()
        yield daemon
        stopped(daemon)


def refusal(client: Client, work: Path) -> AgentdError:
    """What a call that changes something is refused with."""
    with pytest.raises(AgentdError) as caught:
        run(client, "echo changed > a", work)
    return caught.value


def works_again(client: Client, work: Path) -> bool:
    try:
        return not run(client, "echo again > a", work).failed
    except AgentdError:
        return False


def require_readable(daemon: DaemonProcess) -> None:
    """The log, as people read it."""
    assert daemon.command("audit", "list").stdout.strip()
    assert daemon.command("audit", "verify").returncode == 0


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_daemon_starts_on_a_full_disk_recovers_reads_and_refuses(cramped: DaemonProcess, *, interrupted: bool) -> None:
    """Full to the last byte: no change is made but that of a killed daemon is put back; with room again all works as ever."""
    work = cramped.home / "work"
    before = tree(work)
    with Client(cramped.socket) as client:
        if interrupted:
            pending = begin(client, "echo changed > a; rm b; mkdir d; sleep 30", work)
            wait_until(lambda: (work / "d").exists() or pending.is_over, what="a change")
            cramped.kill()
    if not interrupted:
        cramped.stop()
    filler = cramped.state / "filler"
    fill(filler)
    cramped.start()
    assert not differences(before, tree(work))
    require_readable(cramped)
    with Client(cramped.socket) as client:
        error = refusal(client, work)
        assert error.reason is Reason.STORE_FULL
        assert str(cramped.state) in str(error) or "space" in str(error)
        assert not differences(before, tree(work))
        filler.unlink()
        wait_until(lambda: works_again(client, work), AGAIN_S, "a change with room again")
        assert (work / "a").read_text() == "again\n"
        assert open_calls(client) == []
    require_readable(cramped)


@pytest.mark.parametrize("left", [0, 16 << 10, 256 << 10, 5 << 20])
def test_a_command_whose_record_finds_no_room_is_done_or_put_back(cramped: DaemonProcess, left: int) -> None:
    """The state's disk gets full, but for so many bytes, while it runs: all of its changes are there, with an end, or none."""
    work, filler = cramped.home / "work", cramped.state / "filler"
    command = "set -e; : > begun; while [ ! -e go ]; do sleep 0.05; done; seq 100000 > a; rm b; for i in $(seq 50); do echo x > n$i; done; mv c z"
    with Client(cramped.socket) as client:
        pending = begin(client, command, work)
        wait_until((work / "begun").exists, what="a command")
        fill(filler, but=left)
        (work / "go").touch()
        done = ended(pending)
        require_all_or_nothing(work, done=done)
        filler.unlink()
        wait_until(lambda: works_again(client, work), AGAIN_S, "a change with room again")
        wait_until(lambda: open_calls(client) == [], AGAIN_S, "an end of all calls on record")
        assert ("call.end" in ends_of_the_first(client)) is done
    require_readable(cramped)


def ends_of_the_first(client: Client) -> set[str]:
    """How the first call of all ended, as the log has it."""
    seen = events(client)
    call = next(event["call"] for event in seen if event["kind"] == "call.intent")
    return {event["kind"] for event in seen if call in (event.get("call"), event.get("cause")) and event["kind"] in ENDS}


def ended(pending: Background) -> bool:
    """Whether a command ended well."""
    try:
        return not pending.result(120).failed
    except AgentdError:
        return False


def require_all_or_nothing(work: Path, *, done: bool) -> None:
    left: dict[str, Any] = tree(work)
    left.pop("go", None)  # the test's own
    if done:
        assert left["a"].content.endswith(b"\n100000\n")
        assert {"n1", "n50", "z"} <= left.keys()
        assert not {"b", "c"} & left.keys()
        return
    assert sorted(left) == [".", "a", "b", "c"]
    assert all(left[name].content == f"{name}\n".encode() * 1000 for name in ("a", "b", "c"))
