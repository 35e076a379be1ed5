"""Clients that connect and say nothing, or too much, before anybody knows who they are: the others do not notice."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agentd.client import Client
from tests.principals.wire import reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.conftest import DaemonProcess

DEADLINE_S = 20


def is_served(port: int) -> bool:
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
    except grpc.RpcError:
        return False
    return True


def unix(daemon: DaemonProcess, _port: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(daemon.socket))
    return made


def tcp(_daemon: DaemonProcess, port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


@pytest.mark.parametrize("connect", [unix, tcp])
@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"x" * 1000])
def test_whoever_says_nothing_keeps_nobody_out(
    daemon: DaemonProcess, port: int, connect: Callable[[DaemonProcess, int], socket.socket], said: bytes
):
    """More connections than there is room for, of the daemon's own user, too; a new client is served at once."""
    with contextlib.ExitStack() as held:
        for _ in range(150):
            with contextlib.suppress(OSError):
                held.enter_context(connect(daemon, port)).sendall(said)
        time.sleep(1.1)
        if connect is tcp or not said.startswith(b"PRI"):  # who has begun to speak has its time
            with Client(daemon.socket) as client:
                client.status()
        deadline = time.monotonic() + DEADLINE_S
        while connect is tcp and not is_served(port):
            assert time.monotonic() < deadline


def test_what_needs_no_role_needs_a_name(daemon: DaemonProcess, port: int):
    """Whether it lives is nobody's secret. To watch that, or to ask what there is, takes a principal of any role."""
    watched, listed = health_pb2.HealthCheckRequest(), reflection_pb2.ServerReflectionRequest(list_services="")
    for target, known in ((f"unix:{daemon.socket}", True), (f"127.0.0.1:{port}", False)):
        with grpc.insecure_channel(target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(watched).status == health_pb2.HealthCheckResponse.SERVING
            streams = (
                health.Watch(watched, timeout=5),
                reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listed]), timeout=5),
            )
            for stream in streams:
                if known:
                    assert next(iter(stream))
                    stream.cancel()
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    next(iter(stream))
                assert reason(caught.value)[0] == "UNAUTHENTICATED"


def test_requests_from_outside_are_smaller(port: int):
    """What is held of a request before anybody has shown who they are is bounded."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        send = channel.unary_unary("/agentd.v1.RunService/CreateRun")
        with pytest.raises(grpc.RpcError) as caught:
            send(b"\n" + bytes(2 << 20), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
