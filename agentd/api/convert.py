"""Between the parts' values and protobuf messages."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2

from agentd.api.status import to_status
from agentd.budgets import Priority, Usage
from agentd.errors import AgentdError, Reason, RequestError
from agentd.runs import Run, RunRequest, State, StopReason
from agentd.v1 import approval_pb2, run_pb2, tool_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentd.calls import CallResult, Tool
    from agentd.principals import Principal
    from agentd.runs import RunEvent

_DEFAULT_PAGE, _LARGEST_PAGE = 50, 500


def page_size(asked: int) -> int:
    """Raises RequestError (BAD_FIELD) for a negative one; too large is clamped (AIP-158)."""
    if asked < 0:
        raise RequestError(Reason.BAD_FIELD, "page_size is negative.", field="page_size")
    return min(asked or _DEFAULT_PAGE, _LARGEST_PAGE)


def page_token(cursor: str) -> str:
    return base64.urlsafe_b64encode(cursor.encode()).decode() if cursor else ""


def page_cursor(token: str) -> str:
    """Raises RequestError (BAD_PAGE_TOKEN)."""
    try:
        return base64.urlsafe_b64decode(token.encode("ascii")).decode("ascii")
    except (binascii.Error, UnicodeError):
        message = "page_token is not one that agentd gave out."
        raise RequestError(Reason.BAD_PAGE_TOKEN, message, hint="Start again without it.", field="page_token") from None


def page_number(token: str) -> int:
    """A cursor that counts. Raises RequestError (BAD_PAGE_TOKEN)."""
    cursor = page_cursor(token)
    if cursor and not cursor.isdigit():
        raise RequestError(Reason.BAD_PAGE_TOKEN, "page_token is of another list.", field="page_token")
    return int(cursor or 0)


def identifier(name: str, collection: str) -> str:
    """`runs/abc` -> `abc`. Raises RequestError (BAD_FIELD)."""
    prefix, _, identity = name.partition("/")
    if prefix != collection or not identity or "/" in identity:
        raise RequestError(Reason.BAD_FIELD, f"name must look like {collection}/ID, not {name!r}.", field="name")
    return identity


def timestamp(time_ns: int) -> timestamp_pb2.Timestamp:
    return timestamp_pb2.Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def plain(arguments: struct_pb2.Struct) -> dict[str, Any]:
    """A Struct as Python values; whole numbers become int, since JSON Schema tells them apart and Struct doesn't."""
    return {key: _whole(value) for key, value in json_format.MessageToDict(arguments).items()}


def _whole(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _whole(item) for key, item in value.items()}
        case list():
            return [_whole(item) for item in value]
        case _:
            return value


