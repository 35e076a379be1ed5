"""The gRPC server on its unix socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agentd.api.servicers import AuditServicer, JournalServicer, RunServicer, SystemServicer, ToolServicer
from agentd.api.status import ErrorsToStatuses
from agentd.errors import DaemonError, Reason
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
    from collections.abc import Callable
    from pathlib import Path

    from agentd.audit import AuditLog
    from agentd.calls import Calls
    from agentd.runs import Runs

_LONGEST_SOCKET_PATH = 107  # sun_path of unix(7) less its NUL
_LARGEST_MESSAGE = 4 << 20


@dataclass(frozen=True, slots=True)
class ApiParts:
    """What the services speak for. `principal` is who may connect: the socket's file mode lets in nobody else."""

    runs: Runs
    calls: Calls
    audit: AuditLog
    status: Callable[[], system_pb2.Status]
    principal: str


class ApiServer:
    def __init__(self, parts: ApiParts, path: Path) -> None:
        self._parts, self._path = parts, path
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> None:
        """Listen. Raises DaemonError: SOCKET_TAKEN, SOCKET_INVALID."""
        prepare_socket(self._path)
        options = [("grpc.max_receive_message_length", _LARGEST_MESSAGE), ("grpc.so_reuseport", 0)]
        server = grpc.aio.server(interceptors=[ErrorsToStatuses()], options=options)
        parts = self._parts
        run_pb2_grpc.add_RunServiceServicer_to_server(RunServicer(parts.runs, parts.principal), server)
        tool_pb2_grpc.add_ToolServiceServicer_to_server(ToolServicer(parts.calls, parts.principal), server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(parts.audit), server)
        journal_pb2_grpc.add_JournalServiceServicer_to_server(JournalServicer(parts.calls, parts.principal), server)
        system_pb2_grpc.add_SystemServiceServicer_to_server(SystemServicer(parts.status), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        files = (run_pb2, tool_pb2, audit_pb2, journal_pb2, system_pb2)
        names = [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        umask = os.umask(0o177)  # the socket is 0600 from its first moment on
        try:
            server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as e:
            raise _invalid(self._path, str(e)) from None
        finally:
            os.umask(umask)
        await server.start()
        self._server = server
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, give those under way `grace_s` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        if self._server:
            await self._server.stop(grace_s)
        self._path.unlink(missing_ok=True)


def prepare_socket(path: Path) -> None:
    """Make way for a new socket: a stale one is removed, a living one or anything else is not touched."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise _invalid(path, f"it is longer than {_LONGEST_SOCKET_PATH} bytes, the most a unix socket's path can have")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise _invalid(path, str(e.strerror)) from None
    if not stat.S_ISSOCK(mode):
        raise _invalid(path, "there is something else by that name")
    with socket.socket(socket.AF_UNIX) as probe:
        code = probe.connect_ex(os.fspath(path))
    if code == errno.ECONNREFUSED:
        path.unlink()
    elif code != errno.ENOENT:
        raise DaemonError(
            Reason.SOCKET_TAKEN,
            f"Something listens on {path} already.",
            hint="Is agentd running? Stop it, or choose another `socket`.",
            metadata={"path": str(path)},
        )


def _invalid(path: Path, why: str) -> DaemonError:
    return DaemonError(
        Reason.SOCKET_INVALID,
        f"The socket {path} can't be used: {why}.",
        hint="Set another `socket` in agentd.toml or AGENTD_SOCKET.",
        metadata={"path": str(path)},
    )
