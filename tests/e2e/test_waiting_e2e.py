"""Runs that wait, as a demanding user, a hostile client and an unlucky device would have them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import approval_pb2, budget_pb2, run_pb2, token_pb2
from tests.e2e.device import QUICK, Device, seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_State = budget_pb2.Budgets.State
Run = run_pb2.Run
DEADLINE_S = 20.0
ASKS = "delete /etc/hostname"
"""A prompt whose call nothing grants: a person is asked."""
APPENDS = "append hello to log.txt"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with Device(tmp_path, extra=QUICK).made().running() as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """For tests that leave it as it was."""
    with Device(tmp_path_factory.mktemp("shared"), extra=QUICK).made().running() as running:
        yield running


@contextlib.contextmanager
def on_battery(root: Path, extra: str = "") -> Iterator[Device]:
    """A device on which what is in the background waits, and then has its turns one after another."""
    device = Device(root, extra=QUICK + "[engine]\nparallel = 1\n" + extra).made()
    device.charge(50, "Discharging")
    with device.running():
        yield device


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(client: Client, name: str, after: int = 0, timeout: float = DEADLINE_S) -> Iterator[run_pb2.WatchRunResponse]:
    yield from client._runs.WatchRun(run_pb2.WatchRunRequest(name=name, after_sequence=after), timeout=timeout)


def ended(client: Client, run: run_pb2.Run) -> run_pb2.Run:
    last = list(events(client, run.name))[-1]
    assert last.HasField("run")
    return last.run


def reason_of(run: run_pb2.Run) -> str:
    """That of its error."""
    info = error_details_pb2.ErrorInfo()
    assert [detail for detail in run.error.details if detail.Unpack(info)], run
    return info.reason


def background(client: Client, prompt: str = APPENDS, **more: Any) -> run_pb2.Run:
    return client.create_run(prompt, priority=Run.PRIORITY_BACKGROUND, **more)


def hellos(device: Device) -> int:
    path = device.home / "log.txt"
    return path.read_text().count("hello") if path.exists() else 0


def kinds(client: Client, run: run_pb2.Run) -> list[str]:
    """What the audit log has about a run, oldest first."""
    name = run.name.removeprefix("runs/")
    return [event.kind for event in client.audit_events() if event.body.fields["run"].string_value == name]


def begun(client: Client) -> list[str]:
    """The runs that have begun, in this order."""
    return ["runs/" + event.body["run"] for event in client.audit_events() if event.kind == "run.start"]


def token(client: Client, label: str, **more: Any) -> tuple[token_pb2.Token, str]:
    made = client.create_token(token_pb2.Token(label=label, roles=more.pop("roles", ["user"]), **more))
    return made.token, made.secret


def refusal(call: Callable[[], object]) -> AgentdError:
    with pytest.raises(AgentdError) as caught:
        call()
    return caught.value


@contextlib.contextmanager
def asked(client: Client) -> Iterator[Callable[[], str]]:
    """Somebody is there to be asked: waits for the question, and gives its name."""

    def question() -> str:
        until(client.approvals)
        return client.approvals()[0].name

    with client.watching_approvals():
        yield question


def answer(client: Client, question: str, *, allow: bool = False) -> None:
    client.resolve(approval_pb2.ResolveApprovalRequest(name=question, allow=allow))


def test_who_goes_first_is_what_was_promised(tmp_path: Path):
    """Interactive, normal, background; among equals whoever was first, whatever the order in which they came."""
    device = Device(tmp_path, extra=QUICK + "[engine]\nparallel = 1\n").made()
    with device.running(), Client(device.socket) as client:
        list(client.run("what time is it"))
        device.heat(83)
        seen(client, _State.STATE_PAUSED)
        waits = [
            background(client, "hello"),
            client.create_run("hello"),
            background(client, "hello"),
            client.create_run("hello", priority=Run.PRIORITY_INTERACTIVE),
            client.create_run("hello", priority=Run.PRIORITY_UNSPECIFIED),
            client.create_run("hello", priority=Run.PRIORITY_INTERACTIVE),
        ]
        assert {client.get_run(run.name).state for run in waits} == {Run.STATE_QUEUED}
        device.heat(50)
        ends = {index: ended(client, run).end_time.ToNanoseconds() for index, run in enumerate(waits)}
        assert sorted(ends, key=lambda index: ends[index]) == [3, 5, 1, 4, 0, 2]  # each has one turn


def test_a_watcher_of_a_queued_run_knows_how_many_are_before_it(device: Device):
    with Client(device.socket) as client:
        device.heat(83)
        seen(client, _State.STATE_PAUSED)
        runs = [client.create_run("hello") for _ in range(3)]
        notices = [next(event.queue for event in events(client, run.name) if event.HasField("queue")) for run in runs]
        assert [notice.ahead for notice in notices] == [0, 1, 2]
        assert all("83" in notice.reason for notice in notices)


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (Run(prompt="hello", priority=99), "run.priority"),  # type: ignore[arg-type]
        (Run(prompt="hello", budget=Run.Budget(tokens=-1)), "run.budget.tokens"),
        (Run(prompt="hello", budget=Run.Budget(seconds=float("nan"))), "run.budget.seconds"),
        (Run(prompt="hello", budget=Run.Budget(seconds=-0.5)), "run.budget.seconds"),
        (Run(prompt="hello", budget=Run.Budget(joules=float("nan"))), "run.budget.joules"),
        (Run(prompt="hello", budget=Run.Budget(joules=float("-inf"))), "run.budget.joules"),
        (Run(prompt="hello", budget=Run.Budget(calls=-(2**31))), "run.budget.calls"),
        (Run(prompt="hello", start_by_time={"seconds": 2**62}), "run.start_by_time"),
        (Run(prompt="hello", start_by_time={"seconds": -(2**62)}), "run.start_by_time"),
        (Run(prompt="hello", start_by_time={"seconds": 2**33, "nanos": -7}), "run.start_by_time"),
        (Run(prompt="hello", start_by_time={"seconds": 2**33, "nanos": 2_000_000_000}), "run.start_by_time"),
        (Run(prompt="hello", start_by_time={"seconds": 1}), "run.start_by_time"),
        (Run(prompt=""), "run.prompt"),
    ],
)
def test_nonsense_in_a_request_is_the_clients_mistake_and_named(shared: Device, run: run_pb2.Run, field: str):
    with Client(shared.socket) as client:
        error = refusal(lambda: client._call(client._runs.CreateRun, run_pb2.CreateRunRequest(run=run, request_id="r")))
        assert (error.reason, error.metadata.get("field")) == (Reason.BAD_FIELD, field)
        assert not [each for each in client.list_runs() if each.state == Run.STATE_QUEUED]


def test_a_budget_beyond_all_bounds_is_as_good_as_none(shared: Device):
    """The daemon's own limits hold in any case."""
    most = Run.Budget(tokens=2**63 - 1, seconds=1e308, calls=2**31 - 1, joules=1e308)
    with Client(shared.socket) as client:
        assert ended(client, client.create_run("hello", budget=most)).stop_reason == Run.STOP_REASON_ANSWERED


