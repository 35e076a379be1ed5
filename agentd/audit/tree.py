"""The Merkle tree over the log, RFC 6962 section 2.1: one hash for all of it, and short proofs about parts of it.

Leaves are SHA-256(0x00 || body), nodes SHA-256(0x01 || left || right). A tree of any size is described by the roots of the
perfect trees that it consists of, largest first: at most one for each bit of its size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Span = tuple[int, int]

HASH_BYTES = 32
EMPTY = hashlib.sha256(b"").digest()


def leaf(body: bytes) -> bytes:
    return hashlib.sha256(b"\0" + body).digest()


def linked(chain: bytes, leaf_hash: bytes) -> bytes:
    """The chain value that covers a leaf and all before it. Not RFC 6962's: it is for whoever has all rows, one by one."""
    return hashlib.sha256(chain + leaf_hash).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


@dataclass(slots=True)
class Tree:
    """Grows by one leaf at a time. `peaks` are the roots of its perfect trees, largest first."""

    size: int = 0
    peaks: list[bytes] = field(default_factory=list)

    def push(self, leaf_hash: bytes) -> None:
        self.size += 1
        merged, rest = leaf_hash, self.size
        while rest % 2 == 0:
            merged, rest = node(self.peaks.pop(), merged), rest // 2
        self.peaks.append(merged)

    @classmethod
    def kept(cls, size: int, peaks: bytes) -> Self:
        """A tree as `bytes(tree)` has kept it."""
        return cls(size, [peaks[at : at + HASH_BYTES] for at in range(0, len(peaks), HASH_BYTES)])

    def __bytes__(self) -> bytes:
        """Its peaks, one after the other."""
        return b"".join(self.peaks)

    @property
    def root(self) -> bytes:
        if not self.peaks:
            return EMPTY
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = node(peak, root)
        return root


def root_of(leaves: Iterable[bytes]) -> bytes:
    tree = Tree()
    for each in leaves:
        tree.push(each)
    return tree.root


def inclusion(index: int, size: int) -> list[Span]:
    """Whose roots prove that leaf `index` (from 0) is in a tree of `size`: spans of leaves [first, end), nearest first."""
    return _path(index, 0, size)


def _path(index: int, first: int, end: int) -> list[Span]:
    if end - first == 1:
        return []
    middle = first + _split(end - first)
    if index < middle:
        return [*_path(index, first, middle), (middle, end)]
    return [*_path(index, middle, end), (first, middle)]


def consistency(old: int, size: int) -> list[Span]:
    """Whose roots prove that a tree of `size` begins with that of `old` leaves; none if there is nothing to prove."""
    return _subproof(old, 0, size, whole=True) if 0 < old < size else []


def _subproof(old: int, first: int, end: int, *, whole: bool) -> list[Span]:
    """`old` counts from the beginning of the log; `whole` while the part looked at is all of the old tree."""
    if old == end:
        return [] if whole else [(first, end)]
    middle = first + _split(end - first)
    if old <= middle:
        return [*_subproof(old, first, middle, whole=whole), (middle, end)]
    return [*_subproof(old, middle, end, whole=False), (first, middle)]


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def includes(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows that the leaf is in the tree of that size and root. RFC 9162, 2.1.3.2."""
    if not 0 <= index < size:
        return False
    here, last, computed = index, size - 1, leaf_hash
    for each in proof:
        if last == 0:
            return False
        if here & 1 or here == last:
            computed = node(each, computed)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            computed = node(computed, each)
        here, last = here >> 1, last >> 1
    return last == 0 and computed == root


def is_consistent(old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows that the tree of `size` begins with that of `old`. RFC 9162, 2.1.4.2."""
    if not 0 < old <= size:
        return False
    if old == size:
        return not proof and old_root == root
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    if not path:
        return False
    here, last = old - 1, size - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    before = after = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if here & 1 or here == last:
            before, after = node(each, before), node(each, after)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            after = node(after, each)
        here, last = here >> 1, last >> 1
    return last == 0 and before == old_root and after == root


def proved(spans: Sequence[Span], leaves: Iterable[tuple[int, bytes]]) -> tuple[bytes, ...]:
    """The hashes of a proof; `leaves` are (index, hash) from the first one on, gone through once.

    Raises LookupError if some that are needed are not among them.
    """
    trees = {span: Tree() for span in sorted(spans)}
    waiting = iter(trees.items())
    span, tree = next(waiting, ((0, 0), Tree()))
    for index, hashed in leaves:
        while index >= span[1]:
            if tree.size != span[1] - span[0]:
                raise LookupError(span)
            if (following := next(waiting, None)) is None:
                return tuple(trees[each].root for each in spans)
            span, tree = following
        if index >= span[0]:
            tree.push(hashed)
    if any(tree.size != end - first for (first, end), tree in trees.items()):
        raise LookupError(spans)
    return tuple(trees[each].root for each in spans)
