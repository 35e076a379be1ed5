"""The way of every tool call, whoever asks for it: validate, decide, journal, execute, record."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentd_sandbox import (
    Access,
    Job,
    Outcome,
    OutputTooLarge,
    SandboxFailure,
    WorkerCancelled,
    WorkerDied,
    WorkerOffence,
    WorkerTimeout,
)
from agentd_sandbox.network import split_authority

from agentd.audit import Event, FileTouched, SandboxUse, ToolIdentity, Verdict
from agentd.calls.arguments import Arguments
from agentd.errors import AgentdError, Reason, RequestError, SandboxError, ToolError
from agentd.grants import PATH_KINDS
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from agentd_sandbox import Level, Sandbox

    from agentd.audit import AuditLog
    from agentd.calls.manifest import Tool, Toolbox
    from agentd.grants import Decision, Grants, Scope
    from agentd.journal import Journal, Transaction, Undone

CONCURRENT_CALLS = 4  # workers at a time: each costs a process and a thread


@dataclass(frozen=True, slots=True)
class CallRequest:
    """Who asks for what, and in which run of which session, if any."""

    principal: str
    tool: str
    arguments: Mapping[str, Any]
    session: str = ""
    run: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A valid call with its decision, before anything has run."""

    id: str
    request: CallRequest
    tool: Tool
    arguments: dict[str, Any]
    scopes: tuple[Scope, ...]
    decision: Decision


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
            "changed": [file.path for file in self.files],
            "level": self.level,
            "denied": self.denied,
            "wall_us": self.wall_us,
        }


class Denied(RequestError):
    """The grants said no (GRANT_REQUIRED). The refusal is on record as call `call`."""

    def __init__(self, prepared: Prepared) -> None:
        decision = prepared.decision
        add = f"To allow it, add a grant for {decision.scope} to agentd.toml."
        super().__init__(
            Reason.GRANT_REQUIRED,
            f"{prepared.tool.name} was denied: {decision.reason}.",
            hint=f"It stands in {decision.rules[0]}; no grant can overrule it." if decision.rules else add,
            metadata={"tool": prepared.tool.name, "scope": decision.scope, "call": prepared.id},
        )
        self.call, self.decision = prepared.id, decision
        self.scopes = [str(scope) for scope in prepared.scopes]


@dataclass(frozen=True, slots=True)
class Places:
    """Where calls happen: relative paths start at `folder`; `sysfs` and `proc` are where readings come from."""

    folder: Path
    sysfs: str = "/sys"
    proc: str = "/proc"

    def variables(self) -> dict[str, str]:
        prefix = os.environ.get("PREFIX", "/usr")  # Termux keeps its programs in a folder of its own
        return {"folder": str(self.folder), "sysfs": self.sysfs, "proc": self.proc, "prefix": prefix}


