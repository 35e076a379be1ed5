"""When a grant applies: expiry by a clock that never goes back, hours of the day, power, budgets."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")


@dataclass(slots=True)
class Clock:
    """Nanoseconds since 1970, never less than before, `seen` included: the newest time on record when the daemon started.

    A board without a battery starts in the past, and what has expired must not come back for that. A jump into the
    future that is taken back later leaves this clock ahead; what is granted for an hour still lasts one.
    """

    seen: int = 0
    wall: Callable[[], int] = time.time_ns
    steady: Callable[[], int] = time.monotonic_ns
    _base: int = field(init=False)
    _started: int = field(init=False)

    def __post_init__(self) -> None:
        self._base, self._started = max(self.seen, self.wall()), self.steady()

    def now(self) -> int:
        now = max(self.wall(), self._base + self.steady() - self._started)
        if now > self._base + self.steady() - self._started:  # the wall clock was put forward: go on from there
            self._base, self._started = now, self.steady()
        return now


@dataclass(frozen=True, slots=True)
class Moment:
    """What conditions are held against. `charging` and `nominal` are None where nothing measures it."""

    now_ns: int
    minute: int
    """Of the local day."""
    charging: bool | None = None
    nominal: bool | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """All must hold. `hours` is local time, such as 07:00-22:30; 22:00-06:00 lasts over midnight."""

    charging: bool = False
    hours: str = ""
    nominal: bool = False

    def __post_init__(self) -> None:
        if self.hours and (not _HOURS.fullmatch(self.hours) or self.hours[:5] == self.hours[6:]):
            raise RequestError(
                Reason.GRANT_INVALID,
                f"{self.hours!r} are no hours: write them as 07:00-22:30.",
                field="grant.hours",
                metadata={"hours": self.hours},
            )

    def __str__(self) -> str:
        parts = (
            "while charging" if self.charging else "",
            f"between {self.hours.replace('-', ' and ')}" if self.hours else "",
            "while budgets are nominal" if self.nominal else "",
        )
        return ", ".join(filter(None, parts))

    def unmet(self, moment: Moment) -> str:
        """The first condition that does not hold, in words; empty if all do. What nothing measures does not hold."""
        if self.charging and not moment.charging:
            return "it holds only while charging" + (", and nothing here says so" if moment.charging is None else "")
        if self.hours and not _between(moment.minute, self.hours):
            return f"it holds only between {self.hours.replace('-', ' and ')}"
        if self.nominal and not moment.nominal:
            return "it holds only while budgets are nominal" + (", and none is measured" if moment.nominal is None else "")
        return ""


def _between(minute: int, hours: str) -> bool:
    start, end = (int(at[:2]) * 60 + int(at[3:]) for at in hours.split("-"))
    return start <= minute < end if start < end else minute >= start or minute < end


def moment(clock: Clock, sysfs: str) -> Moment:
    """As it is now."""
    local = datetime.now().astimezone()
    return Moment(clock.now(), local.hour * 60 + local.minute, charging(Path(sysfs)))


def charging(sysfs: Path) -> bool | None:
    """Whether power comes from outside (sysfs-class-power). Without any battery it must; None if it can't be read."""
    kinds: dict[str, list[str]] = {}
    try:
        for supply in (sysfs / "class" / "power_supply").iterdir():
            kind = _line(supply / "type")
            kinds.setdefault(kind, []).append(_line(supply / ("status" if kind == "Battery" else "online")))
    except FileNotFoundError:
        return True
    except OSError:
        return None
    batteries = kinds.pop("Battery", [])
    if any(online == "1" for others in kinds.values() for online in others):
        return True
    return not batteries or any(status in ("Charging", "Full", "Not charging") for status in batteries)


def _line(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
