"""How fast the engine process may go: fewer threads, pauses between tokens, held, or ended with what it has.

What is decided does not depend on it: the same tokens in the same pieces, whatever the pace.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from agentd.engine.link import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST_REST_S = 0.005  # shorter ones are saved up: a timer of the kernel is late by as much as they are long
_LOOK_S = 0.2


class OutOfBudget(Exception):
    """The generation is to end with what it has."""


class Aborted(Exception):
    """A pass was not made, or not to its end, since something was given up meanwhile. Nothing of it stays."""


class Pacer:
    """`told` from any thread; the rest from the one that decodes. `given_up` says whether a cancellation is to be seen to."""

    def __init__(self, given_up: Callable[[], bool]) -> None:
        self._given_up = given_up
        self._pace = Pace()
        self._news = threading.Condition()
        self._debt = 0.0
        self.busy_s = self.rest_s = 0.0
        """Since the start."""

    @property
    def trims(self) -> bool:
        """Whether what can be made again is not to be kept."""
        return self._pace.trim

    @property
    def threads(self) -> int:
        """0 for all that there are."""
        return self._pace.threads

    def told(self, pace: Pace) -> None:
        with self._news:
            self._pace = pace
            self._news.notify_all()

    def wake(self) -> None:
        """Somebody has given up."""
        with self._news:
            self._news.notify_all()

    @property
    def stops(self) -> bool:
        """Whether what is generated is to end with what it has; a piece under way need not be finished."""
        return self._pace.stop

    def ready(self) -> None:
        """Before a piece of work: waits for as long as nothing may be done. Raises OutOfBudget; Aborted if, while it waits,
        something is given up.
        """
        with self._news:
            while self._pace.hold and not self._pace.stop and not self._given_up():
                self._news.wait(_LOOK_S)
            if self._pace.stop:
                raise OutOfBudget
            if self._pace.hold:
                raise Aborted

    def rest(self, worked_s: float) -> None:
        """After a piece of work: as long as the duty wants it. What is owed stays owed when the pace changes."""
        with self._news:
            self.busy_s += worked_s
            self._debt += worked_s * _idle(self._pace)
            if self._debt < _LEAST_REST_S:
                return
            while self._debt > 0 and not self._pace.stop and not self._given_up():
                before, begun = self._pace, time.monotonic()
                self._news.wait(self._debt)
                rested = time.monotonic() - begun
                self._debt -= rested
                self.rest_s += rested
                if self._pace is not before:
                    self._debt *= _idle(self._pace) / _idle(before) if _idle(before) else 0.0
            self._debt = max(0.0, self._debt)


def _idle(pace: Pace) -> float:
    """Seconds of rest for a second of work."""
    return 1 / pace.duty - 1