class Calls:
    """Executes tool calls. `execute` may be awaited concurrently; at most CONCURRENT_CALLS workers run at once."""

    def __init__(
        self,
        toolbox: Toolbox,
        grants: Grants,
        journal: Journal,
        audit: AuditLog,
        sandbox: Sandbox,
        level: Level,
        places: Places,
    ) -> None:
        self.toolbox, self.grants = toolbox, grants
        self._journal, self._audit, self._sandbox = journal, audit, sandbox
        self._level, self._places = level, places
        self._arguments = {name: Arguments(tool) for name, tool in toolbox.tools.items()}
        self._changing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(CONCURRENT_CALLS, thread_name_prefix="broker")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def call(self, request: CallRequest) -> CallResult:
        """`prepare` and `execute`: raises what they raise."""
        return await self.execute(await self.prepare(request))

    async def prepare(self, request: CallRequest) -> Prepared:
        """Validate and decide; a refusal is on record when this raises.

        Raises RequestError (TOOL_NOT_FOUND, BAD_ARGUMENTS), Denied.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, request)

    async def execute(self, prepared: Prepared) -> CallResult:
        """Run a prepared call to its end. Cancelling the task kills the worker and puts its changes back.

        A tool that says it failed is a result. Raises ToolError (TOOL_TIMEOUT, TOOL_FAILED), SandboxError,
        JournalError (NOT_UNDOABLE), StoreError: then nothing of the call remains but its record.
        """
        if not any(scope.kind == "write" for scope in prepared.scopes):
            return await self._in_thread(prepared)
        # One change at a time: a call that fails is put back, and must not take another's change with it.
        async with self._changing:
            return await self._in_thread(prepared)

    async def undo(self, call: str, principal: str) -> Undone:
        """Put a call back; waits for a change that is under way. Raises what the journal raises."""
        async with self._changing:
            return await asyncio.to_thread(self._journal.undo, call, principal)

    async def _in_thread(self, prepared: Prepared) -> CallResult:
        cancelled = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._execute, prepared, cancelled)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([work], timeout=prepared.tool.manifest.deadline_s + 10)
            if work.done() and not work.cancelled():
                work.exception()  # it is on record; nobody is left to tell
            raise

    def _prepare(self, request: CallRequest) -> Prepared:
        tool = self.toolbox.tools.get(request.tool)
        call = new_id()
        try:
            if tool is None:
                known = ", ".join(self.toolbox.tools)
                message, hint = f"There is no tool {request.tool!r}.", f"The tools are {known}."
                raise RequestError(Reason.TOOL_NOT_FOUND, message, hint=hint, field="tool", metadata={"tool": request.tool})
            arguments = self._arguments[tool.name].check(request.arguments, str(self._places.folder))
        except RequestError as e:
            event = Event(kind="call.reject", call=call, error=e.message, detail={"tool": request.tool}, **_who(request))
            self._audit.record(event)
            raise
        scopes = self._arguments[tool.name].scopes(arguments, self._places.variables())
        decision = self.grants.decide(request.principal, tool.name, scopes)
        prepared = Prepared(call, request, tool, arguments, scopes, decision)
        if decision.verdict != "allow":
            self._audit.record(_event("call.deny", prepared))
            raise Denied(prepared)
        return prepared

    def _execute(self, prepared: Prepared, cancelled: threading.Event) -> CallResult:
        if not self._level.confines:
            raise SandboxError(
                Reason.SANDBOX_UNSUPPORTED,
                f"No tool can run here: this kernel can't confine one ({'; '.join(self._level.missing)}).",
                hint="`agentd doctor` says what is missing.",
                metadata={"kernel": self._level.kernel},
            )
        paths = [os.fsencode(scope.value) for scope in prepared.scopes if scope.kind == "write"]
        transaction = self._journal.begin(prepared.id, _event("call.intent", prepared), paths)
        try:
            outcome = self._run(prepared, transaction, cancelled)
        except (SandboxFailure, OSError) as e:
            error = _named(e, prepared.tool)
            told = self._told(e.outcome) if isinstance(e, SandboxFailure) and e.outcome else {}
            transaction.roll_back(_event("call.abort", prepared, error=error.message, **told))
            raise error from e
        return self._conclude(prepared, transaction, outcome)

    def _run(self, prepared: Prepared, transaction: Transaction, cancelled: threading.Event) -> Outcome:
        manifest = prepared.tool.manifest
        job = Job(
            prepared.tool.bundle,
            manifest.name,
            prepared.arguments,
            self._places.variables(),
            manifest.deadline_s,
            manifest.output_bytes,
        )
        return self._sandbox.run(job, _access(prepared.scopes), transaction, cancelled)

    def _conclude(self, prepared: Prepared, transaction: Transaction, outcome: Outcome) -> CallResult:
        output = outcome.result if outcome.error is None else {"error": outcome.error}
        output = output if output is not None else {"error": "the tool gave nothing back"}
        digest = hashlib.sha256(json.dumps(output, sort_keys=True).encode()).hexdigest()
        told = self._told(outcome) | {"result_digest": digest}
        files: tuple[FileTouched, ...] = ()
        if outcome.error is None:
            files = transaction.finish(_event("call.end", prepared, **told))
        else:
            transaction.roll_back(_event("call.abort", prepared, error=outcome.error, **told))
        scopes = tuple(map(str, prepared.scopes))
        return CallResult(
            *(prepared.id, prepared.tool.name, output, scopes, prepared.decision, files),
            *(self._level.name, outcome.denied, outcome.wall_us),
        )

    def _told(self, outcome: Outcome) -> dict[str, Any]:
        """What the record says of a call's way through the sandbox."""
        use = SandboxUse(
            level=self._level.name,
            mediated=outcome.mediated,
            denied=outcome.denied,
            denials=tuple(f"{d.call} {d.target}: {d.why}" for d in outcome.denials),
            peers=tuple(f"{host}:{port}" for host, port in outcome.peers),
        )
        return {"sandbox": use, "wall_us": outcome.wall_us, "cpu_us": outcome.cpu_us}


def _who(request: CallRequest) -> dict[str, Any]:
    return {"principal": request.principal, "session": request.session, "run": request.run}


def _event(kind: Any, prepared: Prepared, **more: Any) -> Event:
    tool, decision = prepared.tool, prepared.decision
    event = Event(
        kind=kind,
        call=prepared.id,
        cause=prepared.request.run,
        tool=ToolIdentity(name=tool.name, version=tool.version, digest=tool.digest, effect=tool.manifest.effect),
        **_who(prepared.request),
        **more,
    )
    if kind in ("call.intent", "call.deny"):  # said once; the end refers to it by the call
        verdict = Verdict(verdict=decision.verdict, reason=decision.reason, rules=decision.rules)
        said = {"arguments": prepared.arguments, "scopes": tuple(map(str, prepared.scopes)), "decision": verdict}
        event = event.model_copy(update=said)
    return event


def _access(scopes: tuple[Scope, ...]) -> Access:
    rules = {kind: tuple(scope.rule() for scope in scopes if scope.kind == kind) for kind in PATH_KINDS}
    peers = frozenset(split_authority(scope.value, None) for scope in scopes if scope.kind == "connect")
    used = frozenset(scope.value for scope in scopes if scope.kind == "use")
    return Access(rules["read"], rules["write"], peers, rules["exec"], used)


def _named(error: SandboxFailure | OSError, tool: Tool) -> AgentdError:
    """A failure of the sandbox as an error that names the tool and the way out."""
    reasons = {WorkerTimeout: Reason.TOOL_TIMEOUT, WorkerCancelled: Reason.CANCELLED}
    metadata = {"tool": tool.name}
    if isinstance(error, WorkerTimeout | WorkerCancelled | WorkerDied | WorkerOffence | OutputTooLarge):
        reason = reasons.get(type(error), Reason.TOOL_FAILED)
        return ToolError(reason, f"{tool.name} was ended: {error}.", hint="Its changes were put back.", metadata=metadata)
    hint = "`agentd doctor` says what this machine can confine."
    return SandboxError(
        Reason.SANDBOX_UNSUPPORTED, f"{tool.name} could not be run confined: {error}.", hint=hint, metadata=metadata
    )
