"""A call on its way: as it was asked for, as it is wanted once it is valid, as it may run, how it ended; and its events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentd.audit import Event, FileTouched, Payload, ToolIdentity, Verdict
from agentd.grants import Decision, Labels, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentd.calls.manifest import Tool
    from agentd.grants import Approval, Pattern, Scope

_NONE = Labels()


NAMED_PATHS = 1000
"""Of what a call has changed, in a message: a call may change a hundred thousand."""


def _nobody(_: object) -> None:
    """The client of a call that is no run's sees nothing but its end."""


@dataclass(frozen=True, slots=True)
class CallRequest:
    """Who asks for what, and in which run of which session, if any.

    `labels` are those of the run so far, `read` the scopes it has read, `within` is the most that this principal's calls may
    touch. `tell` gets every question that the call waits for, and again with its answer.
    """

    principal: str
    tool: str
    arguments: Mapping[str, Any]
    session: str = ""
    run: str = ""
    labels: Labels = _NONE
    within: tuple[Pattern, ...] = ()
    read: tuple[str, ...] = ()
    tell: Callable[[Approval], None] = _nobody
    waits: Callable[[tuple[str, ...]], None] = _nobody
    """Called when it has to wait for calls that change the same files."""
    rehearse: bool = False
    """Whether what it changes is to be put back, and kept to be looked at."""
    approval_s: float = 0.0
    """How long a question about it waits for an answer, even while nobody is there; 0 for the daemon's own time."""


def asked(request: CallRequest, tool: Tool, scopes: tuple[Scope, ...]) -> Request:
    """What the grants decide on."""
    return Request(request.principal, tool.name, scopes, request.run, request.within, tool.manifest.asks)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A valid call before anything has been decided. `gives` are the labels that its result brings with it."""

    id: str
    request: CallRequest
    tool: Tool
    arguments: dict[str, Any]
    scopes: tuple[Scope, ...]
    gives: Labels

    def asked(self) -> Request:
        return asked(self.request, self.tool, self.scopes)


@dataclass(frozen=True, slots=True)
class Prepared(Wanted):
    """A call that may run."""

    decision: Decision

    @property
    def rehearsed(self) -> bool:
        return self.request.rehearse or self.decision.rehearse


@dataclass(frozen=True, slots=True)
class CallResult:
    """How a call ended. `output` is what the tool gave back, or `{"error": sentence}`."""

    id: str
    tool: str
    output: dict[str, Any]
    scopes: tuple[str, ...]
    decision: Decision
    files: tuple[FileTouched, ...]
    level: str
    denied: int
    wall_us: int
    labels: Labels
    """What its output makes of the run that reads it."""
    rehearsed: bool = False
    """Whether what it changed was put back, for a person to apply or drop."""

    @property
    def failed(self) -> bool:
        return "error" in self.output

    def told(self) -> dict[str, Any]:
        """Everything about the call but its tool, arguments and output, as JSON."""
        return {
            "call": self.id,
            "scopes": list(self.scopes),
            "decision": self.decision.verdict,
            "reason": self.decision.reason,
            "changed": [file.path for file in self.files[:NAMED_PATHS]],
            "changed_count": len(self.files),
            "level": self.level,
            "denied": self.denied,
            "wall_us": self.wall_us,
            "labels": list(self.labels.names),
            "rehearsed": self.rehearsed,
        }


def who(request: CallRequest) -> dict[str, Any]:
    return {"principal": request.principal, "session": request.session, "run": request.run}


def event(kind: Any, wanted: Wanted, decision: Decision | None = None, **more: Any) -> Event:
    """What was decided, and on what, is said where `decision` is given; later events refer to it by the call."""
    tool = wanted.tool
    made = Event(
        kind=kind,
        call=wanted.id,
        cause=wanted.request.run,
        tool=ToolIdentity(name=tool.name, version=tool.version, digest=tool.digest, effect=tool.manifest.effect),
        **who(wanted.request),
        **more,
    )
    if decision is None:
        return made
    verdict = Verdict(
        verdict=decision.verdict,
        reason=decision.reason,
        rules=decision.rules,
        near=decision.near,
        asked=decision.asked,
        policy=decision.policy,
    )
    said = {"arguments": _recorded(tool, wanted.arguments), "scopes": tuple(map(str, wanted.scopes)), "decision": verdict}
    return made.model_copy(update=said | {"labels": wanted.request.labels.names})


def _recorded(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Paths, numbers and words of the manifest stand in the log, as scopes do; what was written freely is a payload."""
    parameters = tool.manifest.parameters.properties
    plain = {name for name, each in parameters.items() if each.format == "path" or each.enum is not None}
    return {
        name: value if name in plain or isinstance(value, bool | int | float | None) else Payload(value)
        for name, value in arguments.items()
    }
