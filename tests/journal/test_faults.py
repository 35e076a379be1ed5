"""A kill, a full disk or a broken one at every single step of the journal: nothing is lost, nothing is half done.

Each case is a process of its own that does a call and then takes it back, with one fault at its nth step: an open, a rename, a
chmod, an fsync, a commit. Afterwards another one starts, recovers, and looks at what is there and at what the log says.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, PathRule, Refusal
from agentd_sandbox.files import Files
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.audit import AuditLog, Event
from agentd.errors import AgentdError, Reason, StoreError
from agentd.journal import Journal, Keep, Selection, Ways
from agentd.store import Store

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from agentd_sandbox import Change, Recorder

NAMES = ("a", "b", "big", "d", "d/x", "d/y", "l", "new", "n2", "bigger", "e", "e/f/g")
AUDITED = ("open", "os.")
FAULTS = {"kill": 0, "full": errno.ENOSPC, "broken": errno.EIO}
Tree = dict[str, Any]


def grow(home: Path) -> None:
    home.mkdir()
    (home / "a").write_text("a\n")
    (home / "b").write_text("b\n" * 50)
    (home / "big").write_bytes(b"B" * 50_000)
    (home / "d").mkdir()
    (home / "d" / "x").write_text("x")
    (home / "l").symlink_to("a")
    (home / "bigger").write_bytes(b"C" * 60_000)
    (home / "e" / "f").mkdir(parents=True)
    (home / "e" / "f" / "g").write_bytes(os.urandom(70_000))


def tree(home: Path) -> Tree:
    found: Tree = {}
    for path in sorted(home.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            found[str(path.relative_to(home))] = ("link", os.readlink(path))
        else:
            content = path.read_bytes() if path.is_file() else b""
            try:
                attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            except OSError:
                attributes = {}
            found[str(path.relative_to(home))] = (status.st_mode, content, attributes)
    return found


class Unrecorded:
    """Keeps nothing: what comes of operations without a journal."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        pass


def files_of(home: Path, recorder: Recorder) -> Files:
    scope = (PathRule(os.fsencode(home)),)
    return Files(Access(scope, scope), recorder)


@dataclass
class Op:
    """What a tool does, through the very code that the broker does it with."""

    kind: str
    name: str
    other: str = "n2"

    def do(self, files: Files, home: Path) -> None:  # noqa: C901 # a table
        path, other = os.fsencode(home / self.name), os.fsencode(home / self.other)
        match self.kind:
            case "write" | "grow" | "overwrite" | "append" | "sparse" | "mmap":
                self._with_open(files.open(path, self.flags, 0o666, 0o022))
            case "truncate":
                files.truncate(path, 1)
            case "unlink":
                files.remove(path, folder=False)
            case "rmdir":
                files.remove(path, folder=True)
            case "rmtree":
                self._remove_tree(files, home / self.name)
            case "mkdir":
                files.make_folder(path, 0o777)
            case "rename":
                files.rename(path, other, replace=True)
            case "symlink":
                files.make_link(b"elsewhere", path)
            case "link":
                files.make_name(path, other, follow=False)
            case "chmod":
                files.change_mode(path, 0o600)
            case "setxattr":
                files.set_attribute(path, b"user.x", self.name.encode(), 0, follow=True)

    @property
    def content(self) -> bytes:
        return b"n" * 40_000 if self.kind == "grow" else b"new " + self.name.encode()

    @property
    def flags(self) -> int:
        more = {"append": os.O_CREAT | os.O_APPEND, "overwrite": 0, "sparse": os.O_CREAT}
        return os.O_RDWR if self.kind == "mmap" else os.O_WRONLY | more.get(self.kind, os.O_CREAT | os.O_TRUNC)

    def _with_open(self, descriptor: int) -> None:
        """What the tool does with a descriptor, the broker does not see."""
        if self.kind == "sparse":
            os.ftruncate(descriptor, 90_000)
        elif self.kind == "mmap" and os.fstat(descriptor).st_size:
            with mmap.mmap(descriptor, 0) as memory:
                memory[0] ^= 1
        else:
            os.write(descriptor, self.content)
        os.close(descriptor)

    def _remove_tree(self, files: Files, top: Path) -> None:
        if top.is_symlink() or not top.is_dir():
            raise NotADirectoryError
        for path in sorted(top.rglob("*"), reverse=True):
            files.remove(os.fsencode(path), folder=path.is_dir() and not path.is_symlink())
        files.remove(os.fsencode(top), folder=True)


class Injector:
    """Counts the steps that the journal takes, and lets the nth of them fail."""

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.at, self.count, self.armed = fault, at, 0, False
        self._thread = threading.get_ident()
        sys.addaudithook(self._audit)
        fsync, write = os.fsync, Store.write

        def checked_fsync(descriptor: int) -> None:
            self.step()
            fsync(descriptor)

        def checked_write(store: Store, do: Callable[..., Any]) -> Any:
            self.step(store=True)
            result = write(store, do)
            self.step(after=True)
            return result

        os.fsync = checked_fsync  # type: ignore[assignment]
        Store.write = checked_write  # type: ignore[method-assign, assignment]

    def _audit(self, event: str, _args: Any) -> None:
        if self.armed and event.startswith(AUDITED) and threading.get_ident() == self._thread:
            self.step()

    def step(self, *, store: bool = False, after: bool = False) -> None:
        if not self.armed:
            return
        self.count += 1
        if self.count != self.at:
            return
        self.armed = False
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if store:
            reason = Reason.STORE_FULL if self.fault == "full" else Reason.AUDIT_UNAVAILABLE
            raise StoreError(reason, "injected")
        if not after:  # what is durable can't fail any more
            raise OSError(FAULTS[self.fault], "injected")


