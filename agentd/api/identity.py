"""Who calls, and whether they may: asked before any method runs."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from agentd.audit import Origin
from agentd.audit.events import origin
from agentd.principals.roster import nobody, user_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.api.relay import Peer
    from agentd.principals import Principal, Role, Roster

_NEEDED: dict[str, Role | None] = {
    "agentd.v1.RunService": "user",
    "agentd.v1.ToolService": "user",
    "agentd.v1.JournalService": "user",
    "agentd.v1.AuditService": "auditor",
    "agentd.v1.ApprovalService": "approver",
    "agentd.v1.GrantService": "admin",
    "agentd.v1.TokenService": "admin",
    "agentd.v1.AutomationService": "admin",
    "agentd.v1.SystemService": None,
    "agentd.v1.BudgetService": None,
    "grpc.health.v1.Health": None,
    "grpc.reflection.v1alpha.ServerReflection": None,
}
"""The role that the methods of a service need; None: any. A service that is not here needs the role admin."""
_NEEDED_BY_METHOD: dict[str, Role | None] = {
    "/agentd.v1.GrantService/CheckCall": "user",
    "/agentd.v1.RunService/GetRun": None,  # everybody sees their own, auditors all
    "/agentd.v1.RunService/ListRuns": None,
    "/agentd.v1.RunService/WatchRun": None,
    "/agentd.v1.BudgetService/Calibrate": "admin",
    "/agentd.v1.AutomationService/TriggerAutomation": "user",  # admins, and whom the automation names
    "/agentd.v1.AutomationService/ListAutomations": "auditor",
    "/agentd.v1.AutomationService/GetAutomation": "auditor",
    "/agentd.v1.AutomationService/ListTriggerEvents": "auditor",
    "/agentd.v1.AutomationService/GetTriggerEvent": "auditor",
    "/agentd.v1.AuditService/PruneAuditLog": "admin",
    "/agentd.v1.AuditService/RedactAuditEvent": "admin",
    "/agentd.v1.AuditService/RenewAuditLog": "admin",
}
_OPEN = "/grpc.health.v1.Health/Check"  # whether it lives is nobody's secret
_BEARER = "bearer "
_caller: ContextVar[Principal] = ContextVar("caller")


turned_out: WeakSet[asyncio.Task[Any]] = WeakSet()
"""Requests that are ended because whoever made them was revoked."""


def caller() -> Principal:
    """Who the method that runs now is for."""
    return _caller.get()


class Doorkeeper:
    """`find` tells who is behind a relayed connection."""

    def __init__(self, roster: Roster, find: Callable[[str], Peer | None]) -> None:
        self._roster, self._find = roster, find
        self._inside: dict[asyncio.Task[Any], str] = {}
        """Requests under way, and whose they are."""

    def turn_out(self, principal: str) -> int:
        """End the requests of a principal, but for the one that asks for this; returns how many there were."""
        asked = [task for task, name in self._inside.items() if name == principal and task is not asyncio.current_task()]
        for task in asked:
            turned_out.add(task)
            task.cancel()
        return len(asked)

    def admit(self, method: str, context: Any) -> None:
        """Make the caller known to the method. Raises RequestError: UNAUTHENTICATED, TOO_MANY_ATTEMPTS, ROLE_REQUIRED."""
        service = method.strip("/").partition("/")[0]
        if method == _OPEN:
            return
        peer = self._find(context.peer())
        principal = self._principal(context, peer)
        needed = _NEEDED_BY_METHOD.get(method, _NEEDED.get(service, "admin"))
        if needed:
            principal.require(needed, f"call {method.rpartition('/')[2]}")
        _caller.set(principal)
        if (task := asyncio.current_task()) and task not in self._inside:
            task.add_done_callback(lambda done: self._inside.pop(done, None))
            self._inside[task] = principal.name
        origin.set(_origin(context.peer(), peer, principal))

    def _principal(self, context: Any, who: Peer | None) -> Principal:
        peer = context.peer()
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                text = value if isinstance(value, str) else value.decode("utf-8", "replace")
                if not text.lower().startswith(_BEARER):
                    raise nobody("The authorization is not of the kind Bearer.")
                return self._roster.bearer(text[len(_BEARER) :].strip(), _place(peer))
        if who is not None:
            return self._roster.unix(who.uid)
        if names := context.auth_context().get("x509_common_name"):
            return self._roster.certificate(names[0].decode("utf-8", "replace"))
        raise nobody("This connection shows nothing of who is there.")


def _origin(name: str, peer: Peer | None, principal: Principal) -> Origin:
    """For the log: what the kernel, or the connection, shows of who is there."""
    if peer is None:
        return Origin(address=name, token=principal.token)
    login = "" if peer.login is None else user_name(peer.login)
    return Origin(uid=peer.uid, pid=peer.pid, login=login, token=principal.token)


def _place(peer: str) -> str:
    """Where wrong tokens are counted: all of one host, all of this device's sockets."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else "unix"
