"""The log itself: append within a transaction, list, verify.

leaf = SHA-256(0x00 || body), as in RFC 6962; chain = SHA-256(chain of the row before || leaf). The first row
continues 32 zero bytes. A changed, missing or inserted row breaks every chain value after it. Cutting off the
end cannot be seen by any chain: that needs an anchor outside the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentd.audit.events import Event, parsed
from agentd.audit.formats import Record
from agentd.audit.payloads import Kept
from agentd.audit.tree import leaf, linked
from agentd.audit.verify import Claims, verify
from agentd.errors import Reason, StoreError
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import apsw

    from agentd.audit.verify import Jump, Row, Verification
    from agentd.store import Store

_START = bytes(32)
_NO_CLAIMS = Claims()
# What is damaged may be neither text nor there at all, whatever the table says.
_ROW = "seq, coalesce(CAST(body AS BLOB), x''), coalesce(CAST(chain AS BLOB), x'')"
_KEPT = "seq, coalesce(CAST(field AS BLOB), x''), coalesce(CAST(salt AS BLOB), x''), CAST(value AS BLOB)"
_PAGE = 500
_MARGIN = 100_000  # events that there may be after the newest checkpoint, at most
_JUMP_NS = 60 * 10**9  # what a clock is set by, and more than it drifts


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored event: its number, the body as parsed JSON, the chain value that covers it, and the body as it is stored."""

    seq: int
    body: dict[str, Any]
    chain: bytes
    text: str


