"""One servicer for each service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentd.api import convert
from agentd.api.identity import caller
from agentd.calls import CallRequest
from agentd.errors import Reason, RequestError
from agentd.runs.record import unknown_run
from agentd.v1 import (
    run_pb2,
    run_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    tool_pb2,
    tool_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentd.calls import Calls
    from agentd.runs import Run, Runs


class RunServicer(run_pb2_grpc.RunServiceServicer):
    """Everybody sees their own runs; an admin and an auditor those of all."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def CreateRun(self, request: run_pb2.CreateRunRequest, context: Any) -> run_pb2.Run:  # noqa: N802
        return convert.run_message(await self._runs.create(convert.run_request(request, caller())))

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


class SystemServicer(system_pb2_grpc.SystemServiceServicer):
    def __init__(self, status: Callable[[], system_pb2.Status]) -> None:
        self._status = status

    async def GetStatus(self, request: system_pb2.GetStatusRequest, context: Any) -> system_pb2.Status:  # noqa: N802
        status, who = self._status(), caller()
        if not who.has("auditor"):
            runs = [run for run in status.runs if run.principal == who.name]
            calls = [call for call in status.calls if call.principal == who.name]
            del status.runs[:], status.calls[:]
            status.runs.extend(runs)
            status.calls.extend(calls)
        return status
