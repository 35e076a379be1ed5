"""Three-way merge of lines: what two sides have made of one text, if they did not touch the same place."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST = 1 << 20


def merge(base: bytes, ours: bytes, theirs: bytes) -> bytes | None:
    """Both changes of `base` in one; None where they touch or meet, or where one is no text of moderate size.

    Strict on purpose: a place that either side might mean is left for a person.
    """
    texts = (base, ours, theirs)
    if any(len(text) > _LONGEST or b"\0" in text for text in texts):
        return None
    lines = [text.splitlines(keepends=True) for text in texts]
    mine, its = _hunks(lines[0], lines[1]), _hunks(lines[0], lines[2])
    if any(_meet(one, other) for one in mine for other in its if one != other):
        return None
    merged: list[bytes] = []
    at = 0
    for start, end, replacement in sorted({*mine, *its}):
        merged += [*lines[0][at:start], *replacement]
        at = end
    return b"".join((*merged, *lines[0][at:]))


def _hunks(base: Sequence[bytes], other: Sequence[bytes]) -> list[tuple[int, int, tuple[bytes, ...]]]:
    """(first line, line past the last, what stands there instead)."""
    codes = SequenceMatcher(None, base, other, autojunk=False).get_opcodes()
    return [(start, end, tuple(other[a:b])) for tag, start, end, a, b in codes if tag != "equal"]


def _meet(one: tuple[int, int, tuple[bytes, ...]], other: tuple[int, int, tuple[bytes, ...]]) -> bool:
    """Whether they overlap, or leave no line between them."""
    return one[0] <= other[1] and other[0] <= one[1]
