"""Calibration through the real daemon: measured, kept, used; ended by heat, by the client, by nonsense."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from agentd.budgets.calibration import Calibration, Point, load
from agentd.budgets.policy import calibrated, policy_for
from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import budget_pb2
from tests.e2e.device import QUICK, Device, seen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with Device(tmp_path, extra=QUICK + "[engine]\nthreads = 2\n").made().running() as running:
        yield running


def test_what_is_measured_is_kept_and_used_after_a_restart(device: Device):
    """Progress on the way, both numbers of threads, how it cools; work of others goes on in between."""
    device.heat(60)
    with Client(device.socket) as client, Client(device.socket) as person:
        told = []
        for each in client.calibrate(6):
            told.append(each)
            if each.threads == 2 and len(told) % 20 == 0:
                device.heat(60 + min(10, len(told) / 20))
            if not each.threads and each.fraction > 0.85:
                device.heat(58)
            if len(told) == 10:
                assert list(person.run("what time is it"))[-1].HasField("run")
    fractions = [each.fraction for each in told]
    assert fractions == sorted(fractions)
    assert (fractions[-1], told[-1].saved) == (1.0, True)
    assert [point.threads for point in told[-1].points] == [1, 2]
    assert all(point.tokens_per_second > 0 and point.hottest_celsius >= 60 for point in told[-1].points)
    kept = load(device.state / "calibration.json")
    assert kept is not None
    assert len(kept.curve(2)) == 2
    device.stop()
    device.start()
    shown = device.command("calibrate", "--minutes", "0.1").stdout
    assert "tokens/s" in shown
    assert "kept" in shown


def test_heat_ends_a_step_and_after_a_pause_it_goes_on(device: Device):
    with Client(device.socket) as client:
        timers = [threading.Timer(1.5, lambda: device.heat(83)), threading.Timer(5, lambda: device.heat(60))]
        for timer in timers:
            timer.start()
        told = list(client.calibrate(10))
        assert told[-1].saved
        assert [point.threads for point in told[-1].points] == [1, 2]


def test_a_device_that_is_too_hot_is_not_measured(device: Device):
    """Nor one that gets so and stays so; then nothing is kept."""
    with Client(device.socket) as client:
        heated = threading.Timer(1, lambda: device.heat(83))
        heated.start()
        with pytest.raises(AgentdError) as caught:
            list(client.calibrate(10))
        assert caught.value.reason is Reason.CALIBRATION_CUT
        assert not (device.state / "calibration.json").exists()
        seen(client, budget_pb2.Budgets.STATE_PAUSED)
        with pytest.raises(AgentdError) as caught:
            list(client.calibrate(20))
        assert caught.value.reason is Reason.BUDGET_THERMAL


def test_one_at_a_time(device: Device):
    with Client(device.socket) as client, Client(device.socket) as other:
        stream = client.calibrate(30)
        next(stream)
        with pytest.raises(AgentdError) as caught:
            list(other.calibrate(5))
        assert caught.value.reason is Reason.CALIBRATING
        stream.close()


def test_a_client_that_goes_away_ends_it_and_nothing_is_kept(device: Device):
    with Client(device.socket) as client:
        stream = client.calibrate(60)
        next(stream)
        stream.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                next(client.calibrate(5))
                break
            except AgentdError:
                assert time.monotonic() < deadline
        assert not (device.state / "calibration.json").exists()
        with pytest.raises(AgentdError) as caught:
            list(client.calibrate(1))
        assert caught.value.reason is Reason.BAD_FIELD


@pytest.mark.parametrize(
    ("points", "most", "curve"),
    [
        ({1: 5.0, 2: 10.0}, 2, (0.5, 1.0)),
        ({1: 6.0, 2: 8.0, 4: 4.0}, 4, (0.75, 1.0, 0.75, 0.5)),
        ({1: 5.0, 2: 10.0}, 4, ()),  # of another processor
        ({2: 10.0}, 2, ()),
    ],
)
def test_the_curve_of_what_was_measured(points: dict[int, float], most: int, curve: tuple[float, ...]):
    found = Calibration(model="m", points=tuple(Point(threads=n, tokens_per_s=s) for n, s in points.items()))
    assert found.curve(most) == pytest.approx(curve)


def test_what_the_configuration_says_goes_before_what_was_measured():
    found = Calibration(model="m", points=(Point(threads=1, tokens_per_s=1),), cooling_c_per_s=0.5)
    given = policy_for("pi5", 8000, {"thermal": {"cooling_c_per_s": 0.1}})
    assert calibrated(given, found, 1).thermal.cooling_c_per_s == 0.1
    assert calibrated(policy_for("pi5", 8000, {}), found, 1).thermal.cooling_c_per_s == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"model": "m", "points": []}',
        "\x00\xff",
        json.dumps({"model": "m", "points": [{"threads": 1, "tokens_per_s": -1}]}),
    ],
)
def test_a_file_that_makes_no_sense_is_none(tmp_path: Path, text: str):
    (tmp_path / "c").write_text(text, errors="replace")
    assert load(tmp_path / "c") is None
    assert load(tmp_path / f"none{os.getpid()}") is None
