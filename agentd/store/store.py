"""The store: `agentd.db` in the state folder, one writer thread with group commit, read-only readers.

WAL with synchronous=FULL: a commit that was acknowledged survives a power cut (synchronous=NORMAL lost up to
530 acknowledged events in a power-cut test). Work that arrives while a commit is under way shares the next one.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import apsw

from agentd.errors import AgentdError, Reason, StoreError
from agentd.store.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_BUSY_MS = 5000
_GROUP = 64  # pieces of work in one commit at most
_LOCK_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 10
# secure_delete: what is taken out of the log must be in no gap of any page; pages are split and merged at any time.
_SETTINGS = (
    (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 0),
    (apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0),
    (apsw.SQLITE_DBCONFIG_DEFENSIVE, 1),
)
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "journal_size_limit=4194304", "secure_delete=ON")


@dataclass(slots=True)
class _Work:
    do: Callable[[apsw.Connection], Any]
    done: Future[Any]


class Store:
    """Opens or creates the store. Raises StoreError: STORE_LOCKED if another daemon has it, else AUDIT_UNAVAILABLE.

    `open_connection` is a seam for fault injection: it opens the writer's connection.
    """

    def __init__(self, folder: Path, open_connection: Callable[[str], apsw.Connection] = apsw.Connection) -> None:
        self._path = str(folder / "agentd.db")
        self._open = open_connection
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as e:
            raise _unusable(e, self._path) from e
        try:
            self._writer = self._connect()
            migrate(self._writer)
        except (OSError, apsw.Error) as e:
            os.close(self._lock)
            raise _unusable(e, self._path) from e
        self._reader = apsw.Connection(self._path, flags=apsw.SQLITE_OPEN_READONLY)
        self._reader.set_busy_timeout(_BUSY_MS)
        self._reading = threading.Lock()
        self.on_commit: list[Callable[[], None]] = []
        """Called on the writer's thread after each commit: to be quick, and to raise nothing."""
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[apsw.Connection], T]) -> Future[T]:
        """Run `do` in a transaction of the writer thread, in the caller's context; the future resolves once it is durable.

        The future fails with StoreError (STORE_FULL, AUDIT_UNAVAILABLE) if it can't be written, or with
        whatever `do` itself raised, and then nothing of it is kept.
        """
        done: Future[T] = Future()
        context = contextvars.copy_context()  # events that are made in there say where the request came from
        self._queue.put(_Work(lambda db: context.run(do, db), done))
        return done

    def write(self, do: Callable[[apsw.Connection], T]) -> T:
        """`submit` and wait. Not for the event loop."""
        return self.submit(do).result()

    def read(self, do: Callable[[apsw.Connection], T]) -> T:
        """Run `do` on a read-only connection, within one snapshot. Not for the event loop.

        Raises StoreError (AUDIT_UNAVAILABLE) if the file can't be read.
        """
        with self._reading:
            try:
                self._reader.execute("BEGIN")
                try:
                    return do(self._reader)
                finally:
                    self._reader.execute("ROLLBACK")
            except apsw.Error as e:
                raise _unusable(e, self._path) from e

    def empty_wal(self) -> None:
        """Move all that is committed into the store's own file: what was overwritten is in no file any more. Not for the event
        loop. Raises StoreError (AUDIT_UNAVAILABLE) if others read for longer than BUSY_MS.
        """
        with contextlib.closing(apsw.Connection(self._path)) as db:
            db.set_busy_timeout(_BUSY_MS)
            try:
                blocked = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").get[0]
            except apsw.Error as e:
                raise _unusable(e, self._path) from e
        if blocked:
            raise _unusable(apsw.BusyError("others read it; what was deleted is overwritten a little later"), self._path)

    @property
    def file(self) -> Path:
        return Path(self._path)

    @property
    def lock_descriptor(self) -> int:
        """For a process that must be gone before another daemon may use the store."""
        return self._lock

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(_STOP_TIMEOUT_S)
        self._reader.close()
        with contextlib.suppress(apsw.Error):
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.close()
        os.close(self._lock)

    def _connect(self) -> apsw.Connection:
        db = self._open(self._path)
        os.chmod(self._path, 0o600)
        db.set_busy_timeout(_BUSY_MS)
        # We have no triggers and views. Whoever adds one to the file would change what is written as it is written.
        for setting, on in _SETTINGS:
            db.config(setting, on)
        db.execute("PRAGMA page_size=1024")  # of a new store: a call changes few bytes of many pages, and writes half as much
        # One at a time: of several in one string, those after one that gives a row wait until that is fetched.
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}").fetchall()
        synchronous, foreign_keys = db.execute("PRAGMA synchronous").get, db.execute("PRAGMA foreign_keys").get
        if (synchronous, foreign_keys) != (2, 1):  # some builds change the default: a log that can lose its end is none
            raise apsw.Error(f"synchronous={synchronous} instead of FULL, foreign_keys={foreign_keys}")
        return db

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            group = [work]
            stop = False
            with contextlib.suppress(queue.Empty):
                while len(group) < _GROUP:
                    more = self._queue.get_nowait()
                    if more is None:
                        stop = True
                        break
                    group.append(more)
            self._commit(group)
            for tell in tuple(self.on_commit):
                tell()
            if stop:
                return

    def _commit(self, group: list[_Work]) -> None:
        results: list[tuple[_Work, Any]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for work in group:
                if not work.done.set_running_or_notify_cancel():
                    continue  # its caller gave up before it began; from here on it can't be cancelled
                self._writer.execute("SAVEPOINT piece")  # one piece's failure is its own
                try:
                    results.append((work, work.do(self._writer)))
                except (apsw.FullError, apsw.IOError, apsw.CorruptError):
                    raise  # SQLite has taken back the whole transaction by itself
                except Exception as e:
                    self._writer.execute("ROLLBACK TO piece")
                    work.done.set_exception(_unusable(e, self._path) if isinstance(e, apsw.Error) else e)
                self._writer.execute("RELEASE piece")
            self._writer.execute("COMMIT")
        except apsw.Error as e:
            if self._writer.in_transaction:
                with contextlib.suppress(apsw.Error):
                    self._writer.execute("ROLLBACK")
            for work in group:
                if not work.done.done() and (work.done.running() or work.done.set_running_or_notify_cancel()):
                    work.done.set_exception(_unusable(e, self._path))
            return
        for work, result in results:
            work.done.set_result(result)


def _lock(folder: Path) -> int:
    """Ours until the last copy of the descriptor is closed. The zygote has one: what a killed daemon's tools have left
    behind is gone before another daemon recovers, which is why a moment is waited here.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while not _try_lock(descriptor):
        if time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreError(
            Reason.STORE_LOCKED,
            f"Another agentd (pid {holder}) uses the state folder {folder}.",
            hint="Stop it, or give this one its own `state` folder.",
            metadata={"pid": holder, "folder": str(folder)},
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _unusable(error: Exception, path: str) -> AgentdError:
    if isinstance(error, AgentdError):
        return error
    if isinstance(error, apsw.FullError):
        return StoreError(
            Reason.STORE_FULL,
            f"The disk is full: {path} can't be written, so nothing that changes anything runs.",
            hint="Free some space; nothing recorded so far is lost.",
            metadata={"path": path},
        )
    damaged = isinstance(error, apsw.CorruptError | apsw.NotADBError)
    return StoreError(
        Reason.STORE_DAMAGED if damaged else Reason.AUDIT_UNAVAILABLE,
        f"The store {path} can't be used: {error}.",
        hint="Check the disk and the permissions of the state folder.",
        metadata={"path": path, "error": str(error)},
    )
