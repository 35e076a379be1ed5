"""The loop of one run: ask the model, make its calls, give it the results, until it answers or a limit ends it."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from agentd.budgets import QuotaSpent, Usage
from agentd.calls import CallRequest, CallResult, Denied
from agentd.engine.link import Delta, Done, Malformed, ToolCall
from agentd.engine.prompt import Called, Conversation, Generated, Part, Responded, Said, ToolSpec, Turn
from agentd.errors import AgentdError, EngineError, Reason, ToolError
from agentd.grants import Labels
from agentd.runs.results import for_the_model
from agentd.runs.run import StopReason, told

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from agentd.grants import Pattern
    from agentd.runs.run import Direct, Run

MALFORMED_LIMIT = 3
_NO_TOOL = "unknown"
_NONE = Labels()
_TAKES_IN = ("read:", "connect:")
_PASSED_ON = frozenset({Reason.STORE_FULL, Reason.AUDIT_UNAVAILABLE, Reason.SANDBOX_UNSUPPORTED, Reason.INTERNAL})
"""Errors of calls that no other call could do better: they end the run instead of going to the model."""


_ENDINGS = {"length": StopReason.TOKEN_LIMIT, "context": StopReason.CONTEXT_FULL, "budget": StopReason.BUDGET}


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run: model steps, generated tokens, seconds, how often the very same call may be made, calls, joules."""

    steps: int
    tokens: int
    seconds: float
    repeats: int
    calls: int = 32
    joules: float | None = None

    def within(self, budget: Usage) -> Limits:
        """What a budget leaves of them; 0 in it leaves all."""
        return replace(
            self,
            tokens=min(self.tokens, budget.tokens or self.tokens),
            seconds=min(self.seconds, budget.seconds or self.seconds),
            calls=min(self.calls, budget.calls or self.calls),
            joules=min(each for each in (self.joules, budget.joules) if each) if self.joules or budget.joules else None,
        )


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What every prompt of the daemon has in common."""

    system: str
    tools: tuple[ToolSpec, ...]
    thinking: bool
    temperature: float
    seed: int


class Model(Protocol):
    """The part of the engine that the loop uses."""

    def generate(
        self,
        conversation: Conversation,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        spent: Callable[[Done], None],
    ) -> AsyncGenerator[Delta | ToolCall | Malformed | Done, None]: ...


class Purse(Protocol):
    """The part of the quotas that the loop uses."""

    def tokens_left(self, principal: str) -> float: ...

    def require(self, principal: str) -> None: ...

    def spend(self, principal: str, used: Usage) -> None: ...


class Caller(Protocol):
    """The part of `calls/` that the loop uses."""

    async def call(self, request: CallRequest) -> CallResult: ...

    async def end_run(self, run: str) -> None: ...


class _Spent(Exception):
    """Nothing more is to be generated."""

    def __init__(self, stop: StopReason) -> None:
        super().__init__(stop)
        self.stop = stop


@dataclass(slots=True)
class _Step:
    """What one generation gave."""

    text: str = ""
    calls: list[ToolCall | Malformed] = field(default_factory=list)
    done: Done | None = None
    """Also of one that was cancelled."""

    def ended(self, done: Done) -> None:
        self.done = done


@dataclass(slots=True)
class Loop:
    """Runs once. `emit(kind, body)` tells of progress; the counters and `transcript` are up to date at any time."""

    run: Run
    model: Model
    caller: Caller
    settings: ModelSettings
    limits: Limits
    history: list[Turn]
    emit: Callable[[str, dict[str, Any]], None]
    turn: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext
    """Around each generation: it is this run's turn with the model."""
    purse: Purse | None = None
    used: Callable[[], Usage] = Usage
    """What the model and the device have used so far, of all runs: of the difference over a turn its share is this run's."""
    within: tuple[Pattern, ...] = ()
    """The most that its calls may touch, if whoever started it is bounded."""
    rehearse: bool = False
    """Whether what its calls change is put back, for a person to look at."""
    labels: Labels = _NONE
    """What it has taken in so far, that of its session before it included."""
    read: dict[str, None] = field(default_factory=dict)
    """The scopes that it has read, in order."""
    answer: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    calls: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    dropped: int = 0
    """Turns of its session that no longer fit."""
    transcript: list[Part] = field(default_factory=list)
    _parts: list[Part] = field(default_factory=list)
    _malformed: int = 0
    _made: dict[str, int] = field(default_factory=dict)

    async def go(self) -> StopReason:
        """Until the answer or a limit of steps, tokens or repetition. Raises AgentdError if it can't go on."""
        for _ in range(self.limits.steps):
            try:
                step = await self._generate()
            except _Spent as e:
                return e.stop
            assert step.done is not None
            self._parts.append(Generated(step.done.ids))
            for call in step.calls:
                if (stop := await self._make(call)) is not None:
                    return stop
            if (ended := _ENDINGS.get(step.done.reason)) is not None:
                return StopReason.QUOTA if ended is StopReason.TOKEN_LIMIT and self._spent() is StopReason.QUOTA else ended
            if not step.calls and step.done.reason == "tool":  # it waits for a result that nobody asked for
                if (stop := self._reject(_NO_TOOL, "no call was made")) is not None:
                    return stop
            elif not step.calls:
                self.answer = step.text.strip()
                self.transcript.append(Said(self.answer))
                return StopReason.ANSWERED
        return StopReason.STEP_LIMIT

    async def make(self, direct: Direct) -> StopReason:
        """One call, without the model; what it gives is the answer. Raises AgentdError if it fails, or is denied."""
        self.calls += 1
        self.emit("call_started", {"tool": direct.tool, "arguments": direct.arguments})
        try:
            result = await self.caller.call(self._request(direct.tool, direct.arguments))
        except AgentdError as e:
            refused = {"call": e.call, "scopes": e.scopes, "reason": e.decision.reason} if isinstance(e, Denied) else {}
            output = {"output": {"error": e.message}}
            self.emit("call", {"tool": direct.tool, "arguments": direct.arguments, **output, **refused})
            raise
        self.labels |= result.labels
        self.emit("call", {"tool": direct.tool, "arguments": direct.arguments, "output": result.output, **result.told()})
        if result.failed:
            raise ToolError(Reason.TOOL_FAILED, f"{direct.tool}: {result.output['error']}", metadata={"tool": direct.tool})
        self.answer = json.dumps(for_the_model(result.output), ensure_ascii=False)
        return StopReason.ANSWERED

    def _spent(self) -> StopReason | None:
        if self.limits.joules is not None and self.joules >= self.limits.joules:
            return StopReason.ENERGY_LIMIT
        try:
            if self.purse:
                self.purse.require(self.run.principal)
        except QuotaSpent:
            return StopReason.QUOTA
        return None

    async def _generate(self) -> _Step:
        while True:
            try:
                return await self._generate_once()
            except EngineError as e:
                if e.reason is not Reason.PROMPT_TOO_LONG or not self.history:
                    raise
                self.history.pop(0)  # the oldest turn of the session has to go
                self.dropped += 1
                self.emit("context", {"dropped": self.dropped, "left": len(self.history)})

    async def _generate_once(self) -> _Step:
        step = _Step()
        async with self.turn():
            if (stop := self._spent()) is not None:
                raise _Spent(stop)
            before = self.used()
            try:
                await self._ask(step)
            finally:  # what is cancelled, or ends at a limit, was used all the same
                self._count(step.done, self.used() - before)
        return step

    def _count(self, done: Done | None, used: Usage) -> None:
        """`used` is of all that shared the model meanwhile."""
        if done is None:  # the engine died, or had no budget to begin
            return
        share = min(1.0, done.busy_s / used.seconds) if used.seconds > 0 else 0.0
        mine = Usage(len(done.ids), done.busy_s, 0, used.joules * share)
        self.generated_tokens += mine.tokens
        self.prompt_tokens += done.prompt_tokens - done.cached_tokens
        self.seconds += mine.seconds
        self.joules += mine.joules
        if self.purse:
            self.purse.spend(self.run.principal, mine)

    async def _ask(self, step: _Step) -> None:
        settings = self.settings
        turns = (*self.history, Turn(self.run.prompt, tuple(self._parts)))
        conversation = Conversation(settings.system, settings.tools, turns, settings.thinking)
        most = min(
            self.limits.tokens - self.generated_tokens, self.purse.tokens_left(self.run.principal) if self.purse else math.inf
        )
        outputs = self.model.generate(
            conversation,
            max_tokens=max(1, int(most)),
            temperature=settings.temperature,
            seed=settings.seed,
            spent=step.ended,
        )
        async with contextlib.aclosing(outputs) as stream:
            async for output in stream:
                match output:
                    case Delta():
                        self.emit("thought" if output.thought else "text", {"text": output.text})
                        step.text += "" if output.thought else output.text
                    case ToolCall() | Malformed():
                        step.calls.append(output)
                    case Done():
                        step.done = step.done or output  # of one that was never begun nothing was spent

    async def _make(self, call: ToolCall | Malformed) -> StopReason | None:
        if isinstance(call, Malformed):
            return self._reject(_NO_TOOL, f"this is not a call: {call.why}")
        arguments = json.dumps(call.arguments, sort_keys=True)
        self.emit("call_started", {"tool": call.tool, "arguments": call.arguments})
        if call.tool not in {tool.name for tool in self.settings.tools}:
            # Its name is the model's own text: it must not get into the markup of the next prompt.
            return self._reject(_NO_TOOL, "there is no such tool", call)
        key = f"{call.tool} {arguments}"
        self._made[key] = self._made.get(key, 0) + 1
        if self._made[key] > self.limits.repeats:
            self._tell(call, {"error": "this very call was made before"}, {})
            return StopReason.REPEATED_CALL
        if self.calls >= self.limits.calls:
            self._tell(call, {"error": "this run may make no more calls"}, {})
            return StopReason.CALL_LIMIT
        self.calls += 1
        return await self._execute(call)

    def _request(self, tool: str, arguments: Mapping[str, Any]) -> CallRequest:
        run = self.run
        return CallRequest(
            *(run.principal, tool, arguments, run.session, run.id),
            labels=self.labels,
            within=self.within,
            read=tuple(self.read),
            tell=lambda approval: self.emit("approval", told(approval)),
            waits=lambda calls: self.emit("waiting", {"tool": tool, "calls": list(calls)}),
            rehearse=self.rehearse,
            approval_s=run.approval_s,
        )

    async def _execute(self, call: ToolCall) -> StopReason | None:
        try:
            result = await self.caller.call(self._request(call.tool, call.arguments))
        except Denied as e:
            refused = {"call": e.call, "scopes": e.scopes, "decision": e.decision.verdict, "reason": e.decision.reason}
            self._tell(call, {"error": f"denied: {e.decision.reason}"}, refused)
        except QuotaSpent as e:
            self._tell(call, {"error": e.message}, {})
            return StopReason.QUOTA
        except AgentdError as e:
            if e.reason in _PASSED_ON:
                raise
            self._tell(call, {"error": e.message}, {})
        else:
            self.labels |= result.labels
            self.read |= dict.fromkeys(scope for scope in result.scopes if scope.startswith(_TAKES_IN))
            self._tell(call, result.output, result.told())
        return None

    def _tell(self, call: ToolCall, output: dict[str, Any], told: dict[str, Any]) -> None:
        """Give the model the output and everyone else the event."""
        self.emit("call", {"tool": call.tool, "arguments": call.arguments, "output": output, **told})
        response = Responded(call.tool, for_the_model(output))
        self._parts.append(response)
        self.transcript += [Called(call.tool, call.arguments), response]

    def _reject(self, tool: str, why: str, call: ToolCall | None = None) -> StopReason | None:
        arguments = call.arguments if call else {}
        self.emit("call", {"tool": call.tool if call else "", "arguments": arguments, "output": {"error": why}})
        self._parts.append(Responded(tool, {"error": why}))
        self._malformed += 1
        return StopReason.MALFORMED_CALLS if self._malformed >= MALFORMED_LIMIT else None
