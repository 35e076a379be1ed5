"""Undo, rollback and recovery: files come back exactly, or nothing is touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from agentd_sandbox import Change, Refusal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentd.audit import AuditLog, Event
from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal import Journal, Keep, Transaction
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 1 << 20


class Bench:
    """A store, a log and a journal in one folder, which can be dropped and opened again like after a kill."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.open()

    def open(self) -> None:
        self.store = Store(self.state)
        self.audit = AuditLog(self.store)
        self.journal = Journal(self.store, self.audit, self.state / "objects", Keep(LIMIT, low_space_bytes=0))

    def reopen(self) -> list[str]:
        self.store.close()
        self.open()
        return self.journal.recover()

    def begin(self, *paths: Path) -> Transaction:
        call = new_id()
        named = [os.fsencode(path) for path in paths]
        transaction = self.journal.begin(call, Event(kind="call.intent", call=call), named)
        transaction.before_changes([Change("write", path) for path in named])  # as the broker does
        return transaction

    def call(self, change: Callable[[], object], *paths: Path) -> str:
        """A whole call that declares `paths` and does `change`."""
        transaction = self.begin(*paths)
        change()
        transaction.finish(Event(kind="call.end", call=transaction.call))
        return transaction.call


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path.resolve() / "state")
    yield made
    made.store.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "home"
    folder.mkdir()
    (folder / "file").write_text("old\n")
    (folder / "file").chmod(0o640)
    (folder / "link").symlink_to("file")
    (folder / "empty").mkdir(mode=0o750)
    (folder / "full").mkdir()
    (folder / "full" / "f").write_text("f")
    return folder


