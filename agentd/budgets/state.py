"""The words of budgets: what was read, in which state that puts the daemon, what it may do then."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

Name = Literal["thermal", "battery", "memory"]
NAMES: tuple[Name, ...] = ("thermal", "battery", "memory")


class State(IntEnum):
    """The worse, the larger."""

    NOMINAL = 0
    REDUCED = 1
    PAUSED = 2
    SHED = 3


@dataclass(frozen=True, slots=True)
class Readings:
    """What the sensors said in one round; None where there is none, or where it said nothing that can be true.

    `temperature_c` is the hottest of those that count, `thermal_status` Android's (0 none to 6 shutdown), `headroom` Android's
    (1.0 is where it throttles severely). Pressure is the share of the last 10 s in which some, or all, tasks waited for memory.
    Of the engine's process: `anonymous_mib` with what is in swap, of its weights what is mapped and resident, what is in the
    page cache, and all; `reread_pct` is how much of them is read from disk again for each pass over them. `power_w` is that of
    the whole device.
    `sources` says where each value is from, `faults` why others are missing.
    """

    temperature_c: float | None = None
    thermal_status: int | None = None
    headroom: float | None = None
    undervoltage: bool | None = None
    throttled: int | None = None
    """What `vcgencmd get_throttled` says, bit by bit."""
    battery_pct: float | None = None
    charging: bool | None = None
    available_mib: float | None = None
    pressure_some_pct: float | None = None
    pressure_full_pct: float | None = None
    memory_limit_mib: float | None = None
    anonymous_mib: float | None = None
    mapped_mib: float | None = None
    cached_mib: float | None = None
    weights_mib: float | None = None
    reread_pct: float | None = None
    power_w: float | None = None
    battery_c: float | None = None
    sources: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    at: float | None = None
    """When it was read, by the governor's clock; None for now."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the engine and new work may do now. `duty` is the share of the time in which it computes.

    `background` says whether work that can wait is to run. `retry_s` is when to ask again, as far as can be said.
    """

    state: State = State.NOMINAL
    cause: Name | None = None
    """The budget that is worst, if any is not nominal."""
    reason: str = ""
    threads: int = 0
    """0 for all that the engine was given."""
    duty: float = 1.0
    background: bool = True
    retry_s: float = 0.0
    trim: bool = False
    """Whether memory is short: what can be made again is given back, and the model too while it has nothing to do."""

    @property
    def holds(self) -> bool:
        """Whether nothing new is decoded."""
        return self.state >= State.PAUSED