def test_a_deferred_run_is_on_disk_before_its_client_has_the_answer(tmp_path: Path):
    """Killed the moment CreateRun has returned; the client repeats its requests and gets the same runs."""
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            runs = [background(client, "hello", request_id=f"r{n}") for n in range(8)]
            device.kill()
        device.start()
        with Client(device.socket) as client:
            assert [client.get_run(run.name) for run in runs] == runs
            assert [background(client, "hello", request_id=f"r{n}") for n in range(8)] == runs
            assert client.verify().first_bad_sequence == 0
            device.charge(50, "Full")
            assert {ended(client, run).state for run in runs} == {Run.STATE_SUCCEEDED}
            assert [name for name in begun(client) if name in {run.name for run in runs}] == [run.name for run in runs]


def test_one_request_sent_by_many_at_once_is_one_run(tmp_path: Path):
    with on_battery(tmp_path) as device, Client(device.socket) as client, ThreadPoolExecutor(20) as pool:
        runs = list(pool.map(lambda _: background(client, request_id="same").name, range(40), timeout=DEADLINE_S))
        assert len(set(runs)) == 1
        assert len(list(client.list_runs())) == 1
        device.charge(50, "Charging")
        ended(client, client.get_run(runs[0]))
        assert background(client, request_id="same").state == Run.STATE_SUCCEEDED
        assert hellos(device) == 1


