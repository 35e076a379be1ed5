"""One servicer for each service."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from agentd.api import convert
from agentd.api.identity import caller
from agentd.calls import CallRequest
from agentd.errors import Reason, RequestError
from agentd.runs.record import unknown_run
from agentd.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    tool_pb2,
    tool_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentd.audit import Archive, AuditLog, Checkpoints, Entry, Index, Wanted
    from agentd.calls import Calls
    from agentd.runs import Run, Runs


_FOLLOWED = 200  # events of one page of a stream


class RunServicer(run_pb2_grpc.RunServiceServicer):
    """Everybody sees their own runs; an admin and an auditor those of all."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def CreateRun(self, request: run_pb2.CreateRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        who, asked = caller(), request.run
        run = await self._runs.create(
            *(who.name, asked.prompt, asked.session, request.request_id), within=who.within, rehearse=request.rehearse
        )
        return convert.run_message(run)

    async def WatchRun(  # noqa: N802
        self, request: run_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[run_pb2.WatchRunResponse]:
        name = (await self._own(request.name)).id
        if request.after_sequence < 0:
            raise RequestError(Reason.BAD_FIELD, "after_sequence is negative.", field="after_sequence")
        async for event in self._runs.watch(name, request.after_sequence):
            yield convert.event_message(event, await self._runs.get(name) if event.kind == "run" else None)

    async def GetRun(self, request: run_pb2.GetRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        return convert.run_message(await self._own(request.name))

    async def ListRuns(self, request: run_pb2.ListRunsRequest, context: Any) -> run_pb2.ListRunsResponse:  # noqa: N802
        size = convert.page_size(request.page_size)
        whose = "" if _sees_all() else caller().name
        runs = await self._runs.page(convert.page_cursor(request.page_token), size + 1, whose)
        token = convert.page_token(runs[size - 1].id) if len(runs) > size else ""
        return run_pb2.ListRunsResponse(runs=map(convert.run_message, runs[:size]), next_page_token=token)

    async def CancelRun(self, request: run_pb2.CancelRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        return convert.run_message(await self._runs.cancel((await self._own(request.name)).id))

    async def _own(self, name: str) -> Run:
        """Others' runs are not there."""
        identity = convert.identifier(name, "runs")
        run = await self._runs.get(identity)
        if run.principal != caller().name and not _sees_all():
            raise unknown_run(identity)
        return run


def _sees_all() -> bool:
    return caller().has("auditor")


class ToolServicer(tool_pb2_grpc.ToolServiceServicer):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def ListTools(  # noqa: N802
        self, request: tool_pb2.ListToolsRequest, context: Any
    ) -> tool_pb2.ListToolsResponse:
        size, after = convert.page_size(request.page_size), convert.page_cursor(request.page_token)
        tools = [tool for name, tool in self._calls.toolbox.tools.items() if name > after]
        token = convert.page_token(tools[size - 1].name) if len(tools) > size else ""
        return tool_pb2.ListToolsResponse(tools=map(convert.tool_message, tools[:size]), next_page_token=token)

    async def CallTool(self, request: tool_pb2.CallToolRequest, context: Any) -> tool_pb2.ToolCall:  # noqa: N802
        arguments = convert.plain(request.arguments)
        who = caller()
        tool = convert.identifier(request.name, "tools")
        wanted = CallRequest(who.name, tool, arguments, within=who.within, rehearse=request.rehearse)
        result = await self._calls.call(wanted)
        return convert.call_message(convert.result_body(result, arguments))


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, audit: AuditLog, checkpoints: Checkpoints, index: Index, archive: Archive) -> None:
        self._audit, self._checkpoints, self._index, self._archive = audit, checkpoints, index, archive

    async def ListAuditEvents(  # noqa: N802
        self, request: audit_pb2.ListAuditEventsRequest, context: Any
    ) -> audit_pb2.ListAuditEventsResponse:
        size, after = convert.page_size(request.page_size), convert.page_number(request.page_token) or request.after_sequence
        if after < 0:
            raise RequestError(Reason.BAD_FIELD, "after_sequence is negative.", field="after_sequence")
        call = convert.identifier(request.call, "calls") if request.call else ""
        wanted = convert.wanted_events(request.filter, call=call, after=after, newest_first=request.newest_first)
        entries = await asyncio.to_thread(self._entries, wanted, size + 1)
        token = convert.page_token(str(entries[size - 1].seq)) if len(entries) > size else ""
        events = map(convert.audit_message, entries[:size])
        return audit_pb2.ListAuditEventsResponse(audit_events=events, next_page_token=token)

    async def FollowAuditEvents(  # noqa: N802
        self, request: audit_pb2.FollowAuditEventsRequest, context: Any
    ) -> AsyncIterator[audit_pb2.AuditEvent]:
        if request.after_sequence < 0:
            raise RequestError(Reason.BAD_FIELD, "after_sequence is negative.", field="after_sequence")
        wanted, after = convert.wanted_events(request.filter), request.after_sequence
        wanted.fits({})  # an unknown field is said now, and not at the first event
        with self._audit.announcements() as more:
            while not self._audit.ended:
                more.clear()
                while entries := await asyncio.to_thread(self._audit.entries, after=after, limit=_FOLLOWED):
                    for entry in entries:
                        if wanted.fits(entry.body):  # one by one they would cost the disk more in the index than in the log
                            yield convert.audit_message(entry)
                    after = entries[-1].seq
                await more.wait()

    def _entries(self, wanted: Wanted, limit: int) -> list[Entry]:
        if wanted.everything:
            return self._audit.entries(after=wanted.after, limit=limit, newest_first=wanted.newest_first)
        return self._audit.numbered(self._index.find(wanted, limit))

    async def QueryAuditSql(  # noqa: N802
        self, request: audit_pb2.QueryAuditSqlRequest, context: Any
    ) -> audit_pb2.QueryAuditSqlResponse:
        answer = await asyncio.to_thread(self._index.ask, request.sql)
        rows = [convert.cells(row) for row in answer.rows]
        return audit_pb2.QueryAuditSqlResponse(columns=convert.valid(answer.columns), rows=rows, more=answer.more)

    async def VerifyAuditLog(  # noqa: N802
        self, request: audit_pb2.VerifyAuditLogRequest, context: Any
    ) -> audit_pb2.VerifyAuditLogResponse:
        found = await asyncio.to_thread(self._checkpoints.verify, list(request.anchors))
        return audit_pb2.VerifyAuditLogResponse(
            valid_events=found.valid,
            head=found.head,
            first_bad_sequence=found.bad or 0,
            why=found.why,
            attested_events=found.attested,
            anchored_events=found.anchored,
            lost_events=found.lost,
            absent_events=found.absent,
            witnessed_events=found.witnessed,
        )

    async def PruneAuditLog(  # noqa: N802
        self, request: audit_pb2.PruneAuditLogRequest, context: Any
    ) -> audit_pb2.PruneAuditLogResponse:
        if request.keep_events < 1:
            raise RequestError(Reason.BAD_FIELD, "keep_events is at least 1.", field="keep_events")
        moved = await asyncio.to_thread(self._archive.prune, request.keep_events, caller().name, 1)
        if moved is None:
            return audit_pb2.PruneAuditLogResponse()
        await asyncio.to_thread(self._index.forget, moved.last)
        return audit_pb2.PruneAuditLogResponse(first_sequence=moved.first, last_sequence=moved.last, archive=moved.name)

    async def GetCheckpoint(  # noqa: N802
        self, request: audit_pb2.GetCheckpointRequest, context: Any
    ) -> audit_pb2.Checkpoint:
        note = await asyncio.to_thread(self._checkpoints.latest)
        return audit_pb2.Checkpoint(note=note, verifier_key=str(self._checkpoints.verifier))

    async def ProveInclusion(  # noqa: N802
        self, request: audit_pb2.ProveInclusionRequest, context: Any
    ) -> audit_pb2.InclusionProof:
        leaf, hashes = await asyncio.to_thread(self._checkpoints.prove_inclusion, request.sequence, request.size)
        return audit_pb2.InclusionProof(leaf=leaf, hashes=hashes)

    async def ProveConsistency(  # noqa: N802
        self, request: audit_pb2.ProveConsistencyRequest, context: Any
    ) -> audit_pb2.ConsistencyProof:
        hashes = await asyncio.to_thread(self._checkpoints.prove_consistency, request.old_size, request.size)
        return audit_pb2.ConsistencyProof(hashes=hashes)


class SystemServicer(system_pb2_grpc.SystemServiceServicer):
    def __init__(self, status: Callable[[], system_pb2.Status]) -> None:
        self._status = status

    async def GetStatus(self, request: system_pb2.GetStatusRequest, context: Any) -> system_pb2.Status:  # noqa: N802
        return self._status()
