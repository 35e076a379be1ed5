"""What a real kill, a damaged object, a swapped folder or a second call must not do to anybody's files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from agentd_sandbox import Change

from agentd.audit import AuditLog, Event
from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal import Journal, Keep
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agentd.journal import Transaction

LIMIT = 1 << 20


class Desk:
    """A store with log and journal beside a folder `home` of a few files."""

    def __init__(self, root: Path) -> None:
        self.state, self.home = root / "state", root / "home"
        self.home.mkdir()
        (self.home / "file").write_text("old\n")
        (self.home / "large").write_bytes(b"L" * 100_000)
        (self.home / "full").mkdir()
        (self.home / "full" / "f").write_text("f")
        self.open()

    def open(self) -> None:
        self.store = Store(self.state)
        self.audit = AuditLog(self.store)
        self.journal = Journal(self.store, self.audit, self.state / "objects", Keep(LIMIT, low_space_bytes=0))

    def close(self) -> None:
        self.store.close()

    def begin(self, *names: str, call: str = "") -> Transaction:
        call = call or new_id()
        paths = [os.fsencode(self.home / name) for name in names]
        transaction = self.journal.begin(call, Event(kind="call.intent", call=call), paths)
        transaction.before_changes([Change("write", path) for path in paths])  # as the broker does
        return transaction

    def tree(self) -> dict[str, tuple[int, bytes]]:
        found = sorted(self.home.rglob("*"))
        return {str(p.relative_to(self.home)): (p.stat().st_mode, p.read_bytes() if p.is_file() else b"") for p in found}


def end(transaction: Transaction) -> Event:
    return Event(kind="call.end", call=transaction.call)


def abort(transaction: Transaction) -> Event:
    return Event(kind="call.abort", call=transaction.call)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path.resolve())
    yield made
    made.close()


CHILD = """
import os, pathlib, sys, time
from agentd_sandbox import Change
from agentd.audit import AuditLog, Event
from agentd.journal import Journal, Keep
from agentd.store import Store, new_id
state, home, stage = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
store = Store(state)
journal = Journal(store, AuditLog(store), state / "objects", Keep(1 << 20, low_space_bytes=0))
paths = [os.fsencode(home / name) for name in ("file", "large", "new")]

def wait(here):
    if here == stage:
        print("ready", flush=True)
        time.sleep(60)

def call():
    transaction = journal.begin(name := new_id(), Event(kind="call.intent", call=name), paths)
    transaction.before_changes([Change("write", paths[0]), Change("remove", paths[1])])
    wait("begun")
    (home / "file").write_text("new")
    wait("one changed")
    (home / "large").unlink()
    (home / "new").write_bytes(b"n" * 50_000)
    wait("all changed")
    transaction.finish(Event(kind="call.end", call=name))
    return name

if stage == "any time":
    print("ready", flush=True)
    while True:
        journal.undo(call(), "test")
