"""The line of one automation: its events, each handled by one run, in order, under its conditions and limits.

An event is `running` on disk before its run exists, and the run's request id is the event's own: whatever is killed when, the
next daemon finds the run of that event, or none. A run that was cut off is taken back, and then begun again; where that
can't be done (it has reached outside, or others have changed its files since) it is not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from agentd.automations import template
from agentd.automations.events import Event, State
from agentd.automations.feeds import CLOCK_SET
from agentd.budgets import Priority, Usage
from agentd.errors import AgentdError, Code, Reason
from agentd.grants import Labels
from agentd.runs import Direct, RunRequest, StopReason
from agentd.runs import State as RunState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from agentd.automations.automation import Automation
    from agentd.automations.events import Events
    from agentd.automations.feeds import FolderFeed
    from agentd.runs import Run, RunEvent

_log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 30.0  # at conditions that do not hold: power, heat, the network
_MOST_ATTEMPTS = 20  # of an event, kills included: one that takes the daemon with it is not tried for ever
_LEAST_WAIT_NS, _LONGEST_WAIT_NS = 600 * 10**9, 365 * 86400 * 10**9
_CLOCK_SET_NS = int(CLOCK_SET.timestamp() * 1e9)
_CLOCK_SLACK_S = 60.0  # by so much a clock that is kept right may be put back without anybody noticing
_MOST_PARKED = 16  # runs that wait for a person beside those that go on
_WHOLE = frozenset({StopReason.ANSWERED})
_LATER = frozenset({StopReason.BUDGET, StopReason.TIME_LIMIT, StopReason.QUOTA})
"""Limits that another time may not be reached; the others would be again."""


_FOR_GOOD = frozenset({Code.INVALID_ARGUMENT, Code.PERMISSION_DENIED, Code.NOT_FOUND})
"""Errors that another attempt would meet again: wrong arguments, what is not granted, a person's no."""


class Runner(Protocol):
    """The part of the runs that a line uses."""

    async def create(self, asked: RunRequest) -> Run: ...

    async def asked_for(self, principal: str, request_id: str) -> Run | None: ...

    async def get(self, run: str) -> Run: ...

    def watch(self, run: str, after: int) -> AsyncIterator[RunEvent]: ...

    async def cancel(self, run: str) -> Run: ...


class TakeBack(Protocol):
    """Puts back what a run has changed: the paths, or why that can't be."""

    async def __call__(self, run: str, principal: str) -> tuple[list[str], str]: ...


