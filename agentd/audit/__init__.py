"""The audit log: what was asked, decided, run, touched and refused, chained so that no row can change unseen."""

from agentd.audit.archive import Archive
from agentd.audit.checkpoints import Checkpoints
from agentd.audit.events import Event, FileOperation, FileTouched, Origin, Peer, SandboxUse, ToolIdentity, Verdict
from agentd.audit.index import Index, Wanted
from agentd.audit.log import AuditLog, Entry
from agentd.audit.notes import load_signer
from agentd.audit.payloads import Payload
from agentd.audit.redact import Redaction
from agentd.audit.renew import Renewal, settle_key
from agentd.audit.upkeep import Upkeep
from agentd.audit.verify import Verification

__all__ = [
    "Archive",
    "AuditLog",
    "Checkpoints",
    "Entry",
    "Event",
    "FileOperation",
    "FileTouched",
    "Index",
    "Origin",
    "Payload",
    "Peer",
    "Redaction",
    "Renewal",
    "SandboxUse",
    "ToolIdentity",
    "Upkeep",
    "Verdict",
    "Verification",
    "Wanted",
    "load_signer",
    "settle_key",
]