def test_a_request_id_is_its_principals_own_and_of_one_request(tmp_path: Path):
    with on_battery(tmp_path) as device, Client(device.socket) as client:
        mine = background(client, "hello", request_id="id")
        with Client(device.socket, token=token(client, "phone")[1]) as phone:
            theirs = background(phone, "hello", request_id="id")
            assert theirs.name != mine.name
            assert theirs.principal == "token:phone"
        error = refusal(lambda: background(client, "read notes/todo.txt", request_id="id"))
        assert error.reason is Reason.REQUEST_ID_REUSED
        assert refusal(lambda: background(client, "hello", request_id="x" * 65)).reason is Reason.BAD_FIELD


def test_refusals_have_a_retry_info_that_is_never_zero(tmp_path: Path):
    with on_battery(tmp_path, "[budgets.admission]\nbackground_queue_max = 1\n") as device, Client(device.socket) as client:
        background(client, "hello")
        request = run_pb2.CreateRunRequest(run=Run(prompt="hello", priority=Run.PRIORITY_BACKGROUND), request_id="r")
        with pytest.raises(grpc.RpcError) as caught:
            client._runs.CreateRun(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = rpc_status.from_call(caught.value).details
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in details)
        assert retry.retry_delay.ToNanoseconds() > 0
        assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


def test_cancelling_a_queued_run_is_final_and_on_record(tmp_path: Path):
    """Also when it is done twice, by a stranger, after a restart, and when the charger comes then."""
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client)
            with Client(device.socket, token=token(client, "phone")[1]) as phone:
                for look in (phone.cancel_run, phone.get_run, lambda name: list(phone.watch_run(name))):
                    assert refusal(lambda look=look: look(run.name)).reason is Reason.RUN_NOT_FOUND  # type: ignore[misc]
                assert list(phone.list_runs()) == []
                assert list(phone.status().runs) == []
            cancelled = client.cancel_run(run.name)
            assert cancelled.state == Run.STATE_CANCELLED
            assert cancelled.HasField("end_time")
            assert client.cancel_run(run.name) == cancelled
            assert ended(client, run) == cancelled
            assert not client.status().runs
        device.kill()
        device.start()
        with Client(device.socket) as client:
            device.charge(50, "Charging")
            assert ended(client, background(client, "hello")).state == Run.STATE_SUCCEEDED
            assert client.get_run(run.name) == cancelled
            assert hellos(device) == 0
            until(lambda: kinds(client, run) == ["run.queue", "run.end"])


def test_events_of_a_deferred_run_have_no_gaps_over_a_kill(tmp_path: Path):
    """Whoever has seen some of them goes on where it was, in another life of the daemon."""
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client)
            before = next(events(client, run.name))
            assert before.sequence == 1
        device.kill()
        device.start()
        with Client(device.socket) as client:
            device.charge(50, "Charging")
            after = list(events(client, run.name, after=before.sequence))
            assert after[-1].run.state == Run.STATE_SUCCEEDED
            numbers = [before.sequence, *(event.sequence for event in after)]
            assert numbers == list(range(1, len(numbers) + 1))
            assert list(events(client, run.name))[1:] == after
            assert list(events(client, run.name, after=numbers[-1])) == []


def test_a_negative_point_to_resume_from_is_no_crash(shared: Device):
    with Client(shared.socket) as client:
        run = client.create_run("hello")
        ended(client, run)
        try:
            assert len(list(events(client, run.name, after=-5))) == len(list(events(client, run.name)))
        except grpc.RpcError as e:
            assert e.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017


def test_a_run_whose_time_has_passed_while_the_daemon_was_dead_does_not_begin(tmp_path: Path):
    with on_battery(tmp_path) as device:
        soon = datetime.now(UTC) + timedelta(seconds=1)
        with Client(device.socket) as client:
            run = background(client, start_by=soon)
        device.kill()
        device.charge(50, "Charging")
        until(lambda: datetime.now(UTC) > soon)
        device.start()
        with Client(device.socket) as client:
            late = ended(client, run)
            assert (late.state, reason_of(late)) == (Run.STATE_FAILED, "NOT_BEGUN")
            assert late.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
            assert hellos(device) == 0
            until(lambda: kinds(client, run) == ["run.queue", "run.end"])
            assert client.verify().first_bad_sequence == 0


