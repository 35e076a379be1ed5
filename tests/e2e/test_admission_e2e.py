"""Who goes first and who waits, through the real daemon: deferral past a restart, overload, quotas."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import budget_pb2, run_pb2
from tests.e2e.conftest import DaemonProcess
from tests.e2e.device import QUICK, Device, seen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_State = budget_pb2.Budgets.State
Run = run_pb2.Run


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with (
        Device(tmp_path, extra=QUICK + "[budgets.admission]\nqueue_max = 5\n[engine]\nparallel = 1\n")
        .made()
        .running() as running
    ):
        yield running


def ended(client: Client, name: str) -> run_pb2.Run:
    return list(client.watch_run(name))[-1].run


def test_a_deferred_run_survives_a_restart_and_runs_exactly_once(tmp_path: Path):
    """Scenario 6: on the battery it waits, also past a kill -9; the charger lets it go, once."""
    device = Device(tmp_path, extra=QUICK).made()
    device.charge(50, "Discharging")
    device.start()
    with Client(device.socket) as client:
        run = client.create_run("append hello to log.txt", priority=Run.PRIORITY_BACKGROUND, request_id="once")
        assert run.state == Run.STATE_QUEUED
        again = client.create_run("append hello to log.txt", priority=Run.PRIORITY_BACKGROUND, request_id="once")
        assert again.name == run.name
        notice = next(event.queue for event in client.watch_run(run.name) if event.HasField("queue"))
        assert (notice.ahead, bool(notice.reason)) == (0, True)
        person = list(client.run("what time is it"))[-1].run  # who is in a hurry does not wait for the charger
        assert person.state == Run.STATE_SUCCEEDED
    device.kill()
    device.start()
    with Client(device.socket) as client:
        assert client.get_run(run.name).state == Run.STATE_QUEUED
        device.charge(50, "Charging")
        done = ended(client, run.name)
        assert (done.state, done.usage.calls) == (Run.STATE_SUCCEEDED, 1)
        assert (device.home / "log.txt").read_text().count("hello") == 1
        kinds = [event.kind for event in client.audit_events() if "run" in event.body and event.body["run"] in run.name]
        assert kinds.count("run.start") == 1
        assert kinds[0] == "run.queue"
    device.stop()
    device.start()
    with Client(device.socket) as client:
        assert client.get_run(run.name) == done
    assert device.stop() == 0
    assert (device.home / "log.txt").read_text().count("hello") == 1


def test_a_run_that_could_not_begin_in_time_says_why(device: Device):
    with Client(device.socket) as client:
        device.charge(45, "Discharging")
        seen(client, _State.STATE_REDUCED)
        soon = datetime.now(UTC) + timedelta(seconds=0.5)
        run = ended(client, client.create_run("hello", priority=Run.PRIORITY_BACKGROUND, start_by=soon).name)
        assert run.state == Run.STATE_FAILED
        assert "45 %" in run.error.message
        with pytest.raises(AgentdError) as caught:
            client.create_run("hello", start_by=datetime.now(UTC) - timedelta(1))
        assert caught.value.reason is Reason.BAD_FIELD


def test_a_daemon_that_ends_fails_what_people_wait_for_and_keeps_what_can_wait(device: Device):
    with Client(device.socket) as client:
        device.charge(20, "Discharging")
        seen(client, _State.STATE_PAUSED)
        person = client.create_run("hello")
        waits = client.create_run("hello", priority=Run.PRIORITY_BACKGROUND)
    device.kill()
    device.start()
    with Client(device.socket) as client:
        assert client.get_run(person.name).state == Run.STATE_FAILED
        assert client.get_run(waits.name).state == Run.STATE_QUEUED
        assert seen(client, _State.STATE_PAUSED)  # derived from the sensors once more
        assert client.cancel_run(waits.name).state == Run.STATE_CANCELLED


def test_overload_while_paused(device: Device):
    """Scenario 12: as many wait as may, the rest is turned away at once; cancelled ones free their place, the important overtake."""
    with Client(device.socket) as client, ThreadPoolExecutor(50) as pool:
        list(client.run("what time is it"))
        device.heat(83)
        seen(client, _State.STATE_PAUSED)
        background = client.create_run("hello", priority=Run.PRIORITY_BACKGROUND)

        def ask(_: int) -> tuple[run_pb2.Run | AgentdError, float]:
            begun = time.monotonic()
            try:
                return client.create_run("what time is it"), time.monotonic() - begun
            except AgentdError as e:
                return e, time.monotonic() - begun

        answers = list(pool.map(ask, range(50)))
        admitted = [answer for answer, _ in answers if isinstance(answer, run_pb2.Run)]
        refused = [answer for answer, _ in answers if isinstance(answer, AgentdError)]
        assert (len(admitted), len(refused)) == (5, 45)
        assert {error.reason for error in refused} == {Reason.QUEUE_FULL}
        assert all(float(error.metadata["retry_s"]) >= 2 for error in refused)
        client.cancel_run(admitted[0].name)
        person = client.create_run("what time is it", priority=Run.PRIORITY_INTERACTIVE)
        device.heat(60)
        runs = [ended(client, run.name) for run in (person, *admitted[1:], background)]
        assert {run.state for run in runs} == {Run.STATE_SUCCEEDED}
        ends = [run.end_time.ToNanoseconds() for run in runs]
        assert ends[0] < min(ends[1:])
        assert ends[-1] > ends[1]  # it may have a turn while the others execute their calls


def test_a_quota_ends_runs_and_refuses_new_ones(tmp_path: Path):
    quota = '[[quotas]]\nprincipal = "*"\nper = "day"\ntokens = 5\n'
    with DaemonProcess(tmp_path, extra=quota).running() as daemon, Client(daemon.socket) as client:
        run = list(client.run("read notes/todo.txt"))[-1].run
        assert run.usage.generated_tokens <= 5
        with pytest.raises(AgentdError) as caught:
            client.create_run("what time is it")
        assert caught.value.reason is Reason.QUOTA_SPENT
        assert "5 tokens" in caught.value.message
        daemon.stop()
        daemon.start()
        refused = daemon.command("run", "hello", check=False)
        assert "has used what it may" in refused.stderr


def test_a_run_has_a_budget_of_its_own(device: Device):
    with Client(device.socket) as client:
        short = list(client.run("read notes/todo.txt", budget=Run.Budget(tokens=3)))[-1].run
        assert (short.stop_reason, short.usage.generated_tokens) == (Run.STOP_REASON_TOKEN_LIMIT, 3)
        with pytest.raises(AgentdError) as caught:
            client.create_run("hello", budget=Run.Budget(calls=-1))
        assert caught.value.metadata["field"] == "run.budget.calls"


def test_the_commands(device: Device):
    device.charge(45, "Discharging")
    with Client(device.socket) as client:
        seen(client, _State.STATE_REDUCED)
    assert "waits for its turn" in device.command("run", "--background", "--within", "2h", "hello").stdout
    (waits,) = device.json("runs")
    assert (waits["state"], waits["priority"]) == ("STATE_QUEUED", "PRIORITY_BACKGROUND")
    assert "queued (bg)" in " ".join(device.command("runs").stdout.split())
    assert "cancelled" in device.command("runs", "cancel", waits["name"].removeprefix("runs/")).stdout
    assert "cancelled" in device.command("runs", "show", waits["name"]).stdout
    assert "--within goes with" in device.command("run", "--within", "2h", "hello", check=False).stderr