def tree(folder: Path) -> dict[str, tuple[str, int, bytes]]:
    """Kind, mode and content of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = ("link", 0, os.fsencode(os.readlink(path)))
        elif path.is_dir():
            found[str(path.relative_to(folder))] = ("folder", path.stat().st_mode, b"")
        else:
            found[str(path.relative_to(folder))] = ("file", path.stat().st_mode, path.read_bytes())
    return found


CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "replace": (lambda h: (h / "file").write_text("new\n"), ("file",)),
    "append": (lambda h: (h / "file").open("a").write("more\n"), ("file",)),
    "truncate": (lambda h: os.truncate(h / "file", 0), ("file",)),
    "create": (lambda h: (h / "new").write_text("x"), ("new",)),
    "delete": (lambda h: (h / "file").unlink(), ("file",)),
    "rename": (lambda h: (h / "file").rename(h / "moved"), ("file", "moved")),
    "rename over": (lambda h: ((h / "b").write_text("b"), (h / "b").rename(h / "file")), ("b", "file")),
    "make a folder": (lambda h: (h / "made").mkdir(), ("made",)),
    "remove a folder": (lambda h: (h / "empty").rmdir(), ("empty",)),
    "remove a link": (lambda h: (h / "link").unlink(), ("link",)),
    "turn a link": (lambda h: ((h / "link").unlink(), (h / "link").symlink_to("empty")), ("link",)),
    "file becomes folder": (lambda h: ((h / "file").unlink(), (h / "file").mkdir()), ("file",)),
    "change the mode": (lambda h: (h / "file").chmod(0o600), ("file",)),
    "folder and file": (lambda h: ((h / "made").mkdir(), (h / "made" / "f").write_text("x")), ("made/f", "made")),
    "file and folder": (lambda h: ((h / "made").mkdir(), (h / "made" / "f").write_text("x")), ("made", "made/f")),
    "remove both": (lambda h: ((h / "full" / "f").unlink(), (h / "full").rmdir()), ("full/f", "full")),
    "remove both, declared the other way": (lambda h: ((h / "full" / "f").unlink(), (h / "full").rmdir()), ("full", "full/f")),
    "large": (lambda h: (h / "file").write_bytes(os.urandom(200_000)), ("file",)),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_an_undo_brings_everything_back_and_can_be_undone(bench: Bench, home: Path, name: str):
    """Content, mode, link and folder, byte for byte; then forward again."""
    change, paths = CHANGES[name]
    before = tree(home)
    call = bench.call(lambda: change(home), *(home / path for path in paths))
    after = tree(home)
    assert after != before
    undone = bench.journal.undo(call, "test")
    assert tree(home) == before
    bench.journal.undo(undone.call, "test")
    assert tree(home) == after
    assert bench.audit.verify().bad is None


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_kill_before_the_end_is_put_back_at_the_next_start(bench: Bench, home: Path, name: str):
    """Recovered once, recorded, harmless to repeat, and what was overwritten can be had again."""
    change, paths = CHANGES[name]
    before = tree(home)
    bench.begin(*(home / path for path in paths))
    change(home)
    half_done = tree(home)
    assert len(bench.reopen()) == 1
    assert tree(home) == before
    assert bench.reopen() == []
    recovered = [entry.body for entry in bench.audit.entries(limit=500) if entry.body["kind"] == "call.recovered"]
    bench.journal.undo(recovered[0]["call"], "test")
    assert tree(home) == half_done


def test_what_cannot_be_put_back_at_a_start_is_tried_at_the_next(bench: Bench, home: Path):
    """The daemon starts all the same; when the obstacle is gone the file comes back."""
    bench.begin(home / "full" / "f")
    (home / "full" / "f").write_text("half done")
    (home / "full").rename(home / "aside")
    (home / "full").symlink_to("aside")
    assert bench.reopen()
    assert (home / "aside" / "f").read_text() == "half done"
    (home / "full").unlink()
    (home / "aside").rename(home / "full")
    assert bench.reopen()
    assert (home / "full" / "f").read_text() == "f"
    assert bench.reopen() == []


def test_a_large_file_is_kept_beside_the_store_and_comes_back(bench: Bench, home: Path):
    """Over 32 KiB the content goes into a file named by its digest."""
    content = os.urandom(300_000)
    (home / "file").write_bytes(content)
    call = bench.call((home / "file").unlink, home / "file")
    assert len([path for path in (bench.state / "objects").rglob("*") if path.is_file()]) == 1
    bench.journal.undo(call, "test")
    assert (home / "file").read_bytes() == content


def test_what_is_too_large_to_keep_is_refused_before_anything_happens(bench: Bench, home: Path):
    """The error names the file and the limit; nothing is recorded as begun."""
    (home / "file").write_bytes(bytes(LIMIT + 1))
    with pytest.raises(JournalError) as caught:
        bench.begin(home / "file")
    assert caught.value.reason is Reason.NOT_UNDOABLE
    assert bench.reopen() == []


def test_a_change_of_an_undeclared_path_waits_for_its_pre_image(bench: Bench, home: Path):
    """Through the broker's hook: durable when it returns, refused where it can't be kept."""
    transaction = bench.begin()
    (home / "big").write_bytes(bytes(LIMIT + 1))
    for name in ("file", "big"):
        change = Change("write", os.fsencode(home / name))
        if name == "big":
            with pytest.raises(Refusal):
                transaction.before_changes([change])
        else:
            transaction.before_changes([change])
    (home / "file").write_text("new")
    assert len(bench.reopen()) == 1
    assert (home / "file").read_text() == "old\n"


@pytest.mark.parametrize("later", [lambda p: p.write_text("mine"), lambda p: p.unlink(), lambda p: p.chmod(0o600)])
def test_an_undo_never_overwrites_what_came_later(bench: Bench, home: Path, later: Callable[[Path], object]):
    """All or nothing: one changed path keeps every other as it is, too."""
    call = bench.call(
        lambda: ((home / "file").write_text("new"), (home / "other").write_text("x")), home / "file", home / "other"
    )
    later(home / "file")
    after = tree(home)
    with pytest.raises(JournalError) as caught:
        bench.journal.undo(call, "test")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert str(home / "file") in caught.value.message
    assert tree(home) == after


def test_an_undo_that_fails_half_way_leaves_everything_as_it_was(bench: Bench, home: Path):
    """A folder that a call made holds something by now: its other files are not undone either."""
    call = bench.call(lambda: ((home / "file").write_text("new"), (home / "made").mkdir()), home / "made", home / "file")
    (home / "made" / "later").write_text("precious")
    after = tree(home)
    with pytest.raises(JournalError) as caught:
        bench.journal.undo(call, "test")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert tree(home) == after
    assert bench.reopen() == []


def test_an_undo_does_not_follow_a_link_that_was_put_in_its_way(bench: Bench, home: Path):
    """A folder on the way became a link to elsewhere: refused, and elsewhere is untouched."""
    (home / "folder").mkdir()
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "f").write_text("precious")
    call = bench.call(lambda: (home / "folder" / "f").write_text("x"), home / "folder" / "f")
    shutil.rmtree(home / "folder")
    (home / "folder").symlink_to("elsewhere")
    with pytest.raises(JournalError):
        bench.journal.undo(call, "test")
    assert (home / "elsewhere" / "f").read_text() == "precious"


@pytest.mark.parametrize("again", ["undone", "unknown", "nothing"])
def test_what_cannot_be_undone_says_why(bench: Bench, home: Path, again: str):
    """Undone already, unknown, or a call that changed nothing."""
    call = bench.call(lambda: (home / "file").write_text("new"), home / "file")
    if again == "undone":
        bench.journal.undo(call, "test")
    if again == "nothing":
        call = bench.call(lambda: None, home / "file")
    with pytest.raises(JournalError) as caught:
        bench.journal.undo("unknown" if again == "unknown" else call, "test")
    assert caught.value.reason is (Reason.CALL_NOT_FOUND if again == "unknown" else Reason.NOT_UNDOABLE)


def test_names_that_are_not_utf8_come_back(bench: Bench, home: Path):
    """Paths are bytes; the record shows them escaped."""
    odd = Path(os.fsdecode(os.fsencode(home) + b"/\xff\n\xfe"))
    odd.write_text("odd")
    call = bench.call(odd.unlink, odd)
    bench.journal.undo(call, "test")
    assert odd.read_text() == "odd"
    assert bench.audit.verify().bad is None


def test_a_failed_call_is_put_back_at_once(bench: Bench, home: Path):
    """Rolled back and recorded; there is nothing to undo or recover afterwards."""
    before = tree(home)
    transaction = bench.begin(home / "file", home / "new")
    (home / "file").unlink()
    (home / "new").mkdir()
    transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    assert tree(home) == before
    assert bench.reopen() == []


class Files(RuleBasedStateMachine):
    """Any calls on a few files, finished, failed or killed; undone in reverse order everything is as at first."""

    NAMES = ("a", "b", "c", "d/e")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp()).resolve()
        self.home = self.root / "home"
        (self.home / "d").mkdir(parents=True)
        (self.home / "a").write_text("first")
        self.bench = Bench(self.root / "state")
        self.states = [tree(self.home)]
        self.calls: list[str] = []

    def change(self, name: str, content: bytes | None) -> None:
        path = self.home / name
        if content is not None:
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)

    @rule(name=st.sampled_from(NAMES), content=st.none() | st.binary(max_size=8) | st.just(bytes(40_000)))
    def finish(self, name: str, content: bytes | None) -> None:
        call = self.bench.call(lambda: self.change(name, content), self.home / name)
        if tree(self.home) != self.states[-1]:
            self.calls.append(call)
            self.states.append(tree(self.home))

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def move(self, name: str, other: str) -> None:
        if (self.home / name).is_file() and name != other:
            call = self.bench.call(lambda: (self.home / name).rename(self.home / other), self.home / name, self.home / other)
            self.calls.append(call)
            self.states.append(tree(self.home))

    @rule(name=st.sampled_from(NAMES), content=st.none() | st.binary(max_size=8))
    def fail(self, name: str, content: bytes | None) -> None:
        transaction = self.bench.begin(self.home / name)
        self.change(name, content)
        transaction.roll_back(Event(kind="call.abort", call=transaction.call))

    @rule(name=st.sampled_from(NAMES), content=st.none() | st.binary(max_size=8))
    def be_killed(self, name: str, content: bytes | None) -> None:
        self.bench.begin(self.home / name)
        self.change(name, content)
        self.bench.reopen()

    @precondition(lambda self: self.calls)
    @rule()
    def undo_last(self) -> None:
        self.bench.journal.undo(self.calls.pop(), "test")
        self.states.pop()

    @invariant()
    def the_tree_is_what_finished_calls_made_it(self) -> None:
        assert tree(self.home) == self.states[-1]

    def teardown(self) -> None:
        try:
            while self.calls:
                self.undo_last()
                assert tree(self.home) == self.states[-1]
            assert self.bench.audit.verify().bad is None
        except AgentdError as e:
            raise AssertionError(str(e)) from e
        finally:
            self.bench.store.close()
            shutil.rmtree(self.root)


Files.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestFiles = Files.TestCase