def test_a_queued_run_sees_what_came_before_it_in_its_session_over_a_kill(tmp_path: Path):
    with on_battery(tmp_path) as device:
        (device.home / "notes").mkdir()
        (device.home / "notes/todo.txt").write_text("water the plants\n")
        with Client(device.socket) as client:
            for _ in range(2):
                alone = ended(client, client.create_run("what time is it"))  # the second time only its own words are new
            deferred = background(client, "what time is it", session="s")
            earlier = ended(client, client.create_run("read notes/todo.txt", session="s"))
            assert list(earlier.labels) == ["untrusted"]
        device.kill()
        device.start()
        with Client(device.socket) as client:
            device.charge(50, "Charging")
            done = ended(client, deferred)
            assert done.state == Run.STATE_SUCCEEDED
            assert list(done.labels) == ["untrusted"]  # it has read what the other has read
            assert done.usage.prompt_tokens > alone.usage.prompt_tokens


def test_two_queued_runs_of_one_session_follow_each_other(device: Device):
    device.heat(83)
    with Client(device.socket) as client:
        seen(client, _State.STATE_PAUSED)
        first = client.create_run(APPENDS, session="s")
        second = client.create_run("what time is it", session="s")
        device.heat(50)
        one, two = ended(client, first), ended(client, second)
        assert (one.state, two.state) == (Run.STATE_SUCCEEDED, Run.STATE_SUCCEEDED)
        assert list(one.labels) == ["untrusted"]
        assert list(two.labels) == ["untrusted"]
        starts = {name: number for number, name in enumerate(begun(client))}
        assert starts[first.name] < starts[second.name]


def test_a_cancelled_queued_run_leaves_no_trace_in_its_session(tmp_path: Path):
    with on_battery(tmp_path) as device, Client(device.socket) as client:
        client.cancel_run(background(client, "read notes/todo.txt", session="s").name)
        done = ended(client, client.create_run("hello", session="s"))
        assert (done.answer, list(done.labels)) == ("Hello! What should I do?", [])


def test_a_session_of_the_same_name_is_another_for_another_principal(shared: Device):
    with Client(shared.socket) as client, Client(shared.socket, token=token(client, "curious")[1]) as other:
        assert list(ended(client, client.create_run(APPENDS, session="diary")).labels) == ["untrusted"]
        theirs = ended(other, other.create_run("hello", session="diary"))
        assert (theirs.answer, list(theirs.labels)) == ("Hello! What should I do?", [])


def test_the_budget_of_a_run_holds_over_a_kill(tmp_path: Path):
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client, "what time is it", budget=Run.Budget(tokens=3))
        device.kill()
        device.charge(50, "Charging")
        device.start()
        with Client(device.socket) as client:
            done = ended(client, run)
            assert (done.stop_reason, done.usage.generated_tokens) == (Run.STOP_REASON_TOKEN_LIMIT, 3)
            assert done.budget.tokens == 3


def test_each_budget_of_a_run_ends_it_with_its_own_reason(shared: Device):
    with Client(shared.socket) as client:
        ended(client, client.create_run("hello"))
        short = ended(client, client.create_run("what time is it", budget=Run.Budget(seconds=1e-6)))
        assert short.stop_reason == Run.STOP_REASON_TIME_LIMIT
        one = ended(client, client.create_run("what time is it", budget=Run.Budget(calls=1)))
        assert (one.stop_reason, one.usage.calls) == (Run.STOP_REASON_ANSWERED, 1)
        unknown = ended(client, client.create_run("what time is it", budget=Run.Budget(joules=1e-6)))
        assert unknown.stop_reason == Run.STOP_REASON_ANSWERED  # this device does not tell its power


QUOTA = '[[quotas]]\nprincipal = "token:*"\nper = "hour"\ncalls = 3\n'


def test_calls_without_a_model_spend_a_quota_that_each_has_for_itself(tmp_path: Path):
    with Device(tmp_path, extra=QUICK + QUOTA).made().running() as device:
        with Client(device.socket) as client:
            (_, a), (_, b) = token(client, "a"), token(client, "b")
        with Client(device.socket, token=a) as one, Client(device.socket, token=b) as two:
            for _ in range(3):
                one.call("system.time", {})
            error = refusal(lambda: one.call("system.time", {}))
            assert error.reason is Reason.QUOTA_SPENT
            assert "3 calls" in error.message
            assert float(error.metadata["retry_s"]) > 0
            two.call("system.time", {})
        device.kill()
        device.start()
        with Client(device.socket, token=a) as one, Client(device.socket, token=b) as two, Client(device.socket) as client:
            assert refusal(lambda: one.call("system.time", {})).reason is Reason.QUOTA_SPENT
            two.call("system.time", {})
            two.call("system.time", {})
            assert refusal(lambda: two.call("system.time", {})).reason is Reason.QUOTA_SPENT
            for _ in range(5):
                client.call("system.time", {})


