"""The audit log: what was asked, decided, run, touched and refused, chained so that no row can change unseen."""

from agentd.audit.archive import Archive
from agentd.audit.checkpoints import Checkpoints
from agentd.audit.events import Event, FileTouched, SandboxUse, ToolIdentity, Verdict
from agentd.audit.index import Index, Wanted
from agentd.audit.log import AuditLog, Entry
from agentd.audit.notes import load_signer
from agentd.audit.verify import Verification

__all__ = [
    "Archive",
    "AuditLog",
    "Checkpoints",
    "Entry",
    "Event",
    "FileTouched",
    "Index",
    "SandboxUse",
    "ToolIdentity",
    "Verdict",
    "Verification",
    "Wanted",
    "load_signer",
]
