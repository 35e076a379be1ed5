"""What the journal keeps, and what it gives up: content first, never the newest, never what is pinned, always said."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Change, Refusal

from agentd.audit import AuditLog, Event
from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal import Journal, Keep, Selection, Verdict, Ways
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAY_NS = 86400 * 10**9
SIZE = 40_000  # a pre-image of its own


class Bench:
    def __init__(self, root: Path, **keep: Any) -> None:
        self.home = root / "home"
        self.home.mkdir(exist_ok=True)
        self.store = Store(root / "state")
        self.audit = AuditLog(self.store)
        self.objects = root / "state" / "objects"
        self.journal = Journal(self.store, self.audit, self.objects, Keep(**{"low_space_bytes": 0, "runs": 0} | keep))

    def rewrite(self, name: str, text: str, run: str = "") -> str:
        call = new_id()
        path = self.home / name
        transaction = self.journal.begin(call, Event(kind="call.intent", call=call, run=run), [os.fsencode(path)])
        transaction.before_changes([Change("write", os.fsencode(path))])  # as the broker does
        path.write_text(text)
        transaction.finish(Event(kind="call.end", call=call))
        return call

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.objects.glob("??/*"))

    def verdict(self, call: str) -> Verdict:
        (planned,) = self.journal.rollbacks.plan(Selection(calls=(call,)), Ways()).paths
        return planned.verdict


def soon() -> int:
    """Later than the moment in which a new object may still be without its row."""
    return time.time_ns() + 120 * 10**9


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path.resolve(), total_bytes=3 * SIZE + 1000)
    yield made
    made.store.close()


def test_the_oldest_is_given_up_when_there_is_too_much(bench: Bench):
    """Until it fits; the plan says why it can't be had back, and the log which calls it were."""
    for n in range(5):
        (bench.home / f"f{n}").write_bytes(os.urandom(SIZE))
    calls = [bench.rewrite(f"f{n}", "new") for n in range(5)]
    assert len(bench.kept()) == 5
    assert bench.journal.retention.sweep(soon()) == tuple(calls[:2])
    assert len(bench.kept()) == 3
    assert [bench.verdict(call) for call in calls] == [Verdict.MISSING_PREIMAGE] * 2 + [Verdict.RESTORE] * 3
    with pytest.raises(JournalError, match="given up to make room"):
        bench.journal.undo(calls[0], "p")
    (evicted,) = [entry.body for entry in bench.audit.entries(limit=100) if entry.body["kind"] == "journal.evict"]
    assert evicted["detail"] == {"calls": calls[:2], "count": 2}
    bench.journal.undo(calls[4], "p")
    assert bench.journal.retention.sweep() == ()


def test_what_needs_no_content_can_be_undone_for_good(bench: Bench):
    """A file that was created, a folder, a link."""
    call = bench.rewrite("created", "x" * 100)
    bench.journal.retention.sweep(time.time_ns() + 1000 * DAY_NS)
    assert bench.verdict(call) is Verdict.DELETE_CREATED


def test_what_is_old_is_given_up(tmp_path: Path):
    """After so many days, but for the newest runs and what is pinned, whatever the clock says."""
    bench = Bench(tmp_path.resolve(), days=14, runs=2)
    for n in range(6):
        (bench.home / f"f{n}").write_text("old")
    calls = [bench.rewrite(f"f{n}", "new", run) for n, run in enumerate(["", "a", "a", "", "b", "b"])]
    bench.journal.retention.pin(calls[1], "p", pinned=True)
    assert bench.journal.retention.sweep() == ()
    assert bench.journal.retention.sweep(time.time_ns() + 15 * DAY_NS) == (
        calls[0],
        calls[2],
    )  # run b and the call before it stay
    bench.journal.retention.pin(calls[1], "p", pinned=False)
    assert bench.journal.retention.sweep(time.time_ns() + 15 * DAY_NS) == (calls[1],)
    bench.store.close()


def test_only_what_is_there_can_be_pinned(bench: Bench):
    """CALL_NOT_FOUND."""
    with pytest.raises(AgentdError) as caught:
        bench.journal.retention.pin("x", "p", pinned=True)
    assert caught.value.reason is Reason.CALL_NOT_FOUND


def test_the_same_content_is_kept_once_and_as_long_as_anybody_needs_it(bench: Bench):
    """Two files alike: one object, until the last that names it is gone."""
    for name in ("a", "b"):
        (bench.home / name).write_text("x" * SIZE)
    first = bench.rewrite("a", "new")
    second = bench.rewrite("b", "new")
    assert len(bench.kept()) == 1
    bench.journal.retention.pin(second, "p", pinned=True)
    assert bench.journal.retention.sweep(time.time_ns() + 1000 * DAY_NS) == (first,)
    assert len(bench.kept()) == 1
    bench.journal.undo(second, "p")
    assert (bench.home / "b").read_text() == "x" * SIZE


def test_what_a_killed_daemon_has_left_is_swept_and_what_is_new_is_not(bench: Bench):
    """A content without a row, once it is old enough to be nobody's."""
    folder = bench.objects / "ab"
    folder.mkdir(parents=True)
    (folder / "ab123").write_bytes(b"x")
    bench.journal.retention.sweep()
    assert (folder / "ab123").exists()
    bench.journal.retention.sweep(soon())
    assert not (folder / "ab123").exists()


def test_a_call_may_have_only_so_much_kept(tmp_path: Path):
    """Said beforehand where it can be, and in the middle where it can't: then it goes back."""
    bench = Bench(tmp_path.resolve(), call_bytes=100_000)
    for n in range(4):
        (bench.home / f"f{n}").write_bytes(os.urandom(SIZE))
    paths = [os.fsencode(bench.home / f"f{n}") for n in range(4)]
    assert bench.journal.foresee(paths[:2]) == ""
    assert "of a call" in bench.journal.foresee(paths)
    transaction = bench.journal.begin("c1", Event(kind="call.intent", call="c1"), paths)
    with pytest.raises(Refusal, match="of one; the rest"):
        transaction.before_changes([Change("write", path) for path in paths])
    bench.store.close()


def test_on_a_disk_that_is_nearly_full_nothing_changes_files(tmp_path: Path):
    """STORE_FULL before anything has happened; what changes nothing goes on."""
    bench = Bench(tmp_path.resolve(), low_space_bytes=1 << 60)
    with pytest.raises(JournalError) as caught:
        bench.rewrite("a", "x")
    assert caught.value.reason is Reason.STORE_FULL
    assert not (bench.home / "a").exists()
    bench.journal.begin("c1", Event(kind="call.intent", call="c1"), []).finish(Event(kind="call.end", call="c1"))
    bench.store.close()


def test_space_is_set_aside_and_taken_once(bench: Bench):
    """And set aside again by the next sweep."""
    bench.journal.recover()
    reserve = bench.objects.parent / "reserve"
    assert reserve.stat().st_blocks * 512 >= 4 << 20
    assert bench.journal.retention.reserve.release()
    assert not bench.journal.retention.reserve.release()
    bench.journal.retention.sweep()
    assert reserve.exists()
