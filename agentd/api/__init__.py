"""gRPC servicers: translate requests to calls on the parts below, errors to statuses; no logic of their own."""

from agentd.api.auditing import AuditParts
from agentd.api.server import ApiParts, ApiServer, Tcp

__all__ = ["ApiParts", "ApiServer", "AuditParts", "Tcp"]
