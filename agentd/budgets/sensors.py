"""What the device says of its heat, power and memory: files of the kernel, and programs where there are none.

Attributes are all optional, units differ between drivers, and reading one may fail now and then (Documentation/ABI/testing/
sysfs-class-power): what can't be true counts as not said. Roots are given, so that tests and other systems have their own.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from agentd.budgets import athermal
from agentd.budgets.files import as_number, folders, read_line, read_number, read_text
from agentd.budgets.power import of_battery, of_regulator
from agentd.budgets.state import Readings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from agentd.budgets.memory import Cgroup, Engine
    from agentd.budgets.power import Counter
    from agentd.budgets.programs import Asked
    from agentd.budgets.supplies import Supply

_log = logging.getLogger(__name__)
# Of the processor, on boards, PCs and phones; zone numbers mean nothing. From drivers/thermal and drivers/hwmon of Linux.
ZONES = ("cpu-thermal", "cpu_thermal", "x86_pkg_temp", "soc-", "soc_", "mtktscpu", "cpu-", "cpuss", "tsens_tz_sensor")
_CHIPS = ("cpu_thermal", "coretemp", "k10temp", "zenpower")
_STATUSES = {"Charging": True, "Full": True, "Not charging": True, "Discharging": False}
_UNDERVOLTAGE_NOW = 1  # bit 0 of what `vcgencmd get_throttled` says


class Sensors(Protocol):
    def read(self) -> Readings:
        """One round. Raises nothing; may take as long as a driver takes to answer."""


@dataclass(slots=True)
class _Said:
    """What one round has given so far. `phone`: the thresholds for heat are those of a battery."""

    phone: bool = False

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, value: Any, source: str) -> None:
        self.values[name], self.sources[name] = value, source
        self.faults.pop(name, None)

    def fail(self, name: str, why: str) -> None:
        if name not in self.values:
            self.faults[name] = why


@dataclass(frozen=True, slots=True)
class Device:
    """The sensors of this machine: files, and those who are asked beside, where they exist.

    `zones` are types of thermal zones, those of the processor if nothing else is said. A phone has none: its thresholds are
    those of the battery.
    """

    sysfs: Path
    proc: Path
    zones: Sequence[str] = ZONES
    supply: Supply | None = None
    vcgencmd: Asked | None = None
    pmic: Asked | None = None
    athermal: Asked | None = None
    rapl: Counter | None = None
    batteries: bool = True
    cgroup: Cgroup | None = None
    engine: Engine | None = None

    def read(self) -> Readings:
        said = _Said(phone=not self.zones)
        parts = (self._heat, self._power, self._memory, self._engine, self._asked, self._watts)
        for part in parts:
            try:
                part(said)
            except Exception as e:  # one that lies in a new way must not silence the others
                said.faults[part.__name__.strip("_")] = type(e).__name__
                _log.debug("a sensor could not be read", exc_info=True)
        return Readings(**said.values, sources=said.sources, faults=said.faults)

    def _asked(self, said: _Said) -> None:
        if self.supply:
            _supplied(self.supply, said)
        if self.vcgencmd:
            _throttled(self.vcgencmd, said)
        if self.athermal:
            _of_android(self.athermal, said)

    def _heat(self, said: _Said) -> None:
        found: dict[str, float] = {}
        for zone in folders(self.sysfs / "class" / "thermal", "thermal_zone"):
            kind = read_line(zone / "type")
            if kind and self.zones and kind.startswith(tuple(self.zones)):
                _note(found, said, f"{kind} ({zone.name})", zone / "temp")
        for chip in folders(self.sysfs / "class" / "hwmon", "hwmon"):
            name = read_line(chip / "name") or ""
            if name == "rpi_volt" and (alarm := read_number(chip / "in0_lcrit_alarm")) is not None:
                said.say("undervoltage", alarm != 0, "rpi_volt")
            elif not found and self.zones and name in (*self.zones, *(_CHIPS if self.zones == ZONES else ())):
                for file in sorted(chip.glob("temp*_input")):
                    _note(found, said, f"{name} ({chip.name})", file, exact=True)
        if not found and self.zones and self.zones != ZONES:
            zones = folders(self.sysfs / "class" / "thermal", "thermal_zone")
            there = ", ".join(sorted({kind for zone in zones if (kind := read_line(zone / "type"))}))
            said.fail("temperature_c", f"no zone is called {', '.join(self.zones)}; there are {there or 'none'}")
        if found:
            hottest = max(found, key=lambda name: found[name])
            said.say("temperature_c", found[hottest], hottest)

    def _power(self, said: _Said) -> None:
        if not self.batteries:
            return
        levels: dict[str, float] = {}
        charging: list[bool] = []
        for supply in folders(self.sysfs / "class" / "power_supply", ""):
            kind, scope = read_line(supply / "type"), read_line(supply / "scope")
            if scope == "Device" or read_line(supply / "present") == "0":  # a mouse, a bay without a battery
                continue
            if kind == "Battery":
                _battery(supply, said, levels, charging)
            elif kind and read_number(supply / "online") not in (None, 0):
                charging.append(True)
        if levels:
            said.say("battery_pct", sum(levels.values()) / len(levels), ", ".join(levels))
        if charging:
            said.say("charging", any(charging), "power_supply")

    def _watts(self, said: _Said) -> None:
        """The battery's own, if it discharges; else the regulator's; else the processor's, which is the least of all."""
        if "power_w" in said.values:
            return
        if self.pmic and (watts := of_regulator(self.pmic.latest() or "")) is not None:
            said.say("power_w", watts, "pmic")
        elif self.rapl and (watts := self.rapl.watts()) is not None:
            said.say("power_w", watts, "rapl, processor only")

    def _memory(self, said: _Said) -> None:
        for line in (read_text(self.proc / "meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable" and (amount := rest.split()[:1]) and amount[0].isdecimal():
                said.say("available_mib", int(amount[0]) / 1024, "meminfo")
        pressure = self.proc / "pressure" / "memory"
        if self.cgroup and (headroom := self.cgroup.headroom()):
            said.say("memory_limit_mib", headroom.limit_mib, "cgroup")
            if headroom.free_mib < said.values.get("available_mib", math.inf):
                said.say("available_mib", max(0.0, headroom.free_mib), "cgroup")
                pressure = headroom.pressure or pressure
        for line in (read_text(pressure) or "").splitlines():
            kind, *values = line.split()
            told = dict(value.partition("=")[::2] for value in values)
            share = as_number(told.get("avg10", ""))
            if kind in ("some", "full") and share is not None and 0 <= share <= 100:
                said.say(f"pressure_{kind}_pct", share, "pressure")

    def _engine(self, said: _Said) -> None:
        split = self.engine.split() if self.engine else None
        if self.engine and split:
            said.say("anonymous_mib", split.anonymous_mib, "engine")
            said.say("mapped_mib", split.mapped_mib, "engine")
            said.say("weights_mib", split.weights_mib, "model file")
            if split.cached_mib is not None:
                said.say("cached_mib", split.cached_mib, "mincore")
            if (reread := self.engine.reread_pct()) is not None:
                said.say("reread_pct", reread, "engine")


def _note(found: dict[str, float], said: _Said, name: str, file: Path, *, exact: bool = False) -> None:
    """A temperature in the kernel's thousandths; of zones some vendors say tenths or whole degrees instead."""
    value = read_number(file)
    if value is not None:
        value /= 1000 if exact or abs(value) > 1500 else 10 if abs(value) > 150 else 1
    celsius = value
    if celsius is None or not -30 <= celsius <= 150:
        said.faults[name] = f"it says {read_line(file)!r}"
    else:
        found[name] = celsius


def _battery(supply: Path, said: _Said, levels: dict[str, float], charging: list[bool]) -> None:
    level = read_number(supply / "capacity")
    if level is None or not 0 <= level <= 100:
        said.fail("battery_pct", f"{supply.name}: capacity says {read_line(supply / 'capacity')!r}")
    else:
        levels[supply.name] = level
    if (known := _STATUSES.get(read_line(supply / "status") or "")) is not None:
        charging.append(known)
    if known is False and (watts := _discharge(supply)) is not None:
        said.say("power_w", watts, supply.name)
    if (tenths := read_number(supply / "temp")) is not None and -300 <= tenths <= 1500:
        said.say("battery_c", tenths / 10, supply.name)


def _discharge(supply: Path) -> float | None:
    return of_battery(*(read_number(supply / name) for name in ("power_now", "voltage_now", "current_now")))


def _supplied(supply: Supply, said: _Said) -> None:
    text = supply.asked.latest()
    told = supply.parse(text) if text else None
    if told is None or told.level is None:
        said.fail("battery_pct", supply.asked.trouble or f"{supply.name} says nothing of it")
    if told is None:
        return
    found = {"battery_pct": told.level, "charging": told.charging, "battery_c": told.celsius, "power_w": told.watts}
    for name, value in found.items():
        if value is not None:
            said.say(name, value, supply.name)
    if told.celsius is not None and "temperature_c" not in said.values and said.phone:
        said.say("temperature_c", told.celsius, f"battery, {supply.name}")


def _of_android(asked: Asked, said: _Said) -> None:
    """Its headroom is what its thresholds are for, if it has one; else the battery's temperature."""
    status, headroom = athermal.parse(asked.latest() or "")
    if status is not None:
        said.say("thermal_status", status, "AThermal")
    if headroom is not None:
        said.say("headroom", headroom, "AThermal")
        said.say("temperature_c", athermal.celsius(headroom), "AThermal, reckoned from headroom")


def _throttled(program: Asked, said: _Said) -> None:
    """`throttled=0x50005` of the Raspberry Pi's firmware."""
    told = (program.latest() or "").strip().removeprefix("throttled=")
    with contextlib.suppress(ValueError):
        bits = int(told[:18], 16) & 0xFFFFFFFF
        said.say("throttled", bits, "vcgencmd")
        if "undervoltage" not in said.values:
            said.say("undervoltage", bool(bits & _UNDERVOLTAGE_NOW), "vcgencmd")
