"""Rollbacks: of several calls at once, seen before they are done, and never over what somebody else has made."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Change

from agentd.audit import AuditLog, Event, ToolIdentity
from agentd.errors import AgentdError, JournalError, Reason, RequestError
from agentd.journal import Journal, Keep, Plan, Selection, Verdict, Ways
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT = 4 << 20


class Bench:
    """A journal, and a home whose files calls change."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.home.mkdir()
        self.store = Store(root / "state")
        self.audit = AuditLog(self.store)
        self.objects = root / "state" / "objects"
        self.journal = Journal(self.store, self.audit, self.objects, Keep(LIMIT, low_space_bytes=0))

    def call(self, change: Callable[[], object], *names: str, run: str = "", effect: str = "files", who: str = "p") -> str:
        """A whole call that changes the paths of these names."""
        call = new_id()
        tool = ToolIdentity(name="t.x", version="1", digest="", effect=effect)
        intent = Event(kind="call.intent", call=call, run=run, session=f"of {run}" if run else "", principal=who, tool=tool)
        paths = [os.fsencode(self.home / name) for name in names]
        transaction = self.journal.begin(call, intent, paths)
        transaction.before_changes([Change("write", path) for path in paths])  # as the broker does
        change()
        transaction.finish(Event(kind="call.end", call=call))
        return call

    def write(self, name: str, text: str, **more: Any) -> str:
        return self.call(lambda: (self.home / name).write_text(text), name, **more)

    def plan(self, ways: Ways | None = None, **selection: Any) -> Plan:
        return self.journal.rollbacks.plan(Selection(**selection), ways or Ways())

    def verdicts(self, plan: Plan) -> dict[str, Verdict]:
        return {os.path.relpath(os.fsdecode(planned.path), self.home): planned.verdict for planned in plan.paths}

    def apply(self, ways: Ways | None = None, **selection: Any) -> Any:
        return self.journal.rollbacks.apply(self.plan(ways, **selection), "p")

    def tree(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(self.home.rglob("*")):
            name = str(path.relative_to(self.home))
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path.resolve())
    yield made
    made.store.close()


def test_a_run_goes_back_to_before_its_first_call(bench: Bench):
    """Rewritten twice, created, deleted, renamed, a folder: as it was; and the rollback can be undone."""
    for name in ("a", "b", "c"):
        (bench.home / name).write_text(f"old {name}")
    before = bench.tree()
    bench.write("a", "1", run="r")
    bench.write("a", "2", run="r")
    bench.call((bench.home / "b").unlink, "b", run="r")
    bench.call(lambda: (bench.home / "c").rename(bench.home / "d"), "c", "d", run="r")
    bench.call((bench.home / "new").mkdir, "new", run="r")
    bench.write("new/file", "x", run="r")
    bench.write("other", "stays", run="another")
    after = bench.tree()
    plan = bench.plan(run="r")
    assert bench.verdicts(plan) == {
        "a": Verdict.RESTORE, "b": Verdict.RECREATE_DELETED, "c": Verdict.RECREATE_DELETED, "d": Verdict.DELETE_CREATED,
        "new": Verdict.DELETE_CREATED, "new/file": Verdict.DELETE_CREATED,
    }  # fmt: skip
    assert bench.tree() == after  # a plan touches nothing
    done = bench.journal.rollbacks.apply(plan, "p")
    assert bench.tree() == before | {"other": b"stays"}
    assert len(done.calls) == 6
    bench.journal.undo(done.call, "p")
    assert bench.tree() == after
    assert bench.apply(run="r").calls == done.calls  # what was done again can be put back again
    assert bench.tree() == before | {"other": b"stays"}


def test_calls_of_the_middle_wait_for_those_after_them(bench: Bench):
    """What a later call has changed is named; both together go."""
    bench.write("a", "0")
    first = bench.write("a", "1")
    second = bench.write("a", "2")
    plan = bench.plan(calls=(first,))
    assert bench.verdicts(plan) == {"a": Verdict.CONFLICT}
    assert second in plan.paths[0].why
    with pytest.raises(JournalError) as caught:
        bench.journal.undo(first, "p")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    bench.apply(calls=(first, second))
    assert (bench.home / "a").read_text() == "0"


