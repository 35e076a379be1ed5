"""Who may do what through a real daemon's doors: roles, the bounds of a token, and each only with what is its own."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import grant_pb2, journal_pb2, run_pb2, token_pb2
from tests.principals.conftest import refused
from tests.principals.wire import reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import DaemonProcess

SERVICES = ("Run", "Tool", "Journal", "Audit", "Approval", "Grant", "Token", "System", "Automation", "Budget")


@contextlib.contextmanager
def holder(owner: Client, port: int, label: str, *roles: str, scopes: tuple[str, ...] = ()) -> Iterator[Client]:
    """A client with a new token."""
    made = owner.create_token(token_pb2.Token(label=label, roles=roles, scopes=scopes))
    with Client(address=f"127.0.0.1:{port}", token=made.secret) as client:
        yield client
    owner.revoke_token(made.token.name)


def methods() -> list[tuple[str, Any, bool]]:
    """Every method of every service: path, an empty request, and whether it streams."""
    pool = descriptor_pool.Default()
    found = []
    for name in SERVICES:
        service = pool.FindServiceByName(f"agentd.v1.{name}Service")
        for method in service.methods:
            request = message_factory.GetMessageClass(method.input_type)()
            found.append((f"/{service.full_name}/{method.name}", request, method.server_streaming))
    return found


def called(client: Client, path: str, request: Any, *, streams: bool) -> str:
    """The reason that the call fails with; empty if it does not, or if it waits for news."""
    call: Any
    try:
        if streams:
            call = client._channel.unary_stream(path, request_serializer=type(request).SerializeToString)
            next(call(request, timeout=1), None)
        else:
            call = client._channel.unary_unary(path, request_serializer=type(request).SerializeToString)
            call(request, timeout=20)
    except grpc.RpcError as e:
        return reason(e)[0]
    return ""


@pytest.mark.parametrize(
    ("role", "services"),
    [
        ("user", {"Run", "Tool", "Journal", "System"}),
        ("approver", {"Approval", "System"}),
        ("auditor", {"Audit", "System"}),
        ("admin", set(SERVICES)),
    ],
)
def test_a_role_opens_its_services_and_no_other(owner: Client, port: int, role: str, services: set[str]):
    """Every method of every service there is."""
    with holder(owner, port, f"role-{role}", role) as client:
        opened = {
            path for path, request, streams in methods() if called(client, path, request, streams=streams) != "ROLE_REQUIRED"
        }
    expected = {path for path, _, _ in methods() if path.split(".")[-1].split("Service")[0] in services}
    expected |= {f"/agentd.v1.RunService/{name}" for name in ("GetRun", "ListRuns", "WatchRun")}  # own ones; an auditor's: all
    if role != "admin":
        expected |= {f"/agentd.v1.BudgetService/{name}Budgets" for name in ("Get", "Watch")}
    if role == "user":
        expected |= {"/agentd.v1.GrantService/CheckCall", "/agentd.v1.AutomationService/TriggerAutomation"}
    if role == "auditor":  # reads and verifies, and nothing else
        expected -= {f"/agentd.v1.AuditService/{name}AuditLog" for name in ("Prune", "Renew")}
        expected.remove("/agentd.v1.AuditService/RedactAuditEvent")
        expected |= {f"/agentd.v1.AutomationService/{name}" for name in ("ListAutomations", "GetAutomation")}
        expected |= {f"/agentd.v1.AutomationService/{name}TriggerEvent{s}" for name, s in (("Get", ""), ("List", "s"))}
    assert opened == expected


def test_whoever_made_a_rehearsal_needs_another_role_to_apply_it(daemon: DaemonProcess, owner: Client, port: int):
    """Or a grant that wants calls rehearsed would bind nobody. Others' rehearsals are not there for a mere user."""
    mine = owner.call("files.write", {"path": "mine.txt", "text": "x"}, rehearse=True).name
    with holder(owner, port, "rehearser", "user") as client:
        theirs = client.call("files.write", {"path": "rehearsed.txt", "text": "x"}, rehearse=True).name
        assert [each.name for each in client.rehearsals()] == [theirs]
        request = journal_pb2.PlanRollbackRequest(selection=journal_pb2.ChangeSelection(calls=[theirs], rehearsed=True))
        plan = client.plan_rollback(request)
        assert refused(lambda: client.apply_rollback(request, plan.digest)) is Reason.ROLE_REQUIRED
        assert refused(lambda: client.drop_rehearsal(mine)) is Reason.CALL_NOT_FOUND
    with holder(owner, port, "approving", "user", "approver") as client:
        assert {each.name for each in client.rehearsals()} == {mine, theirs}
        client.apply_rollback(request, client.plan_rollback(request).digest)
        client.drop_rehearsal(mine)
    assert (daemon.home / "rehearsed.txt").exists()
    assert not (daemon.home / "mine.txt").exists()


