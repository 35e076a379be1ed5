"""Admission: whose turn it is with the model. Work waits by priority, in queues with an end, until the budgets allow it.

A turn is one generation: between two of them a run executes its calls and waits for people, and holds nothing. A few turns
at a time share the passes over the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from agentd.budgets.state import Allowance, State
from agentd.errors import AgentdError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentd.budgets.policy import AdmissionPolicy

_JITTER = 0.2
_LEAST_RETRY_S, _LONGEST_RETRY_S = 2.0, 600.0
_SMOOTHING = 0.2  # of how long a turn takes
_REASONS = {"thermal": Reason.BUDGET_THERMAL, "battery": Reason.BUDGET_BATTERY, "memory": Reason.BUDGET_MEMORY}
_WAY_OUT = {
    "thermal": "It goes on when the device has cooled down.",
    "battery": "It goes on when the device is charging.",
    "memory": "It goes on when other programs have given memory back.",
}


class Priority(IntEnum):
    """Who goes first. A person waits for what is interactive; the background can wait for power and a cool device."""

    INTERACTIVE = 0
    NORMAL = 1
    BACKGROUND = 2


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


class QueueFull(AgentdError):
    """As many wait as may. `retry_s` grows with each that was turned away, so that they do not all come back at once."""

    def __init__(self, priority: Priority, waiting: int, retry_s: float) -> None:
        kind = priority.name.lower()
        super().__init__(
            Reason.QUEUE_FULL,
            f"{waiting} runs wait for the model already, and no more may.",
            hint="Try again later; budgets.admission in agentd.toml says how many may wait.",
            metadata={"waiting": str(waiting), "priority": kind, "retry_s": f"{retry_s:.0f}"},
        )
        self.retry_s = retry_s


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the order of all that waits. Whoever has it says when its work has `begun`."""

    priority: Priority
    number: int
    begun: bool = False
    key: str = ""
    """Of those with the same one, one at a time has a turn."""
    alone: bool = False
    """Whether nothing else may have a turn beside its own."""
    turn: asyncio.Future[None] | None = None


@dataclass(slots=True)
class Admission:
    """Lives on the event loop. `limits` are the budgets' own; `look` when they have changed. `count` gets each decision."""

    policy: AdmissionPolicy
    limits: Callable[[], Allowance]
    count: Callable[[Priority, str, str], None] = lambda _priority, _decision, _reason: None
    clock: Callable[[], float] = time.monotonic
    parallel: int = 1
    """So many have a turn at a time. The background has one only beside its like: it is to slow nobody down."""
    _tickets: list[Ticket] = field(default_factory=list)
    _at_work: set[Ticket] = field(default_factory=set)
    _turn_s: float = 5.0  # until one has been measured
    _numbers: int = 0
    _turned_away: int = 0

    def admit(self, priority: Priority, *, again: bool = False, key: str = "") -> Ticket:
        """A place; `leave` it when the work has ended. What is `again` here, after a restart or in pieces, had one already.
        Of those with the same `key` one at a time has a turn.

        Raises OverBudget for what does not wait while the model is unloaded; QueueFull.
        """
        limits, deferrable = self.limits(), priority is Priority.BACKGROUND
        if limits.state is State.SHED and not deferrable:
            self.count(priority, "refused", limits.cause or "")
            raise OverBudget(limits)
        waiting = sum(not each.begun and (each.priority is Priority.BACKGROUND) == deferrable for each in self._tickets)
        most = self.policy.background_queue_max if deferrable else self.policy.queue_max
        if waiting >= most and not again:
            self.count(priority, "refused", "queue")
            raise QueueFull(priority, waiting, self._retry_s(waiting))
        self._numbers += 1
        ticket = Ticket(priority, self._numbers, key=key)
        self._tickets.append(ticket)
        self.count(priority, "deferred" if deferrable and not limits.background else "admitted", limits.cause or "")
        return ticket

    def require_time(self, left_s: float) -> None:
        """Raises OverBudget for what could not begin in the time it has: better now than at its end."""
        limits = self.limits()
        if limits.holds and left_s < limits.retry_s:
            raise OverBudget(limits)

    def leave(self, ticket: Ticket) -> None:
        with contextlib.suppress(ValueError):
            self._tickets.remove(ticket)

    def why_waiting(self, ticket: Ticket) -> tuple[int, str]:
        """How many are ahead of it, and what of the budgets keeps it waiting; (0, "") if it may go."""
        ahead = sum(each.turn is not None and _order(each) < _order(ticket) for each in self._tickets)
        if ticket not in self._at_work and not self._fits(ticket):
            ahead += len(self._at_work)
        return ahead, self._forbids(ticket)

    def waiting(self) -> dict[Priority, int]:
        """How many of each priority have not begun."""
        return {priority: sum(not each.begun and each.priority is priority for each in self._tickets) for priority in Priority}

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[None]:
        """It may use the model. Waits without end: whoever can't has a deadline of its own."""
        await self._come(ticket)
        began, self._turned_away = self.clock(), 0
        try:
            yield
        finally:
            self._turn_s += _SMOOTHING * (self.clock() - began - self._turn_s)
            self._go_on(ticket)

    async def _come(self, ticket: Ticket) -> None:
        ticket.turn = asyncio.get_running_loop().create_future()
        self.look()
        try:
            await ticket.turn
        except asyncio.CancelledError:
            if ticket in self._at_work:  # it was its turn in the moment in which it gave up
                self._go_on(ticket)
            raise
        finally:
            ticket.turn = None

    def look(self) -> None:
        """Let the next ones go, if they may."""
        ready = [each for each in self._tickets if each.turn and not each.turn.done() and not self._forbids(each)]
        for each in sorted(ready, key=_order):
            if each.key and any(each.key == other.key for other in self._at_work):
                continue  # it waits for its like only: others may go before it
            if not self._fits(each):
                return
            self._at_work.add(each)
            assert each.turn is not None
            each.turn.set_result(None)

    def _fits(self, ticket: Ticket) -> bool:
        """Beside those at work."""
        background = ticket.priority is Priority.BACKGROUND and any(each.priority < ticket.priority for each in self._at_work)
        alone = bool(self._at_work) and (ticket.alone or any(each.alone for each in self._at_work))
        return len(self._at_work) < self.parallel and not background and not alone

    def _go_on(self, ticket: Ticket) -> None:
        self._at_work.discard(ticket)
        self.look()

    def _forbids(self, ticket: Ticket) -> str:
        """Why the budgets do not let it go now. Where all is unloaded, what has begun goes on to be ended by the engine."""
        limits = self.limits()
        if limits.state is State.SHED and ticket.begun:
            return ""
        if limits.holds:
            return limits.reason or limits.state.name.lower()
        if ticket.priority is Priority.BACKGROUND and not limits.background:
            return limits.reason or "the device runs on its battery"
        return ""

    def _retry_s(self, waiting: int) -> float:
        """Until those that wait, and those that were turned away before, have had a turn. Grows with each of these."""
        self._turned_away += 1
        limits = self.limits()
        ahead = waiting + self._turned_away + random.uniform(0, _JITTER)  # noqa: S311 - no secret
        return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, limits.retry_s) + ahead * self._turn_s)


def _order(ticket: Ticket) -> tuple[int, int]:
    return ticket.priority, ticket.number
