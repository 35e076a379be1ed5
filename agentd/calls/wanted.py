"""A call on its way: as it was asked for, as it is wanted once it is valid, and as it may run; and its events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentd.audit import Event, ToolIdentity, Verdict
from agentd.grants import Decision, Labels, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentd.calls.manifest import Tool
    from agentd.grants import Approval, Pattern, Scope

_NONE = Labels()


def _nobody(_: Approval) -> None:
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
    rehearse: bool = False
    """Whether what it changes is to be put back, and kept to be looked at."""


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
        return Request(self.request.principal, self.tool.name, self.scopes, self.request.run, self.request.within)


@dataclass(frozen=True, slots=True)
class Prepared(Wanted):
    """A call that may run."""

    decision: Decision

    @property
    def rehearsed(self) -> bool:
        return self.request.rehearse or self.decision.rehearse


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
        verdict=decision.verdict, reason=decision.reason, rules=decision.rules, near=decision.near, asked=decision.asked
    )
    said = {"arguments": wanted.arguments, "scopes": tuple(map(str, wanted.scopes)), "decision": verdict}
    return made.model_copy(update=said | {"labels": wanted.request.labels.names})