class AuditLog:
    def __init__(self, store: Store) -> None:
        self._store = store
        self.boot = new_id()
        self.ended = False
        """Whether nobody is to wait for more events."""
        self._waiting: list[Callable[[], None]] = []
        self._clock: tuple[int, int] | None = None
        self.closed = ""
        """Why it is not what was signed: no tool may change anything, and nothing more is signed, until a new one begins."""
        self.start = _START
        """The chain value before the first event."""

    def append(self, db: apsw.Connection, event: Event) -> int:
        """Add an event inside a transaction of the store's writer; returns its number."""
        now = time.time_ns()
        if by := self._jumped(now):
            self._insert(db, Event(kind="clock.jump", principal="agentd", detail={"by_s": by // 10**9}), now)
        return self._insert(db, event, now)

    def _insert(self, db: apsw.Connection, event: Event, now_ns: int) -> int:
        head = db.execute("SELECT seq, coalesce(CAST(chain AS BLOB), x'') FROM event ORDER BY seq DESC LIMIT 1").get
        seq, chain = (head[0] + 1, head[1]) if head else (1, _START)
        sealed = event.sealed(seq=seq, time_ns=now_ns, boot=self.boot)
        db.execute("INSERT INTO event VALUES (?, ?, ?)", (seq, sealed.body, _link(chain, sealed.body.encode())))
        rows = ((kept.seq, kept.field, kept.salt, kept.value) for kept in sealed.payloads)
        # Some may be left of an end that was cut off: these are nobody's any more.
        db.executemany("INSERT OR REPLACE INTO payload VALUES (?, ?, ?, ?)", rows)
        return seq

    def _jumped(self, now_ns: int) -> int:
        """By how much the wall clock was set since the last event, in nanoseconds; 0 if it only went on."""
        steady = time.clock_gettime_ns(time.CLOCK_BOOTTIME)  # goes on while the device sleeps
        by = now_ns - self._clock[0] - (steady - self._clock[1]) if self._clock else 0
        self._clock = (now_ns, steady)
        return by if abs(by) >= _JUMP_NS else 0

    def close(self, why: str) -> None:
        self.closed = why

    def reopen(self) -> None:
        """A new log has begun in its place."""
        self.closed = ""

    def require_open(self) -> None:
        """Raises StoreError (AUDIT_CLOSED)."""
        if self.closed:
            raise StoreError(
                Reason.AUDIT_CLOSED,
                f"The audit log is not what was signed: {self.closed}. No tool may change anything.",
                hint="Look into it with `agentd audit verify`, then begin a new log: `agentd audit renew --reason '...'`.",
            )

    def record(self, event: Event) -> int:
        """Add an event and wait until it is durable. Not for the event loop."""
        return self._store.write(lambda db: self.append(db, event))

    @contextlib.contextmanager
    def announcements(self) -> Iterator[asyncio.Event]:
        """A flag of the running event loop that is set whenever there may be more events."""
        loop, more = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed by now
                loop.call_soon_threadsafe(more.set)

        self._store.on_commit.append(tell)
        self._waiting.append(tell)
        try:
            yield more
        finally:
            self._store.on_commit.remove(tell)
            self._waiting.remove(tell)

    def end(self) -> None:
        """Let go of everybody who waits for more events."""
        self.ended = True
        for tell in tuple(self._waiting):
            tell()

    def numbered(self, numbers: Sequence[int]) -> list[Entry]:
        """The entries of these numbers, in their order."""
        marks = ", ".join("?" * len(numbers))
        query = f"SELECT {_ROW} FROM event WHERE seq IN ({marks})"  # noqa: S608
        rows = self._store.read(lambda db: list(db.execute(query, numbers)))
        found = {seq: _entry(seq, body, chain) for seq, body, chain in rows}
        return [found[seq] for seq in numbers if seq in found]

    def entries(self, *, after: int = 0, limit: int = 100, newest_first: bool = False, call: str = "") -> list[Entry]:
        """Up to `limit` entries past number `after` (before it, if newest first), optionally of one call."""
        order, compare = ("DESC", "<") if newest_first else ("ASC", ">")
        start = after or (1 << 62 if newest_first else 0)
        where = f"seq {compare} ?" + (" AND body ->> 'call' = ?" if call else "")
        query = f"SELECT {_ROW} FROM event WHERE {where} ORDER BY seq {order} LIMIT ?"  # noqa: S608
        values = (start, call, limit) if call else (start, limit)
        rows = self._store.read(lambda db: list(db.execute(query, values)))
        return [_entry(seq, body, chain) for seq, body, chain in rows]

    def since(self, time_ns: int) -> Iterator[Entry]:
        """All entries from the first one that is not older, oldest first."""
        after = 0
        while page := self.entries(after=after, limit=_PAGE):
            after = page[-1].seq
            yield from (entry for entry in page if int(entry.body.get("time_ns", 0)) >= time_ns)

    def newest_ns(self) -> int:
        """The latest time among the newest entries: the clock may have been set back before the last of them."""
        try:
            newest = self.entries(limit=_PAGE, newest_first=True)
        except StoreError:  # its pages are damaged: `Upkeep.look` says so
            return 0
        return max((int(entry.body["time_ns"]) for entry in newest), default=0)

    @staticmethod
    def link(chain: bytes, body: bytes) -> bytes:
        """The chain value that covers an event and all before it."""
        return _link(chain, body)

    @property
    def file(self) -> Path:
        """That of the store."""
        return self._store.file

    @staticmethod
    def last(db: apsw.Connection) -> int:
        """The number of the newest event, within a transaction; 0 if there is none."""
        return int(db.execute("SELECT coalesce(max(seq), 0) FROM event").get)

    def readable(self, signed: int) -> Iterator[Record]:
        """All that can be read, with payloads, in order; what stands on damaged pages is left out.

        There are `signed` events at least, whatever the damaged pages say.
        """
        at = 0
        try:
            size = max(self.size(), signed)
        except StoreError:
            size = signed + _MARGIN
        while at < size:
            try:
                page = self.records(after=at, limit=_PAGE)
                end = page[-1].seq if len(page) == _PAGE else size
            except StoreError:
                page = [each for n in range(at + 1, at + _PAGE + 1) for each in self._record(n)]
                end = at + _PAGE
            for each in page:
                if at < each.seq <= size:  # numbers on a damaged page may go backwards
                    at = each.seq
                    yield self._with_payloads(each)
            at = max(at, end if end > at else at + 1)

    def _record(self, seq: int) -> list[Record]:
        try:
            return [each for each in self.records(after=seq - 1, limit=1) if each.seq == seq]
        except StoreError:
            return []

    def _with_payloads(self, record: Record) -> Record:
        try:
            return replace(record, payloads=tuple(self.payloads([record.seq]).get(record.seq, ())))
        except StoreError:
            return record

    def size(self) -> int:
        """How many events there are: their numbers have no gaps."""
        return int(self._store.read(lambda db: db.execute("SELECT coalesce(max(seq), 0) FROM event").get))

    def rows(self, *, after: int = 0) -> Iterator[tuple[int, bytes, bytes]]:
        """(number, body, chain) as stored, in order; a page at a time, so that others can read meanwhile."""
        query = f"SELECT {_ROW} FROM event WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
        while page := self._store.read(lambda db, after=after: list(db.execute(query, (after, _PAGE)))):  # type: ignore[misc]
            yield from page
            after = page[-1][0]

    def bodies(self, *, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """(number, body) as stored, in order."""
        return ((seq, body) for seq, body, _ in self.rows(after=after))

    def naming(self, field: str, value: str, limit: int) -> list[Entry]:
        """Up to so many events with this id in `field` (call, run), oldest first, without the index."""
        query = f"SELECT {_ROW} FROM event WHERE instr(body, ?) ORDER BY seq LIMIT ?"  # noqa: S608
        rows = self._store.read(lambda db: list(db.execute(query, (f'"{field}":"{value}"', limit))))
        return [entry for row in rows if (entry := _entry(*row)).body.get(field) == value]

    def newest(self, kind: str) -> Entry | None:
        """The last event of a kind, if it is still in the store."""
        query = f"SELECT {_ROW} FROM event WHERE instr(body, ?) ORDER BY seq DESC LIMIT 1"  # noqa: S608
        row = self._store.read(lambda db: db.execute(query, (f'"kind":"{kind}"',)).fetchone())
        return _entry(*row) if row else None

    def payloads(self, numbers: Sequence[int]) -> dict[int, list[Kept]]:
        """What is kept beside these events; nothing where it was taken out."""
        marks = ", ".join("?" * len(numbers))
        query = f"SELECT {_KEPT} FROM payload WHERE seq IN ({marks}) ORDER BY seq, field"  # noqa: S608
        found: dict[int, list[Kept]] = {}
        for row in self._store.read(lambda db: list(db.execute(query, numbers))):
            found.setdefault(row[0], []).append(Kept.of(*row))
        return found

    def all_payloads(self) -> Iterator[Kept | None]:
        """In the order of their events. None where there is no more, so far: to go on when there are new events."""
        query = f"SELECT {_KEPT} FROM payload WHERE seq > ? ORDER BY seq, field LIMIT ?"  # noqa: S608
        after = 0
        while True:
            page = self._store.read(lambda db, after=after: list(db.execute(query, (after, _PAGE))))  # type: ignore[misc]
            whole = page if len(page) < _PAGE or page[0][0] == page[-1][0] else [row for row in page if row[0] < page[-1][0]]
            yield from (Kept.of(*row) for row in whole)  # an event's are not torn apart
            after = whole[-1][0] if whole else after
            if not whole:
                yield None

    def texts(self, *, after: int = 0) -> Iterator[tuple[int, bytes, list[Kept]]]:
        """(number, body, payloads) in order: what there is to look for."""
        query = f"SELECT {_ROW} FROM event WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
        while page := self._store.read(lambda db, after=after: list(db.execute(query, (after, _PAGE)))):  # type: ignore[misc]
            written = self.payloads([seq for seq, _, _ in page])
            yield from ((seq, body, written.get(seq, [])) for seq, body, _ in page)
            after = page[-1][0]

    def records(self, *, after: int, limit: int) -> list[Record]:
        """As they are stored, for other programs."""
        query = f"SELECT {_ROW} FROM event WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
        rows = self._store.read(lambda db: list(db.execute(query, (after, limit))))
        return [Record(seq, body.decode("utf-8", "replace"), chain) for seq, body, chain in rows]

    def first(self) -> int:
        """The first event that is in no archive."""
        return int(self._store.read(lambda db: db.execute("SELECT coalesce(min(seq), 1) FROM event").get))

    def verify(
        self,
        claims: Claims = _NO_CLAIMS,
        rows: Iterable[Row | Jump] | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Verification:
        """Recompute the whole chain from the stored bytes, and what was signed of it; look at all payloads.

        `rows` are those of the log and of its archives, if some of it is there.
        """
        return verify(rows or self.rows(), self.start, claims, self.all_payloads(), self.first, progress)


def _entry(seq: int, body: bytes, chain: bytes) -> Entry:
    return Entry(seq, parsed(body), chain, body.decode("utf-8", "replace"))


def _link(chain: bytes, body: bytes) -> bytes:
    return linked(chain, leaf(body))