def test_a_change_between_two_of_a_run_is_not_lost(bench: Bench):
    """Another run wrote the file in between: going back would take its work along."""
    bench.write("a", "0")
    bench.write("a", "1", run="r")
    between = bench.write("a", "2", run="another")
    bench.write("a", "3", run="r")
    plan = bench.plan(run="r")
    assert bench.verdicts(plan) == {"a": Verdict.CONFLICT}
    assert between in plan.paths[0].why


EDITS: dict[str, tuple[Callable[[Path], object], Verdict]] = {
    "nobody": (lambda _: None, Verdict.RESTORE),
    "edited": (lambda p: p.write_text("mine"), Verdict.CONFLICT),
    "deleted": (lambda p: p.unlink(), Verdict.CONFLICT),
    "mode": (lambda p: p.chmod(0o600), Verdict.CONFLICT),
    "attribute": (lambda p: os.setxattr(p, "user.note", b"x"), Verdict.CONFLICT),
    "by hand": (lambda p: p.write_text("old"), Verdict.ALREADY),
    "folder": (lambda p: (p.unlink(), p.mkdir()), Verdict.TYPE_CHANGED),
    "link": (lambda p: (p.unlink(), p.symlink_to("elsewhere")), Verdict.TYPE_CHANGED),
    "fifo": (lambda p: (p.unlink(), os.mkfifo(p)), Verdict.TYPE_CHANGED),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_somebody_else_has_made_of_it_is_theirs(bench: Bench, edit: str):
    """Told apart, and left alone; nothing of the rest happens either, unless that is wanted."""
    change, verdict = EDITS[edit]
    for name in ("a", "b"):
        (bench.home / name).write_text("old")
        bench.write(name, "new", run="r")
    try:
        change(bench.home / "a")
    except OSError as e:
        pytest.skip(f"this file system: {e}")
    plan = bench.plan(run="r")
    assert bench.verdicts(plan) == {"a": verdict, "b": Verdict.RESTORE}
    if not plan.paths[0].blocks:
        bench.journal.rollbacks.apply(plan, "p")
        assert (bench.home / "a").read_text() == (bench.home / "b").read_text() == "old"
        return
    with pytest.raises(JournalError) as caught:
        bench.journal.rollbacks.apply(plan, "p")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert (bench.home / "b").read_text() == "new"
    done = bench.apply(Ways(partial=True), run="r")
    assert (bench.home / "b").read_text() == "old"
    assert len(done.calls) == 1  # what stays is not undone
    assert bench.verdicts(bench.plan(run="r")) == {"a": verdict}


@pytest.mark.parametrize("edit", ["edited", "deleted", "link"])
def test_force_overwrites_and_keeps_what_it_overwrites(bench: Bench, edit: str):
    """Undoing it gives the other's version back."""
    (bench.home / "a").write_text("old")
    bench.write("a", "new", run="r")
    EDITS[edit][0](bench.home / "a")
    theirs = bench.tree()
    done = bench.apply(Ways(force=True), run="r")
    assert bench.tree() == {"a": b"old"}
    bench.journal.undo(done.call, "p")
    assert bench.tree() == theirs


def test_merge_keeps_both_changes_of_a_text(bench: Bench):
    """Where they don't touch; where they do it stays a conflict."""
    lines = [f"line {n}\n" for n in range(20)]
    (bench.home / "a").write_text("".join(lines))
    call = bench.write("a", "".join([*lines[:3], "by the tool\n", *lines[4:]]))
    mine = (bench.home / "a").read_text() + "by a person\n"
    (bench.home / "a").write_text(mine)
    assert bench.verdicts(bench.plan(calls=(call,))) == {"a": Verdict.CONFLICT}
    plan = bench.plan(Ways(merge=True), calls=(call,))
    assert bench.verdicts(plan) == {"a": Verdict.MERGE}
    assert "-by the tool" in bench.journal.rollbacks.difference(plan.paths[0], back=True).diff
    done = bench.journal.rollbacks.apply(plan, "p")
    assert (bench.home / "a").read_text() == "".join([*lines, "by a person\n"])
    bench.journal.undo(done.call, "p")
    assert (bench.home / "a").read_text() == mine
    (bench.home / "a").write_text(mine.replace("by the tool", "by both"))
    assert bench.verdicts(bench.plan(Ways(merge=True), calls=(call,))) == {"a": Verdict.CONFLICT}


def test_a_plan_that_is_out_of_date_has_another_digest(bench: Bench):
    """And one made anew without any change has the same."""
    (bench.home / "a").write_text("old")
    call = bench.write("a", "new")
    plan = bench.plan(calls=(call,))
    assert bench.plan(calls=(call,)).digest == plan.digest
    (bench.home / "a").chmod(0o600)
    assert bench.plan(calls=(call,)).digest != plan.digest


def test_a_change_while_it_is_put_back_stops_it(bench: Bench):
    """Between plan and act: nothing is overwritten, nothing half done."""
    for name in ("a", "b"):
        (bench.home / name).write_text("old")
        bench.write(name, "new", run="r")
    plan = bench.plan(run="r")
    (bench.home / "b").write_text("just now")
    with pytest.raises(JournalError) as caught:
        bench.journal.rollbacks.apply(plan, "p")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert bench.tree() == {"a": b"new", "b": b"just now"}


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_pre_image_is_never_put_back(bench: Bench, size: int, damage: str):
    """Small ones in the store, large ones beside it: found by digest, and said; the rest can still be had."""
    (bench.home / "a").write_text("x" * size)
    (bench.home / "b").write_text("old")
    bench.write("a", "new", run="r")
    bench.write("b", "new", run="r")
    if size > 32 << 10:
        (kept,) = [path for path in bench.objects.rglob("*") if path.is_file()]
        kept.unlink() if damage == "missing" else kept.write_bytes(b"y" + kept.read_bytes()[1:])
    else:
        value = None if damage == "missing" else b"y" * size
        path = os.fsencode(bench.home / "a")
        bench.store.write(lambda db: db.execute("UPDATE pre_image SET content = ? WHERE path = ?", (value, path)).get)
    assert bench.verdicts(bench.plan(run="r")) == {"a": Verdict.MISSING_PREIMAGE, "b": Verdict.RESTORE}
    with pytest.raises(JournalError) as caught:
        bench.apply(run="r")
    assert caught.value.reason is Reason.NOT_UNDOABLE
    bench.apply(Ways(partial=True, force=True), run="r")
    assert bench.tree() == {"a": b"new", "b": b"old"}


def test_a_folder_that_others_use_by_now_stays(bench: Bench):
    """What lies in it and was not made by the calls is not lost."""
    bench.call((bench.home / "new").mkdir, "new", run="r")
    bench.write("new/file", "x", run="r")
    (bench.home / "new" / "mine").write_text("mine")
    plan = bench.plan(run="r")
    assert bench.verdicts(plan) == {"new": Verdict.CONFLICT, "new/file": Verdict.DELETE_CREATED}
    assert "mine" in plan.paths[0].why
    bench.apply(Ways(partial=True), run="r")
    assert bench.tree() == {"new": None, "new/mine": b"mine"}


def test_a_time_goes_back_over_undos_too(bench: Bench):
    """Changed, undone, changed again: all since then, whoever did it."""
    (bench.home / "a").write_text("old")
    start = time.time_ns()
    bench.journal.undo(bench.write("a", "1"), "p")
    bench.write("a", "2", who="q")
    bench.write("b", "3")
    assert bench.verdicts(bench.plan(since_ns=start)) == {"a": Verdict.RESTORE, "b": Verdict.DELETE_CREATED}
    assert bench.verdicts(bench.plan(since_ns=start, principal="p", paths=(os.fsencode(bench.home / "b"),))) == {
        "b": Verdict.DELETE_CREATED
    }
    assert bench.plan(since_ns=start, until_ns=start + 1).paths == ()
    bench.apply(since_ns=start)
    assert bench.tree() == {"a": b"old"}


def test_one_path_of_a_call_can_be_put_back_alone(bench: Bench):
    """The call is not undone by that; the rest of it can be put back later."""
    for name in ("a", "b"):
        (bench.home / name).write_text("old")
    call = bench.call(lambda: [(bench.home / n).write_text("new") for n in "ab"], "a", "b")
    done = bench.apply(calls=(call,), paths=(os.fsencode(bench.home / "a"),))
    assert done.calls == ()
    assert bench.tree() == {"a": b"old", "b": b"new"}
    assert bench.verdicts(bench.plan(calls=(call,))) == {"a": Verdict.ALREADY, "b": Verdict.RESTORE}
    assert bench.apply(calls=(call,)).calls == (call,)
    assert bench.tree() == {"a": b"old", "b": b"old"}


def test_what_has_reached_outside_is_named(bench: Bench):
    """Its files go back; what was sent does not."""
    call = bench.write("a", "x", run="r", effect="external")
    plan = bench.plan(run="r")
    assert plan.not_undoable == (call,)
    assert bench.verdicts(plan) == {"a": Verdict.DELETE_CREATED}


@pytest.mark.parametrize("selection", [{}, {"principal": "p"}, {"until_ns": 5}])
def test_nothing_selected_is_an_error(bench: Bench, selection: dict[str, Any]):
    """BAD_FIELD: never everything by mistake."""
    with pytest.raises(RequestError) as caught:
        bench.plan(**selection)
    assert caught.value.reason is Reason.BAD_FIELD


@pytest.mark.parametrize("selection", [{"run": "unknown"}, {"calls": ("x", "y")}, {"session": "of nobody"}])
def test_nothing_found_is_said(bench: Bench, selection: dict[str, Any]):
    """NOT_UNDOABLE, with where to look."""
    with pytest.raises(AgentdError) as caught:
        bench.apply(**selection)
    assert caught.value.reason is Reason.NOT_UNDOABLE


def test_attributes_modes_and_times_come_back(bench: Bench):
    """Extended attributes of users, on files and folders."""
    file, folder = bench.home / "a", bench.home / "f"
    file.write_text("old")
    folder.mkdir(mode=0o750)
    try:
        os.setxattr(file, "user.kept", b"1\0\xff")
        os.setxattr(folder, "user.kept", b"2")
    except OSError as e:
        pytest.skip(f"no extended attributes here: {e}")
    os.utime(file, ns=(10**18, 10**18))

    def change() -> None:
        file.write_text("new")
        os.removexattr(file, "user.kept")
        os.setxattr(file, "user.new", b"x")
        os.setxattr(folder, "user.kept", b"3")
        folder.chmod(0o700)

    call = bench.call(change, "a", "f")
    bench.journal.undo(call, "p")
    assert (os.listxattr(file), os.getxattr(file, "user.kept")) == (["user.kept"], b"1\0\xff")
    assert os.getxattr(folder, "user.kept") == b"2"
    assert (folder.stat().st_mode & 0o777, file.stat().st_mtime_ns) == (0o750, 10**18)


def test_a_run_that_only_changed_an_attribute_is_seen(bench: Bench):
    """It counts as a change, in plan and diff."""
    file = bench.home / "a"
    file.write_text("same")
    try:
        call = bench.call(lambda: os.setxattr(file, "user.x", b"1"), "a")
    except OSError as e:
        pytest.skip(f"no extended attributes here: {e}")
    plan = bench.plan(calls=(call,))
    assert bench.journal.rollbacks.difference(plan.paths[0], back=False).summary == "attributes changed"


def test_what_a_run_has_changed_is_shown(bench: Bench):
    """Text line by line, from before the first to after the last call; what is no text, in a sentence."""
    (bench.home / "a").write_text("one\ntwo\n")
    (bench.home / "gone").write_text("bye")
    bench.write("a", "one\n2\n", run="r")
    bench.write("a", "one\n2\nthree", run="r")
    bench.call(lambda: (bench.home / "bin").write_bytes(b"\0\1"), "bin", run="r")
    bench.call((bench.home / "gone").unlink, "gone", run="r")
    (bench.home / "a").write_text("changed by a person since")
    found = [bench.journal.rollbacks.difference(planned, back=False) for planned in bench.plan(run="r").paths]
    by_name = {os.path.basename(os.fsdecode(each.path)): each for each in found}
    text = by_name["a"]
    assert (text.added, text.removed) == (2, 1)
    assert "-two\n" in text.diff
    assert "+three" in text.diff
    assert "person" not in text.diff
    assert "binary" in by_name["bin"].summary
    assert by_name["gone"].summary == "file deleted"
    assert "+++ /dev/null" in by_name["gone"].diff


@pytest.mark.parametrize("name", ["ü\n", "a b", "$(id)", "\udcff\udcfe", "-rf", "*"])
def test_names_are_bytes(bench: Bench, name: str):
    """Whatever a file can be called."""
    call = bench.write(name, "x")
    bench.journal.undo(call, "p")
    assert bench.tree() == {}
