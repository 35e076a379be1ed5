"""HTTP/2 by hand, for what no gRPC client would send; and a look at what a daemon holds open."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from agentd.v1 import system_pb2, system_pb2_grpc

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tests.e2e.conftest import DaemonProcess

DATA, HEADERS, SETTINGS, PING, CONTINUATION = 0, 1, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
STATUS = b"/agentd.v1.SystemService/GetStatus"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


# 0xfe03 lets gRPC send the details of an error as they are, neither as base64 nor with Huffman's code
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, struct.pack(">HI", 0xFE03, 1))


def _text(value: bytes) -> bytes:
    """RFC 7541, 5.2: a length of 7 bits and more, then the bytes as they are."""
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, size = len(value) - 127, [127]
    while rest >= 128:
        size.append(rest % 128 | 128)
        rest //= 128
    return bytes([*size, rest]) + value


def call(stream: int, path: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """The frames of a unary call with an empty request."""
    pairs = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost")]
    pairs += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), *extra]
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs)
    parts = [block[start : start + 16_000] for start in range(0, len(block), 16_000)]
    frames = [
        frame(CONTINUATION if n else HEADERS, END_HEADERS if n == len(parts) - 1 else 0, stream, part)
        for n, part in enumerate(parts)
    ]
    return b"".join(frames) + frame(DATA, END_STREAM, stream, bytes(5))


def answer(connection: socket.socket) -> tuple[str, bytes]:
    """The grpc-status of the first call on a connection that has one, and all that came."""
    connection.settimeout(20)
    got = b""
    marker = b"\x0bgrpc-status"
    while marker not in got or b"grpc-message" not in got:
        more = connection.recv(1 << 16)
        if not more:
            return "closed", got
        got += more
    start = got.index(marker) + len(marker)
    return got[start + 1 : start + 1 + got[start]].decode(), got


def reason(error: grpc.RpcError) -> tuple[str, list[Any]]:
    """The reason of an error and its details; empty if it is no error of ours."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details or not status.details[0].Unpack(info):
        return "", []
    return info.reason, list(status.details)


def outcome(target: str, *metadata: tuple[str, str | bytes], timeout_s: float = 20, **options: Any) -> str:
    """GetStatus over a connection of its own: `ok`, or the reason or else the code that it failed with."""
    # gRPC shares connections within a process: without a pool of its own this would show nothing of a new one
    arguments = [("grpc.use_local_subchannel_pool", 1), *options.items()]
    with grpc.insecure_channel(target, options=arguments) as channel:
        try:
            system_pb2_grpc.SystemServiceStub(channel).GetStatus(
                system_pb2.GetStatusRequest(), metadata=metadata, timeout=timeout_s
            )
        except grpc.RpcError as e:
            return reason(e)[0] or e.code().name  # type: ignore[attr-defined]
    return "ok"


def descriptors(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def until(condition: Callable[[], object], what: Callable[[], object] = str, seconds: float = 20) -> None:
    """Wait for a condition, for so long at most."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)
