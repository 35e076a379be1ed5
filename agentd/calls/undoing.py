"""Calls put back: one, a run, or what a plan names. One change at a time, and no call changes files meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentd.devices import risk
from agentd.errors import AgentdError, JournalError, Reason, RequestError
from agentd.journal import Selection, Ways
from agentd.tasks import to_its_end

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentd.audit import AuditLog
    from agentd.journal import Difference, Journal, Plan, Rehearsal, Undone

_CALLS_OF_A_RUN = 10_000


class Undoing:
    """`changing` is held by whoever changes files."""

    def __init__(self, journal: Journal, audit: AuditLog, changing: asyncio.Lock) -> None:
        self._journal, self._audit, self._changing = journal, audit, changing

    async def undo(self, call: str, principal: str, *, any_call: bool = True) -> Undone:
        """Put a call back, one's own unless `any_call`; waits for a change that is under way.

        Raises what the journal raises, and RequestError (CALL_NOT_FOUND) for others' calls.
        """
        self._audit.require_open()
        if not any_call:
            await asyncio.to_thread(self._require_own, call, principal)
        async with self._changing:
            return await asyncio.to_thread(self._journal.undo, call, principal)

    async def pin(self, call: str, principal: str, *, pinned: bool, any_call: bool = True) -> None:
        """Keep what a call needs to be undone past all quotas, or no longer. Raises AgentdError (CALL_NOT_FOUND)."""

        def pin() -> None:
            if not any_call:
                self._require_own(call, principal)
            self._journal.retention.pin(call, principal, pinned=pinned)

        await asyncio.to_thread(pin)

    async def plan_rollback(self, selection: Selection, ways: Ways) -> tuple[Plan, dict[bytes, Difference]]:
        """A plan, and what it would do to each path. Raises what the planner raises."""

        def plan() -> tuple[Plan, dict[bytes, Difference]]:
            rollbacks = self._journal.rollbacks
            made = rollbacks.plan(selection, ways)
            return made, {planned.path: rollbacks.difference(planned, back=True) for planned in made.paths}

        return await asyncio.to_thread(plan)

    async def roll_back(self, selection: Selection, ways: Ways, digest: str, principal: str) -> Undone:
        """Carry out the plan of that digest; waits for a change that is under way.

        Raises JournalError: PLAN_CHANGED, UNDO_CONFLICT, NOT_UNDOABLE; StoreError.
        """

        def apply() -> Undone:
            plan = self._journal.rollbacks.plan(selection, ways)
            if plan.digest != digest:
                message = "Something has changed since this plan was made; nothing was put back."
                raise JournalError(Reason.PLAN_CHANGED, message, hint="Make a new plan and look at it.")
            return self._journal.rollbacks.apply(plan, principal)

        self._audit.require_open()
        async with self._changing:
            return await asyncio.to_thread(apply)

    async def take_back(self, run: str, principal: str) -> tuple[list[str], str]:
        """Put back all that a run has changed, as if it had never been: the paths, or why that can't be done.

        A run that has reached outside can't be taken back, nor one whose files others have changed since.
        """

        def take_back() -> tuple[list[str], str]:
            entries = self._audit.naming("run", run, _CALLS_OF_A_RUN)
            intents = [entry.body for entry in entries if entry.body.get("kind") == "call.intent"]
            if outside := next((body["tool"]["name"] for body in intents if _reaches_outside(body)), ""):
                return [], f"{outside} has reached outside, which can't be taken back"
            for rehearsal in self._journal.rollbacks.rehearsals(principal):
                if rehearsal.run == run:
                    self._journal.rollbacks.drop(rehearsal.call, principal)
            plan = self._journal.rollbacks.plan(Selection(run=run), Ways())
            if not any(planned.does or planned.blocks for planned in plan.paths):
                return [], ""
            return [file.path for file in self._journal.rollbacks.apply(plan, principal).files], ""

        async def alone() -> tuple[list[str], str]:
            async with self._changing:
                try:
                    return await asyncio.to_thread(take_back)
                except AgentdError as e:
                    return [], e.message.rstrip(".")

        return await to_its_end(alone())  # nothing else may change files meanwhile, whether or not anybody waits for it

    async def rehearsals(self, principal: str) -> list[Rehearsal]:
        """Calls that wait to be applied or dropped, oldest first; of one principal, or of all."""
        return await asyncio.to_thread(self._journal.rollbacks.rehearsals, principal)

    async def drop(self, call: str, principal: str, *, any_call: bool = True) -> None:
        """Give up what a rehearsed call has made. Raises AgentdError (CALL_NOT_FOUND)."""

        def drop() -> None:
            if not any_call:
                self._require_own(call, principal)
            self._journal.rollbacks.drop(call, principal)

        await asyncio.to_thread(drop)

    async def differences(self, selection: Selection) -> list[Difference]:
        """What a selection of calls has changed, by path. Raises what the planner raises."""

        def look() -> list[Difference]:
            rollbacks = self._journal.rollbacks
            plan = rollbacks.plan(replace(selection, undone=True), Ways())
            return [rollbacks.difference(planned, back=False) for planned in plan.paths]

        return await asyncio.to_thread(look)

    def _require_own(self, call: str, principal: str) -> None:
        begun = self._audit.entries(call=call, limit=1)
        if not begun or begun[0].body.get("principal") != principal:
            message, hint = f"{principal} has made no call {call!r}.", "Only an admin may undo the calls of others."
            raise RequestError(Reason.CALL_NOT_FOUND, message, hint=hint, field="name", metadata={"call": call})


def _reaches_outside(body: Mapping[str, Any]) -> bool:
    scopes = body.get("scopes") or ()
    return any(map(lasts, scopes)) or body["tool"].get("effect") in ("external", "physical")


def lasts(scope: str) -> bool:
    """Whether what is done by such a scope can't be put back."""
    kind, _, value = scope.partition(":")
    return kind == "connect" or (kind == "device" and risk(value).lasts)