def struct(value: Mapping[str, Any]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    json_format.Parse(json.dumps(valid(value)), made)
    return made


def valid(value: Any) -> Any:
    """Lone surrogates (file names that are not UTF-8) have no place in a protobuf string."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case dict():
            return {str(key): valid(item) for key, item in value.items()}
        case list() | tuple():
            return [valid(item) for item in value]
        case _:
            return value


def json_text(value: Any) -> str:
    return json.dumps(valid(value), ensure_ascii=False, sort_keys=True)


def run_request(request: run_pb2.CreateRunRequest, who: Principal) -> RunRequest:
    """Raises RequestError (BAD_FIELD)."""
    run, budget = request.run, request.run.budget
    if run.priority not in run_pb2.Run.Priority.values():
        raise RequestError(Reason.BAD_FIELD, f"run.priority has no value {run.priority}.", field="run.priority")
    priority = run_pb2.Run.Priority.Name(run.priority).removeprefix("PRIORITY_")
    return RunRequest(
        *(who.name, run.prompt, run.session, request.request_id),
        within=tuple(map(str, who.within)),
        token=who.token,
        rehearse=request.rehearse,
        priority=Priority[priority] if run.priority else Priority.NORMAL,
        start_by_ns=run.start_by_time.seconds * 10**9 + run.start_by_time.nanos,
        budget=Usage(budget.tokens, budget.seconds, budget.calls, budget.joules),
    )


def run_message(run: Run) -> run_pb2.Run:
    message = run_pb2.Run(
        name=f"runs/{run.id}",
        prompt=run.prompt,
        session=run.session,
        state=run_pb2.Run.State.Value(f"STATE_{run.state.name}"),
        answer=run.answer,
        principal=run.principal,
        create_time=timestamp(run.create_ns),
        labels=run.labels.names,
        usage=run_pb2.Run.Usage(
            prompt_tokens=run.prompt_tokens,
            generated_tokens=run.generated_tokens,
            calls=run.calls,
            seconds=run.seconds,
            joules=run.joules,
        ),
        priority=run_pb2.Run.Priority.Value(f"PRIORITY_{run.priority.name}"),
        start_by_time=timestamp(run.start_by_ns) if run.start_by_ns else None,
        budget=run_pb2.Run.Budget(**asdict(run.budget)),
    )
    if isinstance(run.stop_reason, StopReason):
        message.stop_reason = run_pb2.Run.StopReason.Value(f"STOP_REASON_{run.stop_reason.name}")
    if run.state is State.FAILED and run.error:
        reason, text, hint = run.error
        message.error.CopyFrom(to_status(AgentdError(Reason[reason], text, hint=hint)))
    if run.end_ns:
        message.end_time.CopyFrom(timestamp(run.end_ns))
    return message


def event_message(event: RunEvent, run: Run | None) -> run_pb2.WatchRunResponse:
    """`run` is the run as it ended, for the event that says so."""
    message = run_pb2.WatchRunResponse(sequence=event.sequence, event_time=timestamp(event.time_ns))
    body = event.body
    match event.kind:
        case "text":
            message.text = body["text"]
        case "thought":
            message.thought = body["text"]
        case "call_started":
            message.call_started.tool = body["tool"]
            message.call_started.arguments_json = json_text(body["arguments"])
        case "call":
            message.call.CopyFrom(call_message(body))
        case kind if notice := _NOTICES.get(kind):
            getattr(message, kind).CopyFrom(notice(body))
        case _ if run is not None:
            message.run.CopyFrom(run_message(run))
    return message


def _notice(body: Mapping[str, Any]) -> run_pb2.ApprovalNotice:
    return run_pb2.ApprovalNotice(
        name=f"approvals/{body['approval']}",
        tool=body["tool"],
        scopes=valid(body["scopes"]),
        state=approval_pb2.Approval.State.Value(f"STATE_{body['state'].upper()}"),
        reason=valid(body["reason"]),
    )


_NOTICES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "approval": _notice,
    "budget": lambda body: run_pb2.BudgetNotice(**{**body, "state": f"STATE_{body['state']}"}),
    "context": lambda body: run_pb2.ContextNotice(turns_dropped=body["dropped"], turns_left=body["left"]),
    "queue": lambda body: run_pb2.QueueNotice(ahead=body["ahead"], reason=valid(body["reason"])),
    "waiting": lambda body: run_pb2.WaitNotice(tool=body["tool"], calls=[f"calls/{call}" for call in body["calls"]]),
}
"""What a run says of its circumstances."""


def call_message(body: Mapping[str, Any]) -> tool_pb2.ToolCall:
    """From the body of a run's `call` event, or `result_body`."""
    decision = str(body.get("decision", "unspecified")).upper()
    return tool_pb2.ToolCall(
        name=f"calls/{body['call']}" if "call" in body else "",
        tool=body["tool"],
        arguments_json=json_text(body["arguments"]),
        scopes=valid(body.get("scopes", ())),
        decision=tool_pb2.ToolCall.Decision.Value(f"DECISION_{decision}"),
        reason=valid(body.get("reason", "")),
        output_json=json_text(body["output"]),
        failed="error" in body["output"],
        changed_paths=valid(body.get("changed", ())),
        undoable=bool(body.get("changed")) and not body.get("rehearsed"),
        sandbox_level=body.get("level", ""),
        denied_syscalls=body.get("denied", 0),
        wall_us=body.get("wall_us", 0),
        labels=body.get("labels", ()),
        rehearsed=body.get("rehearsed", False),
        changed_count=body.get("changed_count", len(body.get("changed", ()))),
    )


def result_body(result: CallResult, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"tool": result.tool, "arguments": dict(arguments), "output": result.output, **result.told()}


def tool_message(tool: Tool) -> tool_pb2.Tool:
    return tool_pb2.Tool(
        name=f"tools/{tool.name}",
        description=tool.manifest.description,
        parameters=struct(tool.schema()),
        effect=tool_pb2.Tool.Effect.Value(f"EFFECT_{tool.manifest.effect.upper()}"),
        version=tool.version,
        digest=tool.digest,
        needs=[f"{kind}:{template}" for kind, template in tool.manifest.needs.templates()],
        asks=tool.manifest.asks,
    )
