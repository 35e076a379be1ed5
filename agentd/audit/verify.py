"""What can be said of a log: as far as it is what was written, as far as somebody has signed that, and what is missing.

The chain finds whatever was changed by somebody who did not recompute it. Checkpoints find the rest: who recomputes the chain
has no key. An end that was cut off is found by an anchor only, as everything that is left fits together.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentd.audit.events import parsed
from agentd.audit.notes import BadNote, Verifier
from agentd.audit.payloads import MARK, Kept, commitments, is_of
from agentd.audit.tree import Tree, leaf, linked
from agentd.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from agentd.audit.witness import Witness

    Row = tuple[int, bytes, bytes]


REDACT = b'"kind":"redact"'
_PROGRESS_EVERY = 4096


@dataclass(frozen=True, slots=True)
class Verification:
    """`bad` is the first row that is not what was written, or None; `valid` counts the rows before it.

    `attested` of them are covered by a signed checkpoint, the last of them recorded at `attested_ns`; `anchored` by one that
    was kept elsewhere. `lost` are events that a checkpoint speaks of and that are not there any more. `absent` are in an
    archive that is not there, or damaged; that they were what was signed is known all the same. `witnessed` are the newest
    checkpoints that known witnesses have signed, too.
    """

    valid: int
    head: bytes
    bad: int | None
    why: str = ""
    attested: int = 0
    attested_ns: int = 0
    anchored: int = 0
    lost: int = 0
    absent: int = 0
    witnessed: tuple[Witnessed, ...] = ()


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A witness has signed the first `size` events, at `time_s` seconds since 1970 by its clock."""

    name: str
    size: int
    time_s: int


@dataclass(frozen=True, slots=True)
class Jump:
    """In the place of events up to `last`: the chain value after them, and the tree's peaks. `absent` of them are in a file
    that is not there, or is not the one that was written; those that could be read of it have been looked at.
    """

    last: int
    absent: int
    chain: bytes
    peaks: bytes


@dataclass(slots=True)
class _Claims:
    """What signed notes say: roots by size. `broken` says what is wrong with a note that is none of the log's."""

    roots: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    anchored: set[int] = field(default_factory=set)
    witnessed: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """By witness: when it has signed which sizes."""
    broken: str = ""

    def add(self, verifier: Verifier, note: str, witnesses: Sequence[Witness], *, anchored: bool) -> None:
        try:
            point = verifier.open(note)
        except BadNote as e:
            if not anchored:  # an anchor may hold notes of other logs, too
                self.broken = self.broken or f"a checkpoint in the store is not what was signed: {e}"
            return
        if point.origin != verifier.name:
            return
        self.roots[point.size].add(point.root)
        if anchored:
            self.anchored.add(point.size)
        for witness in witnesses:
            if at := witness.has_signed(note):
                self.witnessed[witness.name][point.size] = at


@dataclass(frozen=True, slots=True)
class Claims:
    """The notes that a log is held against: `kept` are those beside it, `anchors` those from elsewhere."""

    verifier: Verifier | None = None
    kept: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    witnesses: tuple[Witness, ...] = ()
    broken: str = ""
    """Why those beside the log can't be had."""

    def read(self) -> _Claims:
        read = _Claims(broken=self.broken)
        if self.verifier:
            for note in self.kept:
                read.add(self.verifier, note, self.witnesses, anchored=False)
            for note in self.anchors:
                read.add(self.verifier, note, self.witnesses, anchored=True)
        return read


_NO_CLAIMS = Claims()