def test_runs_at_the_same_time_do_not_get_past_a_quota(tmp_path: Path):
    quota = '[[quotas]]\nprincipal = "*"\nper = "day"\ntokens = 50\n[[quotas]]\nprincipal = "*"\nper = "hour"\ntokens = 5000\n'
    with Device(tmp_path, extra=QUICK + quota).made().running() as device, Client(device.socket) as client:
        device.heat(83)
        seen(client, _State.STATE_PAUSED)
        runs = [client.create_run("what time is it") for _ in range(5)]
        device.heat(50)
        done = [ended(client, run) for run in runs]
        assert sum(run.usage.generated_tokens for run in done) <= 50
        assert {run.stop_reason for run in done} <= {Run.STOP_REASON_ANSWERED, Run.STOP_REASON_QUOTA}
        assert all(run.state == Run.STATE_SUCCEEDED for run in done)
        assert refusal(lambda: client.create_run("hello")).metadata["retry_s"]


def test_a_quota_of_calls_ends_a_run_and_is_not_its_tools_failure(tmp_path: Path):
    extra = QUICK + '[[quotas]]\nprincipal = "*"\nper = "hour"\ncalls = 1\n'
    with Device(tmp_path, extra=extra).made().running() as device, Client(device.socket) as client, asked(client) as question:
        run = client.create_run(ASKS)
        asks = question()
        error = refusal(lambda: client.call("system.time", {}))
        assert error.reason is Reason.QUOTA_SPENT
        answer(client, asks)
        assert ended(client, run).state == Run.STATE_SUCCEEDED
        refused = device.command("tools", "call", "system.time", check=False)
        assert refused.returncode == 1
        assert len(refused.stderr.strip().splitlines()) <= 3


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_a_run_that_meets_a_quota_says_that_it_was_the_quota(tmp_path: Path, tokens: int):
    """Not a limit of its own: nothing that its request says would help."""
    quota = f'[[quotas]]\nprincipal = "*"\nper = "day"\ntokens = {tokens}\n'
    with Device(tmp_path, extra=QUICK + quota).made().running() as device, Client(device.socket) as client:
        done = ended(client, client.create_run("what time is it"))
        assert done.usage.generated_tokens <= tokens
        assert done.stop_reason == Run.STOP_REASON_QUOTA


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_a_run_whose_token_was_revoked_does_not_begin(tmp_path: Path, *, restart: bool, again: bool):
    """Nor if there is another token of that name by now: whoever had the first one asked for it."""
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            made, secret = token(client, "phone")
            with Client(device.socket, token=secret) as phone:
                run = background(phone)
            client.revoke_token(made.name)
            if again:
                token(client, "phone")
        if restart:
            device.kill()
            device.start()
        with Client(device.socket) as client:
            device.charge(50, "Charging")
            done = ended(client, run)
            assert done.state == Run.STATE_CANCELLED
            assert hellos(device) == 0
            until(lambda: kinds(client, run) == ["run.queue", "run.end"])


def test_a_charger_that_comes_and_goes_lets_them_begin_while_it_is_there(tmp_path: Path):
    """What has not begun waits; nothing runs twice."""
    with on_battery(tmp_path) as device, Client(device.socket) as client, asked(client) as question:
        first = background(client, ASKS)
        device.charge(50, "Charging")
        asks = question()
        device.charge(50, "Discharging")
        until(lambda: not client.budgets().background)
        second = background(client)
        for status in ("Charging", "Discharging") * 3:
            device.charge(50, status)
        until(lambda: not client.budgets().background)
        assert client.get_run(second.name).state == Run.STATE_QUEUED
        answer(client, asks)
        device.charge(50, "Charging")
        assert ended(client, first).state == Run.STATE_SUCCEEDED
        assert ended(client, second).state == Run.STATE_SUCCEEDED
        assert hellos(device) == 1
        assert begun(client) == [first.name, second.name]


def test_a_request_that_rehearses_is_not_the_same_as_one_that_does_not(tmp_path: Path):
    """A client must not think that it looks first when it does not."""
    with on_battery(tmp_path) as device, Client(device.socket) as client:
        background(client, request_id="r")
        assert refusal(lambda: background(client, request_id="r", rehearse=True)).reason is Reason.REQUEST_ID_REUSED


