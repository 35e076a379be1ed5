"""The daemon on a device that gets hot: told why and until when, and back when it has cooled down."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import approval_pb2, budget_pb2, run_pb2, run_pb2_grpc
from tests.e2e.conftest import DaemonProcess
from tests.e2e.device import QUICK, Device, seen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_State = budget_pb2.Budgets.State


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with Device(tmp_path, extra=QUICK).made().running() as running:
        yield running


def test_a_device_that_is_too_hot_begins_nothing_and_says_until_when(device: Device):
    """Scenario 3: shed at once; the error has all that a client needs; back one step at a time, and it is all on record."""
    with Client(device.socket) as client:
        list(client.run("what time is it"))
        assert client.status().engine_pid
        device.heat(86)
        shed = seen(client, _State.STATE_SHED)[-1]
        assert (shed.cause, shed.background) == ("thermal", False)
        assert "86.0 C" in shed.reason
        assert shed.retry_delay.seconds >= 2
        with pytest.raises(AgentdError) as caught:
            client.create_run("what time is it")
        assert caught.value.reason is Reason.BUDGET_THERMAL
        assert caught.value.metadata["state"] == "shed"
        while client.status().engine_pid:  # the model has given its memory back
            time.sleep(0.02)
        device.heat(60)
        states = [each.state for each in seen(client, _State.STATE_PAUSED, _State.STATE_REDUCED, _State.STATE_NOMINAL)]
        assert states == sorted(states, reverse=True)
        assert list(client.run("what time is it"))[-1].run.state == run_pb2.Run.STATE_SUCCEEDED
        changes = [json_format.MessageToDict(event.body) for event in client.audit_events() if event.kind == "budget.change"]
        assert [each["detail"]["to"] for each in changes] == ["shed", "paused", "reduced", "nominal"]
        assert changes[0]["budget"]["temperature_c"] == 86


def test_the_status_of_a_refusal_has_what_clients_retry_by(device: Device):
    """RetryInfo, ErrorInfo, QuotaFailure, and the trailer that gRPC's own retries heed."""
    device.heat(86)
    with Client(device.socket) as client:
        seen(client, _State.STATE_SHED)
    with grpc.insecure_channel(f"unix:{device.socket}") as channel:
        request = run_pb2.CreateRunRequest(run=run_pb2.Run(prompt="hello"), request_id="r")
        with pytest.raises(grpc.RpcError) as caught:
            run_pb2_grpc.RunServiceStub(channel).CreateRun(request)
    error = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 2000
    kinds = {detail.TypeName() for detail in rpc_status.from_call(error).details}
    assert kinds == {"google.rpc.ErrorInfo", "google.rpc.RetryInfo", "google.rpc.QuotaFailure"}
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
    assert retry.retry_delay.seconds >= 2


def test_a_battery_that_runs_low_and_is_charged(device: Device):
    """Scenario 6: reduced, paused, shed; the charger ends it at once."""
    with Client(device.socket) as client:
        for level, state in ((45, _State.STATE_REDUCED), (20, _State.STATE_PAUSED), (8, _State.STATE_SHED)):
            device.charge(level, "Discharging")
            assert seen(client, state)[-1].cause == "battery"
        device.charge(8, "Charging")
        seen(client, _State.STATE_NOMINAL)


def test_whoever_follows_a_run_is_told(device: Device):
    """While it waits for a person, and the battery runs low."""
    with Client(device.socket) as client, Client(device.socket) as person, person.watching_approvals() as questions:
        denied = threading.Event()

        def deny() -> None:
            question = next(questions)
            device.charge(45, "Discharging")
            seen(client, _State.STATE_REDUCED)
            person.resolve(approval_pb2.ResolveApprovalRequest(name=question.name, allow=False))
            denied.set()

        answering = threading.Thread(target=deny)
        answering.start()
        notices = [event.budget for event in Client(device.socket).run("delete /etc/hostname") if event.HasField("budget")]
        answering.join(20)
    assert denied.is_set()
    assert notices[0].state == _State.STATE_REDUCED
    assert "45 %" in notices[0].reason


def test_the_commands_show_it(device: Device):
    device.heat(55)
    with Client(device.socket) as client:
        while not any(each.value == 55 for each in client.budgets().readings):
            time.sleep(0.02)
    assert "55 C" in device.command("budget").stdout
    assert "nominal" in device.command("top", "--once").stdout
    (told,) = device.json("budget")
    assert told["device"] == "pi5"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[budgets.thermal]\nsetpoint_c = 95\n", "budgets.thermal"),
        ("[budgets.battery]\nreduce_bellow_pct = 3\n", "budgets.battery.reduce_bellow_pct"),
        ("[budgets.memory]\nshed_available_mib = -1\n", "budgets.memory.shed_available_mib"),
        ('[budgets]\ndevice = "pi3"\n', "budgets.device"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused_at_the_start(tmp_path: Path, text: str, key: str):
    running = DaemonProcess(tmp_path, extra=text)
    assert running.start(wait=False).ended() == 1
    assert key in running.log


def test_whoever_follows_the_budgets_is_told_when_the_daemon_stops(tmp_path: Path):
    with Device(tmp_path, extra=QUICK).made().running() as running:
        command = [sys.executable, "-m", "agentd", "--socket", str(running.socket), "budget", "--watch", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            watching.stdout.readline()
            running.stop()
            rest, _ = watching.communicate(timeout=30)
        assert watching.returncode == 1
        assert "DAEMON_" in rest.splitlines()[-1]