def test_a_user_sees_and_undoes_only_what_is_its_own(daemon: DaemonProcess, owner: Client, port: int):
    """Others' runs are not there, and neither are their sessions' words."""
    list(owner.run("what time is it", session="shared"))
    mine = owner.create_run("what time is it")
    with holder(owner, port, "reader", "user") as client:
        assert list(client.list_runs()) == []
        for work in (
            lambda: client.get_run(mine.name),
            lambda: client.cancel_run(mine.name),
            lambda: list(client.watch_run(mine.name)),
        ):
            assert refused(work) is Reason.RUN_NOT_FOUND
        own = client.create_run("what time is it", session="shared")
        assert [run.name for run in client.list_runs()] == [own.name]
        list(client.watch_run(own.name))
        call = owner.call("files.write", {"path": "owned.txt", "text": "x"})
        assert refused(lambda: client.undo(call.name)) is Reason.CALL_NOT_FOUND
        theirs = client.call("files.write", {"path": "theirs.txt", "text": "x"})
        client.undo(theirs.name)
    assert (daemon.home / "owned.txt").exists()
    assert not (daemon.home / "theirs.txt").exists()
    owner.cancel_run(mine.name)


def plan_of(call: str, **ways: bool) -> journal_pb2.PlanRollbackRequest:
    return journal_pb2.PlanRollbackRequest(selection=journal_pb2.ChangeSelection(calls=[call]), **ways)  # type: ignore[arg-type]


def test_changes_are_shown_to_who_may_read_and_taken_back_by_who_may_write(daemon: DaemonProcess, owner: Client, port: int):
    """A token that may only write sees nothing of what was there, nor of what was written since, and does not overwrite it."""
    vault = daemon.home / "vault"
    vault.mkdir()
    (vault / "note.txt").write_text("the owner's secret\n")
    with holder(owner, port, "writer", "user", scopes=(f"write:{vault}",)) as client:
        call = client.call("files.write", {"path": "vault/note.txt", "text": "mine"}).name

        def seen(by: Client) -> str:
            plan = by.plan_rollback(plan_of(call))
            return "".join(each.difference.diff for each in plan.paths) + "".join(
                each.diff for each in by.differences(_of(call))
            )

        assert "the owner's secret" in seen(owner)
        assert seen(client) == ""
        (vault / "note.txt").write_text("written by the owner since\n")
        assert "written by the owner since" in seen(owner)
        assert seen(client) == ""
        forced = plan_of(call, force=True)
        plan = client.plan_rollback(forced)
        client.apply_rollback(forced, plan.digest)  # it has been granted to write there
        assert (vault / "note.txt").read_text() == "the owner's secret\n"
    with holder(owner, port, "reader-too", "user", scopes=(f"write:{vault}", f"read:{vault}")) as client:
        call = client.call("files.write", {"path": "vault/note.txt", "text": "mine"}).name
        assert "the owner's secret" in seen(client)


def test_what_is_denied_by_now_is_not_taken_back_either(daemon: DaemonProcess, owner: Client, port: int):
    """By a denial that came since; the owner may. Of the rest the token's own calls are its own to undo."""
    with holder(owner, port, "undoer", "user") as client:
        first, second = (client.call("files.write", {"path": f"{name}.txt", "text": name}).name for name in ("late", "later"))
        denied = grant_pb2.Grant(tool="*", scope=f"write:{daemon.home}/late.txt", decision=grant_pb2.Grant.DECISION_DENY)
        denial = owner.grant(denied)
        assert refused(lambda: client.undo(first)) is Reason.UNDO_CONFLICT
        assert refused(lambda: client.undo(first, force=True)) is Reason.UNDO_CONFLICT
        client.undo(second)
        assert (daemon.home / "late.txt").exists()
        assert not (daemon.home / "later.txt").exists()
        owner.undo(first)
        owner.revoke_grant(denial.name)
    assert not (daemon.home / "late.txt").exists()


