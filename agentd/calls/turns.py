"""Whose turn it is: so many calls run at a time, and principals take turns, however many calls each of them asks for.

Each principal has a queue of its own, bounded; places go round by round to those who wait. One principal never has all places,
so another one's call that takes a moment does not wait for calls that take minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from agentd.errors import Reason, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST = 64
"""Calls of one principal that are asked about, wait or run at a time."""
_SMOOTH = 0.2  # how much the newest call counts for how long one takes


class Turns:
    """To be used on one event loop."""

    def __init__(self, at_once: int, most: int = MOST) -> None:
        self._at_once, self._most = at_once, most
        self._inside: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """By principal, whoever is next first."""
        self._takes_s = 0.05

    @contextlib.contextmanager
    def admitted(self, principal: str) -> Iterator[None]:
        """Be one of a principal's calls for as long as this lasts. Raises ToolError: QUEUE_FULL if it has too many."""
        if self._inside[principal] >= self._most:
            message = f"{principal} has {self._most} calls under way, and more have to wait."
            error = ToolError(Reason.QUEUE_FULL, message, hint="Nothing was done.", metadata={"principal": principal})
            error.retry_s = self._next_s(principal)
            raise error
        self._inside[principal] += 1
        try:
            yield
        finally:
            self._inside[principal] -= 1

    async def take(self, principal: str) -> Callable[[], None]:
        """Wait for a place to run in; what is returned gives it up, and is called once."""
        waits = asyncio.get_running_loop().create_future()
        self._queues.setdefault(principal, deque()).append(waits)
        self._fill()
        try:
            await waits
        except asyncio.CancelledError:
            if not waits.cancelled():  # it had just been given a place
                self._give_up(principal, None)
            raise
        begun = time.monotonic()
        return lambda: self._give_up(principal, begun)

    def _give_up(self, principal: str, begun: float | None) -> None:
        self._running[principal] -= 1
        if begun is not None:
            self._takes_s += _SMOOTH * (time.monotonic() - begun - self._takes_s)
        self._fill()

    def _fill(self) -> None:
        """Give free places to those who wait, one each, and again from the front."""
        most = max(1, self._at_once - 1)
        for queue in self._queues.values():
            while queue and queue[0].done():  # it was cancelled
                queue.popleft()
        while self._running.total() < self._at_once:
            ready = (name for name, queue in self._queues.items() if queue and self._running[name] < most)
            chosen = min(ready, key=self._running.__getitem__, default=None)
            if chosen is None:
                return
            queue = self._queues.pop(chosen)
            waits = queue.popleft()
            if queue:
                self._queues[chosen] = queue  # behind the others
            if not waits.done():
                self._running[chosen] += 1
                waits.set_result(None)

    def _next_s(self, principal: str) -> float:
        """About how long until one of its calls has ended."""
        others = sum(1 for name, queue in self._queues.items() if queue and name != principal)
        places = max(1, self._at_once // (1 + others))
        return max(0.1, self._takes_s / places)
