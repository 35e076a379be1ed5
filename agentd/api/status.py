"""Errors as `google.rpc.Status` (AIP-193), from the one table in `agentd.errors`."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from agentd.api.identity import turned_out
from agentd.errors import AgentdError, Code, Reason, RequestError
from agentd.principals.roster import nobody
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from google.protobuf.message import Message

DOMAIN = "agentd.local"
_PUSHBACK = "grpc-retry-pushback-ms"
_UNDECODABLE = object()
_log = logging.getLogger(__name__)
_RETRY_AFTER_S = {
    Reason.TOO_MANY_ATTEMPTS: 60,
    Reason.BUDGET_MEMORY: 30,
    Reason.ENGINE_CRASHED: 1,
    Reason.ENGINE_TIMEOUT: 5,
    Reason.DAEMON_STOPPING: 5,
}


_LONGEST_MESSAGE, _LONGEST_VALUE = 1500, 300  # all of a status goes into trailers, which gRPC refuses past 8 KiB


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def to_status(error: AgentdError) -> status_pb2.Status:
    """Exactly one ErrorInfo; further details where the code has one made for it."""
    metadata = {key: _short(value, _LONGEST_VALUE) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata)
    if error.hint:
        info.metadata["hint"] = error.hint
    if error.field:
        info.metadata["field"] = error.field
    details: list[Message] = [info]
    message = _short(error.message, _LONGEST_MESSAGE)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason.code is Code.FAILED_PRECONDITION:
        failed = error_details_pb2.PreconditionFailure.Violation(type=error.reason.name, description=message)
        details.append(error_details_pb2.PreconditionFailure(violations=[failed]))
    if error.reason.code is Code.RESOURCE_EXHAUSTED:
        subject = error.reason.name.lower()
        quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if seconds := retry_after_s(error):
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=round(seconds))))
    status = status_pb2.Status(code=error.reason.code.value, message=_short(str(error), _LONGEST_MESSAGE))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def retry_after_s(error: AgentdError) -> float:
    """0 where trying again is of no use."""
    return error.retry_s or _RETRY_AFTER_S.get(error.reason, 0)


async def _refuse(error: AgentdError, context: Any) -> None:
    status = rpc_status.to_status(to_status(error))
    if seconds := retry_after_s(error):  # for clients that retry by themselves: gRPC's proposal A6
        status = status._replace(trailing_metadata=(*status.trailing_metadata, (_PUSHBACK, str(round(seconds * 1000)))))
    await context.abort_with_status(status)


class ErrorsToStatuses(grpc.aio.ServerInterceptor):
    """Wraps every method, so that no servicer has to. What is not an AgentdError is a bug: only its number gets out.

    `admit(method, context)` raises for those who may not call it.
    """

    def __init__(self, admit: Callable[[str, Any], None]) -> None:
        self._admit = admit

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        admit = functools.partial(self._admit, handler_call_details.method)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _unary(handler.unary_unary, admit), _lenient(handler.request_deserializer), handler.response_serializer
            )
        if handler.unary_stream and asyncio.iscoroutinefunction(handler.unary_stream):  # it writes its answers itself
            return grpc.unary_stream_rpc_method_handler(
                _unary(handler.unary_stream, admit), _lenient(handler.request_deserializer), handler.response_serializer
            )
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream, admit), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, admit), _lenient(handler.request_deserializer), handler.response_serializer
            )
        return handler


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers what it can't decode with a bare INTERNAL and a traceback in our log; we say what is wrong."""

    def attempt(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _UNDECODABLE

    return attempt


def _decoded(request: Any) -> Any:
    if request is _UNDECODABLE:
        message = "The request is not a valid protobuf message; strings must be UTF-8."
        raise RequestError(Reason.BAD_FIELD, message, hint="Build it from the .proto files of this version.")
    return request


def _unary(method: Callable[[Any, Any], Awaitable[Any]], admit: Callable[[Any], None]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            admit(context)
            return await method(_decoded(request), context)
        except asyncio.CancelledError:
            await _say_goodbye(context)
            raise
        except AgentdError as e:
            await _refuse(e, context)
        except grpc.aio.AbortError:
            raise
        except Exception:  # a bug: kept here, numbered for the client
            await context.abort_with_status(rpc_status.to_status(to_status(_bug())))

    return guarded


def _stream(method: Callable[[Any, Any], Any], admit: Callable[[Any], None]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            admit(context)
            async for response in method(_decoded(request), context):
                yield response
        except asyncio.CancelledError:
            await _say_goodbye(context)
            raise
        except AgentdError as e:
            await _refuse(e, context)
        except (grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception:  # as above
            await context.abort_with_status(rpc_status.to_status(to_status(_bug())))

    return guarded


async def _say_goodbye(context: Any) -> None:
    """To whoever was revoked meanwhile; others have cancelled it themselves."""
    task = asyncio.current_task()
    if task in turned_out and task:
        task.uncancel()
        await _refuse(nobody("Your access was revoked."), context)


def _bug() -> AgentdError:
    incident = new_id()
    _log.exception("incident %s", incident)
    message = f"A bug in agentd stopped this request (incident {incident})."
    return AgentdError(Reason.INTERNAL, message, hint="The daemon's log has the details.", metadata={"incident": incident})
