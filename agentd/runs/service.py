"""All runs: started, watched, kept, cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agentd.errors import AgentdError, DaemonError, Reason, RequestError
from agentd.grants import Labels
from agentd.runs.loop import Caller, Limits, Loop, Model, ModelSettings
from agentd.runs.run import WAITS, Run, RunEvent, State, StopReason
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentd.grants import Pattern
    from agentd.runs.record import RunRecords

__all__ = ["Limits", "ModelSettings", "Runs"]

_log = logging.getLogger(__name__)
_NONE = Labels()
LONGEST_PROMPT = 1 << 20
STOP_TIMEOUT_S = 15.0


def _nobody(_: Run) -> None:
    """Where runs are not recorded."""


@dataclass(slots=True)
class _Live:
    """A run that is going on: its events so far, and a flag that is replaced whenever there are more."""

    run: Run
    events: list[RunEvent] = field(default_factory=list)
    more: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    limit: asyncio.Timeout | None = None
    _left: float | None = None

    def add(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "approval":
            self._count_no_waiting(waits=body["state"] == WAITS.value)
        self.events.append(RunEvent(len(self.events) + 1, time.time_ns(), kind, body))
        self.more.set()
        self.more = asyncio.Event()

    def _count_no_waiting(self, *, waits: bool) -> None:
        """The time that a person takes to answer is not the run's."""
        now = asyncio.get_running_loop().time()
        if self.limit is None or (waits == (self._left is not None)):
            return
        if waits:
            self._left = max(0.0, (self.limit.when() or now) - now)
            self.limit.reschedule(None)
        else:
            self.limit.reschedule(now + (self._left or 0.0))
            self._left = None