@pytest.mark.parametrize("priority", [Run.PRIORITY_NORMAL, Run.PRIORITY_BACKGROUND])
def test_killed_while_a_person_is_asked_it_is_failed_and_never_runs_again(tmp_path: Path, priority: int):
    with Device(tmp_path, extra=QUICK).made().running() as device:
        device.charge(50, "Charging")
        with Client(device.socket) as client, contextlib.suppress(AgentdError, grpc.RpcError), asked(client) as question:
            run = client.create_run(ASKS, priority=priority, request_id="r")  # type: ignore[arg-type]
            question()
            assert client.get_run(run.name).state == Run.STATE_RUNNING
            device.kill()
        device.start()
        with Client(device.socket) as client:
            failed = ended(client, run)
            assert failed.state == Run.STATE_FAILED
            assert failed.error.message
            assert client.approvals() == []
            assert not client.status().runs
            assert client.create_run(ASKS, priority=priority, request_id="r") == failed  # type: ignore[arg-type]
            assert kinds(client, run).count("run.start") == 1
            assert kinds(client, run)[-1] == "run.end"  # nothing else says how it ended
            assert client.verify().first_bad_sequence == 0


def test_stopped_while_heat_holds_some_runs_and_others_are_deferred(device: Device):
    """SIGTERM: status 0 at once, watchers are told, what people wait for fails and what can wait stays."""
    with Client(device.socket) as client, ThreadPoolExecutor(2) as pool:
        device.heat(83)
        seen(client, _State.STATE_PAUSED)
        person, waits = client.create_run("hello"), background(client)

        def watch(run: run_pb2.Run) -> tuple[list[run_pb2.WatchRunResponse], grpc.StatusCode | None]:
            told: list[run_pb2.WatchRunResponse] = []
            try:
                told.extend(events(client, run.name))
            except grpc.RpcError as e:
                return told, e.code()
            return told, None

        watching = [pool.submit(watch, run) for run in (person, waits)]
        for run in (person, waits):
            next(events(client, run.name))
        stopped = time.monotonic()
        assert device.stop() == 0
        assert time.monotonic() - stopped < 10
        (told, code), (_, waits_code) = (each.result(DEADLINE_S) for each in watching)
        assert code is grpc.StatusCode.UNAVAILABLE or told[-1].HasField("run")
        assert waits_code is grpc.StatusCode.UNAVAILABLE
    device.heat(50)
    device.charge(90, "Charging")
    device.start()
    with Client(device.socket) as client:
        failed = ended(client, person)
        assert (failed.state, reason_of(failed)) == (
            Run.STATE_FAILED,
            "DAEMON_STOPPING",
        )  # as after a kill: nobody cancelled it
        assert ended(client, waits).state == Run.STATE_SUCCEEDED
        assert hellos(device) == 1
        assert client.verify().first_bad_sequence == 0


def test_killed_at_any_moment_of_its_work_it_runs_at_most_once(tmp_path: Path):
    """What has succeeded is on disk, once; what was killed is failed; what waited runs."""
    with on_battery(tmp_path) as device:
        for delay in (0.0, 0.05, 0.15, 0.4):
            before = hellos(device)
            with Client(device.socket) as client:
                run = background(client)
                device.charge(50, "Charging")
                time.sleep(delay)
                device.kill()
            device.start()
            with Client(device.socket) as client:
                done = ended(client, run)
                appended = hellos(device) - before
                assert kinds(client, run).count("run.start") <= 1
                assert client.verify().first_bad_sequence == 0
            assert (done.state, appended) in {(Run.STATE_SUCCEEDED, 1), (Run.STATE_FAILED, 0), (Run.STATE_FAILED, 1)}
            device.charge(50, "Discharging")
            with Client(device.socket) as client:
                until(lambda client=client: not client.budgets().background)  # type: ignore[misc]


def test_the_log_has_all_of_a_deferred_run_and_verifies(tmp_path: Path):
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client)
        device.stop()
        device.charge(50, "Charging")
        device.start()
        with Client(device.socket) as client:
            ended(client, run)
            until(lambda: kinds(client, run)[-1] == "run.end")
            name = run.name.removeprefix("runs/")
            log = [
                json_format.MessageToDict(event.body)
                for event in client.audit_events()
                if event.body.fields["run"].string_value == name
            ]
            assert [event["kind"] for event in log] == ["run.queue", "run.start", "call.intent", "call.end", "run.end"]
            assert {event["principal"] for event in log} == {run.principal}
            assert APPENDS not in json.dumps(log)
            model = log[1]["detail"]["model"]
            assert (model["name"] != "", len(model["sha256"])) == (True, 64)
            assert log[2]["budget"]["charging"] is True
        assert device.command("audit", "verify").returncode == 0


