"""What the engine has done since the daemon began, over all its processes; how fast it goes, and what it takes."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.engine.link import Progress


@dataclass(frozen=True, slots=True)
class Total:
    """Tokens of prompts, tokens written, passes over the weights, seconds at work, seconds at rest."""

    prefilled: int = 0
    generated: int = 0
    passes: int = 0
    busy_s: float = 0.0
    rest_s: float = 0.0


_FRESH_S = 10.0


@dataclass(slots=True)
class Meter:
    """`told` on the event loop; the rest from any thread."""

    clock: Callable[[], float] = time.monotonic
    _past: Total = field(default_factory=Total)
    _now: Total = field(default_factory=Total)
    _told_at: float = 0.0
    _per_s: float = 0.0

    def told(self, progress: Progress) -> None:
        now = self.clock()
        wrote, passed = progress.generated - self._now.generated, now - self._told_at
        if wrote > 0 and passed > 0:
            self._per_s = wrote / passed if passed < _FRESH_S else 0.0
        self._now = Total(progress.prefilled, progress.generated, progress.passes, progress.busy_s, progress.rest_s)
        self._told_at = now

    def begin(self) -> None:
        """A new process counts from 0."""
        self._past, self._now = self.total, Total()

    @property
    def total(self) -> Total:
        past, now = self._past, self._now
        return Total(
            prefilled=past.prefilled + now.prefilled,
            generated=past.generated + now.generated,
            passes=past.passes + now.passes,
            busy_s=past.busy_s + now.busy_s,
            rest_s=past.rest_s + now.rest_s,
        )

    def speed(self) -> float:
        """Tokens written a second, of late; 0 where nothing was."""
        return self._per_s if self.clock() - self._told_at < _FRESH_S else 0.0


def anonymous_mib(pid: int) -> float:
    """Memory of a process that is no file's: what it takes from others (RssAnon of proc_pid_status(5)); 0 if it has gone."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next((int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon:")), 0.0)
    return 0.0
