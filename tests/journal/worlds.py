"""A journal over a work directory, file systems to put it on, and ways to be killed or to be somebody else meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, Change, PathRule
from agentd_sandbox.files import Files

from agentd.audit import AuditLog, Event
from agentd.errors import JournalError
from agentd.journal import Journal, Keep, Left, Transaction
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

KEEP = Keep(file_bytes=8 << 20, low_space_bytes=0)
NOBODY = 65534


class World:
    """A daemon's state, and a home whose files calls change. It can be dropped and opened again like after a kill."""

    def __init__(self, root: Path, keep: Keep = KEEP) -> None:
        self.root, self.home, self.keep = root, root / "home", keep
        self.home.mkdir(exist_ok=True)
        self.open()

    def open(self) -> None:
        self.store = Store(self.root / "state")
        self.audit = AuditLog(self.store)
        self.journal = Journal(self.store, self.audit, self.root / "state" / "objects", self.keep)

    def retry(self, calls: Sequence[str] = (), *, force: bool = False) -> list[Left]:
        """As the daemon does it, now and then and at a person's word."""
        recovery = self.journal.recovery
        recovery.write_ends()
        for call, paths in recovery.calls():
            if not calls or call in calls:
                recovery.retry(call, paths, force=force)
        return [left for left in recovery.left() if not calls or left.call in calls]

    def reopen(self) -> list[str]:
        self.store.close()
        self.open()
        return self.journal.recover()

    def begin(self, *paths: Path) -> Transaction:
        """A call that is about to change these paths, one after another."""
        call = new_id()
        named = [os.fsencode(path) for path in paths]
        transaction = self.journal.begin(call, Event(kind="call.intent", call=call), named)
        transaction.before_changes([Change("write", path) for path in named])
        return transaction

    def call(self, change: Callable[[], object], *paths: Path) -> str:
        transaction = self.begin(*paths)
        change()
        self.end(transaction)
        return transaction.call

    def end(self, transaction: Transaction) -> None:
        transaction.finish(Event(kind="call.end", call=transaction.call))

    def by_broker(self, change: Callable[[Files], object]) -> str:
        """A call that does it with the very code that the broker has for it."""
        transaction, files = self.broker()
        change(files)
        self.end(transaction)
        return transaction.call

    def broker(self, home: Path | None = None) -> tuple[Transaction, Files]:
        transaction = self.begin()
        transaction.roots = (os.fsencode(home or self.home),)
        scope = (PathRule(transaction.roots[0]),)
        return transaction, Files(Access(scope, scope), transaction)

    def roll_back(self, transaction: Transaction) -> JournalError | None:
        """What it says if something could not be restored."""
        try:
            transaction.roll_back(Event(kind="call.abort", call=transaction.call))
        except JournalError as e:
            return e
        return None

    def state(self, call: str) -> str:
        return str(self.store.read(lambda db: db.execute("SELECT state FROM journal WHERE call = ?", (call,)).get))

    def left(self) -> dict[str, str]:
        """Paths that are left, from the home on, and why."""
        return {os.path.relpath(os.fsdecode(left.path), self.home): left.why for left in self.journal.recovery.left()}

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [entry.body for entry in self.audit.entries(limit=1000) if kind in ("", entry.body["kind"])]

    def recoveries(self, call: str) -> list[str]:
        """The calls that recovered this one and can be undone, oldest first."""
        ended = [event for event in self.events("call.recovered") if event.get("cause") == call]
        return [str(event["call"]) for event in ended if event["call"] != call]


def run(*line: str | Path) -> None:
    subprocess.run(line, check=True, capture_output=True)


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can do this")


@contextlib.contextmanager
def small_disk(at: Path, mib: int = 4) -> Iterator[Path]:
    """A file system in memory, mounted there."""
    need_root()
    at.mkdir(exist_ok=True)
    try:
        run("mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", at)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=False, capture_output=True)


def in_a_child(do: Callable[[], object]) -> int:
    """Do it in a process of its own; returns how that ended: 0, 1 after an exception, minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_nobody(do: Callable[[Path], object]) -> int:
    """Do it in a folder of nobody's, as an ordinary user: root is not shut out of anything."""
    root = Path(tempfile.mkdtemp(dir="/var/tmp")).resolve()

    def become_and_do() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        do(root)

    try:
        if os.geteuid() == 0:
            os.chown(root, NOBODY, NOBODY)
        return in_a_child(become_and_do)
    finally:
        shutil.rmtree(root, ignore_errors=True)


_AUDITED = ("open", "os.")
_armed: list[int] = []
_hooked: list[bool] = []


def kill_at(step: int) -> None:
    """From now on this process is killed at its nth open, rename, link, chmod and so on."""
    if not _hooked:
        sys.addaudithook(_count)
        _hooked.append(True)
    _armed[:] = [step]


def _count(event: str, _arguments: object) -> None:
    if _armed and event.startswith(_AUDITED):
        _armed[0] -= 1
        if _armed[0] <= 0:
            _armed.clear()  # to be killed is an event, too
            os.kill(os.getpid(), signal.SIGKILL)
