"""The budgets at work: sensors read on a thread, the governor stepped, its limits told to whoever keeps them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.budgets.governor import Situation, step
from agentd.budgets.state import Allowance, Readings
from agentd.errors import AgentdError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from agentd.budgets.policy import Policy
    from agentd.budgets.programs import Program
    from agentd.budgets.sensors import Sensors

_JITTER = 0.2
_LEAST_RETRY_S = 2.0
_log = logging.getLogger(__name__)
_REASONS = {"thermal": Reason.BUDGET_THERMAL, "battery": Reason.BUDGET_BATTERY, "memory": Reason.BUDGET_MEMORY}
_WAY_OUT = {
    "thermal": "It goes on when the device has cooled down.",
    "battery": "It goes on when the device is charging.",
    "memory": "It goes on when other programs have given memory back.",
}


class OverBudget(AgentdError):
    """Not now: BUDGET_THERMAL, BUDGET_BATTERY, BUDGET_MEMORY. `retry_s` is when to try again."""

    def __init__(self, limits: Allowance) -> None:
        cause = limits.cause or "thermal"
        retry = max(_LEAST_RETRY_S, limits.retry_s) * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret
        retry = max(_LEAST_RETRY_S, retry)
        super().__init__(
            _REASONS[cause],
            f"The model is {limits.state.name.lower()}: {limits.reason}.",
            hint=_WAY_OUT[cause],
            metadata={"state": limits.state.name.lower(), "budget": cause, "retry_s": f"{retry:.0f}"},
        )
        self.retry_s = retry


@dataclass(slots=True)
class Budgets:
    """Lives on the event loop. `changed` is called with each change of the limits, `record` with each of the state."""

    policy: Policy
    sensors: Sensors
    threads: int
    changed: Callable[[Allowance], None]
    record: Callable[[Allowance, Allowance], None]
    programs: Sequence[Program] = ()
    clock: Callable[[], float] = time.monotonic
    limits: Allowance = field(default_factory=Allowance)
    readings: Readings = field(default_factory=Readings)
    situation: Situation = field(default_factory=Situation)
    _read_at: float = 0.0
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        for program in self.programs:
            program.start()
        reading = threading.Thread(target=self._read, name="sensors", daemon=True)  # a driver may never answer
        reading.start()
        self._tasks = [asyncio.create_task(self._govern(), name="budgets")]

    async def stop(self) -> None:
        self._stopped.set()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for program in self.programs:
            await asyncio.to_thread(program.stop)

    def require(self) -> None:
        """Raises OverBudget while nothing new is begun."""
        if self.limits.holds:
            raise OverBudget(self.limits)

    async def watch(self) -> AsyncIterator[Allowance]:
        """The limits now, and each time they change."""
        while True:
            more, limits = self._more, self.limits
            yield limits
            await more.wait()

    def _read(self) -> None:
        while not self._stopped.is_set():
            self.readings, self._read_at = self.sensors.read(), self.clock()
            self._stopped.wait(self.policy.states.poll_s)

    async def _govern(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # a bug here must not leave the device without a limit that is in force
                _log.exception("the budgets could not be looked at")
            await asyncio.sleep(self.policy.states.poll_s)

    def look(self) -> None:
        """One step. Readings that are old, as a driver hangs, are none."""
        now = self.clock()
        fresh = self._read_at and now - self._read_at <= self.policy.states.stale_s
        self.situation, limits = step(self.policy, self.situation, now, self.readings if fresh else Readings(), self.threads)
        before, self.limits = self.limits, limits
        if limits.state is not before.state:
            _log.warning(
                "budgets: %s, was %s%s", limits.state.name, before.state.name, f": {limits.reason}" * bool(limits.reason)
            )
            with contextlib.suppress(AgentdError):
                self.record(before, limits)
        if limits != before:
            self.changed(limits)
            more, self._more = self._more, asyncio.Event()
            more.set()
