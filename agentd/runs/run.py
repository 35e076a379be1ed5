"""A run and its events, as they are kept."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

from agentd.budgets import Priority, Usage
from agentd.engine.prompt import Called, Part, Responded, Said, Turn
from agentd.errors import Reason, RequestError
from agentd.grants import Labels
from agentd.grants import State as ApprovalState
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentd.grants import Approval

_NONE = Labels()
_UNBOUNDED = Usage()
LONGEST_PROMPT = 1 << 20
_LONGEST_WAIT_S = 366 * 86400.0
WAITS = ApprovalState.PENDING


class State(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StopReason(Enum):
    """Why a run that succeeded has ended."""

    ANSWERED = "answered"
    STEP_LIMIT = "step_limit"
    TOKEN_LIMIT = "token_limit"  # noqa: S105 - not a secret
    TIME_LIMIT = "time_limit"
    REPEATED_CALL = "repeated_call"
    MALFORMED_CALLS = "malformed_calls"
    CONTEXT_FULL = "context_full"
    BUDGET = "budget"
    CALL_LIMIT = "call_limit"
    ENERGY_LIMIT = "energy_limit"
    QUOTA = "quota"


@dataclass(frozen=True, slots=True)
class Direct:
    """A call that somebody has thought of beforehand."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What somebody asks for. The same `request_id` gives the run it started the first time.

    `labels` are those of what the prompt was made from, `within` the most that its calls may touch. With `rehearse` what
    they change is put back, for a person to look at. `start_by_ns` is when it must have begun, 0 for the policy's own time;
    `budget` is what it may use at most, 0 for as much as the daemon's limits allow.
    """

    principal: str
    prompt: str
    session: str = ""
    request_id: str = ""
    labels: Labels = _NONE
    within: tuple[str, ...] = ()
    rehearse: bool = False
    priority: Priority = Priority.NORMAL
    start_by_ns: int = 0
    budget: Usage = _UNBOUNDED
    token: str = ""
    """Id of the token that was shown, if one was."""
    tools: tuple[str, ...] = ()
    """The tools it is told of, and may use; none for all."""
    direct: Direct | None = None
    """One call to make instead of asking the model."""
    trigger: str = ""
    """What started it, if no person did."""
    triggered_by: str = ""
    """Who or what brought that about."""
    approval_s: float = 0.0
    """How long its questions wait for an answer, even while nobody is there; 0 for the daemon's own time."""

    def check(self) -> None:
        """Raises RequestError (BAD_FIELD)."""
        if not self.prompt.strip():
            raise _bad("run.prompt", "is empty")
        if len(self.prompt) > LONGEST_PROMPT:
            raise _bad("run.prompt", f"has {len(self.prompt)} characters; {LONGEST_PROMPT} are the most")
        if "\0" in self.prompt:
            raise _bad("run.prompt", "contains a NUL character")
        for field_name, value in (("run.session", self.session), ("request_id", self.request_id)):
            if len(value) > 64 or not value.isprintable():
                raise _bad(field_name, "is longer than 64 characters or not printable")
        for name, amount in asdict(self.budget).items():
            if not 0 <= amount < math.inf:
                raise _bad(f"run.budget.{name}", "is negative or no number")
        left_s = (self.start_by_ns - time.time_ns()) / 1e9 if self.start_by_ns else _LONGEST_WAIT_S
        if left_s <= 0:
            raise _bad("run.start_by_time", "is not in the future")
        if left_s > _LONGEST_WAIT_S:
            raise _bad("run.start_by_time", "is more than a year away")


def _bad(field_name: str, why: str) -> RequestError:
    return RequestError(Reason.BAD_FIELD, f"{field_name} {why}.", field=field_name, metadata={"field": field_name})


