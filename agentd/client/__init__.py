"""The Python client of agentd, over gRPC on its unix socket.

    from agentd.client import Client

    with Client() as agentd:
        for event in agentd.run("read notes/todo.txt"):
            ...

Every error is an `AgentdError` with the daemon's reason, message and hint.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from google.protobuf import struct_pb2

from agentd.client.automations import AutomationsClient
from agentd.client.transport import Bearer, channel_to, error_of
from agentd.errors import AgentdError
from agentd.places import default_socket
from agentd.v1 import (
    approval_pb2,
    approval_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    grant_pb2,
    grant_pb2_grpc,
    journal_pb2,
    journal_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    token_pb2,
    token_pb2_grpc,
    tool_pb2,
    tool_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

__all__ = ["Client"]

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Is called with how many paths are done, and of how many."""
DEADLINE_S = 60.0
"""Of everything but runs, which have limits of their own."""


def no_progress(_done: int, _total: int) -> None:
    """Report nothing."""


class Client:
    """A connection to the daemon. `socket` defaults to where the daemon listens by default. Close after use.

    `address` is a HOST:PORT to be used instead, over TLS if there is a `ca` (PEM) to know the daemon by; `token` is sent
    with every request, in clear text only within this machine: elsewhere that raises RequestError (BAD_ARGUMENTS).
    """

    def __init__(self, socket: Path | None = None, *, address: str = "", token: str = "", ca: bytes = b"") -> None:
        self.socket = socket or default_socket()
        self._where = address or str(self.socket)
        plain = channel_to(address, ca, secret=bool(token)) if address else grpc.insecure_channel(f"unix:{self.socket}")
        self._channel = grpc.intercept_channel(plain, Bearer(token)) if token else plain
        self._close = plain.close
        self._runs = run_pb2_grpc.RunServiceStub(self._channel)
        self._tools = tool_pb2_grpc.ToolServiceStub(self._channel)
        self._audit = audit_pb2_grpc.AuditServiceStub(self._channel)
        self._journal = journal_pb2_grpc.JournalServiceStub(self._channel)
        self._system = system_pb2_grpc.SystemServiceStub(self._channel)
        self._grants = grant_pb2_grpc.GrantServiceStub(self._channel)
        self._approvals = approval_pb2_grpc.ApprovalServiceStub(self._channel)
        self._budgets = budget_pb2_grpc.BudgetServiceStub(self._channel)
        self._tokens = token_pb2_grpc.TokenServiceStub(self._channel)
        self.automations = AutomationsClient(self._channel, self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._close()

    def create_run(
        self,
        prompt: str,
        *,
        session: str = "",
        request_id: str = "",
        rehearse: bool = False,
        priority: run_pb2.Run.Priority.ValueType = run_pb2.Run.PRIORITY_NORMAL,
        start_by: datetime | None = None,
        budget: run_pb2.Run.Budget | None = None,
    ) -> run_pb2.Run:
        """Start a run; sending the same `request_id` again gives the same run. `rehearse`: what it changes is put back.

        It may have to wait for its turn; if it has not begun at `start_by`, it fails.
        """
        run = run_pb2.Run(prompt=prompt, session=session, priority=priority, budget=budget)
        if start_by:
            run.start_by_time.FromDatetime(start_by)
        request = run_pb2.CreateRunRequest(run=run, request_id=request_id or uuid.uuid4().hex, rehearse=rehearse)
        return self._call(self._runs.CreateRun, request)

    def watch_run(self, name: str, *, after: int = 0) -> Iterator[run_pb2.WatchRunResponse]:
        """The events of a run past number `after`, until it has ended."""
        try:
            yield from self._runs.WatchRun(run_pb2.WatchRunRequest(name=name, after_sequence=after))
        except grpc.RpcError as e:
            raise error_of(e, self._where) from None

    def run(
        self,
        prompt: str,
        *,
        session: str = "",
        rehearse: bool = False,
        priority: run_pb2.Run.Priority.ValueType = run_pb2.Run.PRIORITY_NORMAL,
        budget: run_pb2.Run.Budget | None = None,
    ) -> Generator[run_pb2.WatchRunResponse, None, None]:
        """Start a run and follow it. Closing the iterator early cancels the run."""
        run = self.create_run(prompt, session=session, rehearse=rehearse, priority=priority, budget=budget)
        ended = False
        try:
            for event in self.watch_run(run.name):
                ended = event.WhichOneof("event") == "run"
                yield event
        finally:
            if not ended:
                with contextlib.suppress(AgentdError):
                    self.cancel_run(run.name)

    def get_run(self, name: str) -> run_pb2.Run:
        return self._call(self._runs.GetRun, run_pb2.GetRunRequest(name=name))

    def cancel_run(self, name: str) -> run_pb2.Run:
        return self._call(self._runs.CancelRun, run_pb2.CancelRunRequest(name=name))

    def list_runs(self) -> Iterator[run_pb2.Run]:
        """All runs, newest first."""
        token = ""
        while True:
            page = self._call(self._runs.ListRuns, run_pb2.ListRunsRequest(page_token=token))
            yield from page.runs
            if not (token := page.next_page_token):
                return

    def tools(self) -> Iterator[tool_pb2.Tool]:
        """All tools, by name."""
        token = ""
        while True:
            page = self._call(self._tools.ListTools, tool_pb2.ListToolsRequest(page_token=token))
            yield from page.tools
            if not (token := page.next_page_token):
                return

    def call(self, tool: str, arguments: Mapping[str, Any], *, rehearse: bool = False) -> tool_pb2.ToolCall:
        """Call a tool, such as `files.read`, without a model. `rehearse`: what it changes is put back, to be looked at."""
        struct = struct_pb2.Struct()
        struct.update(dict(arguments))
        request = tool_pb2.CallToolRequest(name=f"tools/{tool}", arguments=struct, rehearse=rehearse)
        return self._call(self._tools.CallTool, request, deadline_s=None)

    def audit_events(
        self,
        *,
        call: str = "",
        newest_first: bool = False,
        after: int = 0,
        which: audit_pb2.AuditFilter | None = None,
        with_payloads: bool = False,
    ) -> Iterator[audit_pb2.AuditEvent]:
        """The audit log past number `after`, oldest first unless said otherwise; `call` is `calls/{call}`.

        With payloads, that they were read is recorded.
        """
        token = ""
        while True:
            request = audit_pb2.ListAuditEventsRequest(
                call=call,
                newest_first=newest_first,
                page_token=token,
                filter=which or audit_pb2.AuditFilter(),
                after_sequence=after,
                with_payloads=with_payloads,
            )
            page = self._call(self._audit.ListAuditEvents, request)
            yield from page.audit_events
            if not (token := page.next_page_token):
                return

    def follow_audit_events(
        self, *, after: int = 0, which: audit_pb2.AuditFilter | None = None
    ) -> Iterator[audit_pb2.AuditEvent]:
        """Events past number `after`, and those to come, until the iterator is closed or the daemon stops."""
        request = audit_pb2.FollowAuditEventsRequest(after_sequence=after, filter=which or audit_pb2.AuditFilter())
        stream = self._audit.FollowAuditEvents(request)
        try:
            yield from self._read(stream)
        finally:
            stream.cancel()

    def prune_audit_log(self, keep_events: int) -> audit_pb2.PruneAuditLogResponse:
        """Move events that are older than the newest ones into an archive."""
        return self._call(self._audit.PruneAuditLog, audit_pb2.PruneAuditLogRequest(keep_events=keep_events), deadline_s=None)

    def audit_sql(self, sql: str) -> audit_pb2.QueryAuditSqlResponse:
        """One SELECT over the views `events` and `paths`."""
        return self._call(self._audit.QueryAuditSql, audit_pb2.QueryAuditSqlRequest(sql=sql))

    def audit_event(self, sequence: int, *, with_payloads: bool = False) -> audit_pb2.AuditEvent:
        """One event. With payloads, that they were read is recorded."""
        request = audit_pb2.GetAuditEventRequest(name=f"auditEvents/{sequence}", with_payloads=with_payloads)
        return self._call(self._audit.GetAuditEvent, request)

    def export_audit_events(self, request: audit_pb2.ExportAuditEventsRequest) -> Iterator[str]:
        """Lines in the format asked for, oldest event first. That it was done is recorded."""
        stream = self._audit.ExportAuditEvents(request)
        try:
            for response in self._read(stream):
                yield from response.lines
        finally:
            stream.cancel()

    def redact(self, sequence: int, field: str, reason: str) -> audit_pb2.RedactAuditEventResponse:
        """Take a value out of the log for good."""
        request = audit_pb2.RedactAuditEventRequest(name=f"auditEvents/{sequence}", field=field, reason=reason)
        return self._call(self._audit.RedactAuditEvent, request, deadline_s=None)

    def renew_audit_log(self, reason: str) -> audit_pb2.RenewAuditLogResponse:
        """Put a log away that is not what was signed, and begin a new one."""
        return self._call(self._audit.RenewAuditLog, audit_pb2.RenewAuditLogRequest(reason=reason), deadline_s=None)

    def verifying(self, anchors: Iterable[str] = ()) -> Iterator[audit_pb2.VerifyAuditLogResponse]:
        """Recompute the whole log; `anchors` are checkpoints that were kept elsewhere. The last message has what was found."""
        stream = self._audit.VerifyAuditLog(audit_pb2.VerifyAuditLogRequest(anchors=anchors))
        try:
            yield from self._read(stream)
        finally:
            stream.cancel()

    def verify(self, anchors: Iterable[str] = ()) -> audit_pb2.Verification:
        """`verifying` to its end."""
        *_, last = self.verifying(anchors)
        return last.verification

    def checkpoint(self) -> audit_pb2.Checkpoint:
        """The newest signed checkpoint of the log, and the key to check it with."""
        return self._call(self._audit.GetCheckpoint, audit_pb2.GetCheckpointRequest())

    def prove_inclusion(self, sequence: int, size: int) -> audit_pb2.InclusionProof:
        request = audit_pb2.ProveInclusionRequest(sequence=sequence, size=size)
        return self._call(self._audit.ProveInclusion, request, deadline_s=None)

    def prove_consistency(self, old_size: int, size: int) -> audit_pb2.ConsistencyProof:
        request = audit_pb2.ProveConsistencyRequest(old_size=old_size, size=size)
        return self._call(self._audit.ProveConsistency, request, deadline_s=None)

    def undo(
        self, call: str, *, partial: bool = False, force: bool = False, merge: bool = False, progress: Progress = no_progress
    ) -> journal_pb2.UndoCallResponse:
        """Undo what a call (`calls/{call}`) has changed. `progress` is called with how many paths of how many are done."""
        request = journal_pb2.UndoCallRequest(name=call, partial=partial, force=force, merge=merge)
        return self._rolled_back(journal_pb2.StreamRollbackRequest(call=request), progress)

    def _rolled_back(self, request: journal_pb2.StreamRollbackRequest, progress: Progress) -> journal_pb2.UndoCallResponse:
        """It has no deadline: it takes as long as there are paths, and says how far it is."""
        done = journal_pb2.UndoCallResponse()
        for step in self._read(self._journal.StreamRollback(request)):
            if step.HasField("progress"):
                progress(step.progress.done, step.progress.total)
            else:
                done = step.done
        return done

    def leftovers(self) -> list[journal_pb2.Leftover]:
        """Paths that failed calls have changed and that could not be restored yet."""
        return list(self._call(self._journal.ListLeftovers, journal_pb2.ListLeftoversRequest()).leftovers)

    def recover(self, calls: Iterable[str] = (), *, force: bool = False) -> list[journal_pb2.Leftover]:
        """Try again to restore what is left, of these calls or of all; returns what still could not be."""
        request = journal_pb2.RecoverCallsRequest(names=calls, force=force)
        return list(self._call(self._journal.RecoverCalls, request, deadline_s=None).leftovers)

    def plan_rollback(self, request: journal_pb2.PlanRollbackRequest) -> journal_pb2.RollbackPlan:
        """What undoing a selection of changes would do."""
        return self._call(self._journal.PlanRollback, request, deadline_s=None)

    def apply_rollback(
        self, plan: journal_pb2.PlanRollbackRequest, digest: str, *, progress: Progress = no_progress
    ) -> journal_pb2.UndoCallResponse:
        """Carry out the plan that was seen. `progress` as in `undo`."""
        request = journal_pb2.ApplyRollbackRequest(plan=plan, digest=digest)
        return self._rolled_back(journal_pb2.StreamRollbackRequest(rollback=request), progress)

    def rehearsals(self) -> list[journal_pb2.Rehearsal]:
        """Calls that wait for somebody to apply or drop them, oldest first."""
        return list(self._call(self._journal.ListRehearsals, journal_pb2.ListRehearsalsRequest()).rehearsals)

    def drop_rehearsal(self, call: str) -> None:
        """Give up what a rehearsed call (`calls/{call}`) has made."""
        self._call(self._journal.DropRehearsal, journal_pb2.DropRehearsalRequest(name=call))

    def pin(self, call: str, *, pinned: bool = True) -> None:
        """Keep what a call (`calls/{call}`) needs to be undone past all quotas, or no longer."""
        self._call(self._journal.PinCall, journal_pb2.PinCallRequest(name=call, pinned=pinned))

    def differences(self, selection: journal_pb2.ChangeSelection) -> list[journal_pb2.PathDifference]:
        """What a selection of calls has changed."""
        request = journal_pb2.DiffChangesRequest(selection=selection)
        return list(self._call(self._journal.DiffChanges, request).differences)

    def grants(self) -> Iterator[grant_pb2.Grant]:
        """All grants in force: those of the configuration, then those made."""
        token = ""
        while True:
            page = self._call(self._grants.ListGrants, grant_pb2.ListGrantsRequest(page_token=token))
            yield from page.grants
            if not (token := page.next_page_token):
                return

    def grant(self, grant: grant_pb2.Grant) -> grant_pb2.Grant:
        return self._call(self._grants.CreateGrant, grant_pb2.CreateGrantRequest(grant=grant))

    def revoke_grant(self, name: str) -> grant_pb2.Grant:
        return self._call(self._grants.RevokeGrant, grant_pb2.RevokeGrantRequest(name=name))

    def check(self, tool: str, arguments: Mapping[str, Any], *, principal: str = "") -> grant_pb2.CheckCallResponse:
        """What would be decided on a call, and why."""
        struct = struct_pb2.Struct()
        struct.update(dict(arguments))
        request = grant_pb2.CheckCallRequest(tool=f"tools/{tool}", arguments=struct, principal=principal)
        return self._call(self._grants.CheckCall, request)

    def propose_grants(self, since_ns: int = 0) -> grant_pb2.ProposeGrantsResponse:
        """The few grants that would have allowed what was asked for since then."""
        request = grant_pb2.ProposeGrantsRequest()
        if since_ns:
            request.since.FromNanoseconds(since_ns)
        return self._call(self._grants.ProposeGrants, request)

    def approvals(self) -> list[approval_pb2.Approval]:
        """The questions that wait for an answer, oldest first."""
        return list(self._call(self._approvals.ListApprovals, approval_pb2.ListApprovalsRequest()).approvals)

    @contextlib.contextmanager
    def watching_approvals(self) -> Iterator[Iterator[approval_pb2.Approval]]:
        """Be somebody who can be asked, from here to the end of the block; gives each question as it comes and is closed."""
        self.approvals()  # raises at once for those who may not
        stream = self._approvals.WatchApprovals(approval_pb2.WatchApprovalsRequest())
        try:
            stream.initial_metadata()  # the daemon knows of us now
            yield self._read(stream)
        finally:
            stream.cancel()

    def _read(self, stream: Iterator[T]) -> Iterator[T]:
        try:
            yield from stream
        except grpc.RpcError as e:
            if e.code() is not grpc.StatusCode.CANCELLED:
                raise error_of(e, self._where) from None

    def resolve(self, request: approval_pb2.ResolveApprovalRequest) -> approval_pb2.Approval:
        """Answer a question."""
        return self._call(self._approvals.ResolveApproval, request)

    def tokens(self) -> list[token_pb2.Token]:
        return list(self._call(self._tokens.ListTokens, token_pb2.ListTokensRequest()).tokens)

    def create_token(self, token: token_pb2.Token) -> token_pb2.CreateTokenResponse:
        """A new token, with its secret."""
        return self._call(self._tokens.CreateToken, token_pb2.CreateTokenRequest(token=token))

    def revoke_principal(self, principal: str) -> token_pb2.RevokePrincipalResponse:
        """End all that a principal has; says how many of each."""
        return self._call(self._tokens.RevokePrincipal, token_pb2.RevokePrincipalRequest(principal=principal))

    def revoke_token(self, name: str) -> token_pb2.Token:
        return self._call(self._tokens.RevokeToken, token_pb2.RevokeTokenRequest(name=name))

    def budgets(self) -> budget_pb2.Budgets:
        """What battery, heat and memory allow now."""
        return self._call(self._budgets.GetBudgets, budget_pb2.GetBudgetsRequest())

    def calibrate(self, seconds: float) -> Iterator[budget_pb2.CalibrateResponse]:
        """Measure this device for so long; closing the iterator ends it."""
        request = budget_pb2.CalibrateRequest()
        request.duration.FromMilliseconds(round(seconds * 1000))
        stream = self._budgets.Calibrate(request)
        try:
            yield from self._read(stream)
        finally:
            stream.cancel()

    def watch_budgets(self) -> Iterator[budget_pb2.Budgets]:
        """The same, and each time it changes, until the iterator is closed."""
        stream = self._budgets.WatchBudgets(budget_pb2.WatchBudgetsRequest())
        try:
            yield from self._read(stream)
        finally:
            stream.cancel()

    def status(self) -> system_pb2.Status:
        return self._call(self._system.GetStatus, system_pb2.GetStatusRequest())

    def _call(self, method: Callable[..., T], request: Any, *, deadline_s: float | None = DEADLINE_S) -> T:
        try:
            return method(request, timeout=deadline_s)
        except grpc.RpcError as e:
            raise error_of(e, self._where) from None
