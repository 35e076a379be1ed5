"""One token of many: the most likely one, or one at random as Gemma recommends (top-k 64, top-p 0.95).

In numpy: of the 262,144 logits only the few that can be taken are looked at more than once. llama.cpp's own chain copies
all of them first, 0.55 ms a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOP_K = 64
TOP_P = 0.95
_NEAR = (4.0, 16.0)  # below the highest logit: where the top-k are looked for first


class NoProbabilities(Exception):
    """The logits are not numbers, or none of them can be taken."""


class Sampler:
    """The same `seed` takes the same tokens of the same logits. `temperature` 0: always the most likely."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._random = np.random.default_rng(seed) if temperature > 0 else None

    def pick(self, logits: NDArray[np.float32], among: NDArray[np.int64] | None = None) -> int:
        """A token's id: of all, or of those in `among`. `logits` has the shape [vocabulary]. Raises NoProbabilities."""
        if among is not None:
            if not len(among):
                raise NoProbabilities
            return int(among[self._index(logits[among])])
        return self._index(logits)

    def _index(self, logits: NDArray[np.float32]) -> int:
        best = int(logits.argmax())  # of a NaN, if there is one
        if not np.isfinite(logits[best]):
            raise NoProbabilities
        if self._random is None:
            return best
        top = _top(logits, float(logits[best]))
        chances = np.exp(logits[top].astype(np.float64) - float(logits[best]))
        chances /= chances.sum()
        kept = int(np.searchsorted(np.cumsum(chances), TOP_P)) + 1  # as many as it takes to reach it, at least one
        chances = (chances[:kept] / chances[0]) ** (1 / self._temperature)  # of the best one that is 1, however cold it is
        drawn = int(np.searchsorted(np.cumsum(chances), self._random.random() * chances.sum(), side="right"))
        return int(top[min(drawn, kept - 1)])


def _top(logits: NDArray[np.float32], best: float) -> NDArray[np.int64]:
    """Where the TOP_K highest are, in falling order."""
    for near in _NEAR:
        found = np.flatnonzero(logits >= best - near)
        if len(found) >= TOP_K:
            break
    else:
        found = np.argpartition(logits, -TOP_K)[-TOP_K:] if len(logits) > TOP_K else np.arange(len(logits))
    if len(found) > 4 * TOP_K:  # a flat distribution: to sort all of them would take milliseconds
        found = found[np.argpartition(logits[found], -TOP_K)[-TOP_K:]]
    return found[np.argsort(-logits[found], kind="stable")][:TOP_K]
