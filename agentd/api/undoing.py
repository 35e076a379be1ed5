"""The journal's service: undo, plans of rollbacks, what calls have changed, what could not be restored."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentd.api import convert
from agentd.api.identity import caller
from agentd.calls import NAMED_PATHS, no_progress
from agentd.journal import Selection, Ways
from agentd.v1 import journal_pb2, journal_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from agentd.calls import Calls, Progress
    from agentd.journal import Difference, Left, PathPlan, Permit, Rehearsal, Undone

_Verdict = journal_pb2.RollbackPlan.Path.Verdict
_Progress = journal_pb2.StreamRollbackResponse.Progress


class JournalServicer(journal_pb2_grpc.JournalServiceServicer):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def UndoCall(  # noqa: N802
        self, request: journal_pb2.UndoCallRequest, context: Any
    ) -> journal_pb2.UndoCallResponse:
        return _undone(await self._undo(request))

    async def _undo(self, request: journal_pb2.UndoCallRequest, progress: Progress = no_progress) -> Undone:
        call, who = convert.identifier(request.name, "calls"), caller()
        permit = self._permit()
        return await self._calls.undoing.undo(
            call, who.name, _ways(request), any_call=who.has("admin"), progress=progress, permit=permit
        )

    def _permit(self, *, rehearsed: bool = False) -> Permit | None:
        """Whoever may change the grants needs none; others may do what their tools could, within the bounds of their token."""
        who = caller()
        return None if who.has("admin") else self._calls.permit(who.name, who.within, looks=rehearsed and who.has("approver"))

    def _selection(self, message: journal_pb2.ChangeSelection) -> Selection:
        return replace(_selection(message), permit=self._permit(rehearsed=message.rehearsed))

    async def PlanRollback(  # noqa: N802
        self, request: journal_pb2.PlanRollbackRequest, context: Any
    ) -> journal_pb2.RollbackPlan:
        plan, differences = await self._calls.undoing.plan_rollback(self._selection(request.selection), _ways(request))
        return journal_pb2.RollbackPlan(
            digest=plan.digest,
            paths=[_path(planned, differences[planned.path]) for planned in plan.paths if planned.path in differences],
            path_count=len(plan.paths),
            calls=[f"calls/{call}" for call in plan.calls],
            not_undoable_calls=[f"calls/{call}" for call in plan.not_undoable],
        )

    async def ApplyRollback(  # noqa: N802
        self, request: journal_pb2.ApplyRollbackRequest, context: Any
    ) -> journal_pb2.UndoCallResponse:
        return _undone(await self._apply(request))

    async def _apply(self, request: journal_pb2.ApplyRollbackRequest, progress: Progress = no_progress) -> Undone:
        selection, ways = self._selection(request.plan.selection), _ways(request.plan)
        if selection.rehearsed:  # or a grant that wants calls rehearsed would bind nobody
            caller().require("approver", "apply a rehearsal")
        return await self._calls.undoing.roll_back(selection, ways, request.digest, caller().name, progress=progress)

    async def StreamRollback(  # noqa: N802
        self, request: journal_pb2.StreamRollbackRequest, context: Any
    ) -> AsyncGenerator[journal_pb2.StreamRollbackResponse, None]:
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int] | None]()

        def progress(done: int, total: int) -> None:  # on the thread that restores, which may outlive the loop
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(steps.put_nowait, (done, total))

        work = self._undo(request.call, progress) if request.HasField("call") else self._apply(request.rollback, progress)
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                yield journal_pb2.StreamRollbackResponse(progress=_Progress(done=step[0], total=step[1]))
            yield journal_pb2.StreamRollbackResponse(done=_undone(await task))
        finally:
            task.cancel()  # if it waits for others; what has begun goes on to its end

    async def ListLeftovers(  # noqa: N802
        self, request: journal_pb2.ListLeftoversRequest, context: Any
    ) -> journal_pb2.ListLeftoversResponse:
        who = caller()
        left = await self._calls.undoing.left()
        return journal_pb2.ListLeftoversResponse(
            leftovers=[_leftover(each) for each in left if who.has("auditor") or each.principal == who.name]
        )

    async def RecoverCalls(  # noqa: N802
        self, request: journal_pb2.RecoverCallsRequest, context: Any
    ) -> journal_pb2.ListLeftoversResponse:
        calls, who = [convert.identifier(name, "calls") for name in request.names], caller()
        if not who.has("admin"):
            own = {left.call for left in await self._calls.undoing.left() if left.principal == who.name}
            calls = [call for call in calls or own if call in own]
            if not calls:  # or it would mean everybody's
                return journal_pb2.ListLeftoversResponse()
        left = await self._calls.undoing.recover(calls, force=request.force, permit=self._permit())
        return journal_pb2.ListLeftoversResponse(leftovers=map(_leftover, left))

    async def ListRehearsals(  # noqa: N802
        self, request: journal_pb2.ListRehearsalsRequest, context: Any
    ) -> journal_pb2.ListRehearsalsResponse:
        who = caller()
        found = await self._calls.undoing.rehearsals("" if who.has("approver") else who.name)
        return journal_pb2.ListRehearsalsResponse(rehearsals=map(_rehearsal, found))

    async def DropRehearsal(  # noqa: N802
        self, request: journal_pb2.DropRehearsalRequest, context: Any
    ) -> journal_pb2.DropRehearsalResponse:
        call, who = convert.identifier(request.name, "calls"), caller()
        await self._calls.undoing.drop(call, who.name, any_call=who.has("approver"))
        return journal_pb2.DropRehearsalResponse()

    async def PinCall(  # noqa: N802
        self, request: journal_pb2.PinCallRequest, context: Any
    ) -> journal_pb2.PinCallResponse:
        call, who = convert.identifier(request.name, "calls"), caller()
        await self._calls.undoing.pin(call, who.name, pinned=request.pinned, any_call=who.has("admin"))
        return journal_pb2.PinCallResponse()

    async def DiffChanges(  # noqa: N802
        self, request: journal_pb2.DiffChangesRequest, context: Any
    ) -> journal_pb2.DiffChangesResponse:
        found = await self._calls.undoing.differences(self._selection(request.selection))
        shown = map(_difference, found[:NAMED_PATHS])
        return journal_pb2.DiffChangesResponse(differences=shown, path_count=len(found))


def _selection(message: journal_pb2.ChangeSelection) -> Selection:
    """Raises RequestError (BAD_FIELD)."""
    who = caller()
    return Selection(
        calls=tuple(convert.identifier(name, "calls") for name in message.calls),
        run=convert.identifier(message.run, "runs") if message.run else "",
        session=message.session,
        since_ns=message.since.ToNanoseconds() if message.HasField("since") else 0,
        until_ns=message.until.ToNanoseconds() if message.HasField("until") else 0,
        paths=tuple(os.fsencode(path) for path in message.paths),
        principal="" if who.has("approver" if message.rehearsed else "admin") else who.name,
        rehearsed=message.rehearsed,
    )


def _ways(message: journal_pb2.PlanRollbackRequest | journal_pb2.UndoCallRequest) -> Ways:
    return Ways(message.partial, message.force, message.merge)


def _path(planned: PathPlan, difference: Difference) -> journal_pb2.RollbackPlan.Path:
    return journal_pb2.RollbackPlan.Path(
        difference=_difference(difference),
        verdict=_Verdict.Value(f"VERDICT_{planned.verdict.name}"),
        why=convert.valid(planned.why),
        does=planned.does,
        forced=planned.forced,
        calls=[f"calls/{call}" for call in planned.calls],
    )


def _rehearsal(rehearsal: Rehearsal) -> journal_pb2.Rehearsal:
    return journal_pb2.Rehearsal(
        name=f"calls/{rehearsal.call}",
        run=f"runs/{rehearsal.run}" if rehearsal.run else "",
        principal=rehearsal.principal,
        create_time=convert.timestamp(rehearsal.time_ns),
        paths=convert.valid(tuple(map(os.fsdecode, rehearsal.paths))),
    )


def _difference(difference: Difference) -> journal_pb2.PathDifference:
    return journal_pb2.PathDifference(
        path=convert.valid(os.fsdecode(difference.path)),
        summary=convert.valid(difference.summary),
        diff=convert.valid(difference.diff),
        added=difference.added,
        removed=difference.removed,
    )


def _leftover(left: Left) -> journal_pb2.Leftover:
    return journal_pb2.Leftover(
        call=f"calls/{left.call}",
        path=convert.valid(os.fsdecode(left.path)),
        reason=convert.valid(left.why),
        create_time=convert.timestamp(left.since_ns),
    )


def _undone(undone: Undone) -> journal_pb2.UndoCallResponse:
    return journal_pb2.UndoCallResponse(
        name=f"calls/{undone.call}",
        restored_paths=[convert.valid(file.path) for file in undone.files[:NAMED_PATHS]],
        restored_count=len(undone.files),
        undone_calls=[f"calls/{call}" for call in undone.calls],
    )
