"""The gRPC server on its unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agentd.api.auditing import AuditParts, AuditServicer
from agentd.api.automating import AutomationServicer
from agentd.api.budgeting import BudgetServicer
from agentd.api.ending import Ending
from agentd.api.identity import Doorkeeper
from agentd.api.people import ApprovalServicer, GrantServicer, TokenServicer
from agentd.api.relay import CONNECTIONS, Relay
from agentd.api.servicers import RunServicer, SystemServicer, ToolServicer
from agentd.api.status import ErrorsToStatuses
from agentd.api.undoing import JournalServicer
from agentd.errors import DaemonError, Reason
from agentd.v1 import (
    approval_pb2,
    approval_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    automation_pb2,
    automation_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    grant_pb2,
    grant_pb2_grpc,
    journal_pb2,
    journal_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    token_pb2,
    token_pb2_grpc,
    tool_pb2,
    tool_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from agentd.automations import Automations
    from agentd.budgets import Budgets
    from agentd.calls import Calls
    from agentd.engine.calibrate import Progress
    from agentd.grants import Approvals, Grant, Grants
    from agentd.principals import Roster, Tokens
    from agentd.runs import Runs

_LONGEST_SOCKET_PATH = 107  # sun_path of unix(7) less its NUL
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.http2.max_ping_strikes", 2),
)
_INSIDE = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS + 32),
)
_OUTSIDE = (
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.max_allowed_incoming_connections", 32),
    ("grpc.max_concurrent_streams", 8),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
"""What can be held before anybody has shown who they are: 32 connections, each with 8 requests of 1 MiB."""
_REQUESTS_OUTSIDE = 64
"""At the inner socket, with room for those that are being closed, and at TCP; there nobody has shown yet who they are."""


@dataclass(frozen=True, slots=True)
class ApiParts:
    """What the services speak for."""

    runs: Runs
    calls: Calls
    audit: AuditParts
    budgets: Budgets
    calibrate: Callable[[float], AsyncGenerator[Progress, None]]
    grants: Grants
    approvals: Approvals
    tokens: Tokens
    roster: Roster
    automations: Automations
    status: Callable[[], system_pb2.Status]
    propose: Callable[[int], tuple[list[Grant], int]]


@dataclass(frozen=True, slots=True)
class Tcp:
    """HOST:PORT, and for TLS the texts of certificate and key; with `client_ca` clients need a certificate of it."""

    address: str
    certificate: bytes = b""
    key: bytes = b""
    client_ca: bytes = b""


class ApiServer:
    """Listens at `path` with file mode `mode`, and at `tcp`. `private` is a folder that only the daemon can enter. With a
    socket that is `given`, whoever gave it made it at `path`, and takes it away.
    """

    def __init__(
        self,
        parts: ApiParts,
        path: Path,
        mode: int,
        private: Path,
        tcp: Tcp | None = None,
        given: socket.socket | None = None,
    ) -> None:
        self._parts, self._path, self._tcp, self._given = parts, path, tcp, given
        self._private = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inner = f"/proc/self/fd/{self._private}/api.sock"  # short, however long the folder's path is
        self._relay = Relay(path, self._inner, mode, given)
        self._server: grpc.aio.Server | None = None
        self._outside: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> None:
        """Listen. Raises DaemonError: SOCKET_TAKEN, SOCKET_INVALID."""
        if not self._given:
            prepare_socket(self._path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("api.sock", dir_fd=self._private)
        doorkeeper = Doorkeeper(self._parts.roster, self._relay.peer)
        logging.getLogger("grpc._cython.cygrpc").addFilter(_tells_no_header)
        guards = [ErrorsToStatuses(doorkeeper.admit)]
        server = grpc.aio.server(interceptors=guards, options=[*_OPTIONS, *_INSIDE])
        names = self._add_services(server, doorkeeper)
        umask = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self._inner}")
        except RuntimeError as e:
            raise _invalid(self._path, str(e)) from None
        finally:
            os.umask(umask)
        if self._tcp:
            # A server of its own, with its own bounds: who comes from outside takes nothing of who is at home.
            self._outside = grpc.aio.server(
                interceptors=guards, options=[*_OPTIONS, *_OUTSIDE], maximum_concurrent_rpcs=_REQUESTS_OUTSIDE
            )
            self._add_services(self._outside, doorkeeper)
            _listen(self._outside, self._tcp)
            await self._outside.start()
        await server.start()
        self._server = server
        try:
            await self._relay.start()
        except OSError as e:
            raise _invalid(self._path, str(e.strerror)) from None
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _add_services(self, server: grpc.aio.Server, doorkeeper: Doorkeeper) -> list[str]:
        parts = self._parts
        ending = Ending(parts.tokens, parts.grants, parts.approvals, parts.runs, doorkeeper, parts.audit.log)
        run_pb2_grpc.add_RunServiceServicer_to_server(RunServicer(parts.runs), server)
        tool_pb2_grpc.add_ToolServiceServicer_to_server(ToolServicer(parts.calls), server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(parts.audit), server)
        journal_pb2_grpc.add_JournalServiceServicer_to_server(JournalServicer(parts.calls), server)
        grants = GrantServicer(parts.grants, parts.calls, parts.propose)
        grant_pb2_grpc.add_GrantServiceServicer_to_server(grants, server)
        approval_pb2_grpc.add_ApprovalServiceServicer_to_server(ApprovalServicer(parts.approvals), server)
        token_pb2_grpc.add_TokenServiceServicer_to_server(TokenServicer(parts.tokens, ending), server)
        system_pb2_grpc.add_SystemServiceServicer_to_server(SystemServicer(parts.status), server)
        budget_pb2_grpc.add_BudgetServiceServicer_to_server(BudgetServicer(parts.budgets, parts.calibrate), server)
        automating = AutomationServicer(parts.automations, parts.calls, parts.grants)
        automation_pb2_grpc.add_AutomationServiceServicer_to_server(automating, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        files = (
            *(run_pb2, tool_pb2, audit_pb2, journal_pb2, grant_pb2, approval_pb2, token_pb2, system_pb2, budget_pb2),
            automation_pb2,
        )
        names = [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        return names

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, give those under way `grace_s` seconds, then end them."""
        self._relay.close_door()
        await self._health.enter_graceful_shutdown()
        servers = [server for server in (self._server, self._outside) if server]
        if servers:
            stopping = [asyncio.create_task(server.stop(grace_s)) for server in servers]
            await asyncio.wait(stopping, timeout=grace_s + 1)  # a client that does not read keeps it for ever
            await self._relay.stop()
            await asyncio.wait(stopping, timeout=1)
        if not self._given:
            self._path.unlink(missing_ok=True)
        os.close(self._private)


def _tells_no_header(record: logging.LogRecord) -> bool:
    """gRPC logs a header that is not UTF-8 with its value, which may be a token with a stray byte."""
    return not str(record.msg).startswith("Invalid encoding")


def _listen(server: grpc.aio.Server, tcp: Tcp) -> None:
    """Raises DaemonError (SOCKET_INVALID)."""
    try:
        if tcp.certificate:
            pair = [(tcp.key, tcp.certificate)]
            ca = tcp.client_ca or None
            credentials = grpc.ssl_server_credentials(pair, root_certificates=ca, require_client_auth=bool(ca))
            server.add_secure_port(tcp.address, credentials)
        else:
            server.add_insecure_port(tcp.address)
    except (RuntimeError, ValueError) as e:
        raise DaemonError(
            Reason.SOCKET_INVALID,
            f"{tcp.address} can't be listened at: {e}.",
            hint="Look at [listen] in agentd.toml: is the port taken, are certificate and key PEM files?",
            metadata={"address": tcp.address},
        ) from None


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
