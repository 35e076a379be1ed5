"""One servicer for each service."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from agentd.api import convert
from agentd.calls import CallRequest
from agentd.errors import Reason, RequestError
from agentd.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    journal_pb2,
    journal_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    tool_pb2,
    tool_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentd.audit import AuditLog
    from agentd.calls import Calls
    from agentd.runs import Runs


class RunServicer(run_pb2_grpc.RunServiceServicer):
    def __init__(self, runs: Runs, principal: str) -> None:
        self._runs, self._principal = runs, principal

    async def CreateRun(self, request: run_pb2.CreateRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        run = await self._runs.create(self._principal, request.run.prompt, request.run.session, request.request_id)
        return convert.run_message(run)

    async def WatchRun(  # noqa: N802
        self, request: run_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[run_pb2.WatchRunResponse]:
        name = convert.identifier(request.name, "runs")
        if request.after_sequence < 0:
            raise RequestError(Reason.BAD_FIELD, "after_sequence is negative.", field="after_sequence")
        async for event in self._runs.watch(name, request.after_sequence):
            yield convert.event_message(event, await self._runs.get(name) if event.kind == "run" else None)

    async def GetRun(self, request: run_pb2.GetRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        return convert.run_message(await self._runs.get(convert.identifier(request.name, "runs")))

    async def ListRuns(self, request: run_pb2.ListRunsRequest, context: Any) -> run_pb2.ListRunsResponse:  # noqa: N802
        size = convert.page_size(request.page_size)
        runs = await self._runs.page(convert.page_cursor(request.page_token), size + 1)
        token = convert.page_token(runs[size - 1].id) if len(runs) > size else ""
        return run_pb2.ListRunsResponse(runs=map(convert.run_message, runs[:size]), next_page_token=token)

    async def CancelRun(self, request: run_pb2.CancelRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        return convert.run_message(await self._runs.cancel(convert.identifier(request.name, "runs")))


class ToolServicer(tool_pb2_grpc.ToolServiceServicer):
    def __init__(self, calls: Calls, principal: str) -> None:
        self._calls, self._principal = calls, principal

    async def ListTools(  # noqa: N802
        self, request: tool_pb2.ListToolsRequest, context: Any
    ) -> tool_pb2.ListToolsResponse:
        size, after = convert.page_size(request.page_size), convert.page_cursor(request.page_token)
        tools = [tool for name, tool in self._calls.toolbox.tools.items() if name > after]
        token = convert.page_token(tools[size - 1].name) if len(tools) > size else ""
        return tool_pb2.ListToolsResponse(tools=map(convert.tool_message, tools[:size]), next_page_token=token)

    async def CallTool(self, request: tool_pb2.CallToolRequest, context: Any) -> tool_pb2.ToolCall:  # noqa: N802
        arguments = convert.plain(request.arguments)
        wanted = CallRequest(self._principal, convert.identifier(request.name, "tools"), arguments)
        result = await self._calls.call(wanted)
        return convert.call_message(convert.result_body(result, arguments))


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    async def ListAuditEvents(  # noqa: N802
        self, request: audit_pb2.ListAuditEventsRequest, context: Any
    ) -> audit_pb2.ListAuditEventsResponse:
        size, cursor = convert.page_size(request.page_size), convert.page_cursor(request.page_token)
        if cursor and not cursor.isdigit():
            raise RequestError(Reason.BAD_PAGE_TOKEN, "page_token is of another list.", field="page_token")
        entries = await asyncio.to_thread(
            self._audit.entries,
            after=int(cursor or 0),
            limit=size + 1,
            newest_first=request.newest_first,
            call=convert.identifier(request.call, "calls") if request.call else "",
        )
        token = convert.page_token(str(entries[size - 1].seq)) if len(entries) > size else ""
        events = map(convert.audit_message, entries[:size])
        return audit_pb2.ListAuditEventsResponse(audit_events=events, next_page_token=token)

    async def VerifyAuditLog(  # noqa: N802
        self, request: audit_pb2.VerifyAuditLogRequest, context: Any
    ) -> audit_pb2.VerifyAuditLogResponse:
        found = await asyncio.to_thread(self._audit.verify)
        return audit_pb2.VerifyAuditLogResponse(
            valid_events=found.valid, head=found.head, first_bad_sequence=found.bad or 0, why=found.why
        )


class JournalServicer(journal_pb2_grpc.JournalServiceServicer):
    def __init__(self, calls: Calls, principal: str) -> None:
        self._calls, self._principal = calls, principal

    async def UndoCall(  # noqa: N802
        self, request: journal_pb2.UndoCallRequest, context: Any
    ) -> journal_pb2.UndoCallResponse:
        call = convert.identifier(request.name, "calls")
        undone = await self._calls.undo(call, self._principal)
        paths = [file.path.encode("utf-8", "replace").decode() for file in undone.files]
        return journal_pb2.UndoCallResponse(name=f"calls/{undone.call}", restored_paths=paths)


class SystemServicer(system_pb2_grpc.SystemServiceServicer):
    def __init__(self, status: Callable[[], system_pb2.Status]) -> None:
        self._status = status

    async def GetStatus(self, request: system_pb2.GetStatusRequest, context: Any) -> system_pb2.Status:  # noqa: N802
        return self._status()
