"""What the device says of its heat, power and memory: files of the kernel, and programs where there are none.

Attributes are all optional, units differ between drivers, and reading one may fail now and then (Documentation/ABI/testing/
sysfs-class-power): what can't be true counts as not said. Roots are given, so that tests and other systems have their own.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from agentd.budgets.state import Readings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from agentd.budgets.memory import Cgroup, Engine
    from agentd.budgets.programs import Program

# Of the processor, on boards, PCs and phones; zone numbers mean nothing. From drivers/thermal and drivers/hwmon of Linux.
ZONES = ("cpu-thermal", "cpu_thermal", "x86_pkg_temp", "soc-", "soc_", "mtktscpu", "cpu-", "cpuss", "tsens_tz_sensor")
_CHIPS = ("cpu_thermal", "coretemp", "k10temp", "zenpower")
_LONGEST = 4096
_STATUSES = {"Charging": True, "Full": True, "Not charging": True, "Discharging": False}
_TERMUX_STATUSES = {"CHARGING": True, "FULL": True, "NOT_CHARGING": True, "DISCHARGING": False}
_UNDERVOLTAGE_NOW = 1  # bit 0 of what `vcgencmd get_throttled` says


class Sensors(Protocol):
    def read(self) -> Readings:
        """One round. Raises nothing; may take as long as a driver takes to answer."""


@dataclass(slots=True)
class _Said:
    """What one round has given so far."""

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
    """The sensors of this machine. `termux` and `vcgencmd` are programs that run beside, where they exist.

    `zones` are types of thermal zones, those of the processor if nothing else is said. A phone has none: its thresholds are
    those of the battery.
    """

    sysfs: Path
    proc: Path
    zones: Sequence[str] = ZONES
    termux: Program | None = None
    vcgencmd: Program | None = None
    cgroup: Cgroup | None = None
    engine: Engine | None = None

    def read(self) -> Readings:
        said = _Said()
        self._heat(said)
        self._power(said)
        self._memory(said)
        self._engine(said)
        if self.termux:
            _termux(self.termux, said)
        if self.vcgencmd:
            _throttled(self.vcgencmd, said)
        return Readings(**said.values, sources=said.sources, faults=said.faults)

    def _heat(self, said: _Said) -> None:
        found: dict[str, float] = {}
        for zone in _folders(self.sysfs / "class" / "thermal", "thermal_zone"):
            kind = _line(zone / "type")
            if kind and self.zones and kind.startswith(tuple(self.zones)):
                _note(found, said, f"{kind} ({zone.name})", zone / "temp")
        for chip in _folders(self.sysfs / "class" / "hwmon", "hwmon"):
            name = _line(chip / "name") or ""
            if name == "rpi_volt" and (alarm := _number(chip / "in0_lcrit_alarm")) is not None:
                said.say("undervoltage", alarm != 0, "rpi_volt")
            elif not found and self.zones and name in (*self.zones, *(_CHIPS if self.zones == ZONES else ())):
                for file in sorted(chip.glob("temp*_input")):
                    _note(found, said, f"{name} ({chip.name})", file, exact=True)
        if found:
            hottest = max(found, key=lambda name: found[name])
            said.say("temperature_c", found[hottest], hottest)

    def _power(self, said: _Said) -> None:
        levels: dict[str, float] = {}
        charging: list[bool] = []
        for supply in _folders(self.sysfs / "class" / "power_supply", ""):
            kind, scope = _line(supply / "type"), _line(supply / "scope")
            if scope == "Device" or _line(supply / "present") == "0":  # a mouse, a bay without a battery
                continue
            if kind == "Battery":
                level = _number(supply / "capacity")
                if level is None or not 0 <= level <= 100:
                    said.fail("battery_pct", f"{supply.name}: capacity says {_line(supply / 'capacity')!r}")
                else:
                    levels[supply.name] = level
                if (known := _STATUSES.get(_line(supply / "status") or "")) is not None:
                    charging.append(known)
            elif kind and _number(supply / "online") not in (None, 0):
                charging.append(True)
        if levels:
            said.say("battery_pct", sum(levels.values()) / len(levels), ", ".join(levels))
        if charging:
            said.say("charging", any(charging), "power_supply")

    def _memory(self, said: _Said) -> None:
        for line in (_text(self.proc / "meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable" and (amount := rest.split()[:1]) and amount[0].isdecimal():
                said.say("available_mib", int(amount[0]) / 1024, "meminfo")
        pressure = self.proc / "pressure" / "memory"
        if self.cgroup and (headroom := self.cgroup.headroom()):
            said.say("memory_limit_mib", headroom.limit_mib, "cgroup")
            if headroom.free_mib < said.values.get("available_mib", math.inf):
                said.say("available_mib", max(0.0, headroom.free_mib), "cgroup")
                pressure = headroom.pressure or pressure
        for line in (_text(pressure) or "").splitlines():
            kind, *values = line.split()
            told = dict(value.partition("=")[::2] for value in values)
            share = _float(told.get("avg10", ""))
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
    value = _number(file)
    if value is not None:
        value /= 1000 if exact or abs(value) > 1500 else 10 if abs(value) > 150 else 1
    celsius = value
    if celsius is None or not -30 <= celsius <= 150:
        said.faults[name] = f"it says {_line(file)!r}"
    else:
        found[name] = celsius


def _termux(program: Program, said: _Said) -> None:
    """Of Termux:API. Any key may be missing or null, -1 means unknown, and a missing temperature is -214748364.8."""
    told = program.latest()
    try:
        battery = json.loads(told) if told else None
    except (ValueError, RecursionError):
        battery = None
    if not isinstance(battery, dict):
        said.fail("battery_pct", program.trouble or "termux-battery-status has said nothing yet")
        return
    level, celsius = battery.get("percentage"), battery.get("temperature")
    if isinstance(level, int | float) and not isinstance(level, bool) and 0 <= level <= 100:
        said.say("battery_pct", float(level), "termux-battery-status")
    if (charging := _TERMUX_STATUSES.get(str(battery.get("status")))) is not None:
        said.say("charging", charging, "termux-battery-status")
    if isinstance(celsius, int | float) and -30 <= celsius <= 150 and "temperature_c" not in said.values:
        said.say("temperature_c", float(celsius), "battery, termux-battery-status")


def _throttled(program: Program, said: _Said) -> None:
    """`throttled=0x50005` of the Raspberry Pi's firmware."""
    told = (program.latest() or "").strip().removeprefix("throttled=")
    with contextlib.suppress(ValueError):
        bits = int(told, 16)
        said.say("throttled", bits, "vcgencmd")
        if "undervoltage" not in said.values:
            said.say("undervoltage", bool(bits & _UNDERVOLTAGE_NOW), "vcgencmd")


def _folders(folder: Path, begins: str) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(path for path in folder.iterdir() if path.name.startswith(begins))


def _text(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return opened.read(_LONGEST).decode("utf-8", "replace")
    except OSError:  # EIO, ENODATA, EAGAIN, or it has gone: not said in this round
        return None


def _line(file: Path) -> str | None:
    text = _text(file)
    return None if text is None else text.strip()


def _number(file: Path) -> float | None:
    return _float(_line(file) or "")


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
