"""How much the journal keeps, and what it gives up first: flash is small, and wears out.

What is given up is content only: that a call was there, which paths it changed and how, stays on record. The newest runs and
what is pinned are never given up, whatever the clock says.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import JournalError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import apsw

    from agentd.audit import AuditLog
    from agentd.store import Store

_MIB = 1 << 20
_RESERVE_BYTES = 4 * _MIB
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
    """`folder` is that of the store, `objects` where large contents are."""

    def __init__(self, store: Store, audit: AuditLog, folder: Path, objects: Path, keep: Keep) -> None:
        self._store, self._audit, self._objects, self.keep = store, audit, objects, keep
        self._folder, self._reserve = folder, folder / "reserve"
        self.hold_reserve()

    def require_space(self) -> None:
        """Raises JournalError (STORE_FULL) while the disk is nearly full: an undo could not be promised."""
        space = os.statvfs(self._folder)
        left = space.f_bavail * space.f_frsize
        if left < self.keep.low_space_bytes:
            raise JournalError(
                Reason.STORE_FULL,
                f"Only {left // _MIB} MiB are left on the disk of {self._folder}; nothing that changes files runs below "
                f"{self.keep.low_space_bytes // _MIB}.",
                hint="Free some space, or lower journal.low_space_mib.",
                metadata={"left_mib": str(left // _MIB)},
            )

    def hold_reserve(self) -> None:
        """Space set aside, so that what has begun can be ended on a full disk. Without it all works, but for that."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
            except OSError:
                self._reserve.unlink()  # half of it helps nobody
            finally:
                os.close(descriptor)

    def release_reserve(self) -> bool:
        """Whether there was any."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

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
        sizes = {call: inline + sum(self._size(name) for name in kept.get(call, ())) for call, _, _, _, inline in rows}
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
        self._remove_unused()
        self.hold_reserve()
        return tuple(given_up)

    def _give_up(self, db: apsw.Connection, calls: list[str]) -> None:
        for call in calls:
            db.execute("UPDATE pre_image SET content = NULL, object = NULL, result = NULL WHERE call = ?", (call,))
        detail = {"calls": calls[:_NAMED], "count": len(calls)}
        self._audit.append(db, Event(kind="journal.evict", principal="agentd", detail=detail))

    def _remove_unused(self) -> None:
        """Files that no pre-image names. One that is being written has no name of that kind yet, or its row comes in a moment:
        a minute is waited for that.
        """
        used = {name for names in self._store.read(_objects_used).values() for name in names}
        for path in self._objects.glob("??/*"):
            with contextlib.suppress(OSError):
                if path.name not in used and time.time() - path.stat().st_mtime > 60:
                    path.unlink()

    def _size(self, name: str) -> int:
        try:
            return (self._objects / name[:2] / name).stat().st_size
        except OSError:
            return 0


def _rows(db: apsw.Connection) -> list[tuple[str, int, str, int, int]]:
    """(call, time, its run or itself, pinned, bytes within the store), oldest first."""
    query = """SELECT call, time_ns, CASE run WHEN '' THEN call ELSE run END, pinned,
                      sum(coalesce(length(content), 0) + coalesce(length(result), 0))
               FROM journal JOIN pre_image USING (call) WHERE state != 'open' GROUP BY call ORDER BY begun"""
    return [(str(c), int(t), str(u), int(p), int(b)) for c, t, u, p, b in db.execute(query)]


def _objects_used(db: apsw.Connection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for call, name in db.execute("SELECT call, object FROM pre_image WHERE object IS NOT NULL"):
        found.setdefault(str(call), set()).add(str(name))
    return found


def _newest(rows: Iterable[tuple[str, int, str, int, int]], runs: int) -> frozenset[str]:
    units = list(dict.fromkeys(unit for _, _, unit, _, _ in reversed(list(rows))))
    return frozenset(units[:runs])
