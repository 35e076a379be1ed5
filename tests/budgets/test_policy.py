"""Thresholds: defaults that fit together, and mistakes that are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest

from agentd.budgets import policy_for, this_device, total_mib
from agentd.budgets.policy import Device
from agentd.errors import ConfigError, Reason

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("device", get_args(Device))
@pytest.mark.parametrize("memory", [512, 2000, 4000, 16000])
def test_the_defaults_of_every_device_fit_together(device: Device, memory: float):
    assert policy_for(device, memory, {}).device == device


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"thermal": {"setpoint_c": 90}}, "budgets.thermal"),
        ({"thermal": {"resume_c": 81}}, "budgets.thermal"),
        ({"thermal": {"pause_f": 180}}, "budgets.thermal.pause_f"),
        ({"thermal": {"pause_c": 82000}}, "budgets.thermal.pause_c"),
        ({"thermal": {"critical_c": "hot"}}, "budgets.thermal.critical_c"),
        ({"battery": {"shed_below_pct": 60}}, "budgets.battery"),
        ({"battery": {"reduced_duty": 0}}, "budgets.battery.reduced_duty"),
        ({"battery": {"reduce_below_pct": 0.5, "pause_below_pct": 25}}, "budgets.battery"),
        ({"memory": {"shed_available_mib": 99999}}, "budgets.memory"),
        ({"memory": {"reserve": 1}}, "budgets.memory.reserve"),
        ({"states": {"poll_s": 0}}, "budgets.states.poll_s"),
    ],
)
def test_a_mistake_is_refused_with_its_key(given: dict[str, dict[str, Any]], key: str):
    """Out of order, unknown, or in another unit."""
    with pytest.raises(ConfigError) as caught:
        policy_for("pi5", 8000, given)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert caught.value.metadata["key"] == key


@pytest.mark.parametrize(
    ("model", "device"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0\0", "pi5"),
        ("Raspberry Pi 4 Model B\0", "pi4"),
        ("Raspberry Pi Zero 2 W\0", "pizero2w"),
        ("x", "generic"),
    ],
)
def test_a_board_is_known_by_its_name(tmp_path: Path, model: str, device: str):
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "model").write_text(model)
    assert this_device(tmp_path, {}) == device
    assert this_device(tmp_path, {"PREFIX": "/data/data/com.termux/files/usr"}) == "android"
    assert this_device(tmp_path / "none", {}) == "generic"


def test_all_memory_there_is(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal:  2097152 kB\n")
    assert total_mib(tmp_path) == 2048
    assert total_mib(tmp_path / "none") == 4096
