"""All runs: started, watched, kept, cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentd.budgets import Admission, Allowance, Priority, Ticket, Usage
from agentd.budgets.policy import AdmissionPolicy
from agentd.errors import AgentdError, DaemonError, Reason, RequestError
from agentd.grants import parse
from agentd.runs.live import Live
from agentd.runs.loop import Caller, Limits, Loop, Model, ModelSettings
from agentd.runs.run import Run, RunEvent, RunRequest, State, StopReason
from agentd.store import new_id
from agentd.tasks import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from agentd.budgets import Quotas
    from agentd.runs.record import RunRecords

__all__ = ["Limits", "ModelSettings", "Runs"]

_log = logging.getLogger(__name__)
_NOT_READY_S = 2.0
STOP_TIMEOUT_S = 15.0


async def _nothing() -> bool:
    """Where the model needs no preparation."""
    return True


def _nobody(_: Run) -> None:
    """Where runs are not recorded."""


class _Overdue(Exception):
    """It has waited for its turn for as long as it may."""


class Runs:
    """Owns the tasks of all runs. Lives on the event loop; the store is asked on other threads."""

    def __init__(
        self,
        records: RunRecords,
        model: Model,
        caller: Caller,
        settings: ModelSettings,
        limits: Limits,
        *,
        record: Callable[[Run], None] = _nobody,
        admission: Admission | None = None,
        quotas: Quotas | None = None,
        used: Callable[[], Usage] = Usage,
        is_known: Callable[[str, str], bool] = lambda _principal, _token: True,
        prepare: Callable[[], Awaitable[bool]] = _nothing,
    ) -> None:
        """`record` gets each run when it is asked for, begins and has ended, on a thread of its own; what it raises keeps a run
        from beginning. `used` is what the model and the device have used so far. `is_known` says whether a principal may still
        have runs: one that was deferred may have been asked for long ago. `prepare` loads the model, if it may be.
        """
        self._admission = admission or Admission(AdmissionPolicy(), Allowance)
        self._records, self._model, self._caller, self._record = records, model, caller, record
        self._settings, self._limits = settings, limits
        self._quotas, self._used, self._is_known, self._prepare = quotas, used, is_known, prepare
        self._live: dict[str, Live] = {}
        self._stopping = False

    async def create(self, asked: RunRequest) -> Run:
        """Start a run, or put it in the queue.

        Raises RequestError: BAD_FIELD, REQUEST_ID_REUSED; OverBudget, QueueFull, QuotaSpent; StoreError; DaemonError
        (DAEMON_STOPPING).
        """
        asked.check()
        if self._stopping:
            raise _stopping()
        if asked.request_id and (known := await self._records.asked_for(asked.principal, asked.request_id)):
            return self._the_same(known, asked)
        if self._quotas:
            self._quotas.require(asked.principal)
        ticket = self._admitted(asked)
        policy = self._admission.policy
        live = Live(Run.of(asked, policy.defer_s if asked.priority is Priority.BACKGROUND else policy.wait_s), ticket)
        try:
            kept = await self._records.insert(live.run, asked.request_id or None)
            if kept.id != live.run.id:
                self._admission.leave(ticket)
                return self._the_same(kept, asked)
            loop = self._loop(live)
            await asyncio.to_thread(self._record, live.run)
            if self._stopping and not live.run.deferrable:
                raise _stopping()
        except BaseException:
            self._admission.leave(ticket)
            await self._give_up(live.run)
            raise
        if not self._stopping:  # what can wait is in the store, for the next start
            self._launch(live, loop)
        return live.run

    def _admitted(self, asked: RunRequest) -> Ticket:
        """One call without the model waits for nobody: what the budgets hold up is the model, and it may be to tell of that."""
        if asked.direct:
            return Ticket(asked.priority, 0, begun=True)
        self._admission.require_time(asked.start_by_ns / 1e9 - time.time() if asked.start_by_ns else math.inf)
        return self._admission.admit(asked.priority, key=self._key(asked.principal))

    def _the_same(self, known: Run, asked: RunRequest) -> Run:
        """Raises RequestError (REQUEST_ID_REUSED) if another run was asked for under this id."""
        same = (known.prompt, known.rehearse, known.priority) == (asked.prompt, asked.rehearse, asked.priority)
        if not same or asked.session not in ("", known.session):
            message = f"The request id {asked.request_id!r} was used for another request."
            raise RequestError(Reason.REQUEST_ID_REUSED, message, hint="Use a new one.", field="request_id")
        return self._live[known.id].run if known.id in self._live else known

    async def _give_up(self, run: Run) -> None:
        """It never was: asking again under its id is to start it."""
        with contextlib.suppress(AgentdError):
            await self._records.drop(run)

    def resume(self, deferred: list[Run]) -> None:
        """What was deferred before a restart goes on waiting."""
        for run in deferred:
            live = Live(run, self._admission.admit(run.priority, again=True, key=self._key(run.principal)))
            self._launch(live, self._loop(live))

    def _key(self, principal: str) -> str:
        """Two that may use only so many tokens together are not to count on the same ones."""
        return principal if self._quotas and self._quotas.counts_tokens(principal) else ""

    def _loop(self, live: Live) -> Loop:
        run = live.run
        loop = Loop(run, self._model, self._caller, self._settings_of(run), self._limits.within(run.budget), [], live.add)
        loop.labels, loop.rehearse = run.labels, run.rehearse
        loop.within = tuple(parse(text, resolved=True) for text in run.within)
        loop.turn = lambda: self._turn(live, loop)
        loop.purse, loop.used = self._quotas, self._used
        return loop

    def _settings_of(self, run: Run) -> ModelSettings:
        if not run.tools:
            return self._settings
        return replace(self._settings, tools=tuple(tool for tool in self._settings.tools if tool.name in run.tools))

    async def _remember(self, live: Live, loop: Loop) -> None:
        """What its session has said before, up to now; and what that has taken in."""
        run = live.run
        earlier = await self._records.history(run.session)
        history = [each for each in earlier if each.principal == run.principal]  # a session's name is no key to others' words
        for each in history:
            loop.labels |= each.labels
        loop.history = [each.turn() for each in history]

    def _launch(self, live: Live, loop: Loop) -> None:
        self._live[live.run.id] = live
        live.task = asyncio.create_task(self._go(live, loop), name=f"run {live.run.id}")

    @contextlib.asynccontextmanager
    async def _turn(self, live: Live, loop: Loop) -> AsyncIterator[None]:
        """Raises _Overdue, and for the first one what keeps a deferred run from beginning."""
        first = not live.ticket.begun
        until = live.run.start_by_ns / 1e9 if first else time.time() + self._patience_s(live.run)
        if first:
            await self._follow_session(live, until)
        told = False
        while True:
            ahead, reason = self._admission.why_waiting(live.ticket)
            if (ahead or reason) and not told:
                live.add("queue", {"ahead": ahead, "reason": reason})
                told = True
            async with contextlib.AsyncExitStack() as stack:
                live.hold("turn", on=True)
                try:
                    await self._come(stack, live, until)
                    ready = not first or await self._is_ready(live.run)
                finally:
                    live.hold("turn", on=False)
                if ready:
                    if first:
                        await self._begin(live, loop)
                    yield
                    return
            # Between its turn and the model's loading the device has become too hot, or its memory too full.
            live.hold("turn", on=True)
            await asyncio.sleep(_NOT_READY_S)
            live.hold("turn", on=False)

    async def _follow_session(self, live: Live, until: float) -> None:
        """It is to see those of its session that were asked for before it. What can wait for days holds up nobody."""
        mine = live.run
        for each in list(self._live.values()):
            same = (each.run.session, each.run.principal) == (mine.session, mine.principal)
            waits = each.run.state is State.QUEUED and each.run.deferrable
            if not same or waits or each.task is None or each.ticket.number >= live.ticket.number:
                continue
            live.hold("turn", on=True)
            try:
                await asyncio.wait([each.task], timeout=max(0.0, until - time.time()))
            finally:
                live.hold("turn", on=False)

    def _patience_s(self, run: Run) -> float:
        """How long one that has begun waits for a further turn."""
        policy = self._admission.policy
        return policy.defer_s if run.deferrable else policy.wait_s

    async def _come(self, stack: contextlib.AsyncExitStack, live: Live, until: float) -> None:
        """Raises _Overdue."""
        left = until - time.time()
        if left <= 0:
            raise _Overdue
        try:
            async with asyncio.timeout(left):
                await stack.enter_async_context(self._admission.turn(live.ticket))
        except TimeoutError:
            raise _Overdue from None

    async def _is_ready(self, run: Run) -> bool:
        """Whether the model is there to begin with. What can wait waits for memory, too."""
        try:
            return await self._prepare() or not run.deferrable
        except AgentdError as e:
            if e.reason is Reason.BUDGET_MEMORY and run.deferrable:
                return False
            raise

    async def _begin(self, live: Live, loop: Loop) -> None:
        """Until that is on disk it is still one that waits."""
        begun = replace(live.run, state=State.RUNNING)
        if begun.deferrable:
            if not self._is_known(begun.principal, begun.token):
                message = f"{begun.principal} may have no runs any more: its token was revoked, or its role taken away."
                raise RequestError(Reason.ROLE_REQUIRED, message, metadata={"principal": begun.principal})
            await self._records.keep(begun)
        await self._remember(live, loop)  # after that: what is taken out of its session meanwhile is refused
        live.run, live.ticket.begun = begun, True
        await asyncio.to_thread(self._record, replace(begun, labels=loop.labels))

    def going_on(self) -> list[Run]:
        """Oldest first."""
        return [live.run for live in self._live.values() if not live.run.ended]

    def notice(self, body: dict[str, Any], *, holds: bool) -> None:
        """What battery, heat and memory allow has changed: whoever watches a run is told, and whoever may goes on."""
        for live in list(self._live.values()):
            if not live.run.ended and not live.ending:
                live.hold("budget", on=holds)
                live.tell_budget(body)
        self._admission.look()

    async def asked_for(self, principal: str, request_id: str) -> Run | None:
        """The run that was started under this id, if one was."""
        known = await self._records.asked_for(principal, request_id)
        return self._live[known.id].run if known and known.id in self._live else known

    async def get(self, run: str) -> Run:
        """Raises RequestError (RUN_NOT_FOUND)."""
        if live := self._live.get(run):
            return live.run
        return await self._records.get(run)

    async def page(self, before: str, limit: int, principal: str = "") -> list[Run]:
        """Up to `limit` runs older than `before` (or the newest), newest first; of one principal, or of all."""
        kept = await self._records.page(before, limit, principal)
        return [self._live[run.id].run if run.id in self._live else run for run in kept]

    async def watch(self, run: str, after: int) -> AsyncIterator[RunEvent]:
        """The events past number `after`, until the run has ended. Raises RequestError (RUN_NOT_FOUND)."""
        if (live := self._live.get(run)) is None:
            events = await self._records.events(run, 0)
            if len(events) == 1 or after > len(events):  # a daemon was killed meanwhile: its end is news to everybody
                for event in events[-1:]:
                    yield replace(event, sequence=after + 1)
                return
            for event in events[after:]:
                yield event
            return
        if after > len(live.events):  # it waited past a restart, and counts anew
            after = 0
        while True:
            more, ended = live.more, live.run.ended  # before the events: more may come while these are sent
            for event in live.events[after:]:
                yield event
                after = event.sequence
            if live.left:
                raise _stopping()
            if ended:
                return
            await more.wait()

    async def cancel(self, run: str) -> Run:
        """End a run and wait until it has ended. Raises RequestError (RUN_NOT_FOUND), StoreError."""
        live = self._live.get(run)
        if live and live.run.state is State.QUEUED and live.run.deferrable:
            # First on disk: or it would run after all, at the next start.
            await self._records.keep(replace(live.run, state=State.CANCELLED, end_ns=time.time_ns()))
        if live and live.task:
            live.task.cancel()
            await asyncio.wait([live.task], timeout=STOP_TIMEOUT_S)
        return await self.get(run)

    async def stop(self) -> None:
        """Cancel what is going on and let nothing new begin."""
        self._stopping = True
        tasks = [live.task for live in self._live.values() if live.task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)

    async def _go(self, live: Live, loop: Loop) -> None:
        end: dict[str, Any]
        try:
            async with asyncio.timeout(loop.limits.seconds) as limit:
                live.time(limit)
                if live.run.direct:
                    await self._begin(live, loop)
                    stop = await loop.make(live.run.direct)
                else:
                    stop = await loop.go()
            end = {"state": State.SUCCEEDED, "stop_reason": stop}
        except TimeoutError:
            end = {"state": State.SUCCEEDED, "stop_reason": StopReason.TIME_LIMIT}
        except _Overdue:
            end = self._overdue(live)
        except asyncio.CancelledError:
            if self._stopping and live.run.state is State.QUEUED and live.run.deferrable:
                live.leave()  # it waits on in the store, for the next start
                return
            end = {"state": State.CANCELLED}
            if self._stopping and live.run.state is State.QUEUED:
                stopping = _stopping()
                end = {"state": State.FAILED, "error": (stopping.reason.name, stopping.message, stopping.hint)}
        except AgentdError as e:
            end = {"state": State.FAILED, "error": (e.reason.name, e.message, e.hint)}
        except Exception:  # a bug of ours must end this run only, and be found in the log
            incident = new_id()
            _log.exception("incident %s in run %s", incident, live.run.id)
            end = {"state": State.FAILED, "error": ("INTERNAL", f"A bug in agentd ended this run (incident {incident}).", "")}
        answer = loop.answer or "".join(e.body["text"] for e in live.events if e.kind == "text").strip()
        ended = replace(
            live.run,
            **end,
            answer=answer,
            end_ns=time.time_ns(),
            prompt_tokens=loop.prompt_tokens,
            generated_tokens=loop.generated_tokens,
            calls=loop.calls,
            seconds=round(loop.seconds, 3),
            joules=round(loop.joules, 3),
            labels=loop.labels,
            transcript=tuple(loop.transcript),
        )
        self._admission.leave(live.ticket)
        await to_its_end(self._keep(live, ended))  # whoever cancels it now is to see its end, too

    def _overdue(self, live: Live) -> dict[str, Any]:
        """One that has begun ends with what it has."""
        if live.run.state is State.RUNNING:
            held = bool(self._admission.why_waiting(live.ticket)[1])
            return {"state": State.SUCCEEDED, "stop_reason": StopReason.BUDGET if held else StopReason.TIME_LIMIT}
        ahead, reason = self._admission.why_waiting(live.ticket)
        why = reason or (f"{ahead} runs were before it" if ahead else "the model was busy")
        by = datetime.fromtimestamp(live.run.start_by_ns / 1e9, UTC).isoformat(" ", "seconds")
        message = f"The run could not begin by {by}: {why}."
        return {"state": State.FAILED, "error": (Reason.NOT_BEGUN.name, message, "Start it again, with more time to wait.")}

    async def _keep(self, live: Live, ended: Run) -> None:
        """Its end is on disk before anybody is told; and only what is on disk may leave the memory."""
        last = live.last_event()
        with contextlib.suppress(AgentdError):  # a full disk: the run stays readable while the daemon lives
            try:
                await self._records.finish(ended, [*live.events, last])
            finally:
                live.end(ended, last)
            self._live.pop(live.run.id, None)
            await asyncio.to_thread(self._record, live.run)
        with contextlib.suppress(AgentdError):
            await self._caller.end_run(live.run.id)


def _stopping() -> DaemonError:
    return DaemonError(Reason.DAEMON_STOPPING, "The daemon is stopping.", hint="Try again when it is back.")
