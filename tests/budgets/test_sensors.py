"""Sensors on a made-up tree of sysfs and procfs: units, junk, and what is not there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentd.budgets import Device, Program
from agentd.budgets.power import Counter
from agentd.budgets.supplies import Supply, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.budgets import Readings


class Tree:
    """`put("class/thermal/thermal_zone0", type="cpu-thermal", temp=50000)`."""

    def __init__(self, folder: Path) -> None:
        self.sysfs, self.proc = folder / "sys", folder / "proc"
        self.proc.mkdir(parents=True)

    def put(self, place: str, **files: object) -> None:
        (self.sysfs / place).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.sysfs / place / name).write_text(f"{text}\n")

    def read(self, **more: Any) -> Readings:
        return Device(self.sysfs, self.proc, **more).read()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_nothing_there_is_nothing_read(tree: Tree):
    """No crash, no reading, no fault."""
    found = tree.read()
    assert (found.temperature_c, found.battery_pct, found.charging, found.available_mib) == (None,) * 4
    assert found.faults == {}


@pytest.mark.parametrize(
    ("said", "celsius"),
    [("48000", 48.0), ("480", 48.0), ("48", 48.0), ("-5000", -5.0), ("0", 0.0), ("", None), ("nan", None), ("hot", None),
     ("999999", None), ("-40000", None), ("inf", None)],
)  # fmt: skip
def test_temperatures_in_any_unit_of_the_vendors(tree: Tree, said: str, celsius: float | None):
    """Thousandths, tenths, degrees; what can't be true is none, and said to be so."""
    tree.put("class/thermal/thermal_zone3", type="cpu-thermal", temp=said)
    found = tree.read()
    assert found.temperature_c == celsius
    assert ("cpu-thermal (thermal_zone3)" in found.faults) is (celsius is None)


def test_the_hottest_of_the_processors_zones_counts_and_no_other_zone(tree: Tree):
    """By type, as numbers mean nothing; the configuration may name others."""
    tree.put("class/thermal/thermal_zone0", type="gpu-thermal", temp=90000)
    tree.put("class/thermal/thermal_zone1", type="cpu-thermal", temp=50000)
    tree.put("class/thermal/thermal_zone2", type="soc_max", temp=61000)
    found = tree.read()
    assert (found.temperature_c, found.sources["temperature_c"]) == (61.0, "soc_max (thermal_zone2)")
    assert tree.read(zones=("gpu",)).temperature_c == 90.0
    assert tree.read(zones=()).temperature_c is None


def test_a_chip_of_hwmon_where_there_is_no_zone(tree: Tree):
    tree.put("class/hwmon/hwmon0", name="nvme", temp1_input=80000)
    tree.put("class/hwmon/hwmon4", name="coretemp", temp1_input=40000, temp2_input=44000)
    assert tree.read().temperature_c == 44.0


@pytest.mark.parametrize(("alarm", "low"), [(0, False), (1, True)])
def test_the_supply_voltage_of_a_raspberry_pi(tree: Tree, alarm: int, *, low: bool):
    tree.put("class/hwmon/hwmon1", name="rpi_volt", in0_lcrit_alarm=alarm)
    assert tree.read().undervoltage is low


@pytest.mark.parametrize(
    ("files", "level", "charging"),
    [
        ({"capacity": 80, "status": "Discharging"}, 80.0, False),
        ({"capacity": 80, "status": "Charging"}, 80.0, True),
        ({"capacity": 100, "status": "Not charging"}, 100.0, True),
        ({"capacity": 55, "status": "Unknown"}, 55.0, None),
        ({"capacity": 101, "status": "Discharging"}, None, False),
        ({"capacity": -1, "status": "Discharging"}, None, False),
        ({"capacity": "", "status": ""}, None, None),
        ({"capacity": "Unknown"}, None, None),
        ({"capacity": 40, "status": "Discharging", "scope": "Device"}, None, None),
        ({"capacity": 40, "status": "Discharging", "present": 0}, None, None),
        ({"capacity": 100, "status": "Discharging", "current_now": -1600, "voltage_now": 3300, "temp": 26}, 100.0, False),
    ],
)
def test_batteries_say_what_they_like(tree: Tree, files: dict[str, object], level: float | None, charging: bool | None):
    """A mouse's does not count, nor a level that can't be; the sign of a current says nothing."""
    tree.put("class/power_supply/BAT0", type="Battery", **files)
    found = tree.read()
    assert (found.battery_pct, found.charging) == (level, charging)


def test_external_power_counts_whatever_the_battery_says(tree: Tree):
    tree.put("class/power_supply/BAT0", type="Battery", capacity=30, status="Discharging")
    tree.put("class/power_supply/AC", type="Mains", online=0)
    assert tree.read().charging is False
    tree.put("class/power_supply/USB", type="USB", online=1)
    assert tree.read().charging is True


def test_memory_and_its_pressure(tree: Tree):
    (tree.proc / "meminfo").write_text("MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable:    2097152 kB\n")
    (tree.proc / "pressure").mkdir()
    text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=5\nfull avg10=3.25 avg60=0.00 avg300=0.00 total=1\n"
    (tree.proc / "pressure" / "memory").write_text(text)
    found = tree.read()
    assert (found.available_mib, found.pressure_some_pct, found.pressure_full_pct) == (2048.0, 12.5, 3.25)


