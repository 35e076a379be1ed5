"""Every error that a person or a client can see: one hierarchy, one table of reasons.

An error says what happened, to what, why, and what to do next. `api/` maps `Reason.code` to a gRPC
status and puts the reason and the metadata into `google.rpc.ErrorInfo` (AIP-193); the command line
prints the message. Anything that is not an `AgentdError` is a bug and reaches a client only as INTERNAL
with an incident id.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationError


class Code(Enum):
    """The gRPC status codes in use (names and numbers of google.rpc.Code), free of any gRPC import."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(Enum):
    """The reasons a request can fail with, and the status each maps to. Names are the wire contract."""

    BAD_FIELD = Code.INVALID_ARGUMENT, "bad field"
    BAD_PAGE_TOKEN = Code.INVALID_ARGUMENT, "bad page token"
    BAD_ARGUMENTS = Code.INVALID_ARGUMENT, "bad tool arguments"
    PROMPT_TOO_LONG = Code.INVALID_ARGUMENT, "prompt too long"
    CONFIG_INVALID = Code.FAILED_PRECONDITION, "bad configuration"
    CREDENTIAL_INVALID = Code.FAILED_PRECONDITION, "bad credential"
    MANIFEST_INVALID = Code.FAILED_PRECONDITION, "bad manifest"
    TOOL_NOT_FOUND = Code.NOT_FOUND, "unknown tool"
    RUN_NOT_FOUND = Code.NOT_FOUND, "unknown run"
    EVENT_NOT_FOUND = Code.NOT_FOUND, "unknown event"
    BUDGET_THERMAL = Code.RESOURCE_EXHAUSTED, "too hot"
    BUDGET_BATTERY = Code.RESOURCE_EXHAUSTED, "battery low"
    BUDGET_MEMORY = Code.RESOURCE_EXHAUSTED, "memory short"
    QUEUE_FULL = Code.RESOURCE_EXHAUSTED, "queue full"
    QUOTA_SPENT = Code.RESOURCE_EXHAUSTED, "quota spent"
    NOT_BEGUN = Code.DEADLINE_EXCEEDED, "did not begin in time"
    CALIBRATING = Code.FAILED_PRECONDITION, "calibration going on"
    CALIBRATION_CUT = Code.ABORTED, "calibration not finished"
    RUN_GOING_ON = Code.FAILED_PRECONDITION, "run going on"
    AUTOMATION_INVALID = Code.FAILED_PRECONDITION, "bad automation"
    AUTOMATION_NOT_FOUND = Code.NOT_FOUND, "unknown automation"
    AUTOMATION_PAUSED = Code.FAILED_PRECONDITION, "automation paused"
    CALL_NOT_FOUND = Code.NOT_FOUND, "unknown call"
    GRANT_REQUIRED = Code.PERMISSION_DENIED, "not granted"
    GRANT_INVALID = Code.INVALID_ARGUMENT, "bad grant"
    GRANT_NOT_FOUND = Code.NOT_FOUND, "unknown grant"
    GRANT_REVOKED = Code.ABORTED, "grant revoked"
    APPROVAL_NOT_FOUND = Code.NOT_FOUND, "unknown approval"
    APPROVAL_CLOSED = Code.FAILED_PRECONDITION, "already decided"
    TOKEN_INVALID = Code.INVALID_ARGUMENT, "bad token"
    TOKEN_NOT_FOUND = Code.NOT_FOUND, "unknown token"
    ROLE_REQUIRED = Code.PERMISSION_DENIED, "role missing"
    UNAUTHENTICATED = Code.UNAUTHENTICATED, "not known"
    TOO_MANY_ATTEMPTS = Code.RESOURCE_EXHAUSTED, "too many attempts"
    REQUEST_ID_REUSED = Code.ALREADY_EXISTS, "request id reused"
    MODEL_TOO_LARGE = Code.FAILED_PRECONDITION, "model too large"
    MODEL_INVALID = Code.FAILED_PRECONDITION, "model unusable"
    DOWNLOAD_FAILED = Code.UNAVAILABLE, "download failed"
    ENGINE_CRASHED = Code.UNAVAILABLE, "engine crashed"
    ENGINE_TIMEOUT = Code.UNAVAILABLE, "engine did not answer"
    SANDBOX_UNSUPPORTED = Code.FAILED_PRECONDITION, "sandbox unavailable"
    TOOL_FAILED = Code.ABORTED, "tool failed"
    TOOL_TIMEOUT = Code.DEADLINE_EXCEEDED, "tool ran past its deadline"
    NOT_UNDOABLE = Code.FAILED_PRECONDITION, "not undoable"
    PLAN_CHANGED = Code.FAILED_PRECONDITION, "plan is out of date"
    UNDO_CONFLICT = Code.FAILED_PRECONDITION, "changed since"
    STORE_FULL = Code.RESOURCE_EXHAUSTED, "disk full"
    DESCRIPTORS_SHORT = Code.RESOURCE_EXHAUSTED, "too few file descriptors"
    STORE_DAMAGED = Code.FAILED_PRECONDITION, "store damaged"
    STORE_LOCKED = Code.FAILED_PRECONDITION, "state folder in use"
    AUDIT_CLOSED = Code.FAILED_PRECONDITION, "audit log closed"
    AUDIT_UNAVAILABLE = Code.UNAVAILABLE, "audit log cannot be written"
    SOCKET_TAKEN = Code.FAILED_PRECONDITION, "socket in use"
    SOCKET_INVALID = Code.FAILED_PRECONDITION, "socket unusable"
    DAEMON_UNREACHABLE = Code.UNAVAILABLE, "daemon not reachable"
    DAEMON_STOPPING = Code.UNAVAILABLE, "daemon is stopping"
    CANCELLED = Code.CANCELLED, "cancelled"
    INTERNAL = Code.INTERNAL, "bug in agentd"

    def __init__(self, code: Code, summary: str) -> None:
        self.code = code
        self.summary = summary


def first_mistake(error: ValidationError) -> tuple[str, str]:
    """Where and what of a failed validation, for a sentence. A key nobody knows is named before the one it replaced."""
    mistakes = error.errors()
    mistake = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    what = "is unknown" if mistake["type"] == "extra_forbidden" else mistake["msg"].removeprefix("Value error, ")
    return ".".join(map(str, mistake["loc"])), what


class AgentdError(Exception):
    """Base of all errors meant to be seen.

    `message` says what happened and why, `hint` what to do next. `metadata` repeats every variable of the
    message (AIP-193), `field` names the offending request field where there is one.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        hint: str = "",
        field: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.field = field
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.retry_s = 0.0
        """When to try again, for errors that know."""

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class RequestError(AgentdError):
    """The request itself is wrong: repeat it changed, not as it is."""


class ConfigError(AgentdError):
    """A configuration file or manifest is wrong; names file and key."""


class EngineError(AgentdError):
    """The model cannot be loaded or its process died; the daemon lives on."""


class SandboxError(AgentdError):
    """No worker can be confined here; no tool runs."""


class ToolError(AgentdError):
    """A tool call ended without a result."""


class StoreError(AgentdError):
    """The store cannot be read or written; nothing that changes anything runs."""


class JournalError(AgentdError):
    """A change cannot be captured or put back."""


class DaemonError(AgentdError):
    """The daemon cannot start, be reached or go on."""