def test_the_prompt_of_a_deferred_run_can_be_taken_out_once_it_has_ended(tmp_path: Path):
    """Wherever it was kept meanwhile: log, queue, transcript, request."""
    secret = "hunter2correcthorse"
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            runs = [background(client, f"append {secret} to log.txt", request_id=f"r{n}") for n in range(2)]
            queued = [event.sequence for event in client.audit_events() if event.kind == "run.queue"]
            assert refusal(lambda: client.redact(queued[0], "detail.prompt", "a password")).reason is Reason.RUN_GOING_ON
            client.cancel_run(runs[0].name)
            device.charge(50, "Charging")
            ended(client, runs[1])
            for number in queued:
                gone = client.redact(number, "detail.prompt", "a password")
                assert gone.run in {run.name for run in runs}
            for event in client.audit_events():
                with contextlib.suppress(AgentdError):
                    for field in ("arguments.text", "detail.answer", "detail.prompt"):
                        client.redact(event.sequence, field, "a password")
            assert all(secret not in client.get_run(run.name).prompt for run in runs)
            assert all(secret not in str(each) for each in client.list_runs())
            assert client.verify().first_bad_sequence == 0
            shown = [event for event in client.audit_events(with_payloads=True) if secret in str(event)]
            assert [event.kind for event in shown] == []
        assert device.stop() == 0


def test_a_redacted_prompt_that_never_began_is_on_no_disk(tmp_path: Path):
    secret = "hunter2correcthorse"
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client, f"append {secret} to log.txt", session="s", request_id="r")
            client.cancel_run(run.name)
            (queued,) = [event.sequence for event in client.audit_events() if event.kind == "run.queue"]
            client.redact(queued, "detail.prompt", "a password")
        for stop in (device.kill, device.stop):
            stop()
            files = [path for path in device.state.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
            assert files == []
            device.start()


def test_a_deferred_run_is_done_with_the_rights_of_when_it_begins(tmp_path: Path):
    """A grant that was denied meanwhile holds."""
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client)
        device.stop()
        device.extra += f'[[grants]]\ntool = "files.append"\nscope = "write:{device.home}"\ndecision = "deny"\n'
        device.charge(50, "Charging")
        device.start()
        with Client(device.socket) as client:
            done = ended(client, run)
            assert done.state == Run.STATE_SUCCEEDED
            assert hellos(device) == 0


def test_lists_show_what_waits_to_those_who_may_see_it(tmp_path: Path):
    with on_battery(tmp_path) as device, Client(device.socket) as client:
        auditor = token(client, "eye", roles=["auditor"])[1]  # "read the log, and all runs" (grants.md)
        with Client(device.socket, token=token(client, "phone")[1]) as phone, Client(device.socket, token=auditor) as eye:
            mine, theirs = background(client, "hello"), background(phone, "hello")
            assert [run.name for run in client.list_runs()] == [theirs.name, mine.name]
            assert [run.name for run in eye.list_runs()] == [theirs.name, mine.name]
            assert [run.name for run in phone.list_runs()] == [theirs.name]
            assert [(run.name, run.queued, run.background) for run in phone.status().runs] == [(theirs.name, True, True)]
            assert client.cancel_run(theirs.name).state == Run.STATE_CANCELLED
            assert refusal(lambda: eye.create_run("hello")).reason is Reason.ROLE_REQUIRED
            assert refusal(lambda: eye.cancel_run(mine.name)).reason in {Reason.ROLE_REQUIRED, Reason.RUN_NOT_FOUND}
            assert client.get_run(mine.name).state == Run.STATE_QUEUED


@pytest.mark.parametrize("within", ["-1h", "0s", "soon", "99999999999d", "1e9d"])
def test_a_span_that_makes_no_sense_is_said_in_a_line_or_two(shared: Device, within: str):
    told = shared.command("run", "--background", "--within", within, "hello", check=False)
    assert told.returncode != 0
    message = [line for line in told.stderr.strip().splitlines() if line.startswith(("Error", "error", "agentd"))] or [""]
    assert within.lstrip("-") in told.stderr or "within" in told.stderr, told.stderr
    assert len(message) <= 2


