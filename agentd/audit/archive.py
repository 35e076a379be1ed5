"""The oldest part of the log, moved out of the store into files that still verify: the log must not fill a card.

By numbers, never by the clock; only up to a signed checkpoint, and only what verifies. A file has a line for each event, with
the event as it was hashed, compressed with zstd: `zstdcat archive/1-4096.jsonl.zst | jq`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zstandard

from agentd.audit.events import Event
from agentd.audit.formats import Record, jsonl
from agentd.audit.notes import BadNote
from agentd.audit.tree import Tree, leaf
from agentd.audit.verify import Jump
from agentd.errors import Reason, RequestError, StoreError
from agentd.store import arriving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import apsw

    from agentd.audit.checkpoints import Checkpoints
    from agentd.audit.log import AuditLog
    from agentd.audit.verify import Row
    from agentd.store import Store

LEAST = 4096  # events that are worth a file
_EVENT = '"event":'


@dataclass(frozen=True, slots=True)
class Segment:
    """Events `first` to `last`, in the file `name`; `chain` and `peaks` are what goes on after them."""

    first: int
    last: int
    chain: bytes
    peaks: bytes
    name: str
    digest: str


class Archive:
    """Files in `folder`, and what the store knows of them."""

    def __init__(self, store: Store, audit: AuditLog, checkpoints: Checkpoints, folder: Path) -> None:
        self._store, self._audit, self._checkpoints, self._folder = store, audit, checkpoints, folder

    def segments(self) -> list[Segment]:
        query = "SELECT first, last, chain, peaks, name, digest FROM segment ORDER BY first"
        rows = self._store.read(lambda db: list(db.execute(query)))
        return [Segment(*row) for row in rows]

    def rows(self) -> Iterator[Row | Jump]:
        """All of the log from its first event on; where a file is missing or damaged, what goes on after it.

        Events that are moved to a file meanwhile are read there.
        """
        at = 0
        while True:
            for segment in self.segments():
                if segment.last > at:
                    yield from self._from(segment, at)
                    at = segment.last
            for row in self._audit.rows(after=at):
                if row[0] > at + 1 and any(segment.last > at for segment in self.segments()):
                    break  # there was no gap a moment ago
                yield row
                at = row[0]
            else:
                if not any(segment.last > at for segment in self.segments()):
                    return

    def _from(self, segment: Segment, at: int) -> Iterator[Row | Jump]:
        try:
            yield from (row for row in self._read(segment) if row[0] > at)
            whole = self._digest(segment) == segment.digest
        except (OSError, ValueError, zstandard.ZstdError):
            whole = False
        if not whole:
            absent = segment.last - max(at, segment.first - 1)
            yield Jump(segment.last, absent, segment.chain, segment.peaks)

    def prune(self, keep: int, principal: str, least: int = LEAST) -> Segment | None:
        """Move what is older than the newest `keep` events into a file, up to the last checkpoint before that.

        None if that would be fewer than `least`. Raises RequestError (BAD_FIELD) if it does not verify, StoreError.
        """
        segments = self.segments()
        first = segments[-1].last + 1 if segments else 1
        bound = self._audit.size() - max(keep, 1)
        sizes = [size for size in self._checkpoints.all() if first + least - 1 <= size <= bound]
        if not sizes:
            return None
        start = segments[-1] if segments else None
        segment = self._write(first, max(sizes), start)

        def commit(db: apsw.Connection) -> None:
            if db.execute("SELECT chain FROM event WHERE seq = ?", (segment.last,)).get != segment.chain:
                raise _unfit(segment.last)  # meanwhile another log has begun in its place
            row = (segment.first, segment.last, segment.chain, segment.peaks, segment.name, segment.digest)
            db.execute("INSERT INTO segment (first, last, chain, peaks, name, digest) VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("DELETE FROM event WHERE seq <= ?", (segment.last,))
            db.execute("DELETE FROM payload WHERE seq <= ?", (segment.last,))
            detail = {"first": first, "last": segment.last, "archive": segment.name, "sha256": segment.digest}
            self._audit.append(db, Event(kind="prune", principal=principal, detail=detail))

        self._store.write(commit)
        return segment

    def _write(self, first: int, last: int, before: Segment | None) -> Segment:
        """The file, durable, and found to be what was signed."""
        chain = before.chain if before else self._audit.start
        tree = Tree.kept(first - 1, before.peaks if before else b"")
        name = f"{first}-{last}.jsonl.zst"
        with self._writing(), arriving(self._folder / name) as file:
            with zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed:
                for seq, body, stored in self._audit.rows(after=first - 1):
                    if seq > last:
                        break
                    chain = self._audit.link(chain, body)
                    if chain != stored or seq != tree.size + 1:
                        raise _unfit(seq)
                    tree.push(leaf(body))
                    packed.write(jsonl(Record(seq, body.decode(), stored)).encode() + b"\n")
            if not self._was_signed(tree):
                raise _unfit(last)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Segment(first, last, chain, bytes(tree), name, digest)

    def _was_signed(self, tree: Tree) -> bool:
        try:
            point = self._checkpoints.verifier.open(self._checkpoints.all().get(tree.size, ""))
        except BadNote:
            return False
        return point.root == tree.root

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises StoreError."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield
        except OSError as e:
            raise StoreError(
                Reason.STORE_FULL if e.errno == errno.ENOSPC else Reason.AUDIT_UNAVAILABLE,
                f"The oldest events can't be moved to {self._folder}: {e.strerror}. They stay where they are.",
                hint="Check the disk.",
                metadata={"path": str(self._folder)},
            ) from e

    def _digest(self, segment: Segment) -> str:
        """Raises OSError."""
        with (self._folder / segment.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _read(self, segment: Segment) -> Iterator[Row]:
        """Raises OSError, ValueError, ZstdError."""
        found = _lines(self._folder / segment.name)
        for seq, line in zip(range(segment.first, segment.last + 1), found, strict=True):
            chain = bytes.fromhex(json.loads(line)["chain"])
            yield seq, line[line.index(_EVENT) + len(_EVENT) : -1].encode(), chain


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield line.removesuffix("\n")


def _unfit(seq: int) -> RequestError:
    return RequestError(
        Reason.BAD_FIELD,
        f"The log can't be pruned: event {seq} is not what was written and signed. Nothing was moved.",
        hint="`agentd audit verify` says more.",
        metadata={"sequence": str(seq)},
    )
