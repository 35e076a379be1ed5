"""The audit log alone: durable events a second, what they write to the disk, verifying and finding among many."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from agentd.audit import AuditLog, Checkpoints, Event, Index, Payload, ToolIdentity, Wanted, load_signer
from agentd.store import Store
from tests.bench.figures import Figure, milliseconds, percentile
from tests.bench.undo import write_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_EVENTS = 600
_AT_ONCE = 64
_MANY = 100_000


def figures(folder: Path) -> list[Figure]:
    store = Store(folder / "log")
    try:
        audit = AuditLog(store)
        return [*_appending(audit, folder), *_many(store, audit, folder)]
    finally:
        store.close()


def _event(n: int) -> Event:
    """About as large as one of a call. Every fourth has a payload: the intents of calls that write."""
    tool = ToolIdentity(name="files.write", version="0.1.0", digest="d" * 64, effect="files")
    detail = {"pad": "x" * 400}
    said = {"path": f"/home/pi/notes/{n}.txt", "text": Payload("water the plants, buy bread")} if n % 4 == 1 else None
    who = {"principal": "unix:pi", "call": f"c{n}", "run": f"r{n // 20}"}
    return Event(kind="call.end", **who, tool=tool, arguments=said, wall_us=n, detail=detail)


def _appending(audit: AuditLog, folder: Path) -> list[Figure]:
    synced = milliseconds(_synced(folder / "synced"), 300, "one fdatasync")
    before, start = write_bytes(), time.perf_counter()
    for n in range(_EVENTS):
        audit.record(_event(n))
    took = time.perf_counter() - start
    each = (write_bytes() - before) / _EVENTS / 1024
    start = time.perf_counter()
    threads = [threading.Thread(target=_some, args=(audit,)) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = time.perf_counter() - start
    base = 1000 / percentile(synced, 0.5)
    cost = milliseconds(lambda: (audit.record(_event(1)), audit.record(_event(2))), 300, "what the log costs a call")
    return [
        Figure("what the log costs a call, its intent and its end, p50", percentile(cost, 0.5), "ms", 5),
        Figure("durable events, one after another (over 300)", _EVENTS / took, "/s", None, "fdatasync of 1 KB", base),
        Figure(
            f"durable events, {_AT_ONCE} at a time (over 5,000)",
            _AT_ONCE * 50 / together,
            "/s",
            None,
            "fdatasync of 1 KB",
            base,
        ),
        Figure("written to the disk by an event", each, "KB", 12),
    ]


def _some(audit: AuditLog) -> None:
    for n in range(50):
        audit.record(_event(n))


def _many(store: Store, audit: AuditLog, folder: Path) -> list[Figure]:
    chain = audit.entries(limit=1, newest_first=True)[0].chain
    first, rows, payloads = audit.size() + 1, [], []
    for seq in range(first, first + _MANY):
        sealed = _event(seq).sealed(seq=seq, time_ns=1_700_000_000_000_000_000 + seq, boot="b")
        chain = audit.link(chain, sealed.body.encode())
        rows.append((seq, sealed.body, chain))
        payloads += [(each.seq, each.field, each.salt, each.value) for each in sealed.payloads]
    store.write(lambda db: db.executemany("INSERT INTO event VALUES (?, ?, ?)", rows))
    store.write(lambda db: db.executemany("INSERT INTO payload VALUES (?, ?, ?, ?)", payloads))
    points = Checkpoints(store, audit, load_signer(folder / "audit.key", "o"))
    points.make()
    start = time.perf_counter()
    found = points.verify()
    took = time.perf_counter() - start
    assert found.bad is None
    index = Index(folder / "index.db", audit)
    index.catch_up()
    asked = milliseconds(lambda: index.find(Wanted(words="files write", newest_first=True), 50), 50, "the last 50 matches")
    index.close()
    return [
        Figure(f"events verified, of {found.valid} (over 150,000)", found.valid / took, "/s"),
        Figure(f"the last 50 matches among {found.valid}, p50", percentile(asked, 0.5), "ms", 20),
    ]


def _synced(file: Path) -> Callable[[], object]:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        os.write(descriptor, bytes(1000))
        os.fdatasync(descriptor)

    return write
