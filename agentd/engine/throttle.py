"""Keeps the engine within what the budgets allow: its pace, and its end when it is to give all its memory back."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.budgets import Allowance, State
from agentd.engine.link import Pace

if TYPE_CHECKING:
    from agentd.engine.client import Engine


_log = logging.getLogger(__name__)
_LOOK_S = 10.0
_SHORT_S = 10.0  # that a model stays with nothing to do while memory is short


@dataclass(slots=True)
class Throttle:
    """On the event loop. What is being generated is held for `hold_s` seconds at most, then it ends with what it has.

    A model that has had nothing to do for `idle_s` seconds is unloaded.
    """

    engine: Engine
    hold_s: float
    idle_s: float
    _forced: int = 0
    _limits: Allowance = field(default_factory=Allowance)
    _pace: Pace = field(default_factory=Pace)
    _ending: asyncio.TimerHandle | None = None
    _unloading: asyncio.Task[None] | None = None
    _looking: asyncio.Task[None] | None = None

    def force(self, threads: int) -> None:
        """So many threads all of the time, to measure them, as long as nothing holds; 0: as the budgets say again."""
        self._forced = threads
        self.apply(self._limits)

    def apply(self, limits: Allowance) -> None:
        self._limits = limits
        threads, duty = (limits.threads, limits.duty) if not self._forced else (self._forced, 1.0)
        held = self._pace.hold and limits.state is State.PAUSED  # since when it is held does not change by that
        stop = limits.state is State.SHED or (held and self._pace.stop)
        self._tell(Pace(threads=threads, duty=duty, hold=limits.state is State.PAUSED, stop=stop, trim=limits.trim))
        if not held and self._ending:
            self._ending.cancel()
            self._ending = None
        if limits.state is State.PAUSED and not held:
            self._ending = asyncio.get_running_loop().call_later(self.hold_s, self._end)
        if limits.state is State.SHED and (self._unloading is None or self._unloading.done()):
            self._unloading = asyncio.create_task(self.engine.unload("shed"), name="unload the model")

    def start(self) -> None:
        self._looking = asyncio.create_task(self._unload_idle(), name="unload an idle model")

    async def stop(self) -> None:
        if self._ending:
            self._ending.cancel()
        tasks = [task for task in (self._unloading, self._looking) if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(min(self.idle_s / 4, _LOOK_S))
            if self.engine.idle_s() >= (min(self.idle_s, _SHORT_S) if self._pace.trim else self.idle_s):
                try:
                    await self.engine.unload("memory" if self._pace.trim else "idle")
                except Exception:  # the next look tries again
                    _log.exception("the model could not be unloaded")

    def _end(self) -> None:
        self._tell(self._pace.model_copy(update={"stop": True}))

    def _tell(self, pace: Pace) -> None:
        self._pace = pace
        self.engine.pace(pace)