def test_commands_about_runs_that_are_not_there_say_so_in_a_line_or_two(shared: Device):
    for arguments in (
        ("runs", "show", "nonsense"),
        ("runs", "cancel", "01JD9Q6Z"),
        ("runs", "show", "runs/../x"),
        ("runs", "show", ""),
    ):
        told = shared.command(*arguments, check=False)
        assert told.returncode == 1, arguments
        assert 1 <= len(told.stderr.strip().splitlines()) <= 2, told.stderr


def test_a_prefix_of_a_run_is_enough_as_in_the_example(shared: Device):
    """`agentd runs show 01JD9Q6Z` is what the help says: fewer characters than a name has."""
    with Client(shared.socket) as client:
        run = client.create_run("hello")
        ended(client, run)
        name = run.name.removeprefix("runs/")
        assert "Hello!" in shared.command("runs", "show", name).stdout
        assert "Hello!" in shared.command("runs", "show", name[:20]).stdout


def test_a_cancel_that_races_with_the_beginning_leaves_one_end(device: Device):
    device.charge(90, "Charging")
    with Client(device.socket) as client:
        ended(client, client.create_run("hello"))
        for delay in (0.0, 0.005, 0.02, 0.05):
            run = background(client)
            threading.Event().wait(delay)
            cancelled = client.cancel_run(run.name)
            assert cancelled.state in {Run.STATE_CANCELLED, Run.STATE_SUCCEEDED}
            assert ended(client, run) == client.get_run(run.name)
            until(lambda run=run: kinds(client, run).count("run.end") == 1)  # type: ignore[misc]
        assert not client.status().runs


def test_whoever_saw_much_of_a_run_still_sees_its_end_after_a_kill(tmp_path: Path):
    """Also where this daemon has fewer events of it to tell: the last event of every run is the run itself."""
    with on_battery(tmp_path) as device:
        with Client(device.socket) as client:
            run = background(client)
            stream = events(client, run.name)
            told = [next(stream)]
            for celsius, state in (
                (83, _State.STATE_PAUSED),
                (50, _State.STATE_NOMINAL),
                (83, _State.STATE_PAUSED),
                (50, _State.STATE_NOMINAL),
            ):
                device.heat(celsius)
                seen(client, state)
            while len(told) < 7:
                told.append(next(stream))
        device.kill()
        device.start()
        with Client(device.socket) as client:
            client.cancel_run(run.name)
            after = list(events(client, run.name, after=told[-1].sequence))
            assert after
            assert after[-1].run.state == Run.STATE_CANCELLED
            assert after[0].sequence == told[-1].sequence + 1


def test_a_run_that_was_killed_has_its_last_event_for_those_who_followed_it(tmp_path: Path):
    with Device(tmp_path, extra=QUICK).made().running() as device:
        with Client(device.socket) as client, contextlib.suppress(AgentdError, grpc.RpcError), asked(client) as question:
            run = client.create_run(ASKS)
            question()
            stream = events(client, run.name)
            told = [next(stream), next(stream)]
            device.kill()
        device.start()
        with Client(device.socket) as client:
            after = list(events(client, run.name, after=told[-1].sequence))
            assert [event.run.state for event in after] == [Run.STATE_FAILED]
            assert after[0].sequence == told[-1].sequence + 1


def test_a_negative_point_to_resume_from_of_a_run_that_waits_hides_nothing(device: Device):
    device.heat(83)
    with Client(device.socket) as client:
        seen(client, _State.STATE_PAUSED)
        run = client.create_run("what time is it")
        next(events(client, run.name))
        device.heat(50)
        try:
            told = list(events(client, run.name, after=-1))
        except grpc.RpcError as e:
            assert e.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
        else:
            assert [event.sequence for event in told] == list(range(1, len(told) + 1))


def test_what_never_began_is_not_recorded_as_started(device: Device):
    """A log that says `run.start` of a run that waited and was cancelled is wrong about what the device did."""
    device.heat(83)
    with Client(device.socket) as client:
        seen(client, _State.STATE_PAUSED)
        run = client.create_run("hello")
        assert run.state == Run.STATE_QUEUED
        client.cancel_run(run.name)
        assert "run.start" not in kinds(client, run)
