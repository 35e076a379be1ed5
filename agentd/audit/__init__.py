"""The audit log: what was asked, decided, run, touched and refused, chained so that no row can change unseen."""

from agentd.audit.events import Event, FileTouched, SandboxUse, ToolIdentity, Verdict
from agentd.audit.log import AuditLog, Entry, Verification

__all__ = ["AuditLog", "Entry", "Event", "FileTouched", "SandboxUse", "ToolIdentity", "Verdict", "Verification"]
