"""Checkpoints of the log: made when there is enough new, kept beside it, and given to anchors elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from agentd.audit.notes import BadNote, Checkpoint
from agentd.audit.tree import Tree, consistency, inclusion, leaf, proved
from agentd.audit.verify import Claims, Jump
from agentd.errors import AgentdError, Reason, RequestError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from agentd.audit.anchors import Anchor
    from agentd.audit.log import AuditLog
    from agentd.audit.notes import Signer, Verifier
    from agentd.audit.verify import Row, Verification
    from agentd.audit.witness import Witness
    from agentd.store import Store

EVERY_EVENTS = 256
EVERY_S = 3600.0
_log = logging.getLogger(__name__)


class Checkpoints:
    """`signer` has the log's key; its name is the log's origin."""

    def __init__(
        self, store: Store, audit: AuditLog, signer: Signer, anchors: Sequence[Anchor] = (), witnesses: Sequence[Witness] = ()
    ) -> None:
        self._store, self._audit, self._signer, self._anchors = store, audit, signer, tuple(anchors)
        self.witnesses = tuple(witnesses)
        self.rows: Callable[[], Iterable[Row | Jump]] = audit.rows
        """Those that are verified and proved: of the log, and of its archives where there are some."""
        self._making = threading.Lock()
        self._made_s = time.monotonic()
        self._unpublished: dict[str, str] = {}

    @property
    def verifier(self) -> Verifier:
        return self._signer.verifier

    def latest(self) -> str:
        """The newest note; empty if there is none yet."""
        query = "SELECT CAST(note AS BLOB) FROM checkpoint ORDER BY size DESC LIMIT 1"
        return bytes(self._store.read(lambda db: db.execute(query).get) or b"").decode("utf-8", "replace")

    def is_due(self) -> bool:
        """Whether there are many new events, or some and the last checkpoint was long ago."""
        new = self._audit.size() - self._last().size
        return new >= EVERY_EVENTS or (new > 0 and time.monotonic() - self._made_s >= EVERY_S)

    def make(self) -> str:
        """A checkpoint of all events there are, durable and with the anchors when it returns; the newest one if nothing is new.

        An anchor that can't be reached gets the newest note the next time. A log that is closed gets none. Raises StoreError.
        """
        with self._making:
            if self._audit.closed:
                return self.latest()
            tree = self._last()
            size = tree.size
            for _, body in self._audit.bodies(after=size):
                tree.push(leaf(body))
            if tree.size > size or not size:
                note = self._cosigned(self._signer.sign(Checkpoint(self.verifier.name, tree.size, tree.root)), tree.size)
                row = (tree.size, bytes(tree), note)
                self._store.write(lambda db: db.execute("INSERT OR REPLACE INTO checkpoint VALUES (?, ?, ?)", row))
                self._unpublished |= {anchor.name: note for anchor in self._anchors}
            self._made_s = time.monotonic()
            self._publish()
            return self.latest()

    def begin_anew(self, signer: Signer, begin: Callable[[], None]) -> None:
        """With another name and key, for a log that `begin` puts in this one's place: no key may sign the other's events."""
        with self._making:
            begin()
            self._signer = signer
            self._unpublished.clear()

    def _cosigned(self, note: str, size: int) -> str:
        """By the witnesses that answer."""
        for witness in self.witnesses:
            if witness.url:
                try:
                    note = witness.ask(note, size, lambda old: self.prove_consistency(old, size))
                except (OSError, AgentdError) as e:
                    _log.warning("the witness %s has not signed the checkpoint: %s", witness.name, e)
        return note

    def _publish(self) -> None:
        for anchor in self._anchors:
            if note := self._unpublished.get(anchor.name):
                try:
                    anchor.publish(note)
                except OSError as e:
                    _log.warning("the checkpoint could not be given to %s: %s", anchor.name, e)
                else:
                    del self._unpublished[anchor.name]

    def _last(self) -> Tree:
        """As it was at the newest checkpoint."""
        query = "SELECT size, peaks FROM checkpoint ORDER BY size DESC LIMIT 1"
        row = self._store.read(lambda db: db.execute(query).get)
        return Tree.kept(*row) if row else Tree()

    def all(self) -> dict[int, str]:
        """Notes by size."""
        query = "SELECT size, coalesce(CAST(note AS BLOB), x'') FROM checkpoint"
        rows = self._store.read(lambda db: list(db.execute(query)))
        return {int(size): note.decode("utf-8", "replace") for size, note in rows}

    def verify(self, anchors: Iterable[str] = (), progress: Callable[[int], None] = lambda _: None) -> Verification:
        """All that can be said of the log; `anchors` are notes that somebody has kept elsewhere."""
        try:
            kept, broken = tuple(self.all().values()), ""
        except StoreError as e:
            kept, broken = (), f"the checkpoints in the store can't be read: {e.message}"
        claims = Claims(self.verifier, kept, tuple(anchors), self.witnesses, broken)
        return self._audit.verify(claims, self.rows(), progress)

    # -- proofs

    def prove_inclusion(self, seq: int, size: int) -> tuple[bytes, tuple[bytes, ...]]:
        """The leaf of event `seq`, and the hashes that lead from it to the root of the first `size` events.

        Raises RequestError (BAD_FIELD).
        """
        if not 1 <= seq <= size or size > self._audit.size():
            raise _out_of_range("sequence", f"there is no event {seq} among the first {size}")
        own, *hashes = self._proved([(seq - 1, seq), *inclusion(seq - 1, size)])
        return own, tuple(hashes)

    def prove_consistency(self, old: int, size: int) -> tuple[bytes, ...]:
        """The hashes that show that the first `old` of `size` events were the same then. Raises RequestError (BAD_FIELD)."""
        if not 1 <= old <= size or size > self._audit.size():
            raise _out_of_range("size", f"{old} and {size} are no two sizes that this log had, one after the other")
        return self._proved(consistency(old, size))

    def _proved(self, spans: Sequence[tuple[int, int]]) -> tuple[bytes, ...]:
        there = (row for row in self.rows() if not isinstance(row, Jump))
        try:
            return proved(spans, ((seq - 1, leaf(body)) for seq, body, _ in there))
        except LookupError:
            raise _out_of_range(
                "sequence", "some of the events that the proof needs are in an archive that is not there"
            ) from None

    def contradiction(self, anchors: Iterable[str]) -> str:
        """Why the log can't be the one that was signed, as far as that is seen without going through it; empty if it can.

        `anchors` are notes that were kept elsewhere; those of others do not count.
        """
        size, kept, unknown = self._audit.size(), self.all(), 0
        for note in (*anchors, kept[max(kept)] if kept else ""):
            point = _unchecked(note)
            if point is None or point.origin != self.verifier.name or (point.size <= size and _is(kept, point)):
                continue
            if not self._has_signed(note):  # looked at only here: an anchor file may have many, and nearly all are known
                continue
            if point.size > size:
                return f"{point.size - size} events are missing at its end, it had {point.size} when that was signed"
            unknown = max(unknown, point.size)
        if unknown:
            return f"its first {unknown} events were signed, and of that it knows nothing: it is an older one, put back"
        return ""

    def _has_signed(self, note: str) -> bool:
        try:
            self.verifier.open(note)
        except BadNote:
            return False
        return True


def _unchecked(note: str) -> Checkpoint | None:
    try:
        return Checkpoint.parse(note.partition("\n\n")[0] + "\n")
    except BadNote:
        return None


def _is(kept: dict[int, str], point: Checkpoint) -> bool:
    return not point.size or kept.get(point.size, "").startswith(point.text)


def _out_of_range(field: str, why: str) -> RequestError:
    return RequestError(Reason.BAD_FIELD, f"{why[0].upper()}{why[1:]}.", field=field, metadata={"field": field})
