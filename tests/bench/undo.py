"""The journal alone: what capture adds to a change, what a rollback takes, what a small call writes to the disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

from agentd_sandbox import Access, PathRule
from agentd_sandbox.files import Files

from agentd.audit import AuditLog, Event
from agentd.journal import Journal, Keep, Selection, Ways
from agentd.store import Store, new_id
from tests.bench.figures import Figure, milliseconds, percentile

_FILES = 1000
_CALLS = 300
_MIB = 1 << 20


class _Desk:
    def __init__(self, folder: Path) -> None:
        self.home = folder / "undo" / "home"
        self.home.mkdir(parents=True)
        self.store = Store(folder / "undo" / "state")
        self.journal = Journal(self.store, AuditLog(self.store), folder / "undo" / "state" / "objects", Keep(low_space_bytes=0))

    def call(self, *paths: Path, content: bytes, run: str = "") -> None:
        """Rewrite files as a tool does: what the broker does for it is the broker's own code."""
        call = new_id()
        intent = Event(kind="call.intent", call=call, run=run)
        transaction = self.journal.begin(call, intent, [os.fsencode(path) for path in paths])
        scope = (PathRule(os.fsencode(self.home)),)
        files = Files(Access(scope, scope), transaction)
        for path in paths:
            descriptor = files.open(os.fsencode(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, 0o022)
            os.write(descriptor, content)
            os.close(descriptor)
        transaction.finish(Event(kind="call.end", call=call))


def figures(folder: Path) -> list[Figure]:
    desk = _Desk(folder.resolve())
    try:
        return [*_small(desk), *_large(desk), *_rollback(desk), *_written(desk)]
    finally:
        desk.store.close()


def _small(desk: _Desk) -> list[Figure]:
    file = desk.home / "small"
    file.write_bytes(b"x" * 4096)
    texts = iter(range(10**9))

    def capture() -> None:
        call = new_id()
        desk.journal.begin(call, Event(kind="call.intent", call=call), [os.fsencode(file)])

    captured = milliseconds(capture, 200, "capture of 4 KiB")
    plain = milliseconds(lambda: _durably(file, b"%d" % next(texts)), 200, "plain durable rewrite of 4 KiB")
    desk.journal.recover()
    base = percentile(plain, 0.5)
    return [
        Figure(
            "first write of a 4 KiB file, added by the journal, p50",
            percentile(captured, 0.5),
            "ms",
            10,
            "plain durable rewrite",
            base,
        )
    ]


def _large(desk: _Desk) -> list[Figure]:
    """One after the other, so that both meet the same memory: a virtual machine's new pages cost it more than the writing."""
    file = desk.home / "large"
    content = os.urandom(16 * _MIB)
    _durably(file, content)
    plain, captured = [], []
    for n in range(24):
        new = content[:-8] + b"%8d" % n
        plain += milliseconds(lambda new=new: _durably(file, new), 1, "plain durable rewrite of 16 MiB")  # type: ignore[misc]
        new = content[:-8] + b"%8d" % -n
        captured += milliseconds(lambda new=new: desk.call(file, content=new), 1, "rewrite of 16 MiB as a call")  # type: ignore[misc]
    base = percentile(plain, 0.5)
    return [
        Figure(
            "rewrite of a 16 MiB file as a call, p50", percentile(captured, 0.5), "ms", 2 * base, "plain durable rewrite", base
        )
    ]


def _rollback(desk: _Desk) -> list[Figure]:
    folder = desk.home / "many"
    folder.mkdir()
    paths = [folder / str(n) for n in range(_FILES)]
    for path in paths:
        path.write_text("old")
    desk.call(*paths, content=b"new", run="many")
    start = time.perf_counter()
    rollbacks = desk.journal.rollbacks
    rollbacks.apply(rollbacks.plan(Selection(run="many"), Ways()), "p")
    return [Figure(f"rollback of {_FILES} files", time.perf_counter() - start, "s", 5)]


def _written(desk: _Desk) -> list[Figure]:
    """As the kernel counts what this process has sent to the disk (proc(5), io: write_bytes)."""
    file = desk.home / "counted"
    before = write_bytes()
    for n in range(_CALLS):
        desk.call(file, content=b"%d" % n)
    each = (write_bytes() - before) / _CALLS / 1024
    return [Figure("written to the disk by a small call that changes a file", each, "KB", 20)]


def _durably(file: Path, content: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def write_bytes() -> int:
    text = Path("/proc/self/io").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("write_bytes")).split()[1])
