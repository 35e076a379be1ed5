"""The bundle `system` on a fake sysfs and procfs, laid out as the kernel's: classes are links into devices."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import DaemonProcess


def device(sysfs: Path, kind: str, name: str, **files: str) -> None:
    """/sys/class/KIND/NAME -> ../../devices/platform/board/KIND/NAME, with these files in it."""
    folder = sysfs / "devices" / "platform" / "board" / kind / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_text(content + "\n")
    link = sysfs / "class" / kind / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent))


def thermal(sysfs: Path, number: int, kind: str, millidegrees: str) -> None:
    folder = sysfs / "devices" / "virtual" / "thermal" / f"thermal_zone{number}"
    folder.mkdir(parents=True)
    (folder / "type").write_text(kind + "\n")
    (folder / "temp").write_text(millidegrees + "\n")
    link = sysfs / "class" / "thermal" / f"thermal_zone{number}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent))


@pytest.fixture
def client_of(own_daemon: DaemonProcess, tmp_path: Path) -> Client:
    """A daemon whose sysfs and procfs are `tmp_path`/sys and /proc."""
    config = own_daemon.write_config()
    places = f'[tools]\nsysfs = "{tmp_path}/sys"\nproc = "{tmp_path}/proc"\n'
    config.write_text(config.read_text().replace("[tools]\n", places))
    own_daemon.write_config = lambda: config  # type: ignore[method-assign]
    own_daemon.start()
    return Client(own_daemon.socket)


def reading(client: Client, tool: str) -> dict[str, object]:
    with client:
        result: dict[str, object] = json.loads(client.call(tool, {}).output_json)
        return result


def test_the_battery_is_read_where_its_class_leads(client_of: Client, tmp_path: Path):
    """Mains and batteries without a level are passed over; the words of the kernel become small letters."""
    device(tmp_path / "sys", "power_supply", "AC", type="Mains", online="1")
    device(tmp_path / "sys", "power_supply", "BAT0", type="Battery", capacity="83", status="Discharging")
    assert reading(client_of, "system.battery") == {"percent": 83, "status": "discharging"}


@pytest.mark.parametrize("capacity", ["", "nonsense", "-5"])
def test_a_battery_that_tells_nothing_sensible_is_none(client_of: Client, tmp_path: Path, capacity: str):
    """An error in words, not a number that is none."""
    device(tmp_path / "sys", "power_supply", "BAT0", type="Battery", capacity=capacity, status="Unknown")
    assert reading(client_of, "system.battery") == {"error": "no battery found"}


def test_the_temperature_is_that_of_the_board(client_of: Client, tmp_path: Path):
    """By the zone's type, not its number; absurd readings are passed over."""
    thermal(tmp_path / "sys", 0, "charger-skin", "99000")
    thermal(tmp_path / "sys", 1, "cpu-broken", "-273000")
    thermal(tmp_path / "sys", 2, "cpu-thermal", "48312")
    assert reading(client_of, "system.temperature") == {"celsius": 48.3}


def test_a_machine_without_sensors_says_so(client_of: Client):
    """No sysfs at all is no crash."""
    assert reading(client_of, "system.temperature") == {"error": "no sensor found"}


def test_memory_is_what_the_kernel_calls_available(client_of: Client, tmp_path: Path):
    """In mebibytes, from meminfo."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 4096000 kB\n")
    assert reading(client_of, "system.memory") == {"free_mb": 4000, "total_mb": 7812}
