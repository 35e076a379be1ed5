"""A new log in the place of one that does not fit what was signed of it: the old one is never mended.

All that can be read of it goes into a file, its private key is removed, and the new log, of another name and key, begins with
an event that names both. A log must not sign what contradicts what it has signed before (c2sp.org/tlog-checkpoint): so it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import zstandard

from agentd.audit.events import Event, require_reason
from agentd.audit.formats import jsonl
from agentd.audit.notes import load_signer, make_signer
from agentd.errors import Reason, StoreError
from agentd.store import arriving, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import apsw

    from agentd.audit.archive import Archive, Segment
    from agentd.audit.checkpoints import Checkpoints
    from agentd.audit.index import Index
    from agentd.audit.log import AuditLog
    from agentd.store import Store

T = TypeVar("T")
_ATTEMPTS = 5
_NUMBERED = re.compile(r"(.*)/([0-9]+)")
_TABLES = ("event", "payload", "checkpoint", "segment", "shipped")


@dataclass(frozen=True, slots=True)
class Renewed:
    """The new log's name, and where the old one is: `events` of them could be read."""

    origin: str
    archive: str
    events: int


class _Grown(Exception):
    """There are more events than were written out."""


class Renewal:
    """`key_file` has the key of the log, `folder` gets the old one."""

    def __init__(
        self,
        store: Store,
        log: AuditLog,
        checkpoints: Checkpoints,
        index: Index,
        archive: Archive,
        key_file: Path,
        folder: Path,
    ) -> None:
        self._store, self._log, self._checkpoints, self._index = store, log, checkpoints, index
        self._archive, self._key_file, self._folder = archive, key_file, folder
        self._renewing = threading.Lock()

    def renew(self, reason: str, principal: str) -> Renewed:
        """Not for the event loop. Raises RequestError (BAD_FIELD), StoreError; then the old log is the one."""
        require_reason(reason)
        with self._renewing:
            return self._renew(reason, principal)

    def _renew(self, reason: str, principal: str) -> Renewed:
        settle_key(self._key_file, self._log)  # of one before that was interrupted
        old = self._checkpoints.verifier
        signer = make_signer(_next(self._key_file), _following(old.name))
        for _ in range(_ATTEMPTS):
            size = _or(None, self._log.size)
            name, digest, events = self._write_out()
            told: dict[str, Any] = {
                "renews": old.name,
                "old_key": str(old),
                "key": str(signer.verifier),
                "why": self._log.closed,
                "reason": reason,
            }
            told |= {"archive": name, "sha256": digest, "events": str(events), "checkpoint": _or("", self._checkpoints.latest)}
            event = Event(kind="renew", principal=principal, detail=told)
            with contextlib.suppress(_Grown):
                self._checkpoints.begin_anew(signer, lambda event=event, size=size: self._begin(event, size))  # type: ignore[misc]
                break
        else:
            raise StoreError(Reason.AUDIT_UNAVAILABLE, "The log grows faster than it can be put away.", hint="Try again.")
        self._log.reopen()
        settle_key(self._key_file, self._log)
        self._index.start_anew()
        self._checkpoints.make()
        return Renewed(signer.verifier.name, name, events)

    def _begin(self, event: Event, size: int | None) -> None:
        """Empty what there is and record the first event. Where pages are damaged the tables are put aside, unread.

        After SQLITE_CORRUPT a transaction can do nothing more, so that is another one. Raises _Grown, StoreError.
        """
        try:
            self._store.write(lambda db: self._replace(db, event, size, _empty))
        except StoreError as e:
            if e.reason is not Reason.STORE_DAMAGED:
                raise
            self._store.write(lambda db: self._replace(db, event, None, self._put_aside))

    def _replace(
        self, db: apsw.Connection, event: Event, size: int | None, empty: Callable[[apsw.Connection, str], None]
    ) -> None:
        if size is not None and self._log.last(db) != size:
            raise _Grown
        for table in _TABLES:
            empty(db, table)
        self._log.append(db, event)

    @staticmethod
    def _put_aside(db: apsw.Connection, table: str) -> None:
        made = str(db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).get)
        taken = {str(name) for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        aside = next(f"damaged_{n}_{table}" for n in range(1, 1000) if f"damaged_{n}_{table}" not in taken)
        db.execute(f"ALTER TABLE {table} RENAME TO {aside}")
        db.execute(made)

    def _write_out(self) -> tuple[str, str, int]:
        """Name and digest of the file, and how many events it has."""
        name, events = f"closed-{hashlib.sha256(str(self._checkpoints.verifier).encode()).hexdigest()[:16]}.jsonl.zst", 0
        known: dict[int, str] = {}
        signed = max(_or(known, self._checkpoints.all), default=0)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with arriving(self._folder / name) as file:
                with zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed:
                    packed.write(self._heading().encode() + b"\n")
                    for record in self._log.readable(signed):
                        packed.write(jsonl(record).encode() + b"\n")
                        events += 1
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            message = f"The old log can't be written to {self._folder}: {e.strerror}. It stays as it is."
            raise StoreError(Reason.AUDIT_UNAVAILABLE, message, hint="Check the disk.") from e
        return name, digest, events

    def _heading(self) -> str:
        """Whose log it was, all that was signed of it, and the files with its oldest part."""
        known: list[Segment] = []
        notes: dict[int, str] = {}
        known, notes = _or(known, self._archive.segments), _or(notes, self._checkpoints.all)
        segments = [asdict(each) | {"chain": each.chain.hex(), "peaks": each.peaks.hex()} for each in known]
        return json.dumps({"key": str(self._checkpoints.verifier), "checkpoints": list(notes.values()), "segments": segments})


def settle_key(key_file: Path, log: AuditLog) -> None:
    """After a kill: the key of a log that has begun takes its place, that of one that has not is removed. Raises StoreError.

    Where damage keeps that from being known, both stay.
    """
    coming = _next(key_file)
    if not coming.exists():
        return
    try:
        key = str(load_signer(coming).verifier)
        firsts = [each.body for each in log.entries(limit=2)]  # the clock may have been set just before
    except StoreError as e:
        if e.reason is not Reason.STORE_DAMAGED:
            raise
        return
    details = [body.get("detail") for body in firsts if body["kind"] == "renew"]
    begun = any(isinstance(detail, dict) and detail.get("key") == key for detail in details)
    try:
        if begun:
            coming.rename(key_file)
        else:
            coming.unlink()
        sync_folder(key_file.parent)
    except OSError as e:
        message = f"The key of the audit log can't be moved to {key_file}: {e.strerror}."
        raise StoreError(Reason.AUDIT_UNAVAILABLE, message, hint="Check the disk.", metadata={"path": str(key_file)}) from e


def _empty(db: apsw.Connection, table: str) -> None:
    db.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own


def _or(otherwise: T, read: Callable[[], T]) -> T:
    """What is read, or something else where pages are damaged."""
    try:
        return read()
    except StoreError:
        return otherwise


def _next(key_file: Path) -> Path:
    return key_file.with_name(f"{key_file.name}.next")


def _following(origin: str) -> str:
    numbered = _NUMBERED.fullmatch(origin)
    return f"{numbered[1]}/{int(numbered[2]) + 1}" if numbered else f"{origin}/2"
