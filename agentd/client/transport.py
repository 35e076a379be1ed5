"""What goes along with every request, and what an error that comes back means."""

from __future__ import annotations

import ipaddress
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from agentd.errors import AgentdError, DaemonError, Reason, RequestError


def error_of(error: grpc.RpcError, where: str) -> AgentdError:
    """What the daemon said, as the error it raised there; `retry_s` says when to try again, where that is of use."""
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details if status else ():
        detail.Unpack(info)
        detail.Unpack(retry)
    if status and info.reason in Reason.__members__:
        metadata = dict(info.metadata)
        hint = metadata.pop("hint", "")
        message = status.message.removesuffix(hint).rstrip()
        told = AgentdError(Reason[info.reason], message, hint=hint, metadata=metadata)
        told.retry_s = retry.retry_delay.ToMilliseconds() / 1000
        return told
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        message, metadata = f"No daemon answers on {where}.", {"socket": where}
        return DaemonError(Reason.DAEMON_UNREACHABLE, message, hint="Start it with `agentd serve`.", metadata=metadata)
    return AgentdError(Reason.INTERNAL, f"The request failed: {error.code().name}: {error.details()}")


def channel_to(address: str, ca: bytes, *, secret: bool) -> grpc.Channel:
    """To HOST:PORT. `secret`: a token is sent over it, which only TLS or this very machine may carry. Raises RequestError."""
    if ca:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca))
    host = address.rpartition(":")[0].strip("[]")
    if secret and not _is_here(host):
        message = f"A token is not sent to {address} in clear text: anybody on the way could use it."
        hint = "Give the certificate that the daemon is known by (ca=), and let it listen with TLS: docs/configuration.md."
        raise RequestError(Reason.BAD_ARGUMENTS, message, hint=hint, field="ca", metadata={"address": address})
    return grpc.insecure_channel(address)


def _is_here(host: str) -> bool:
    """By number, or the name that RFC 6761 reserves: what others lead to, a resolver says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends a token with every request."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._signed(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._signed(client_call_details), request)

    def _signed(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), self._header])
