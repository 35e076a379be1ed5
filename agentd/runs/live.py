"""A run that is going on: its events so far, who is told of more, and how much of its time is left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agentd.runs.run import WAITS, Run, RunEvent, State

if TYPE_CHECKING:
    from agentd.budgets import Ticket

_MOST_TOLD = 100
Hold = Literal["turn", "approval", "budget"]


@dataclass(slots=True)
class Live:
    """`more` is replaced whenever there are more events. Time in which others keep it waiting is not the run's own."""

    run: Run
    ticket: Ticket
    events: list[RunEvent] = field(default_factory=list)
    more: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    limit: asyncio.Timeout | None = None
    ending: bool = False
    left: bool = False
    """Whether this daemon goes without it: it goes on waiting for the next one."""
    _holds: set[Hold] = field(default_factory=set)
    _left: float = 0.0
    _told: tuple[str, float, int] = ("NOMINAL", 1.0, 0)
    _told_times: int = 0

    def add(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "approval":
            self.hold("approval", on=body["state"] == WAITS.value)
        self.events.append(RunEvent(len(self.events) + 1, time.time_ns(), kind, body))
        self._tell()

    def tell_budget(self, body: dict[str, Any]) -> None:
        """While it waits, changes of the state only, and not without end: that may be days."""
        told = body["state"], body["duty"], body["threads"]
        if told == self._told:  # something else has changed
            return
        if self.run.state is State.QUEUED:
            if told[0] == self._told[0] or self._told_times >= _MOST_TOLD:
                return
            self._told_times += 1
        self._told = told
        self.add("budget", body)

    def last_event(self) -> RunEvent:
        """The one that tells of the end: nothing is added from here on."""
        self.ending = True
        return RunEvent(len(self.events) + 1, time.time_ns(), "run", {})

    def end(self, ended: Run, last: RunEvent) -> None:
        self.run = ended
        self.events.append(last)
        self._tell()

    def leave(self) -> None:
        self.left = True
        self._tell()

    def _tell(self) -> None:
        self.more.set()
        self.more = asyncio.Event()

    def hold(self, why: Hold, *, on: bool) -> None:
        """Its time stands still while anything holds it."""
        held = bool(self._holds)
        self._holds = self._holds | {why} if on else self._holds - {why}
        if self.limit is None or held == bool(self._holds) or self.limit.expired():
            return
        self._keep_time()

    def time(self, limit: asyncio.Timeout) -> None:
        """From now on it has so much time; what holds it already does."""
        self.limit = limit
        if self._holds:
            self._keep_time()

    def _keep_time(self) -> None:
        """Stand still or go on. One whose time has run out in this very moment ends anyway."""
        assert self.limit is not None
        now = asyncio.get_running_loop().time()
        if self._holds:
            self._left = max(0.0, (self.limit.when() or now) - now)
        with contextlib.suppress(RuntimeError):
            self.limit.reschedule(None if self._holds else now + self._left)
