"""What an event says. Stored as sorted ASCII JSON, so that a terminal can't be spoofed and a line is an event."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

LONGEST_TEXT = 4096
"""Longer strings in arguments are recorded by digest and length: the log is no copy of the user's files."""

Kind = Literal[
    "boot", "stop", "gap", "prune", "clock.jump", "run.start", "run.end",
    "call.reject", "call.deny", "call.intent", "call.end", "call.abort", "call.recovered",
    "undo.intent", "undo.end", "rehearsal.apply", "rehearsal.end", "rehearsal.drop", "journal.pin", "journal.evict",
    "grant.create", "grant.revoke", "approval.request", "approval.answer",
    "token.create", "token.revoke", "auth.fail",
]  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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


class SandboxUse(_Part):
    """How the worker was confined and what it was refused (the first 32, and how many in all)."""

    level: str
    mediated: int = 0
    denied: int = 0
    denials: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


class FileTouched(_Part):
    """A path the call changed, with SHA-256 of its content before and after; none where there was no file."""

    path: str
    before: str | None = None
    after: str | None = None


class Event(_Part):
    """One row of the log. Fields that do not apply to its kind are left out of the stored body."""

    kind: Kind
    principal: str = ""
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
    result_digest: str = ""
    error: str = ""
    wall_us: int | None = None
    cpu_us: int | None = None
    detail: dict[str, Any] | None = None

    def body(self, *, seq: int, time_ns: int, boot: str) -> str:
        """The exact text that is stored and hashed."""
        fields = self.model_dump(exclude_defaults=True)
        fields |= {"v": 1, "seq": seq, "time_ns": str(time_ns), "boot": boot, "kind": self.kind}
        if self.arguments is not None:
            fields["arguments"] = {key: _short(value) for key, value in self.arguments.items()}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


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