call()
wait("finished")
"""


def kill_child(desk: Desk, stage: str, after_s: float = 0) -> None:
    """Let a child come to `stage` and kill it with SIGKILL."""
    desk.close()
    command = [sys.executable, "-c", CHILD, str(desk.state), str(desk.home), stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(after_s)
        finally:
            child.send_signal(signal.SIGKILL)
    desk.open()


@pytest.mark.parametrize("stage", ["begun", "one changed", "all changed"])
def test_a_killed_process_leaves_nothing_half_done(desk: Desk, stage: str):
    """After SIGKILL in the middle of a call the next start puts everything back, says so, and can undo even that."""
    before = desk.tree()
    kill_child(desk, stage)
    half_done = desk.tree()
    assert (half_done == before) is (stage == "begun")
    assert len(desk.journal.recover()) == 1
    assert desk.tree() == before
    assert desk.journal.recover() == []
    if half_done != before:
        (recovered,) = (e.body for e in desk.audit.entries(limit=500) if e.body["kind"] == "call.recovered")
        desk.journal.undo(recovered["call"], "test")
        assert desk.tree() == half_done
    assert desk.audit.verify().bad is None


def test_a_call_that_had_ended_before_the_kill_stands(desk: Desk):
    """Its end was durable: nothing is recovered, and it can be undone."""
    before = desk.tree()
    kill_child(desk, "finished")
    assert desk.tree() != before
    assert desk.journal.recover() == []
    (ended,) = (e.body for e in desk.audit.entries(limit=500) if e.body["kind"] == "call.end")
    desk.journal.undo(ended["call"], "test")
    assert desk.tree() == before


@pytest.mark.parametrize("after_s", [0.02, 0.05, 0.11, 0.23])
def test_a_kill_at_any_time_leaves_one_of_two_states(desk: Desk, after_s: float):
    """While calls and undos run in turn: either all of the last call or nothing of it."""
    before = desk.tree()
    kill_child(desk, "any time", after_s)
    desk.journal.recover()
    found = desk.tree()
    assert found == before or (found["file"][1], "large" in found, found["new"][1]) == (b"new", False, b"n" * 50_000)
    assert not [name for name in found if ".agentd-" in name]
    assert desk.journal.recover() == []
    assert desk.audit.verify().bad is None


def test_an_end_that_cannot_be_recorded_properly_is_a_named_error_or_an_end(desk: Desk):
    """A folder was swapped for a link during the call: no bare OSError, and no call that stays open."""
    transaction = desk.begin("full/f")
    (desk.home / "full" / "f").write_text("new")
    (desk.home / "full").rename(desk.home / "aside")
    (desk.home / "full").symlink_to("aside")
    try:
        transaction.finish(end(transaction))
    except AgentdError:
        return
    kinds = [entry.body["kind"] for entry in desk.audit.entries(call=transaction.call)]
    assert kinds == ["call.intent", "call.end"]


@pytest.mark.parametrize("damage", ["missing", "changed", "cut"])
def test_a_kept_content_that_is_damaged_is_not_put_back(desk: Desk, damage: str):
    """The digest tells: the undo is refused by name and nothing changes."""
    transaction = desk.begin("large")
    (desk.home / "large").write_text("new")
    transaction.finish(end(transaction))
    (kept,) = (path for path in (desk.state / "objects").rglob("*") if path.is_file())
    match damage:
        case "missing":
            kept.unlink()
        case "changed":
            kept.write_bytes(b"X" + kept.read_bytes()[1:])
        case _:
            os.truncate(kept, 10)
    after = desk.tree()
    with pytest.raises(AgentdError):
        desk.journal.undo(transaction.call, "test")
    assert desk.tree() == after


def test_what_cannot_be_put_back_is_refused_before_it_is_changed(desk: Desk):
    """A FIFO has no content to keep: either the call is refused, or the FIFO comes back."""
    os.mkfifo(desk.home / "fifo")
    try:
        transaction = desk.begin("fifo")
    except JournalError as e:
        assert e.reason is Reason.NOT_UNDOABLE  # noqa: PT017 - refusing is one of two good ends
        return
    (desk.home / "fifo").unlink()
    transaction.roll_back(abort(transaction))
    assert (desk.home / "fifo").is_fifo()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("name", ["file", "full", "link"])
def test_what_comes_back_belongs_to_its_owner(desk: Desk, name: str):
    """File, folder or link: not to the daemon."""
    (desk.home / "link").symlink_to("file")
    os.chown(desk.home / name, 1234, 1234, follow_symlinks=False)
    names = ["full/f", "full"] if name == "full" else [name]
    transaction = desk.begin(*names)
    for gone in names:
        (desk.home / gone).rmdir() if gone == "full" else (desk.home / gone).unlink()
    transaction.finish(end(transaction))
    desk.journal.undo(transaction.call, "test")
    status = (desk.home / name).lstat()
    assert (status.st_uid, status.st_gid) == (1234, 1234)


@pytest.mark.parametrize("size", [(32 << 10) - 1, 32 << 10, (32 << 10) + 1, LIMIT - 1, LIMIT])
def test_contents_of_every_size_up_to_the_limit_come_back(desk: Desk, size: int):
    """On both sides of the border between store and objects, with time stamp."""
    content = os.urandom(size)
    (desk.home / "file").write_bytes(content)
    os.utime(desk.home / "file", ns=(1, 1_600_000_000_123_456_789))
    transaction = desk.begin("file")
    (desk.home / "file").write_text("new")
    transaction.finish(end(transaction))
    assert any((desk.state / "objects").rglob("*")) is (size > 32 << 10)
    desk.journal.undo(transaction.call, "test")
    assert (desk.home / "file").read_bytes() == content
    assert (desk.home / "file").stat().st_mtime_ns == 1_600_000_000_123_456_789


def test_an_undo_leaves_no_descriptor_open(desk: Desk):
    """Fifty times there and back."""
    before = len(os.listdir("/proc/self/fd"))
    call = ""
    for n in range(50):
        if n % 2:
            desk.journal.undo(call, "test")
        else:
            transaction = desk.begin("file", "new")
            (desk.home / "file").write_text(str(n))
            (desk.home / "new").write_text(str(n))
            transaction.finish(end(transaction))
            call = transaction.call
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_open_calls_are_put_back_in_the_order_they_came(desk: Desk):
    """Newest first, by when they began, whatever their ids are: the oldest state is what is left."""
    first = desk.begin("file", call="zzz")
    (desk.home / "file").write_text("first\n")
    desk.begin("file", call="aaa")
    (desk.home / "file").write_text("second\n")
    assert first.call == "zzz"
    desk.close()
    desk.open()
    assert desk.journal.recover() == ["aaa", "zzz"]
    assert (desk.home / "file").read_text() == "old\n"


@pytest.mark.parametrize("how", ["rolled back", "recovered"])
def test_a_call_that_fails_does_not_take_back_what_another_has_finished(desk: Desk, how: str):
    """The other one began later, changed the same file, and its end is on record."""
    failing = desk.begin("file", "large")
    (desk.home / "file").write_text("failing\n")
    (desk.home / "large").write_text("failing\n")
    other = desk.begin("file")
    (desk.home / "file").write_text("finished\n")
    other.finish(end(other))
    if how == "rolled back":
        failing.roll_back(abort(failing))
    else:
        desk.close()
        desk.open()
        desk.journal.recover()
    assert (desk.home / "file").read_text() == "finished\n"
    assert (desk.home / "large").read_bytes() == b"L" * 100_000