def test_what_can_not_be_read_is_absent_in_this_round(tree: Tree):
    """A folder in the place of a file answers EISDIR, as drivers answer EIO."""
    tree.put("class/thermal/thermal_zone0", type="cpu-thermal")
    (tree.sysfs / "class/thermal/thermal_zone0/temp").mkdir()
    (tree.sysfs / "class/power_supply").mkdir()
    (tree.sysfs / "class/power_supply/BAT0").symlink_to("gone")
    assert tree.read().temperature_c is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["type", "temp", "capacity", "status", "online", "scope", "present"]), st.binary(max_size=40)
    )
)
def test_whatever_the_files_hold_reading_is_no_crash(tree: Tree, files: dict[str, bytes]):
    """And what comes out can be true."""
    for place in ("class/thermal/thermal_zone0", "class/power_supply/X"):
        tree.put(place)
        for name, content in files.items():
            (tree.sysfs / place / name).write_bytes(content)
    (tree.proc / "meminfo").write_bytes(b"".join(files.values()))
    found = tree.read()
    assert found.temperature_c is None or -30 <= found.temperature_c <= 150
    assert found.battery_pct is None or 0 <= found.battery_pct <= 100


class Told(Program):
    """A program that has said something; no process is needed to read that."""

    def latest(self) -> str | None:
        return self.command[0]


@pytest.mark.parametrize(
    ("told", "level", "charging", "celsius"),
    [
        ('{"percentage": 64, "status": "DISCHARGING", "temperature": 31.5}', 64.0, False, 31.5),
        ('{"percentage": 64, "status": "FULL", "temperature": -214748364.8}', 64.0, True, None),
        ('{"percentage": -1, "status": "UNKNOWN", "temperature": null}', None, None, None),
        ('{"status": null}', None, None, None),
        ("[]", None, None, None),
        ("API not available", None, None, None),
        ('{"percentage": 1e999, "temperature": "hot"}', None, None, None),
    ],
)
def test_what_termux_says(tree: Tree, told: str, level: float | None, charging: bool | None, celsius: float | None):
    """Keys may be missing, null or nonsense."""
    found = tree.read(supply=Supply("termux", Told([told], 60), parse_json), zones=())
    assert (found.battery_pct, found.charging, found.temperature_c) == (level, charging, celsius)


@pytest.mark.parametrize(
    ("told", "low"), [("throttled=0x0", False), ("throttled=0x50005", True), ("throttled=0x50000", False), ("VCHI", None)]
)
def test_what_the_firmware_says(tree: Tree, told: str, low: bool | None):
    """Bit 0 is now; bit 16 has been."""
    assert tree.read(vcgencmd=Told([told], 60)).undervoltage is low


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"status": "Discharging", "power_now": 4_500_000}, 4.5),
        ({"status": "Discharging", "voltage_now": 3_800_000, "current_now": -1_000_000}, 3.8),
        ({"status": "Discharging", "voltage_now": 3300, "current_now": -1600}, None),  # test_power's: microwatts
        ({"status": "Charging", "power_now": 9_000_000}, None),
        ({"status": "Discharging"}, None),
    ],
)
def test_a_battery_that_discharges_tells_the_devices_power(tree: Tree, files: dict[str, object], watts: float | None):
    """The sign of a current differs between drivers; what is charged is not what is used."""
    tree.put("class/power_supply/BAT0", type="Battery", capacity=50, temp=312, **files)
    found = tree.read()
    assert found.power_w == (pytest.approx(watts) if watts else None) or (found.power_w or 1) < 0.001
    assert found.battery_c == 31.2


def test_the_regulator_of_a_raspberry_pi_5(tree: Tree):
    """Rails with volts and amperes; the input has volts only."""
    rails = """ 3V7_WL_SW_A current(0)=0.00683110A
   3V3_SYS_A current(1)=0.06148422A
     EXT5V_V volt(24)=5.14970000V
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
    """
    assert tree.read(pmic=Told([rails], 60)).power_w == pytest.approx(0.0068311 * 3.7 + 0.06148422 * 3.3)
    assert tree.read(pmic=Told(["error=1"], 60)).power_w is None


def test_a_processors_counter_wraps(tmp_path: Path):
    now, counter = 0.0, Counter(tmp_path, lambda: now)
    assert counter.watts() is None
    for at, energy, watts in ((1.0, 999_000_000, None), (3.0, 1_000_000, 1.0), (4.0, 1_000_000, None), (5.0, 6_000_000, 5.0)):
        now = at
        (tmp_path / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / "max_energy_range_uj").write_text("1000000000\n")
        assert counter.watts() == watts


@pytest.mark.parametrize(
    ("line", "celsius", "status"),
    [
        ('{"status": 1, "headroom": 0.8}', 38.0, 1),
        ('{"status": 3, "headroom": 1.0}', 44.0, 3),
        ('{"status": -1, "headroom": null}', None, None),
        ('{"status": 0, "headroom": NaN}', None, 0),
        ('{"status": true, "headroom": "hot"}', None, None),
        ("linker: library not found", None, None),
    ],
)
def test_what_android_says(tree: Tree, line: str, celsius: float | None, status: int | None):
    """Headroom as the temperature that a phone's thresholds are for; NaN is no reading."""
    found = tree.read(athermal=Told([line], 10), zones=())
    assert (found.temperature_c, found.thermal_status) == (celsius and pytest.approx(celsius), status)


def test_this_machine_can_be_read():
    """The real files, whatever they are here."""
    from pathlib import Path

    found = Device(Path("/sys"), Path("/proc")).read()
    assert found.available_mib is not None
    assert 0 < found.available_mib < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
