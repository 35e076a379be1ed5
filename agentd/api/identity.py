"""Who calls, and whether they may: asked before any method runs."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from agentd.principals.roster import nobody

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.principals import Principal, Role, Roster

_NEEDED: dict[str, Role | None] = {
    "agentd.v1.RunService": "user",
    "agentd.v1.ToolService": "user",
    "agentd.v1.JournalService": "user",
    "agentd.v1.AuditService": "auditor",
    "agentd.v1.ApprovalService": "approver",
    "agentd.v1.GrantService": "admin",
    "agentd.v1.TokenService": "admin",
    "agentd.v1.SystemService": None,
}
"""The role that the methods of a service need; None: any. A service that is not here needs the role admin."""
_NEEDED_BY_METHOD: dict[str, Role | None] = {
    "/agentd.v1.GrantService/CheckCall": "user",
    "/agentd.v1.AuditService/PruneAuditLog": "admin",
}
_OPEN = "grpc.health.v1.Health"  # whether it lives is nobody's secret
_BEARER = "bearer "
_caller: ContextVar[Principal] = ContextVar("caller")


def caller() -> Principal:
    """Who the method that runs now is for."""
    return _caller.get()


class Doorkeeper:
    """`user` finds the user id behind a relayed connection."""

    def __init__(self, roster: Roster, user: Callable[[str], int | None]) -> None:
        self._roster, self._user = roster, user

    def admit(self, method: str, context: Any) -> None:
        """Make the caller known to the method. Raises RequestError: UNAUTHENTICATED, TOO_MANY_ATTEMPTS, ROLE_REQUIRED."""
        service = method.strip("/").partition("/")[0]
        if service == _OPEN:
            return
        principal = self._principal(context)
        needed = _NEEDED_BY_METHOD.get(method, _NEEDED.get(service, "admin"))
        if needed:
            principal.require(needed, f"call {method.rpartition('/')[2]}")
        _caller.set(principal)

    def _principal(self, context: Any) -> Principal:
        peer = context.peer()
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                text = value if isinstance(value, str) else value.decode("utf-8", "replace")
                if not text.lower().startswith(_BEARER):
                    raise nobody("The authorization is not of the kind Bearer.")
                return self._roster.bearer(text[len(_BEARER) :].strip(), _place(peer))
        if (uid := self._user(peer)) is not None:
            return self._roster.unix(uid)
        if names := context.auth_context().get("x509_common_name"):
            return self._roster.certificate(names[0].decode("utf-8", "replace"))
        raise nobody("This connection shows nothing of who is there.")


def _place(peer: str) -> str:
    """Where wrong tokens are counted: all of one host, all of this device's sockets."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else "unix"
