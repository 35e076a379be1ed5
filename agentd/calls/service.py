"""The way of every tool call, whoever asks for it: validate, decide, journal, execute, record."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from agentd_sandbox import (
    Access,
    Job,
    Outcome,
    OutputTooLarge,
    PathRule,
    SandboxFailure,
    WorkerCancelled,
    WorkerDied,
    WorkerOffence,
    WorkerRevoked,
    WorkerTimeout,
)
from agentd_sandbox.network import split_authority

from agentd.audit import Event, FileTouched, Payload, Peer, SandboxUse
from agentd.calls.arguments import Arguments
from agentd.calls.locks import Locks
from agentd.calls.turns import Turns
from agentd.calls.undoing import Undoing, lasts
from agentd.calls.wanted import CallRequest, CallResult, Prepared, Wanted, asked, event, who
from agentd.devices import is_node
from agentd.errors import AgentdError, JournalError, Reason, RequestError, SandboxError, ToolError
from agentd.grants import PATH_KINDS
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from agentd_sandbox import Level, Sandbox

    from agentd.audit import AuditLog
    from agentd.calls.manifest import Tool, Toolbox
    from agentd.calls.permission import Permission
    from agentd.calls.places import Places
    from agentd.grants import Decision, Grant, Pattern, Scope
    from agentd.journal import Journal, Permit, Transaction

T = TypeVar("T")
_EXITS: Mapping[type, str] = {
    WorkerTimeout: "timeout",
    WorkerCancelled: "cancelled",
    WorkerRevoked: "revoked",
    WorkerOffence: "offence",
    OutputTooLarge: "output",
}
CONCURRENT_CALLS = 8  # workers at a time: each costs a process and a thread


class Calls:
    """Executes tool calls. `execute` may be awaited concurrently; at most `at_once` workers run at a time."""

    def __init__(
        self,
        toolbox: Toolbox,
        permission: Permission,
        journal: Journal,
        audit: AuditLog,
        sandbox: Sandbox,
        level: Level,
        places: Places,
        *,
        at_once: int = CONCURRENT_CALLS,
        keep_outputs: bool = False,
        budget: Callable[[], dict[str, Any]] = dict,
        spend: Callable[[str], None] = lambda _principal: None,
    ) -> None:
        """With `keep_outputs` the log has what tools give back, and not only its digest. `budget` tells how the device is,
        `spend` counts each call of a principal, or raises QuotaSpent.
        """
        self._budget, self._spend = budget, spend
        self.toolbox, self._permission = toolbox, permission
        self._journal, self._audit, self._sandbox = journal, audit, sandbox
        self._level, self._places = level, places
        self._profile, self._keep_outputs = level.filter_digest, keep_outputs
        self._arguments = {name: Arguments(tool) for name, tool in toolbox.tools.items()}
        self._locks, self._turns = Locks(), Turns(at_once)
        self.undoing = Undoing(journal, audit, self._locks)
        self._running: dict[str, tuple[Prepared, threading.Event, float]] = {}
        """What is executed, what tells it that it may no longer, since when."""
        self._waiting: dict[str, tuple[Prepared, asyncio.AbstractEventLoop, float]] = {}
        """What waits for others that change the same files, and since when."""
        permission.grants.changed = self._look_again
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="broker")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def running(self) -> list[tuple[Prepared, float]]:
        """What is executed now, and for how many seconds."""
        return [(prepared, time.monotonic() - begun) for prepared, _, begun in list(self._running.values())]

    def waiting(self) -> list[tuple[Prepared, float, tuple[str, ...]]]:
        """What waits for calls that change the same files: for how many seconds, and for which ones."""
        now = time.monotonic()
        return [(prepared, now - begun, self._locks.waits_for(call)) for call, (prepared, _, begun) in self._waiting.items()]

    async def call(self, request: CallRequest) -> CallResult:
        """`prepare` and `execute`: raises what they raise, QuotaSpent; ToolError (QUEUE_FULL) if its principal has too many."""
        with self._turns.admitted(request.principal):
            self._spend(request.principal)
            return await self.execute(await self.prepare(request))

    async def prepare(self, request: CallRequest) -> Prepared:
        """Validate and decide, asking a person where that must be; a refusal is on record when this raises.

        Raises RequestError (TOOL_NOT_FOUND, BAD_ARGUMENTS), Denied.
        """
        wanted = await asyncio.to_thread(self._validate, request)
        if wanted.tool.manifest.effect != "none":
            self._audit.require_open()
        if request.rehearse:
            await self._require_rehearsable(wanted)
        prepared = await self._permission.obtain(wanted, lambda: self._scopes(*self._checked(request)))
        if prepared.rehearsed:
            await self._require_rehearsable(prepared)
        return prepared

    async def _require_rehearsable(self, wanted: Wanted) -> None:
        """Raises JournalError (NOT_UNDOABLE), with that on record, for what nobody could put back."""
        outside = [str(scope) for scope in wanted.scopes if lasts(str(scope))]
        if outside or wanted.tool.manifest.reaches_outside:
            reaches = f" ({outside[0]})" if outside else ""
            error = JournalError(
                Reason.NOT_UNDOABLE,
                f"{wanted.tool.name} can't be rehearsed: it reaches outside{reaches}, and that could not be put back.",
                hint="It was not run. Call it without rehearsing.",
                metadata={"tool": wanted.tool.name, "call": wanted.id},
            )
            await asyncio.to_thread(self._audit.record, event("call.reject", wanted, error=error.message))
            raise error

    def explain(self, request: CallRequest, supposed: Sequence[Grant] | None = None) -> tuple[tuple[Scope, ...], Decision]:
        """What would be decided on such a call now, and why; nothing is recorded or run. Not for the event loop.
        With `supposed` as if these were all the grants.

        Raises RequestError (TOOL_NOT_FOUND, BAD_ARGUMENTS).
        """
        tool, arguments = self._checked(request)
        wanted = asked(request, tool, self._scopes(tool, arguments))
        return wanted.wanted, self._permission.grants.decide(wanted, supposed)

    async def execute(self, prepared: Prepared) -> CallResult:
        """Run a prepared call to its end. Cancelling the task kills the worker and puts its changes back.

        A tool that says it failed is a result. Raises ToolError (TOOL_TIMEOUT, TOOL_FAILED), SandboxError,
        JournalError (NOT_UNDOABLE), StoreError: then nothing of the call remains but its record.
        """
        trees = [_tree(scope) for scope in prepared.scopes if scope.kind == "write"]
        if not trees:
            return await self._in_turn(prepared)
        # One change of a path at a time: a call that fails is rolled back, and must not take another's change with it.
        self._waiting[prepared.id] = prepared, asyncio.get_running_loop(), time.monotonic()
        try:
            claim = await self._locks.acquire(prepared.id, trees, prepared.request.waits)
        except ToolError as e:
            await asyncio.to_thread(self._audit.record, event("call.reject", prepared, error=e.message))
            raise
        finally:
            self._waiting.pop(prepared.id, None)
        return await self._in_turn(prepared, lambda: self._locks.release(claim))

    def permit(self, principal: str, within: tuple[Pattern, ...], *, looks: bool = False) -> Permit:
        """What of the changes of calls somebody may see and take back."""
        return self._permission.over_files(principal, within, looks=looks)

    def fixed_scopes(self, tool: str) -> frozenset[str]:
        """The scopes of a tool that are its own, whatever its arguments; none if there is no such tool."""
        if tool not in self._arguments:
            return frozenset()
        return frozenset(str(scope) for scope in self._arguments[tool].scopes({}, self._places.variables()))

    def asks(self, tool: str) -> bool:
        """Whether only a grant that names it counts."""
        known = self.toolbox.tools.get(tool)
        return known is not None and known.manifest.asks

    async def end_run(self, run: str) -> None:
        """What was allowed for this run alone is over."""
        await asyncio.to_thread(self._permission.end_run, run)

    async def _in_turn(self, prepared: Prepared, ended: Callable[[], None] = lambda: None) -> CallResult:
        try:
            give_up = await self._turns.take(prepared.request.principal)
        except BaseException:
            ended()
            raise

        def over() -> None:
            try:
                give_up()
            finally:
                ended()

        return await self._in_thread(prepared, over)

    async def _in_thread(self, prepared: Prepared, ended: Callable[[], None] = lambda: None) -> CallResult:
        """`ended` is called when nothing of it goes on any more, whoever has given up waiting for it."""
        cancelled = threading.Event()
        try:
            work = self._in_context(self._execute, prepared, cancelled)
        except BaseException:  # no thread takes it: the daemon is stopping
            ended()
            raise
        work.add_done_callback(lambda _: ended())
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([work], timeout=prepared.tool.manifest.deadline_s + 10)
            if work.done() and not work.cancelled():
                work.exception()  # it is on record; nobody is left to tell
            raise

    def _in_context(self, do: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """On a thread, where events still know the origin of the request."""
        context = contextvars.copy_context()
        return asyncio.get_running_loop().run_in_executor(self._threads, context.run, do, *arguments)

    def _validate(self, request: CallRequest) -> Wanted:
        call = new_id()
        try:
            tool, arguments = self._checked(request)
        except RequestError as e:
            asked = {"tool": Payload(request.tool), "reason": e.reason.name}
            rejected = Event(kind="call.reject", call=call, error=Payload(e.message), detail=asked, **who(request))
            self._audit.record(rejected)
            raise
        scopes = self._scopes(tool, arguments)
        return Wanted(call, request, tool, arguments, scopes, self._permission.gives(tool, scopes))

    def _checked(self, request: CallRequest) -> tuple[Tool, dict[str, Any]]:
        tool = self.toolbox.tools.get(request.tool)
        if tool is None:
            message, hint = f"There is no tool {request.tool!r}.", f"{self.toolbox.why_missing(request.tool)}."
            raise RequestError(Reason.TOOL_NOT_FOUND, message, hint=hint, field="tool", metadata={"tool": request.tool})
        return tool, self._arguments[tool.name].check(request.arguments, str(self._places.folder))

    def _scopes(self, tool: Tool, arguments: Mapping[str, Any]) -> tuple[Scope, ...]:
        return self._arguments[tool.name].scopes(arguments, self._places.variables())

    def _look_again(self) -> None:
        """After a change of the grants: what is no longer allowed may do nothing more."""
        for prepared, revoked, _ in list(self._running.values()):
            if not self._permission.still(prepared):
                revoked.set()
        for prepared, loop, _ in list(self._waiting.values()):
            if not self._permission.still(prepared):
                message = f"{prepared.tool.name} may not run any more: what allowed it was revoked while it waited."
                error = ToolError(Reason.GRANT_REVOKED, message, hint="Nothing was changed.")
                loop.call_soon_threadsafe(self._locks.refuse, prepared.id, error)

    def _execute(self, prepared: Prepared, cancelled: threading.Event) -> CallResult:
        if not self._level.confines:
            raise SandboxError(
                Reason.SANDBOX_UNSUPPORTED,
                f"No tool can run here: this kernel can't confine one ({'; '.join(self._level.missing)}).",
                hint="`agentd doctor` says what is missing.",
                metadata={"kernel": self._level.kernel},
            )
        paths = [os.fsencode(scope.value) for scope in prepared.scopes if scope.kind == "write"]
        intent = event("call.intent", prepared, prepared.decision, budget=self._budget() or None)
        transaction = self._journal.begin(prepared.id, intent, paths)
        revoked = threading.Event()
        self._running[prepared.id] = prepared, revoked, time.monotonic()
        try:
            if not self._permission.still(prepared):  # revoked between the decision and now
                revoked.set()
            outcome = self._run(prepared, transaction, cancelled, revoked)
        except (SandboxFailure, OSError) as e:
            error = _named(e, prepared.tool)
            told = self._told(e.outcome) if isinstance(e, SandboxFailure) and e.outcome else {}
            transaction.roll_back(event("call.abort", prepared, error=error.message, exit=_EXITS.get(type(e), "died"), **told))
            raise error from e
        finally:
            del self._running[prepared.id]
        try:
            return self._conclude(prepared, transaction, outcome)
        except AgentdError:
            raise
        except Exception as e:  # a bug of ours, or what nobody foresaw of a tool's answer: nothing of the call is to stay
            transaction.roll_back(event("call.abort", prepared, error=f"a bug in agentd: {type(e).__name__}", exit="died"))
            raise

    def _run(
        self, prepared: Prepared, transaction: Transaction, cancelled: threading.Event, revoked: threading.Event
    ) -> Outcome:
        manifest = prepared.tool.manifest
        job = Job(
            prepared.tool.bundle,
            manifest.name,
            prepared.arguments,
            self._places.variables(),
            manifest.deadline_s,
            manifest.output_bytes,
        )
        return self._sandbox.run(job, self._access(prepared), transaction, cancelled, revoked)

    def _access(self, prepared: Prepared) -> Access:
        scopes = prepared.scopes
        rules = {kind: tuple(scope.rule() for scope in scopes if scope.kind == kind) for kind in PATH_KINDS}
        peers = frozenset(split_authority(scope.value, None) for scope in scopes if scope.kind == "connect")
        used = frozenset(scope.value for scope in scopes if scope.kind == "use")
        named = (self._places.devices.get(scope.value, ()) for scope in scopes if scope.kind == "device")
        nodes = tuple(PathRule(os.fsencode(node), glob=True) for nodes in named for node in nodes)
        operated = frozenset(scope.value for scope in scopes if scope.kind == "device" and not is_node(scope.value))
        own, known = self._places.own, self._places.own.identities()
        return Access(
            *(rules["read"], rules["write"], peers, rules["exec"], used, nodes, operated),
            hidden=tuple(PathRule(os.fsencode(path)) for path in own.absent),
            absent=known.absent,
            protected=known.protected,
            later=self._permission.grants.later.rules,
            named=self._permission.named(prepared),
        )

    def _conclude(self, prepared: Prepared, transaction: Transaction, outcome: Outcome) -> CallResult:
        output = outcome.result if outcome.error is None else {"error": outcome.error}
        output = output if output is not None else {"error": "the tool gave nothing back"}
        digest = hashlib.sha256(json.dumps(output, sort_keys=True).encode()).hexdigest()
        told = self._told(outcome) | {"result_digest": digest, "exit": "result" if outcome.error is None else "error"}
        told["detail"] |= {"output": Payload(output)} if self._keep_outputs else {}
        files: tuple[FileTouched, ...] = ()
        if outcome.error is None:
            files = self._end(prepared, transaction, told)
        else:
            transaction.roll_back(event("call.abort", prepared, error=Payload(outcome.error), **told))
        scopes = tuple(map(str, prepared.scopes))
        return CallResult(
            *(prepared.id, prepared.tool.name, output, scopes, prepared.decision, files),
            *(self._level.name, outcome.denied, outcome.wall_us, prepared.gives),
            rehearsed=prepared.rehearsed and bool(files),
        )

    def _end(self, prepared: Prepared, transaction: Transaction, told: Mapping[str, Any]) -> tuple[FileTouched, ...]:
        """What the call has changed, on record. Raises JournalError, StoreError: then it is put back."""
        try:
            if prepared.rehearsed:
                told = {**told, "detail": {**told.get("detail", {}), "rehearsed": True}}
                return transaction.rehearse(event("call.end", prepared, **told))
            self._permission.label(prepared, transaction.images)  # before anybody else may read it
            return transaction.finish(event("call.end", prepared, **told))
        except AgentdError as e:
            transaction.roll_back(event("call.abort", prepared, error=e.message, **told))
            raise

    def _told(self, outcome: Outcome) -> dict[str, Any]:
        """What the record says of a call's way through the sandbox."""
        use = SandboxUse(
            level=self._level.name,
            mediated=outcome.mediated,
            denied=outcome.denied,
            denials=tuple(f"{d.call} {d.target}: {d.why}" for d in outcome.denials),
            peers=tuple(Peer(**asdict(contact)) for contact in outcome.contacts),
            profile=self._profile,
        )
        used = {"wall_us": outcome.wall_us, "cpu_us": outcome.cpu_us, "rss_kb": outcome.rss_kb}
        return {"sandbox": use, **used, "budget": self._budget() or None, "detail": self._operated(outcome)}

    def _operated(self, outcome: Outcome) -> dict[str, Any]:
        """Which devices, and how each operation ended; what was asked and answered so that it can be taken out of the log."""
        if not outcome.operations:
            return {}
        detail: dict[str, Any] = {"operations": [{"device": each.device, "ended": each.ended} for each in outcome.operations]}
        for n, operation in enumerate(outcome.operations):
            detail[f"asked_{n}"] = Payload(operation.asked)
            if operation.error or self._keep_outputs:
                detail[f"answer_{n}"] = Payload(operation.error or operation.answer)
        return detail


def _tree(scope: Scope) -> bytes:
    """The directory below which all that a scope covers lies."""
    return os.fsencode(os.path.dirname(scope.value.partition("*")[0]) or "/" if scope.glob else scope.value)


def _named(error: SandboxFailure | OSError, tool: Tool) -> AgentdError:
    """A failure of the sandbox as an error that names the tool and the way out."""
    reasons = {
        WorkerTimeout: Reason.TOOL_TIMEOUT,
        WorkerCancelled: Reason.CANCELLED,
        WorkerRevoked: Reason.GRANT_REVOKED,
    }
    metadata = {"tool": tool.name}
    if isinstance(error, WorkerTimeout | WorkerCancelled | WorkerDied | WorkerOffence | OutputTooLarge):
        reason = reasons.get(type(error), Reason.TOOL_FAILED)
        hint = "What it has done outside stays done." if tool.manifest.reaches_outside else "Its changes were put back."
        return ToolError(reason, f"{tool.name} was ended: {error}.", hint=hint, metadata=metadata)
    hint = "`agentd doctor` says what this machine can confine."
    return SandboxError(
        Reason.SANDBOX_UNSUPPORTED, f"{tool.name} could not be run confined: {error}.", hint=hint, metadata=metadata
    )
