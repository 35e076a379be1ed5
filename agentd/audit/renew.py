"""A new log in the place of one that does not fit what was signed of it: the old one is never mended.

All that can be read of it goes into a file, its private key is removed, and the new log, of another name and key, begins with
an event that names both. A log must not sign what contradicts what it has signed before (c2sp.org/tlog-checkpoint): so it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import apsw
import zstandard

from agentd.audit.events import Event
from agentd.audit.formats import jsonl
from agentd.audit.notes import load_signer, make_signer
from agentd.errors import Reason, RequestError, StoreError
from agentd.store import arriving, sync_folder

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.audit.archive import Archive
    from agentd.audit.checkpoints import Checkpoints
    from agentd.audit.index import Index
    from agentd.audit.log import AuditLog
    from agentd.store import Store

_PAGE = 500
_ATTEMPTS = 5
_MARGIN = 100_000  # events that there may be after the newest checkpoint, at most
_NUMBERED = re.compile(r"(.*)/([0-9]+)")
_TABLES = ("event", "payload", "checkpoint", "segment", "shipped")
LONGEST_REASON = 500


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

    def renew(self, reason: str, principal: str) -> Renewed:
        """Not for the event loop. Raises RequestError (BAD_FIELD), StoreError."""
        if not reason.strip() or len(reason) > LONGEST_REASON:
            hint = "It is recorded for whoever asks later."
            raise RequestError(Reason.BAD_FIELD, f"A reason has 1 to {LONGEST_REASON} characters.", hint=hint, field="reason")
        old = self._checkpoints.verifier
        origin = _following(old.name)
        signer = make_signer(_next(self._key_file), origin)
        for _ in range(_ATTEMPTS):
            name, digest, events, last = self._write_out()
            told = {
                "renews": old.name,
                "old_key": str(old),
                "key": str(signer.verifier),
                "why": self._log.closed,
                "reason": reason,
            }
            told |= {"archive": name, "sha256": digest, "events": str(events), "checkpoint": self._checkpoints.latest()}
            with contextlib.suppress(_Grown):
                self._store.write(lambda db, last=last, told=told: self._begin(db, last, told, principal))  # type: ignore[misc]
                break
        else:
            raise StoreError(Reason.AUDIT_UNAVAILABLE, "The log grows faster than it can be put away.", hint="Try again.")
        settle_key(self._key_file, self._log)
        self._log.reopen()
        self._index.start_anew()
        self._checkpoints.begin_anew(signer)
        return Renewed(origin, name, events)

    def _begin(self, db: apsw.Connection, last: int, told: dict[str, str], principal: str) -> None:
        with contextlib.suppress(apsw.CorruptError):  # then nothing can have been added to it either
            if self._log.last(db) != last:
                raise _Grown
        for table in _TABLES:
            db.execute("SAVEPOINT emptying")
            try:
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own
            except apsw.CorruptError:  # its pages stay as they are, for whoever wants to look at them
                db.execute("ROLLBACK TO emptying")
                self._put_aside(db, table)
            db.execute("RELEASE emptying")
        self._log.append(db, Event(kind="renew", principal=principal, detail=dict(told)))

    @staticmethod
    def _put_aside(db: apsw.Connection, table: str) -> None:
        made = str(db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).get)
        taken = {str(name) for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        aside = next(f"damaged_{n}_{table}" for n in range(1, 1000) if f"damaged_{n}_{table}" not in taken)
        db.execute(f"ALTER TABLE {table} RENAME TO {aside}")
        db.execute(made)

    def _write_out(self) -> tuple[str, str, int, int]:
        """Name and digest of the file, how many events it has, and the number of the last."""
        name, events, last = (
            f"closed-{hashlib.sha256(str(self._checkpoints.verifier).encode()).hexdigest()[:16]}.jsonl.zst",
            0,
            0,
        )
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with arriving(self._folder / name) as file:
                with zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed:
                    packed.write(self._heading().encode() + b"\n")
                    for record in self._log.readable(max(self._checkpoints.all(), default=0) + _MARGIN):
                        packed.write(jsonl(record).encode() + b"\n")
                        events, last = events + 1, record.seq
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            message = f"The old log can't be written to {self._folder}: {e.strerror}. It stays as it is."
            raise StoreError(Reason.AUDIT_UNAVAILABLE, message, hint="Check the disk.") from e
        return name, digest, events, last

    def _heading(self) -> str:
        """Whose log it was, all that was signed of it, and the files with its oldest part."""
        segments = [asdict(each) | {"chain": each.chain.hex(), "peaks": each.peaks.hex()} for each in self._archive.segments()]
        notes = list(self._checkpoints.all().values())
        return json.dumps({"key": str(self._checkpoints.verifier), "checkpoints": notes, "segments": segments})


def settle_key(key_file: Path, log: AuditLog) -> None:
    """After a kill: the key of a log that has begun takes its place, that of one that has not is removed. Raises OSError."""
    coming = _next(key_file)
    if not coming.exists():
        return
    try:
        key = str(load_signer(coming).verifier)
        firsts = [each.body for each in log.entries(limit=2)]  # the clock may have been set just before
    except StoreError:
        key, firsts = "", []
    begun = any(body.get("kind") == "renew" and body.get("detail", {}).get("key") == key for body in firsts)
    if begun:
        coming.rename(key_file)
    else:
        coming.unlink()
    sync_folder(key_file.parent)


def _next(key_file: Path) -> Path:
    return key_file.with_name(f"{key_file.name}.next")


def _following(origin: str) -> str:
    numbered = _NUMBERED.fullmatch(origin)
    return f"{numbered[1]}/{int(numbered[2]) + 1}" if numbered else f"{origin}/2"
