"""Keeps the engine within what the budgets allow: its pace, and its end when it is to give all its memory back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.budgets import Allowance, State
from agentd.engine.link import Pace

if TYPE_CHECKING:
    from agentd.engine.client import Engine


@dataclass(slots=True)
class Throttle:
    """On the event loop. What is being generated is held for `hold_s` seconds at most, then it ends with what it has."""

    engine: Engine
    hold_s: float
    _pace: Pace = field(default_factory=Pace)
    _ending: asyncio.TimerHandle | None = None
    _unloading: asyncio.Task[None] | None = None

    def apply(self, limits: Allowance) -> None:
        held = self._pace.hold and limits.state is State.PAUSED  # since when it is held does not change by that
        stop = limits.state is State.SHED or (held and self._pace.stop)
        self._tell(Pace(threads=limits.threads, duty=limits.duty, hold=limits.state is State.PAUSED, stop=stop))
        if not held and self._ending:
            self._ending.cancel()
            self._ending = None
        if limits.state is State.PAUSED and not held:
            self._ending = asyncio.get_running_loop().call_later(self.hold_s, self._end)
        if limits.state is State.SHED and (self._unloading is None or self._unloading.done()):
            self._unloading = asyncio.create_task(self.engine.unload(), name="unload the model")

    async def stop(self) -> None:
        if self._ending:
            self._ending.cancel()
        if self._unloading:
            self._unloading.cancel()
            await asyncio.wait([self._unloading])

    def _end(self) -> None:
        self._tell(self._pace.model_copy(update={"stop": True}))

    def _tell(self, pace: Pace) -> None:
        self._pace = pace
        self.engine.pace(pace)
