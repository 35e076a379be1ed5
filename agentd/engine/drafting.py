"""Drafts by prompt lookup: agents copy paths, names and results, so what followed the same tokens before may follow again.

A draft is decoded in one pass with the token before it, and what the model would not have written itself is dropped: the
text is the same as without. It pays where a pass of several tokens takes little more than one of a single token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST = 7
"""Tokens of a draft: with the one before them 8 rows, a multiple of the 4 that llama.cpp's kernels take at once."""
_GRAMS = (3, 2)
"""So many tokens must have stood there before, the longer ones looked for first: a path is copied from its second token on."""
_SMOOTHING = 0.15
_PAYS = 1.05
_ROW_COSTS = 0.2  # of a pass of one row, until it has been measured (E2B, Q4_0, 2 cores)


@dataclass(slots=True)
class Drafter:
    """Of one generation. `chance` is how often a drafted token came true, of late."""

    chance: float = 0.5
    _proposed: list[int] = field(default_factory=list)
    _seen: dict[tuple[int, ...], int] = field(default_factory=dict)
    _upto: int = 0

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """What followed the last few tokens when they stood there before."""
        for end in range(max(self._upto, _GRAMS[0]), len(tokens)):
            for gram in _GRAMS:
                self._seen[tuple(tokens[end - gram : end])] = end
        self._upto = len(tokens)
        found = next((self._seen[key] for gram in _GRAMS if (key := tuple(tokens[-gram:])) in self._seen), 0)
        self._proposed = list(tokens[found : found + LONGEST]) if found else []
        return self._proposed

    def compare(self, written: Sequence[int]) -> None:
        """Learn from what came instead, whether what was proposed was decoded as a draft or not."""
        proposed, self._proposed = self._proposed, []
        for guess, token in zip(proposed, written, strict=False):
            self.chance += _SMOOTHING * ((guess == token) - self.chance)
            if guess != token:
                return


@dataclass(slots=True)
class Costs:
    """Seconds of a pass, by its number of rows."""

    _known: dict[int, float] = field(default_factory=dict)

    def told(self, rows: int, seconds: float) -> None:
        before = self._known.get(rows, seconds)
        self._known[rows] = before + _SMOOTHING * (seconds - before)

    def of(self, rows: int) -> float:
        """In units of a pass of one row."""
        one = self._known.get(1, 0.0)
        if rows == 1 or not one or rows not in self._known:
            return 1 + _ROW_COSTS * (rows - 1)
        return max(1.0, self._known[rows] / one)

    def best_draft(self, chance: float, most: int) -> int:
        """How many tokens to draft so that the most are written in a second; 0 where none pay."""
        best, gain = 0, _PAYS
        expected = 1.0
        for n in range(1, most + 1):
            expected += chance**n
            if n in (1, 3, LONGEST) and expected / self.of(n + 1) > gain:
                best, gain = n, expected / self.of(n + 1)
        return best
