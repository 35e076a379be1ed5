"""Network mediation: connect(2) on the worker's own socket, to the broker's own copy of the address."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time

ADDRESS_BYTES = 128  # sizeof(struct sockaddr_storage)


def peer(raw: bytes) -> tuple[str, int]:
    """(address, port) of a sockaddr. Addresses mapped into IPv6 are given in their IPv4 form."""
    (family,) = struct.unpack_from("=H", raw)
    if family == socket.AF_INET and len(raw) >= 8:
        (port,) = struct.unpack_from("!H", raw, 2)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    if family == socket.AF_INET6 and len(raw) >= 24:
        (port,) = struct.unpack_from("!H", raw, 2)
        text = socket.inet_ntop(socket.AF_INET6, raw[8:24])
        return text.removeprefix("::ffff:") if text.startswith("::ffff:") and "." in text else text, port
    raise OSError(errno.EAFNOSUPPORT, "address family")


def connect(descriptor: int, target: tuple[str, int], deadline: float) -> None:
    """Connect and close this copy of the socket; waits for a blocking socket until `deadline` (monotonic)."""
    copy = socket.socket(fileno=descriptor)
    try:
        blocking = os.get_blocking(descriptor)
        os.set_blocking(descriptor, False)
        try:
            code = copy.connect_ex(target)
            if code == errno.EINPROGRESS and blocking:
                _, ready, _ = select.select([], [copy], [], max(0.0, deadline - time.monotonic()))
                code = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.ETIMEDOUT
        finally:
            os.set_blocking(descriptor, blocking)
    finally:
        copy.close()
    if code:
        raise OSError(code, os.strerror(code))