class Runs:
    """Owns the tasks of all runs. Lives on the event loop; the store is asked on other threads."""

    def __init__(
        self,
        records: RunRecords,
        model: Model,
        caller: Caller,
        settings: ModelSettings,
        limits: Limits,
        record: Callable[[Run], None] = _nobody,
        admit: Callable[[], None] = lambda: None,
    ) -> None:
        """`record` gets each run when it begins and when it has ended, on a thread of its own; what it raises keeps a run from
        beginning. So does what `admit` raises.
        """
        self._admit = admit
        self._records, self._model, self._caller, self._record = records, model, caller, record
        self._settings, self._limits = settings, limits
        self._live: dict[str, _Live] = {}
        self._keeping: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def create(
        self,
        principal: str,
        prompt: str,
        session: str,
        request_id: str,
        labels: Labels = _NONE,
        within: tuple[Pattern, ...] = (),
        *,
        rehearse: bool = False,
    ) -> Run:
        """Start a run. The same `request_id` gives the run it started the first time.

        `labels` are those of what the prompt was made from, `within` the most that its calls may touch. With
        `rehearse` what they change is put back, for a person to look at.

        Raises RequestError: BAD_FIELD, REQUEST_ID_REUSED; StoreError; DaemonError (DAEMON_STOPPING).
        """
        _check(prompt, session, request_id)
        if self._stopping:
            raise DaemonError(Reason.DAEMON_STOPPING, "The daemon is stopping.", hint="Try again when it is back.")
        if not await self._records.has_begun(request_id):  # who asks once more is to get the run of the first time
            self._admit()
        run = Run(new_id(), principal, prompt, session or new_id(), State.RUNNING, time.time_ns())
        earlier = await self._records.history(session) if session else []
        history = [each for each in earlier if each.principal == principal]  # a session's name is no key to others' words
        for each in history:
            labels |= each.labels
        kept = await self._records.insert(run, request_id or None)
        if kept.id != run.id:
            if (kept.prompt, kept.principal) != (prompt, principal):
                message = f"The request id {request_id!r} was used for another prompt."
                raise RequestError(Reason.REQUEST_ID_REUSED, message, hint="Use a new one.", field="request_id")
            return kept
        await asyncio.to_thread(self._record, replace(run, labels=labels))
        live = self._live[run.id] = _Live(run)
        loop = Loop(run, self._model, self._caller, self._settings, self._limits, [each.turn() for each in history], live.add)
        loop.labels, loop.within, loop.rehearse = labels, within, rehearse
        live.task = asyncio.create_task(self._go(live, loop), name=f"run {run.id}")
        return run

    def going_on(self) -> list[Run]:
        """Oldest first."""
        return [live.run for live in self._live.values() if not live.run.ended]

    def notice(self, body: dict[str, Any]) -> None:
        """What battery, heat and memory allow has changed: whoever watches a run is told."""
        for live in self._live.values():
            if not live.run.ended:
                live.add("budget", body)

    async def get(self, run: str) -> Run:
        """Raises RequestError (RUN_NOT_FOUND)."""
        if live := self._live.get(run):
            return live.run
        return await self._records.get(run)

    async def page(self, before: str, limit: int, principal: str = "") -> list[Run]:
        """Up to `limit` runs older than `before` (or the newest), newest first; of one principal, or of all."""
        return await self._records.page(before, limit, principal)

    async def watch(self, run: str, after: int) -> AsyncIterator[RunEvent]:
        """The events past number `after`, until the run has ended. Raises RequestError (RUN_NOT_FOUND)."""
        if (live := self._live.get(run)) is None:
            for event in await self._records.events(run, after):
                yield event
            return
        while True:
            more, ended = live.more, live.run.ended  # before the events: more may come while these are sent
            for event in live.events[after:]:
                yield event
                after = event.sequence
            if ended:
                return
            await more.wait()

    async def cancel(self, run: str) -> Run:
        """End a run and wait until it has ended. Raises RequestError (RUN_NOT_FOUND)."""
        live = self._live.get(run)
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
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=STOP_TIMEOUT_S)

    async def _go(self, live: _Live, loop: Loop) -> None:
        end: dict[str, Any]
        try:
            async with asyncio.timeout(self._limits.seconds) as live.limit:
                stop = await loop.go()
            end = {"state": State.SUCCEEDED, "stop_reason": stop}
        except TimeoutError:
            end = {"state": State.SUCCEEDED, "stop_reason": StopReason.TIME_LIMIT}
        except asyncio.CancelledError:
            end = {"state": State.CANCELLED}
        except AgentdError as e:
            end = {"state": State.FAILED, "error": (e.reason.name, e.message, e.hint)}
        except Exception:  # a bug of ours must end this run only, and be found in the log
            incident = new_id()
            _log.exception("incident %s in run %s", incident, live.run.id)
            end = {"state": State.FAILED, "error": ("INTERNAL", f"A bug in agentd ended this run (incident {incident}).", "")}
        answer = loop.answer or "".join(e.body["text"] for e in live.events if e.kind == "text").strip()
        live.run = replace(
            live.run,
            **end,
            answer=answer,
            end_ns=time.time_ns(),
            prompt_tokens=loop.prompt_tokens,
            generated_tokens=loop.generated_tokens,
            calls=loop.calls,
            labels=loop.labels,
            transcript=tuple(loop.transcript),
        )
        live.add("run", {})
        keeping = asyncio.create_task(self._keep(live), name=f"keep run {live.run.id}")
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)
        await asyncio.shield(keeping)

    async def _keep(self, live: _Live) -> None:
        """Only what is on disk may leave the memory."""
        with contextlib.suppress(AgentdError):  # a full disk: the run stays readable while the daemon lives
            await self._records.finish(live.run, live.events)
            self._live.pop(live.run.id, None)
            await asyncio.to_thread(self._record, live.run)
        with contextlib.suppress(AgentdError):
            await self._caller.end_run(live.run.id)


def _check(prompt: str, session: str, request_id: str) -> None:
    def bad(field: str, why: str) -> RequestError:
        return RequestError(Reason.BAD_FIELD, f"{field} {why}.", field=field, metadata={"field": field})

    if not prompt.strip():
        raise bad("run.prompt", "is empty")
    if len(prompt) > LONGEST_PROMPT:
        raise bad("run.prompt", f"has {len(prompt)} characters; {LONGEST_PROMPT} are the most")
    if "\0" in prompt:
        raise bad("run.prompt", "contains a NUL character")
    for field_name, value in (("run.session", session), ("request_id", request_id)):
        if len(value) > 64 or not value.isprintable():
            raise bad(field_name, "is longer than 64 characters or not printable")
