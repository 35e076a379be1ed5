"""What an event says. Stored as sorted ASCII JSON, so that a terminal can't be spoofed and a line is an event.

What people, models and tools have written is a payload: the event has a commitment to it only. Names, numbers, paths and
addresses stand in the event itself, as the log is there to say them.
"""

from __future__ import annotations

import hashlib
import json
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentd.audit.payloads import Kept, Payload, seal, text_of
from agentd.errors import Reason, RequestError

LONGEST_TEXT = 4096
"""Longer strings in an event are recorded by digest and length."""
_LONGEST_ERROR = 1000

Kind = Literal[
    "boot", "stop", "gap", "prune", "clock.jump", "policy.change", "run.queue", "run.start", "run.end",
    "redact", "payload.read", "export", "renew", "budget.change",
    "call.reject", "call.deny", "call.intent", "call.end", "call.abort", "call.recovered",
    "undo.intent", "undo.end", "rehearsal.apply", "rehearsal.end", "rehearsal.drop", "journal.pin", "journal.evict",
    "grant.create", "grant.revoke", "approval.request", "approval.answer",
    "token.create", "token.revoke", "principal.revoke", "auth.fail",
]  # fmt: skip


FileOperation = Literal["create", "change", "delete", "attributes"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(_Part):
    """Where a request came from, as the kernel or the connection shows it."""

    uid: int | None = None
    pid: int | None = None
    login: str = ""
    """Who had logged in, whatever user that became later: /proc/PID/loginuid, which only root's own tools can set again."""
    address: str = ""
    """Of a TCP connection."""
    token: str = ""
    """Id of the token that was shown."""


origin: ContextVar[Origin | None] = ContextVar("origin", default=None)
"""Of the request that is being served: the events of all that it leads to say so."""


LONGEST_REASON = 500


def require_reason(reason: str) -> None:
    """What an admin does to the log says why. Raises RequestError (BAD_FIELD)."""
    if not reason.strip() or len(reason) > LONGEST_REASON:
        message = f"A reason has 1 to {LONGEST_REASON} characters."
        hint = "It is recorded for whoever asks later."
        raise RequestError(Reason.BAD_FIELD, message, hint=hint, field="reason", metadata={"field": "reason"})


def _origin() -> Origin | None:
    return origin.get()


class ToolIdentity(_Part):
    """Which code was asked for: the digest covers manifest and program."""

    name: str
    version: str
    digest: str
    effect: str


class Verdict(_Part):
    """What the grants said: allow, ask or deny, by which rules, and why in words."""

    verdict: str
    reason: str
    rules: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    """Rules that almost allowed it, each with what kept it from doing so."""
    asked: str = ""
    """What asking a person has come to."""
    policy: str = ""
    """SHA-256 over all the rules that were in force."""


class Peer(_Part):
    """A peer that was connected to, how often, and the bytes that went there and came back, as far as they were counted."""

    host: str
    port: int
    connections: int
    sent: int | None = None
    received: int | None = None


class SandboxUse(_Part):
    """How the worker was confined and what it was refused (the first 32, and how many in all)."""

    level: str
    profile: str = ""
    """SHA-256 of the filter that the worker was under."""
    mediated: int = 0
    denied: int = 0
    denials: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()


class FileTouched(_Part):
    """A path the call changed, with SHA-256 of its content before and after; none where there was no file.

    `attributes`: owner, mode, times or extended attributes of what is otherwise the same.
    """

    path: str
    operation: FileOperation
    before: str | None = None
    after: str | None = None


class Event(_Part):
    """One row of the log. Fields that do not apply to its kind are left out of the stored body."""

    kind: Kind
    principal: str = ""
    origin: Origin | None = Field(default_factory=_origin)
    session: str = ""
    run: str = ""
    call: str = ""
    cause: str = ""
    tool: ToolIdentity | None = None
    arguments: dict[str, Any] | None = None
    scopes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """Of the run, when it asked: untrusted, private."""
    decision: Verdict | None = None
    sandbox: SandboxUse | None = None
    files: tuple[FileTouched, ...] = ()
    undoable: bool | None = None
    budget: dict[str, Any] | None = None
    """State and readings of battery, heat and memory when the call began, or ended."""
    result_digest: str = ""
    exit: str = ""
    """How the worker ended: result, error, timeout, cancelled, revoked, died, offence, output."""
    error: str | Payload = ""
    wall_us: int | None = None
    cpu_us: int | None = None
    rss_kb: int | None = None
    detail: dict[str, Any] | None = None

    def sealed(self, *, seq: int, time_ns: int, boot: str) -> Sealed:
        """The exact text that is stored and hashed, and what is kept beside it: payloads of arguments, detail and error."""
        fields = self.model_dump(exclude_defaults=True, exclude={"arguments", "detail", "error", "origin"})
        fields |= {"v": 2, "seq": seq, "time_ns": str(time_ns), "boot": boot, "kind": self.kind}
        if self.origin:
            fields["origin"] = self.origin.model_dump(exclude_defaults=True)
        kept: list[Kept] = []

        def said(value: Any, field: str) -> Any:
            if not isinstance(value, Payload):
                return value
            told, beside = seal(value, seq, field)
            kept.append(beside)
            return told

        for name in ("arguments", "detail"):
            if (given := getattr(self, name)) is not None:
                fields[name] = {key: said(value, f"{name}.{key}") for key, value in given.items()}
        if self.error:
            fields["error"] = said(self.error if isinstance(self.error, Payload) else self.error[:_LONGEST_ERROR], "error")
        return Sealed(text_of(_short(fields)), tuple(kept))


@dataclass(frozen=True, slots=True)
class Sealed:
    """An event as it is stored, and its payloads."""

    body: str
    payloads: tuple[Kept, ...]


def parsed(body: bytes | str) -> dict[str, Any]:
    """What a stored event says. One that somebody has damaged is shown as such, so that the rest can still be read."""
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("kind"), str) or not str(told.get("time_ns", "")).isdecimal():
        return {"kind": "damaged", "time_ns": "0"}
    return told


def _short(value: Any) -> Any:
    match value:
        case str() if len(value) > LONGEST_TEXT:
            data = value.encode("utf-8", "surrogatepass")
            return {"$sha256": hashlib.sha256(data).hexdigest(), "$bytes": len(data)}
        case dict():
            return {key: _short(item) for key, item in value.items()}
        case list() | tuple():
            return [_short(item) for item in value]
        case _:
            return value
