"""When a schedule is due: cron expressions (Debian's rules for daylight saving, by cronsim) and plain intervals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from tzlocal import get_localzone

if TYPE_CHECKING:
    from collections.abc import Iterator

_EVERY = re.compile(r"([1-9][0-9]{0,5})(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LEAST_S, _LONGEST_S = 10, 366 * 86400
MOST_MISSED = 100
"""Of `missed = "all"`: a board that was off for a year does not come back to half a million runs."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Either a cron expression in a zone, or every so many seconds, counted from 1970."""

    cron: str
    every_s: int
    zone: tzinfo

    @classmethod
    def of(cls, cron: str, every: str, zone: str) -> Schedule:
        """Raises ValueError."""
        try:
            where: tzinfo = ZoneInfo(zone) if zone else get_localzone()
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{zone or 'of this device'!r} is no time zone; write one such as Europe/Berlin") from None
        if every:
            found = _EVERY.fullmatch(every)
            seconds = int(found[1]) * _UNITS[found[2]] if found else 0
            if not _LEAST_S <= seconds <= _LONGEST_S:
                raise ValueError(f"{every!r} is no interval from {_LEAST_S}s to 366d; write it as 15m or 6h")
            return cls("", seconds, where)
        if len(cron.split()) != 5:
            raise ValueError(f"{cron!r} is no cron expression: it has five fields, minute hour day month weekday")
        try:
            next(CronSim(cron, datetime.now(UTC)))
        except CronSimError as e:
            raise ValueError(f"{cron!r} is no cron expression: {e}") from None
        except StopIteration:
            raise ValueError(f"{cron!r} never comes") from None
        return cls(cron, 0, where)

    def after(self, moment: datetime) -> datetime:
        """The first time it is due past `moment`. Raises StopIteration if that is more than 50 years away."""
        if self.every_s:
            passed = int(moment.timestamp()) // self.every_s
            return datetime.fromtimestamp((passed + 1) * self.every_s, self.zone)
        return next(CronSim(self.cron, moment.astimezone(self.zone)))

    def between(self, last: datetime, now: datetime) -> list[datetime]:
        """When it was due past `last` and up to `now`: the newest ones of these, oldest first."""
        found: list[datetime] = []
        since, until = last.astimezone(UTC), now.astimezone(UTC)  # within one zone a clock that is put back would not count
        for due in self._before(now):
            if due <= since or len(found) >= MOST_MISSED:
                break
            if due <= until:
                found.append(due)
        return found[::-1]

    def _before(self, now: datetime) -> Iterator[datetime]:
        """Backwards from `now`, which is in it."""
        if not self.every_s:
            yield from CronSim(self.cron, now.astimezone(self.zone) + timedelta(seconds=1), reverse=True)
            return
        due = int(now.timestamp()) // self.every_s * self.every_s
        while due > 0:
            yield datetime.fromtimestamp(due, self.zone)
            due -= self.every_s
