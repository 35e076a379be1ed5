"""What can be said of a log: as far as it is what was written, as far as somebody has signed that, and what is missing.

The chain finds whatever was changed by somebody who did not recompute it. Checkpoints find the rest: who recomputes the chain
has no key. An end that was cut off is found by an anchor only, as everything that is left fits together.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.audit.notes import BadNote, Verifier
from agentd.audit.tree import Tree, leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from agentd.audit.witness import Witness

    Row = tuple[int, bytes, bytes]
    Link = Callable[[bytes, bytes], bytes]


@dataclass(frozen=True, slots=True)
class Verification:
    """`bad` is the first row that is not what was written, or None; `valid` counts the rows before it.

    `attested` of them are covered by a signed checkpoint, `anchored` by one that was kept elsewhere. `lost` are events that
    a checkpoint speaks of and that are not there any more. `absent` are in an archive that is not there, or damaged; that they
    were what was signed is known all the same. `witnessed` are covered by a checkpoint that a known witness has signed, too.
    """

    valid: int
    head: bytes
    bad: int | None
    why: str = ""
    attested: int = 0
    anchored: int = 0
    lost: int = 0
    absent: int = 0
    witnessed: int = 0


@dataclass(frozen=True, slots=True)
class Jump:
    """In the place of events up to `last` that are not at hand: the chain value after them, and the tree's peaks."""

    last: int
    chain: bytes
    peaks: bytes


@dataclass(slots=True)
class _Claims:
    """What signed notes say: roots by size. `broken` says what is wrong with a note that is none of the log's."""

    roots: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    anchored: set[int] = field(default_factory=set)
    witnessed: set[int] = field(default_factory=set)
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
        if any(witness.has_signed(note) for witness in witnesses):
            self.witnessed.add(point.size)


def verify(
    rows: Iterable[Row | Jump],
    link: Link,
    start: bytes,
    verifier: Verifier | None = None,
    kept: Iterable[str] = (),
    anchors: Iterable[str] = (),
    witnesses: Sequence[Witness] = (),
) -> Verification:
    """Recompute all of it, in constant memory. `kept` are the notes beside the log, `anchors` those from elsewhere."""
    claims = _Claims()
    if verifier:
        for note in kept:
            claims.add(verifier, note, witnesses, anchored=False)
        for note in anchors:
            claims.add(verifier, note, witnesses, anchored=True)
    chain, tree, attested, anchored, witnessed, absent = start, Tree(), 0, 0, 0, 0
    bad, why = None, ""
    for row in rows:
        if isinstance(row, Jump):
            absent += row.last - tree.size
            chain, tree = row.chain, Tree.kept(row.last, row.peaks)
        else:
            seq, body, stored = row
            expected = tree.size + 1
            computed = link(chain, body) if seq == expected else b""
            if computed != stored:
                bad = min(seq, expected)
                why = f"event {expected} is missing" if seq != expected else f"event {seq} does not continue the chain"
                break
            chain = computed
            tree.push(leaf(body))
        if roots := claims.roots.get(tree.size):
            if roots != {tree.root}:
                bad = attested + 1
                why = f"the events from {bad} to {tree.size} are not those that were signed"
                break
            attested = tree.size
            anchored = tree.size if tree.size in claims.anchored else anchored
            witnessed = tree.size if tree.size in claims.witnessed else witnessed
    if bad is None and claims.broken:
        bad, why = attested + 1, claims.broken
    valid = tree.size if bad is None else bad - 1
    lost = max([0, *(size - tree.size for size in claims.roots)]) if bad is None else 0
    return Verification(valid, chain, bad, why, attested, anchored, lost, absent, witnessed)
