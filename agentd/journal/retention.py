"""How much the journal keeps, and what it gives up first: flash is small, and wears out.

What is given up is content only: that a call was there, which paths it changed and how, stays on record. The newest runs and
what is pinned are never given up, whatever the clock says.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import JournalError, Reason
from agentd.journal.images import GIVE_UP
from agentd.store import Reserve

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import apsw

    from agentd.audit import AuditLog
    from agentd.journal.contents import Contents
    from agentd.store import Store

_MIB = 1 << 20
_PART = 50  # of a file system that calls write to is to be free: a small one has less to lose than the store's
_ARRIVING_S = 60  # what nothing refers to may be new: its row comes in a moment
_OBJECTS = "SELECT call, object, result_object FROM pre_image WHERE object IS NOT NULL OR result_object IS NOT NULL"
_NAMED = 32  # calls in the event of an eviction
_DAY_NS = 86400 * 10**9


@dataclass(frozen=True, slots=True)
class Keep:
    """`file_bytes` and `call_bytes` bound what one file and one call may have kept, `total_bytes` all of it, `days` for how
    long; the newest `runs` are kept all the same. Below `low_space_bytes` on the disk nothing that changes files runs.
    """

    file_bytes: int = 64 * _MIB
    call_bytes: int = 256 * _MIB
    total_bytes: int = 2048 * _MIB
    days: int = 14
    runs: int = 20
    low_space_bytes: int = 200 * _MIB


class Retention:
    """`folder` is that of the store."""

    def __init__(self, store: Store, audit: AuditLog, folder: Path, contents: Contents, keep: Keep) -> None:
        self._store, self._audit, self._contents, self.keep = store, audit, contents, keep
        self._folder, self.reserve = folder, Reserve(folder)

    def require_space(self, paths: Iterable[bytes]) -> None:
        """Raises JournalError (STORE_FULL) while the store's disk, or one of those of `paths`, is nearly full."""
        self._require_space(os.fsencode(self._folder), self.keep.low_space_bytes)
        if not self.reserve.hold():
            raise JournalError(
                Reason.STORE_FULL,
                f"The disk of {self._folder} is full: what is left is kept to end what has begun, and for the next start.",
                hint="Free some space; it goes on by itself then.",
                metadata={"path": str(self._folder)},
            )
        for directory in {_existing(path) for path in paths}:
            space = os.statvfs(directory)
            least = min(self.keep.low_space_bytes, space.f_blocks * space.f_frsize // _PART)
            self._require_space(directory, least)

    @staticmethod
    def _require_space(directory: bytes, least: int) -> None:
        space = os.statvfs(directory)
        left = space.f_bavail * space.f_frsize
        if left < least:
            raise JournalError(
                Reason.STORE_FULL,
                f"Only {left // _MIB} MiB are left on the disk of {os.fsdecode(directory)}; nothing that changes files there "
                f"runs below {least // _MIB}.",
                hint="Free some space, or lower journal.low_space_mib.",
                metadata={"left_mib": str(left // _MIB), "path": os.fsdecode(directory)},
            )

    def pin(self, call: str, principal: str, *, pinned: bool) -> None:
        """Keep what a call needs to be undone, or no longer. Raises JournalError (CALL_NOT_FOUND)."""

        def mark(db: apsw.Connection) -> bool:
            db.execute("UPDATE journal SET pinned = ? WHERE call = ?", (int(pinned), call))
            if not db.changes():
                return False
            detail = {"pinned": pinned}
            self._audit.append(db, Event(kind="journal.pin", principal=principal, cause=call, detail=detail))
            return True

        if not self._store.write(mark):
            hint = "`agentd audit list` shows the calls."
            raise JournalError(Reason.CALL_NOT_FOUND, f"Call {call} is not known.", hint=hint, metadata={"call": call})

    def sweep(self, now_ns: int | None = None) -> tuple[str, ...]:
        """Give up what is too old or too much, oldest first, and remove what nothing refers to; returns the calls.

        Raises StoreError, OSError: the next sweep goes on from there.
        """
        now = time.time_ns() if now_ns is None else now_ns
        rows, kept = self._store.read(_rows), self._store.read(_objects_used)
        sizes = {call: inline + sum(self._contents.size(name) for name in kept.get(call, ())) for call, _, _, _, inline in rows}
        total = sum(sizes.values())
        newest = _newest(rows, self.keep.runs)
        given_up: list[str] = []
        for call, time_ns, unit, pinned, _inline in rows:
            old = time_ns < now - self.keep.days * _DAY_NS
            if not sizes[call] or pinned or unit in newest or not (old or total > self.keep.total_bytes):
                continue
            given_up.append(call)
            total -= sizes[call]
        if given_up:
            self._store.write(lambda db: self._give_up(db, given_up))
        used = {name for names in self._store.read(_objects_used).values() for name in names}
        self._contents.remove_unused(used, now / 10**9 - _ARRIVING_S)
        self.reserve.hold()
        return tuple(given_up)

    def _give_up(self, db: apsw.Connection, calls: list[str]) -> None:
        for call in calls:
            db.execute(GIVE_UP, (call,))
        detail = {"calls": calls[:_NAMED], "count": len(calls)}
        self._audit.append(db, Event(kind="journal.evict", principal="agentd", detail=detail))


def _existing(path: bytes) -> bytes:
    """The nearest directory that is there."""
    while not os.path.isdir(path) and path not in (b"/", b""):
        path = os.path.dirname(path)
    return path or b"/"


def _rows(db: apsw.Connection) -> list[tuple[str, int, str, int, int]]:
    """(call, time, its run or itself, pinned, bytes within the store), oldest first."""
    query = """SELECT call, time_ns, CASE run WHEN '' THEN call ELSE run END, pinned,
                      sum(coalesce(length(content), 0) + coalesce(length(result), 0))
               FROM journal JOIN pre_image USING (call) WHERE state != 'open' GROUP BY call ORDER BY begun"""
    return [(str(c), int(t), str(u), int(p), int(b)) for c, t, u, p, b in db.execute(query)]


def _objects_used(db: apsw.Connection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for call, *names in db.execute(_OBJECTS):
        found.setdefault(str(call), set()).update(str(name) for name in names if name)
    return found


def _newest(rows: Iterable[tuple[str, int, str, int, int]], runs: int) -> frozenset[str]:
    units = list(dict.fromkeys(unit for _, _, unit, _, _ in reversed(list(rows))))
    return frozenset(units[:runs])
