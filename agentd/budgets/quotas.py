"""Quotas: what each principal may use of the model and the tools in an hour or a day, all its runs together."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from agentd.errors import AgentdError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import apsw

    from agentd.store import Store

_HOUR_S = 3600
_KEPT_HOURS = 24
_OF_THE_MODEL = ("tokens", "seconds", "joules")
_UNITS = {"tokens": "tokens", "seconds": "seconds of the model", "calls": "calls", "joules": "joules"}
_ADD = """
INSERT INTO used VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    tokens = tokens + excluded.tokens, seconds = seconds + excluded.seconds,
    calls = calls + excluded.calls, joules = joules + excluded.joules
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Generated tokens, seconds of the model, calls of tools, joules of the device (0 where its power is not known)."""

    tokens: int = 0
    seconds: float = 0.0
    calls: int = 0
    joules: float = 0.0

    def __sub__(self, other: Usage) -> Usage:
        """Of counts that grow; 0 where one did not."""
        return Usage(
            max(0, self.tokens - other.tokens),
            max(0.0, self.seconds - other.seconds),
            max(0, self.calls - other.calls),
            max(0.0, self.joules - other.joules),
        )

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens + other.tokens, self.seconds + other.seconds, self.calls + other.calls, self.joules + other.joules
        )


@dataclass(frozen=True, slots=True)
class Quota:
    """For each principal whose name `principal` matches, on its own. None: no limit."""

    principal: str
    per: Literal["hour", "day"]
    tokens: int | None = None
    seconds: float | None = None
    calls: int | None = None
    joules: float | None = None

    @property
    def hours(self) -> int:
        return 1 if self.per == "hour" else _KEPT_HOURS


class QuotaSpent(AgentdError):
    """QUOTA_SPENT. `retry_s` is when some of it comes back."""

    def __init__(self, principal: str, quota: Quota, what: str, retry_s: float) -> None:
        limit = getattr(quota, what)
        super().__init__(
            Reason.QUOTA_SPENT,
            f"{principal} has used what it may in a{'n hour' if quota.per == 'hour' else ' day'}: {limit:g} {_UNITS[what]}.",
            hint=f"Some of it comes back in {math.ceil(retry_s / 60)} min; [[quotas]] in agentd.toml says how much there is.",
            metadata={
                "principal": principal,
                "quota": what,
                "limit": f"{limit:g}",
                "per": quota.per,
                "retry_s": f"{retry_s:.0f}",
            },
        )
        self.retry_s = retry_s


@dataclass(slots=True)
class Quotas:
    """Lives on the event loop. What was used is kept by the hour, so a day is the last 24 of them."""

    quotas: Sequence[Quota]
    store: Store
    clock: Callable[[], float] = time.time
    _used: dict[str, dict[int, Usage]] = field(default_factory=dict)

    def load(self) -> None:
        """What was used before a restart. Not for the event loop."""
        since = self._hour() - _KEPT_HOURS
        rows = self.store.read(lambda db: list(db.execute("SELECT * FROM used WHERE hour > ?", (since,))))
        for principal, hour, *amounts in rows:
            self._used.setdefault(str(principal), {})[int(hour)] = Usage(*amounts)

    def require(self, principal: str, what: Sequence[str] = _OF_THE_MODEL) -> None:
        """Raises QuotaSpent where nothing is left."""
        for quota in self._of(principal):
            used = self._within(principal, quota.hours)
            for name in what:
                limit = getattr(quota, name)
                if limit is not None and getattr(used, name) >= limit:
                    raise QuotaSpent(principal, quota, name, self._back_in_s(principal, quota))

    def tokens_left(self, principal: str) -> float:
        """At least 0; infinite without a quota."""
        left = (
            quota.tokens - self._within(principal, quota.hours).tokens
            for quota in self._of(principal)
            if quota.tokens is not None
        )
        return max(0, min(left, default=math.inf))

    def counts_tokens(self, principal: str) -> bool:
        return any(quota.tokens is not None for quota in self._of(principal))

    def spend(self, principal: str, used: Usage) -> None:
        """Nobody waits for this to be durable: a kill loses the last moment at most."""
        if not self._of(principal):
            return
        hour = self._hour()
        hours = self._used.setdefault(principal, {})
        hours[hour] = hours.get(hour, Usage()) + used
        old = hour - _KEPT_HOURS
        for each in [each for each in hours if each <= old]:
            del hours[each]

        def add(db: apsw.Connection) -> None:
            db.execute(_ADD, (principal, hour, used.tokens, used.seconds, used.calls, used.joules))
            db.execute("DELETE FROM used WHERE hour <= ?", (old,))

        self.store.submit(add)

    def call(self, principal: str) -> None:
        """One call of a tool. Raises QuotaSpent."""
        self.require(principal, ("calls",))
        self.spend(principal, Usage(calls=1))

    def _of(self, principal: str) -> list[Quota]:
        return [quota for quota in self.quotas if fnmatchcase(principal, quota.principal)]

    def _within(self, principal: str, hours: int) -> Usage:
        since = self._hour() - hours
        return sum((used for hour, used in self._used.get(principal, {}).items() if hour > since), Usage())

    def _back_in_s(self, principal: str, quota: Quota) -> float:
        """When the oldest hour that counts is no longer within; at the full hour if nothing was used yet."""
        now, since = self.clock(), self._hour() - quota.hours
        counted = [hour for hour in self._used.get(principal, {}) if hour > since]
        return max(1.0, (min(counted, default=self._hour()) + quota.hours) * _HOUR_S - now)

    def _hour(self) -> int:
        return int(self.clock() // _HOUR_S)
