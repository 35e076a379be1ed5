"""A modelled board: two thermal nodes, a firmware that throttles, an engine whose power falls with threads and duty.

Modelled on a Raspberry Pi 5 without a fan; no such board was measured for this.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentd.budgets.governor import speed

FULL_SPEED = 8.0  # tok/s


@dataclass
class Board:
    """`resistance` in K/W from chip to air; powers in watts, capacities in J/K."""

    resistance: float = 14.0
    ambient: float = 25.0
    idle_w: float = 1.6
    full_w: float = 3.1
    chip: float = 25.0
    case: float = 25.0
    threads: int = 4
    tokens: float = 0.0
    firmware: float = 1.0

    def __post_init__(self) -> None:
        self.chip = self.case = self.ambient + self.resistance * self.idle_w

    def run(self, seconds: float, threads: int, duty: float, *, busy: bool = True, tick: float = 0.1) -> None:
        """Go on for so long. The firmware lowers the clock between 80 and 85 degrees, at a cost of speed and power."""
        share = threads / self.threads * duty if busy else 0.0
        for _ in range(round(seconds / tick)):
            self.firmware = max(0.6, min(1.0, 1.0 - (self.chip - 80.0) / 5.0 * 0.4))
            watts = self.idle_w + self.full_w * share * self.firmware**2
            between = (self.chip - self.case) / (self.resistance * 0.25)
            away = (self.case - self.ambient) / (self.resistance * 0.75)
            self.chip += (watts - between) / 3.0 * tick
            self.case += (between - away) / 30.0 * tick
            if busy:
                self.tokens += FULL_SPEED * speed(threads, self.threads) * duty * self.firmware * tick
