"""Calls undone: one, a run, or what a plan names. No call changes the same files meanwhile."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from agentd.calls.wanted import NAMED_PATHS
from agentd.devices import risk
from agentd.errors import AgentdError, JournalError, Reason, RequestError, ToolError
from agentd.journal import Difference, Selection, Ways, parents
from agentd.store import new_id
from agentd.tasks import to_its_end

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from agentd.audit import AuditLog
    from agentd.calls.locks import Locks
    from agentd.journal import Journal, Left, PathPlan, Permit, Plan, Rehearsal, Undone

_CALLS_OF_A_RUN = 10_000
_TREES = 64  # that are held at once
_STOP_S = 30.0
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Is called with how many paths are done, and of how many."""


def no_progress(_done: int, _total: int) -> None:
    pass


class Undoing:
    """`locks` are held by whoever changes files."""

    def __init__(self, journal: Journal, audit: AuditLog, locks: Locks) -> None:
        self._journal, self._audit, self._locks = journal, audit, locks
        self._working: set[asyncio.Future[Any]] = set()

    async def undo(
        self,
        call: str,
        principal: str,
        ways: Ways,
        *,
        any_call: bool = True,
        progress: Progress = no_progress,
        permit: Permit | None = None,
    ) -> Undone:
        """Undo a call, one's own unless `any_call`; waits for calls that change the same files. `progress` is called, on a
        thread of its own, with how many paths of how many are done.

        Raises what the journal raises, and RequestError (CALL_NOT_FOUND) for others' calls.
        """
        self._audit.require_open()
        if not any_call:
            await asyncio.to_thread(self._require_own, call, principal)
        selection = Selection(calls=(call,), permit=permit)
        return await self._apply(selection, ways, principal, progress)

    async def _apply(
        self, selection: Selection, ways: Ways, principal: str, progress: Progress, digest: str | None = None
    ) -> Undone:
        rollbacks = self._journal.rollbacks

        def apply(plan: Plan) -> Undone:
            if digest is not None and plan.digest != digest:
                message = "Something has changed since this plan was made; nothing was undone."
                raise JournalError(Reason.PLAN_CHANGED, message, hint="Make a new plan and look at it.")
            total = len(plan.paths)
            return rollbacks.apply(plan, principal, lambda done: progress(min(done, total), total))

        return await self._holding(selection, ways, apply)

    async def _holding(self, selection: Selection, ways: Ways, do: Callable[[Plan], T]) -> T:
        """Do something with a plan, holding all that it names. Once begun it is done to its end."""
        plan = functools.partial(self._journal.rollbacks.plan, selection, ways)
        while True:
            wanted = {planned.path for planned in (await asyncio.to_thread(plan)).paths}
            async with self._locks.changing(f"undo-{new_id()}", _trees(wanted)):
                made = await asyncio.to_thread(plan)
                # Before its turn came, a call may have ended that it is about.
                if {planned.path for planned in made.paths} <= wanted:
                    return await self._to_its_end(functools.partial(do, made))

    async def _to_its_end(self, do: Callable[[], T]) -> T:
        task = asyncio.ensure_future(asyncio.to_thread(do))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return await to_its_end(task)

    async def stop(self) -> None:
        """Wait for what has begun."""
        if self._working:
            await asyncio.wait(set(self._working), timeout=_STOP_S)

    async def recover(
        self,
        calls: Collection[str] = (),
        *,
        force: bool = False,
        patience_s: float | None = None,
        permit: Permit | None = None,
    ) -> list[Left]:
        """Try again to restore what failed calls have left, of these or of all; returns what still could not be. With `force`,
        what somebody has changed since is overwritten, after their version was kept. With `patience_s`, what others change for
        longer than that is left for another time. Raises StoreError.
        """
        self._audit.require_open()
        recovery = self._journal.recovery
        await asyncio.to_thread(recovery.write_ends)
        for call, paths in await asyncio.to_thread(recovery.calls):
            if calls and call not in calls:
                continue
            permitted = await asyncio.to_thread(_permitted, paths, permit, force=force)
            retry = functools.partial(recovery.retry, call, permitted, force=force)
            try:
                async with self._locks.changing(f"recover-{call}", _trees(paths), patience_s=patience_s):
                    await self._to_its_end(retry)
            except ToolError:
                if patience_s is None:
                    raise
        return [left for left in await self.left() if not calls or left.call in calls]

    async def left(self) -> list[Left]:
        """What failed calls have changed and could not be restored yet."""
        return await asyncio.to_thread(self._journal.recovery.left)

    @property
    def left_count(self) -> int:
        return self._journal.recovery.count

    async def pin(self, call: str, principal: str, *, pinned: bool, any_call: bool = True) -> None:
        """Keep what a call needs to be undone past all quotas, or no longer. Raises AgentdError (CALL_NOT_FOUND)."""

        def pin() -> None:
            if not any_call:
                self._require_own(call, principal)
            self._journal.retention.pin(call, principal, pinned=pinned)

        await asyncio.to_thread(pin)

    async def plan_rollback(self, selection: Selection, ways: Ways) -> tuple[Plan, dict[bytes, Difference]]:
        """A plan, and what it would do to its paths, or to as many as are named: what is in the way first. Raises what the
        planner raises.
        """

        def plan() -> tuple[Plan, dict[bytes, Difference]]:
            rollbacks = self._journal.rollbacks
            made = rollbacks.plan(selection, ways)
            shown = sorted(made.paths, key=lambda planned: not planned.blocks)[:NAMED_PATHS]
            return made, {planned.path: self._difference(planned, selection.permit, back=True) for planned in shown}

        return await asyncio.to_thread(plan)

    async def roll_back(
        self, selection: Selection, ways: Ways, digest: str, principal: str, *, progress: Progress = no_progress
    ) -> Undone:
        """Carry out the plan of that digest; waits for calls that change the same files. `progress` as in `undo`.

        Raises JournalError: PLAN_CHANGED, UNDO_CONFLICT, NOT_UNDOABLE; StoreError.
        """
        self._audit.require_open()
        return await self._apply(selection, ways, principal, progress, digest)

    async def take_back(self, run: str, principal: str) -> tuple[list[str], str]:
        """Put back all that a run has changed, as if it had never been: the paths, or why that can't be done.

        A run that has reached outside can't be taken back, nor one whose files others have changed since.
        """

        def take_back(plan: Plan) -> tuple[list[str], str]:
            entries = self._audit.naming("run", run, _CALLS_OF_A_RUN)
            intents = [entry.body for entry in entries if entry.body.get("kind") == "call.intent"]
            if outside := next((body["tool"]["name"] for body in intents if _reaches_outside(body)), ""):
                return [], f"{outside} has reached outside, which can't be taken back"
            for rehearsal in self._journal.rollbacks.rehearsals(principal):
                if rehearsal.run == run:
                    self._journal.rollbacks.drop(rehearsal.call, principal)
            if not any(planned.does or planned.blocks for planned in plan.paths):
                return [], ""
            return [file.path for file in self._journal.rollbacks.apply(plan, principal).files], ""

        async def alone() -> tuple[list[str], str]:
            try:
                return await self._holding(Selection(run=run), Ways(), take_back)
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
            return [self._difference(planned, selection.permit, back=False) for planned in plan.paths]

        return await asyncio.to_thread(look)

    def _difference(self, planned: PathPlan, permit: Permit | None, *, back: bool) -> Difference:
        if permit and not permit.reads(planned.path):
            return Difference(planned.path, "it is not shown, as no grant to read it covers it")
        return self._journal.rollbacks.difference(planned, back=back)

    def _require_own(self, call: str, principal: str) -> None:
        begun = self._audit.entries(call=call, limit=1)
        if not begun or begun[0].body.get("principal") != principal:
            message, hint = f"{principal} has made no call {call!r}.", "Only an admin may undo the calls of others."
            raise RequestError(Reason.CALL_NOT_FOUND, message, hint=hint, field="name", metadata={"call": call})


def _permitted(paths: Iterable[bytes], permit: Permit | None, *, force: bool) -> list[bytes]:
    return [path for path in paths if permit is None or not permit.refuses(path, force)]


def _trees(paths: Iterable[bytes]) -> list[bytes]:
    """What has to be held to change these paths: the topmost ones, or one directory that has them all if they are many."""
    chosen = set(paths)
    top = [path for path in chosen if not chosen.intersection(parents(path))]
    return top if len(top) <= _TREES else [os.path.commonpath(top)]


def _reaches_outside(body: Mapping[str, Any]) -> bool:
    scopes = body.get("scopes") or ()
    return any(map(lasts, scopes)) or body["tool"].get("effect") in ("external", "physical")


def lasts(scope: str) -> bool:
    """Whether what is done by such a scope can't be put back."""
    kind, _, value = scope.partition(":")
    return kind == "connect" or (kind == "device" and risk(value).lasts)