def opened(root: Path) -> tuple[Store, AuditLog, Journal]:
    store = Store(root / "state")
    audit = AuditLog(store)
    return store, audit, Journal(store, audit, root / "state" / "objects", Keep(1 << 20, low_space_bytes=0, runs=0))


def play(root: Path, ops: list[Op], *, fails: bool, injector: Injector) -> None:
    """One call with its operations; if it ends well it is taken back, and the journal swept."""
    store, _audit, journal = opened(root)
    home = root / "home"
    injector.armed = True
    transaction = journal.begin("c1", Event(kind="call.intent", call="c1", run="r"), [os.fsencode(home / "a")])
    files = files_of(home, transaction)
    for op in ops:
        with contextlib.suppress(OSError, Refusal):  # the tool gets an error, and goes on
            op.do(files, home)
    files.close()
    if fails:
        transaction.roll_back(Event(kind="call.abort", call="c1"))
    else:
        transaction.finish(Event(kind="call.end", call="c1"))
        rollbacks = journal.rollbacks
        rollbacks.apply(rollbacks.plan(Selection(run="r"), Ways()), "p")
        with contextlib.suppress(OSError):  # as it says; the next one goes on from there
            journal.retention.sweep(10**20)
    injector.armed = False
    store.close()


def in_a_process(root: Path, ops: list[Op], *, fails: bool, fault: str, at: int) -> tuple[int, bool]:
    """How many steps it took, and whether it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            injector = Injector(fault, at)
            with contextlib.suppress(AgentdError):
                play(root, ops, fails=fails, injector=injector)
            injector.armed = False
            os.write(writing, str(injector.count).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as report:
        told = report.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.WEXITSTATUS(status) == 0
    return int(told or b"0"), killed


def check(root: Path, before: Tree, changed: Tree) -> None:
    """Recover, twice: the files are as before the call, or as after it, as the log says; and never anything between."""
    home = root / "home"
    for _ in range(2):
        store, audit, journal = opened(root)
        try:
            journal.recover()
            kinds = [entry.body["kind"] for entry in audit.entries(limit=1000)]
            stands = "call.end" in kinds and "undo.end" not in kinds
            assert tree(home) == (changed if stands else before), kinds
            assert audit.verify().bad is None
            assert store.read(lambda db: db.execute("SELECT count(*) FROM journal WHERE state = 'open'").get) == 0
            assert not [name for name in os.listdir(home) if name.startswith(".agentd-")]
        finally:
            store.close()
    if stands and before != changed:  # what stands can be taken back
        store, _audit, journal = opened(root)
        try:
            journal.undo("c1", "p")
            assert tree(home) == before
        finally:
            store.close()


def case(ops: list[Op], *, fails: bool, fault: str, at: int) -> int:
    """One case in a folder of its own; returns how many steps there were."""
    root = Path(tempfile.mkdtemp()).resolve()
    try:
        grow(root / "home")
        before = tree(root / "home")
        shutil.copytree(root / "home", root / "copy", symlinks=True)
        files = files_of(root / "copy", Unrecorded())
        for op in ops:
            with contextlib.suppress(OSError):
                op.do(files, root / "copy")
        files.close()
        changed = tree(root / "copy")
        steps, _killed = in_a_process(root, ops, fails=fails, fault=fault, at=at)
        if fault == "kill" or at == 0:
            check(root, before, changed)
        else:
            check_error(root, before)
        return steps
    finally:
        shutil.rmtree(root)


def check_error(root: Path, before: Tree) -> None:
    """After an error that was met: the call had the effect that the log has on record, and that can be taken back."""
    home = root / "home"
    store, audit, journal = opened(root)
    try:
        journal.recover()
        kinds = [entry.body["kind"] for entry in audit.entries(limit=1000)]
        assert audit.verify().bad is None
        if "call.end" in kinds and "undo.end" not in kinds:
            plan = journal.rollbacks.plan(Selection(calls=("c1",)), Ways(force=True))
            if any(planned.does for planned in plan.paths):
                journal.rollbacks.apply(plan, "p")
        assert tree(home) == before, kinds
    finally:
        store.close()


CALL = [
    Op("write", "a"), Op("append", "b"), Op("write", "big"), Op("rmtree", "e"), Op("overwrite", "bigger"), Op("rename", "d/x", "d/y"), Op("mkdir", "new"), Op("grow", "new/file"),
    Op("unlink", "l"), Op("symlink", "l"), Op("chmod", "b"), Op("setxattr", "a"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_fault_at_steps_of_a_call_and_its_rollback(fault: str, *, fails: bool):
    """Capture, intent, end, plan, rollback, eviction: opens, renames, fsyncs and commits of all of them, some of each."""
    steps = case(CALL, fails=fails, fault=fault, at=0)
    assert steps > 60
    for at in range(1, steps + 1, 3 if fault == "kill" else 5):  # those between are the random ones' below
        case(CALL, fails=fails, fault=fault, at=at)


ops = st.lists(
    st.builds(
        Op,
        st.sampled_from(
            "write grow append overwrite sparse mmap truncate unlink rmdir rmtree mkdir rename symlink link chmod setxattr".split()
        ),
        st.sampled_from(NAMES),
        st.sampled_from(NAMES),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ops, st.booleans(), st.sampled_from(sorted(FAULTS)), st.randoms(use_true_random=False))
def test_a_fault_at_any_step_of_any_call(made: list[Op], fails: bool, fault: str, chance: random.Random):
    """Random operations, a random step."""
    case(made, fails=fails, fault=fault, at=chance.randint(1, 250))
