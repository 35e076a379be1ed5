"""How fast the engine process may go: fewer threads, pauses between tokens, held, or ended with what it has.

What is decided does not depend on it: the same tokens in the same pieces, whatever the pace.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from agentd.engine.link import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST_REST_S = 0.005  # shorter ones are saved up: a timer of the kernel is late by as much as they are long
_LONGEST_REST_S = 5.0
_LOOK_S = 0.2


class OutOfBudget(Exception):
    """The generation is to end with what it has."""


class Pacer:
    """`told` from any thread; the rest from the one that decodes. `given_up` says whether nobody waits any more."""

    def __init__(self, given_up: Callable[[], bool]) -> None:
        self._given_up = given_up
        self._pace = Pace()
        self._news = threading.Condition()
        self._debt = 0.0

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

    def rest(self, worked_s: float) -> None:
        """After a piece of work: as long as the duty wants it, and for as long as nothing may be done. Raises OutOfBudget."""
        with self._news:
            self._debt += worked_s * (1 / self._pace.duty - 1)
            if self._debt >= _LEAST_REST_S:
                before = self._pace
                rest, self._debt = min(self._debt, _LONGEST_REST_S), 0.0
                self._news.wait_for(lambda: self._pace is not before or self._given_up(), rest)
            while self._pace.hold and not self._pace.stop and not self._given_up():
                self._news.wait(_LOOK_S)
            if self._pace.stop:
                raise OutOfBudget