@dataclass(frozen=True, slots=True)
class Run:
    """One run. Times are nanoseconds since 1970; `error` is (reason, message, hint) of an AgentdError."""

    id: str
    principal: str
    prompt: str
    session: str
    state: State
    create_ns: int
    stop_reason: StopReason | None = None
    answer: str = ""
    error: tuple[str, str, str] | None = None
    end_ns: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    calls: int = 0
    seconds: float = 0.0
    """Of the model."""
    joules: float = 0.0
    """Of the device while the model was at work; 0 where its power is not known."""
    labels: Labels = _NONE
    """What it has taken in: later runs of the session have it in their context too."""
    transcript: tuple[Part, ...] = field(default=(), repr=False)
    """Calls, results and answer, thoughts left out: what later runs of the session see of this one."""
    priority: Priority = Priority.NORMAL
    start_by_ns: int = 0
    budget: Usage = _UNBOUNDED
    within: tuple[str, ...] = ()
    rehearse: bool = False
    token: str = ""
    tools: tuple[str, ...] = ()
    direct: Direct | None = None
    trigger: str = ""
    triggered_by: str = ""
    approval_s: float = 0.0

    @classmethod
    def of(cls, asked: RunRequest, wait_s: float) -> Self:
        """A new one, which waits for so long at most unless it was asked for with a time."""
        now = time.time_ns()
        return cls(
            *(new_id(), asked.principal, asked.prompt, asked.session or new_id(), State.QUEUED, now),
            labels=asked.labels,
            priority=asked.priority,
            start_by_ns=asked.start_by_ns or now + int(wait_s * 1e9),
            budget=asked.budget,
            within=asked.within,
            token=asked.token,
            rehearse=asked.rehearse,
            tools=asked.tools,
            direct=asked.direct,
            trigger=asked.trigger,
            triggered_by=asked.triggered_by,
            approval_s=asked.approval_s,
        )

    @property
    def ended(self) -> bool:
        return self.state not in (State.QUEUED, State.RUNNING)

    @property
    def deferrable(self) -> bool:
        """Whether it can wait past a restart until battery, heat and memory allow it."""
        return self.priority is Priority.BACKGROUND

    def turn(self) -> Turn:
        return Turn(self.prompt, self.transcript)

    def to_json(self) -> str:
        fields = asdict(replace(self, transcript=()))
        fields["state"] = self.state.value
        fields["stop_reason"] = self.stop_reason.value if self.stop_reason else None
        fields["priority"] = self.priority.name.lower()
        fields["transcript"] = [{type(part).__name__: asdict(part)} for part in self.transcript]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Run:
        fields = json.loads(text)
        fields["state"] = State(fields["state"])
        fields["stop_reason"] = StopReason(fields["stop_reason"]) if fields["stop_reason"] else None
        fields["labels"] = Labels(**{name: tuple(sources) for name, sources in fields.get("labels", {}).items()})
        fields["error"] = tuple(fields["error"]) if fields["error"] else None
        fields["priority"] = Priority[fields.get("priority", "normal").upper()]
        fields["budget"] = Usage(**fields.get("budget", {}))
        fields["within"] = tuple(fields.get("within", ()))
        fields["tools"] = tuple(fields.get("tools", ()))
        fields["direct"] = Direct(**fields["direct"]) if fields.get("direct") else None
        kinds: dict[str, Any] = {"Said": Said, "Called": Called, "Responded": Responded}
        parts = (next(iter(part.items())) for part in fields["transcript"])
        fields["transcript"] = tuple(kinds[name](**values) for name, values in parts)
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class RunEvent:
    """What happened, in order: `kind` is text, thought, call_started, approval, call, budget, queue, context or run; `body`
    is JSON.
    """

    sequence: int
    time_ns: int
    kind: str
    body: dict[str, Any]


def told(approval: Approval) -> dict[str, Any]:
    """A question that a call waits for, or has waited for, as the body of an event."""
    return {
        "approval": approval.id,
        "call": approval.call,
        "tool": approval.tool,
        "state": approval.state.value,
        "reason": approval.reason if approval.state is WAITS else approval.said,
        "scopes": [str(scope) for scope in approval.scopes],
    }