@pytest.mark.parametrize("how", ["its token", "the principal"])
def test_who_is_revoked_has_nothing_left_that_goes_on(daemon: DaemonProcess, owner: Client, port: int, how: str):
    """A run that waits for an answer, the question, the streams, the grants; in one step, which is on record."""
    made = owner.create_token(token_pb2.Token(label="gone", roles=["user"]))
    grant = grant_pb2.Grant(principal="token:gone", tool="files.read", scope=f"read:{daemon.home}")
    grant.decision = grant_pb2.Grant.DECISION_ALLOW
    owner.grant(grant)
    ask = grant_pb2.Grant(tool="files.write", scope=f"write:{daemon.home}/asks", decision=grant_pb2.Grant.DECISION_ASK)
    asks = owner.grant(ask)
    ended: list[bool] = []

    def call(client: Client) -> None:
        with contextlib.suppress(AgentdError):
            client.call("files.write", {"path": "asks/x", "text": "x"})
        ended.append(True)

    with Client(address=f"127.0.0.1:{port}", token=made.secret) as client, owner.watching_approvals() as questions:
        thread = threading.Thread(target=call, args=(client,))
        thread.start()
        question = next(questions)
        run = client.create_run("what time is it")
        if how == "its token":
            owner.revoke_token(made.token.name)
        else:
            told = owner.revoke_principal("token:gone")
            assert (told.tokens, told.grants, told.approvals, told.requests) == (1, 1, 1, 1)
        thread.join(10)
        assert ended
        assert refused(client.status) is Reason.UNAUTHENTICATED
    assert question.name not in [each.name for each in owner.approvals()]
    assert not [grant for grant in owner.grants() if grant.principal == "token:gone"]
    over = (run_pb2.Run.STATE_CANCELLED, run_pb2.Run.STATE_SUCCEEDED, run_pb2.Run.STATE_FAILED)
    assert owner.get_run(run.name).state in over
    assert not (daemon.home / "asks" / "x").exists()
    newest = itertools.islice(owner.audit_events(newest_first=True), 20)
    assert "principal.revoke" in {event.kind for event in newest}
    owner.revoke_grant(asks.name)
    assert refused(lambda: owner.revoke_principal("*")) is Reason.BAD_FIELD


def _of(call: str) -> journal_pb2.ChangeSelection:
    return journal_pb2.ChangeSelection(calls=[call])


def test_a_tokens_bounds_hold_against_grants(daemon: DaemonProcess, owner: Client, port: int):
    """In calls, in what is said of calls, and in runs."""
    (daemon.home / "inside").mkdir()
    for name in ("inside/a.txt", "outside.txt"):
        (daemon.home / name).write_text("x")
    with holder(owner, port, "bound", "user", scopes=(f"read:{daemon.home}/inside",)) as client:
        assert not client.call("files.read", {"path": "inside/a.txt"}).failed
        assert refused(lambda: client.call("files.read", {"path": "outside.txt"})) is Reason.GRANT_REQUIRED
        assert client.check("files.read", {"path": "outside.txt"}).decision == grant_pb2.Grant.DECISION_DENY
        assert client.check("files.read", {"path": "inside/a.txt"}).decision == grant_pb2.Grant.DECISION_ALLOW
        assert refused(lambda: client.check("files.read", {"path": "x"}, principal="unix:root")) is Reason.ROLE_REQUIRED
        events = list(client.run("read outside.txt"))
        assert any("may not touch" in event.call.reason for event in events if event.WhichOneof("event") == "call")
    assert not owner.call("files.read", {"path": "outside.txt"}).failed


def test_many_clients_at_once_are_told_apart(daemon: DaemonProcess, owner: Client, port: int):
    """Each request is its own sender's, on connections that are shared and on those that are not."""
    seen: list[tuple[str, str]] = []

    def work(label: str, client: Client) -> None:
        for _ in range(10):
            run = client._call(client._runs.CreateRun, run_pb2.CreateRunRequest(run=run_pb2.Run(prompt="x")))
            client.cancel_run(run.name)
            seen.append((label, run.principal))

    with contextlib.ExitStack() as stack:
        clients = {f"token:t{n}": stack.enter_context(holder(owner, port, f"t{n}", "user")) for n in range(3)}
        own = client_name(daemon)
        threads = [threading.Thread(target=work, args=pair) for pair in [*clients.items(), (own, owner)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 40
    assert all(label == principal for label, principal in seen)


def client_name(daemon: DaemonProcess) -> str:
    with Client(daemon.socket) as client:
        run = client.create_run("x")
        client.cancel_run(run.name)
        return run.principal