@dataclass(slots=True)
class _Beside:
    """The payloads of the events from number `first` on, looked at as these pass by."""

    coming: Iterator[Kept | None]
    first: int
    gone: set[tuple[int, str]] = field(default_factory=set)
    """Event and field of what is not there, as long as no redaction says why."""
    _next: Kept | None = None
    _at_end: bool = False

    def fault(self, seq: int, body: bytes) -> str:
        """What is wrong with those of this event."""
        if seq < self.first:
            return ""
        if REDACT in body:
            self._forgive(parsed(body))
        missing = body.count(MARK)
        if not missing and self._next is not None and self._next.seq > seq:
            return ""  # as for most
        own = self._of(seq, wait=missing > 0)
        for kept in own:
            if not is_of(kept, body):
                return f"the value of {kept.field} of event {seq} is not what was written"
        if missing != len(own):
            self.gone |= {(seq, name) for name in commitments(parsed(body)).keys() - {kept.field for kept in own}}
        return ""

    def _of(self, seq: int, *, wait: bool) -> list[Kept]:
        """Those of one event, as far as they are there by now."""
        own: list[Kept] = []
        while True:
            if self._next is None and (wait or not self._at_end):
                self._next = next(self.coming, None)
                self._at_end = self._next is None
            if self._next is None or self._next.seq > seq:
                return own
            if self._next.seq == seq:
                own.append(self._next)
            self._next, wait = None, False

    def _forgive(self, told: dict[str, Any]) -> None:
        detail = told.get("detail")
        if told["kind"] == "redact" and isinstance(detail, dict):
            also = detail.get("also")
            for name, events in [
                (detail.get("field"), detail.get("events")),
                *(also.items() if isinstance(also, dict) else ()),
            ]:
                if isinstance(name, str) and isinstance(events, list):
                    self.gone -= {(each, name) for each in events if isinstance(each, int)}


@dataclass(slots=True)
class _Walk:
    """Over all rows: chain, tree, and what was found so far."""

    claims: _Claims
    beside: _Beside
    chain: bytes
    tree: Tree = field(default_factory=Tree)
    absent: int = 0
    attested: int = 0
    anchored: int = 0
    attested_body: bytes = b""

    def step(self, row: Row | Jump) -> tuple[int, str] | None:
        """The first event that is not what was written, and why, if it is found here."""
        body = b""
        if isinstance(row, Jump):
            self.absent += row.absent
            self.chain, self.tree = row.chain, Tree.kept(row.last, row.peaks)
        else:
            seq, body, stored = row
            expected = self.tree.size + 1
            if seq != expected:
                return min(seq, expected), f"event {expected} is missing"
            own = leaf(body)
            if (computed := linked(self.chain, own)) != stored:
                return seq, f"event {seq} does not continue the chain"
            if why := self.beside.fault(seq, body):
                return seq, why
            self.chain = computed
            self.tree.push(own)
        if roots := self.claims.roots.get(self.tree.size):
            if roots != {self.tree.root}:
                first = self.attested + 1
                return first, f"the events from {first} to {self.tree.size} are not those that were signed"
            self.attested, self.attested_body = self.tree.size, body
            self.anchored = self.tree.size if self.tree.size in self.claims.anchored else self.anchored
        return None


def verify(
    rows: Iterable[Row | Jump],
    start: bytes,
    claims: Claims = _NO_CLAIMS,
    payloads: Iterable[Kept | None] = (),
    first_kept: Callable[[], int] = lambda: 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Recompute all of it, in constant memory. `payloads` are those of the events from number `first_kept` on, which may move
    on meanwhile. `progress` gets the number of events so far, now and then; what it raises ends the matter.
    """
    read = claims.read()
    walk = _Walk(read, _Beside(iter(payloads), 1), start)
    found: tuple[int, str] | None = None
    try:
        walk.beside.first = first_kept()
        for row in rows:
            if found := walk.step(row):
                break
            if walk.tree.size % _PROGRESS_EVERY == 0:
                progress(walk.tree.size)
        moved = first_kept()
        if found is None and (gone := min((each for each in walk.beside.gone if each[0] >= moved), default=None)):
            found = gone[0], f"the value of {gone[1]} of event {gone[0]} is gone, and no redaction says so"
    except StoreError as e:
        at = walk.tree.size + 1
        found = at, f"event {at} can't be read: {e.message}"
    if found is None and read.broken:
        found = walk.attested + 1, read.broken
    bad, why = found or (None, "")
    size = walk.tree.size
    return Verification(
        valid=size if bad is None else bad - 1,
        head=walk.chain,
        bad=bad,
        why=why,
        attested=walk.attested,
        attested_ns=int(parsed(walk.attested_body)["time_ns"]),
        anchored=walk.anchored,
        lost=0 if found else max([0, *(each - size for each in read.roots)]),
        absent=walk.absent,
        witnessed=tuple(_newest(name, signed, walk.attested) for name, signed in read.witnessed.items()),
    )


def _newest(name: str, signed: Mapping[int, int], attested: int) -> Witnessed:
    size = max((each for each in signed if each <= attested), default=0)
    return Witnessed(name, size, signed.get(size, 0))