@dataclass(slots=True)
class Line:
    automation: Automation
    events: Events
    runs: Runner
    take_back: TakeBack
    unmet: Callable[[], str]
    """Which of its conditions does not hold now, in words."""
    commands: Callable[[str], frozenset[str]]
    """Which arguments of a tool are command lines."""
    feed: FolderFeed | None = None
    waits: str = ""
    """Why nothing begins, if something waits."""
    under_way: dict[int, Event] = field(default_factory=dict)
    parked: set[int] = field(default_factory=set)
    """Those of them that wait for a person."""
    paused: bool = False
    """What goes on goes on, and nothing begins."""
    _held: tuple[float, str] = (0.0, "")
    """Until when nothing begins, and why: the disk is full, the model's queue is."""
    _quiet_until: float = 0.0
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled; events under way stay `running` on disk."""
        try:
            while True:
                self._woken.clear()
                try:
                    wait_s = await self._begin_all()
                except AgentdError as e:  # the disk is full, say
                    self.waits, wait_s = e.message, _LOOK_AGAIN_S
                except Exception as e:  # a bug of ours is found in the log, and silences nothing for good
                    _log.exception("%s", self.automation.name)
                    self.waits, wait_s = f"a bug in agentd: {e}", _LOOK_AGAIN_S
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), wait_s)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _begin_all(self) -> float | None:
        """As many as may; then after how many seconds to look again, if nothing wakes it before."""
        self.waits = ""
        if self.paused:
            return None
        if (left_s := self._held[0] - time.monotonic()) > 0:
            self.waits = self._held[1]
            return left_s
        while len(self.under_way) - len(self.parked) < self.automation.limits.concurrency and len(self.parked) < _MOST_PARKED:
            now = time.time_ns()
            event = await self.events.due(self.automation.name, now, self._longest_ns(), self.under_way)
            if event is None:
                later = await self.events.next_due_ns(self.automation.name)
                return None if later is None else min(_LOOK_AGAIN_S, max(0.05, (later - now) / 1e9))
            if event.state is State.WAITING:
                event = _timed(event, now)
                reason, wait_s = await self._not_yet()
                if not event.attempt and now - event.create_ns > self.automation.limits.wait_s * 1e9:
                    why = event.note or reason or "others were before it"
                    await self._end(event, State.DROPPED, f"it could not begin in time: {why}")
                    continue
                if reason:
                    self.waits = reason
                    return wait_s
            self._launch(event)
        return None

    def _longest_ns(self) -> int:
        """How long an event may have to wait for its time."""
        limits = self.automation.limits
        return int((max(limits.debounce_s, limits.retry_s * 2**limits.retries) + _CLOCK_SLACK_S) * 1e9)

    async def _not_yet(self) -> tuple[str, float]:
        """Why nothing may begin now, and after how many seconds to look again."""
        if reason := await asyncio.to_thread(self.unmet):
            return reason, _LOOK_AGAIN_S
        left_s = self._quiet_until - time.monotonic()
        return (f"pauses for {left_s:.0f} s more", min(left_s, _LOOK_AGAIN_S)) if left_s > 0 else ("", 0.0)

    def _launch(self, event: Event) -> None:
        self.under_way[event.seq] = event
        task = asyncio.create_task(self._go(event), name=f"{self.automation.name} event {event.seq}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _go(self, event: Event) -> None:
        try:
            await self._handle(event)
        except AgentdError as e:
            if e.reason is not Reason.DAEMON_STOPPING:  # else the next daemon goes on with it
                _log.warning("%s, event %d: %s", self.automation.name, event.seq, e)
                self._hold(_LOOK_AGAIN_S, e.message)
        except Exception:  # a bug of ours ends this event only, and is found in the log
            _log.exception("event %d of %s", event.seq, self.automation.name)
            with contextlib.suppress(AgentdError):
                await self._end(event, State.FAILED, "a bug in agentd; its log says more")
        finally:
            self.under_way.pop(event.seq, None)
            self.parked.discard(event.seq)
            self.wake()

    async def _handle(self, event: Event) -> None:
        if event.state is State.RUNNING:  # a daemon was killed, or stopped, with it
            known = await self.runs.asked_for(self.automation.principal, event.request_id)
            if known is not None:
                await self._follow(event, known, was_ended=known.ended)
                return
        else:
            if reason := await self._obsolete(event):
                await self._end(event, State.DROPPED, reason)
                return
            event = replace(event, state=State.RUNNING, attempt=event.attempt + 1, begin_ns=time.time_ns(), note="")
            event = await self.events.keep(event)
        try:
            run = await self.runs.create(self._request(event))
        except AgentdError as e:
            if e.reason is Reason.DAEMON_STOPPING:
                raise
            await self._refused(event, e)
            return
        await self._follow(event, run, was_ended=False)

    async def _obsolete(self, event: Event) -> str:
        if self.feed and not await asyncio.to_thread(os.path.lexists, event.subject):
            return "the file is not there any more"
        return "" if event.attempt < _MOST_ATTEMPTS else f"it was tried {event.attempt} times"

    def _request(self, event: Event) -> RunRequest:
        """Raises ToolError (BAD_FIELD) for data that may not stand in a prompt."""
        automation = self.automation
        template.require_fit(event.data)
        direct = None
        if automation.call:
            call = automation.call
            direct = Direct(call.tool, template.filled_call(call.arguments, event.data, self.commands(call.tool)))
        prompt = template.filled(automation.prompt, event.data)
        return RunRequest(
            principal=automation.principal,
            prompt=prompt or f"{automation.call.tool if automation.call else ''} {json.dumps(direct and direct.arguments)}",
            request_id=event.request_id,
            labels=Labels(untrusted=(f"trigger:{automation.name}",)),
            priority=Priority[automation.priority.upper()],
            start_by_ns=self._begins_by_ns(event),
            budget=Usage(seconds=automation.limits.deadline_s),
            tools=automation.tools,
            direct=direct,
            trigger=f"automations/{automation.name}/events/{event.seq}",
            triggered_by=event.by,
            approval_s=automation.limits.approval_s,
        )

    async def _follow(self, event: Event, run: Run, *, was_ended: bool) -> None:
        """To the end of its run, and what follows from that. `was_ended`: by a daemon that did not live to say so here."""
        self.under_way[event.seq] = event = replace(event, run=run.id)
        failed = ""
        async for told in self.runs.watch(run.id, 0):
            if told.kind == "call" and told.body.get("tool"):
                failed = _failure(told.body)
            if told.kind == "approval":
                self._park(event, told)
            elif told.kind == "call" and self.feed:
                await self.feed.wrote(told.body.get("changed", ()))
        run = await self.runs.get(run.id)
        lost = run.error is not None and run.error[0] == Reason.DAEMON_STOPPING.name
        await self._settle(event, run, failed, cut_off=lost or (was_ended and run.state is RunState.CANCELLED))

    def _park(self, event: Event, told: RunEvent) -> None:
        """While a person is asked, others have its place."""
        if told.body["state"] == "pending":
            self.parked.add(event.seq)
        else:
            self.parked.discard(event.seq)
        self.wake()

    async def _settle(self, event: Event, run: Run, failed: str, *, cut_off: bool) -> None:
        """`failed` is what its last call came to, if that was an error: the model has answered all the same."""
        message = run.error[1] if run.error else ""
        if run.state is RunState.SUCCEEDED and run.stop_reason in _WHOLE:
            await self._end(event, State.SUCCEEDED, failed)
        elif run.state is RunState.CANCELLED and not cut_off:
            await self._end(event, State.FAILED, "it was cancelled")
        elif run.state is RunState.SUCCEEDED and run.stop_reason not in _LATER:
            await self._end(event, State.FAILED, f"it came to no end: {_words(run.stop_reason)}")
        else:
            may_differ = run.error is None or Reason[run.error[0]].code not in _FOR_GOOD
            await self._again(event, message or _words(run.stop_reason), counts=not cut_off, may_differ=may_differ)

    async def _again(self, event: Event, why: str, *, counts: bool, may_differ: bool = True) -> None:
        """What its run has done is put back; then it waits for its next attempt, if it has one and that may end differently."""
        limits, failures = self.automation.limits, event.failures + counts
        if failures > limits.retries or not may_differ:
            await self._end(event, State.FAILED, why)
            return
        async with self.feed.quiet if self.feed else contextlib.nullcontext():
            paths, blocked = await self.take_back(event.run, self.automation.principal)
            if self.feed:
                await self.feed.wrote(paths)
        if blocked:
            await self._end(event, State.FAILED, f"{why} It is not begun again: {blocked}.")
            return
        wait_s = limits.retry_s * 2 ** (failures - 1) if counts else 0.0
        await self._wait(event, wait_s, why, failures)

    async def _refused(self, event: Event, error: AgentdError) -> None:
        """There is no run. What may be possible later is waited for."""
        if error.reason.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
            # The line waits, and not this event alone: others would be refused as well, and are not to get before it.
            self._hold(max(1.0, error.retry_s), error.message)
            await self._wait(replace(event, attempt=event.attempt - 1), 0.0, error.message, event.failures)
        else:
            await self._end(event, State.FAILED, str(error))

    def _hold(self, seconds: float, why: str) -> None:
        self._held = time.monotonic() + seconds, why

    def _begins_by_ns(self, event: Event) -> int:
        """A run may wait for the model as long as its event may; never shorter than the model takes to be loaded."""
        now = time.time_ns()
        until = event.create_ns + int(self.automation.limits.wait_s * 1e9)
        return min(max(until, now + _LEAST_WAIT_NS), now + _LONGEST_WAIT_NS)

    async def _wait(self, event: Event, wait_s: float, why: str, failures: int) -> None:
        due_ns = time.time_ns() + int(wait_s * 1e9)
        await self.events.keep(replace(event, state=State.WAITING, due_ns=due_ns, note=why, failures=failures))

    async def _end(self, event: Event, state: State, note: str) -> None:
        if state is State.SUCCEEDED:
            self._quiet_until = time.monotonic() + self.automation.limits.pause_s
        await self.events.keep(replace(event, state=state, end_ns=time.time_ns(), note=note))


def _timed(event: Event, now_ns: int) -> Event:
    """One that came while the clock was not set has come now."""
    return replace(event, create_ns=now_ns) if event.create_ns < _CLOCK_SET_NS <= now_ns else event


def _failure(call: Mapping[str, Any]) -> str:
    output = call.get("output")
    error = output.get("error") if isinstance(output, dict) else None
    return f"{call['tool']}: {error}" if error else ""


def _words(stop: StopReason | None) -> str:
    return stop.value.replace("_", " ") if stop else "it was cut off"
