"""What says how the battery is, where no file of the kernel does: Termux:API, NUT, PiSugar, a command of the user's.

Formats: termux-api's BatteryStatusAPI; NUT's network protocol (RFC 9271); PiSugar's server; for a command, JSON with the
keys of Termux:API. Any of them may leave out what it does not know, or say nonsense: that counts as not said.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agentd.budgets.files import as_number
from agentd.budgets.programs import Program, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentd.budgets.programs import Asked

Provider = Literal["auto", "sysfs", "termux", "nut", "pisugar", "command", "none"]
_CHARGING = {"CHARGING": True, "FULL": True, "NOT_CHARGING": True, "DISCHARGING": False}
_NUT_LINE = re.compile(r'^VAR \S+ (\S+) "([^"]*)"$', re.MULTILINE)
_SUGAR_LINE = re.compile(r"^(battery\w*): (\S+)$", re.MULTILINE)
_NUT = ("battery.charge", "ups.status", "battery.temperature", "ups.realpower")
_SUGAR = ("battery", "battery_power_plugged")
_EVERY_S = 30.0
_PORTS = {"nut": 3493, "pisugar": 8423}


@dataclass(frozen=True, slots=True)
class Said:
    """Of the supply: percent, whether external power is there, degrees of the battery, watts that the device takes."""

    level: float | None = None
    charging: bool | None = None
    celsius: float | None = None
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Supply:
    """Who is asked, and how the answer is read."""

    name: str
    asked: Asked
    parse: Callable[[str], Said]


def supply(provider: Provider, address: str, command: Sequence[str]) -> Supply | None:
    """None for what the kernel's files say. `address` is HOST[:PORT], for NUT UPS@HOST[:PORT]. Raises ValueError."""
    if provider == "command":
        if not command:
            raise ValueError("provider command needs a command")
        return Supply(command[0], Program(command, _EVERY_S), parse_json)
    if provider == "termux":
        return Supply("termux-battery-status", Program(("termux-battery-status",), 2 * _EVERY_S), parse_json)
    if provider not in _PORTS:
        return None
    ups, _, host = address.rpartition("@")
    host, colon, port = (host or "127.0.0.1").partition(":")
    if colon and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{address} is not HOST:PORT")
    where = f"{host}:{port or _PORTS[provider]}"
    if provider == "nut":
        if not re.fullmatch(r"[\w-]{1,64}", ups):
            raise ValueError("provider nut needs an address of the form UPS@HOST")
        question = "".join(f"GET VAR {ups} {name}\n" for name in _NUT) + "LOGOUT\n"
        return Supply("NUT", Server(where, question.encode(), len(_NUT) + 1, _EVERY_S), parse_nut)
    question = "".join(f"get {name}\n" for name in _SUGAR)
    return Supply("PiSugar", Server(where, question.encode(), len(_SUGAR), _EVERY_S), parse_pisugar)


def parse_json(text: str) -> Said:
    """Any key may be missing or null, -1 means unknown, and a missing temperature is -214748364.8."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return Said()
    if not isinstance(told, dict):
        return Said()
    charging = told["charging"] if isinstance(told.get("charging"), bool) else _CHARGING.get(str(told.get("status")))
    return Said(_level(told.get("percentage")), charging, _celsius(told.get("temperature")), _watts(told.get("watts")))


def parse_nut(text: str) -> Said:
    """`OL` is on line power, `OB` on the battery; what is unknown is an `ERR` line."""
    told = dict(_NUT_LINE.findall(text))
    flags = told.get("ups.status", "").split()
    charging = True if "OL" in flags else False if "OB" in flags else None
    level, celsius = _level(as_number(told.get("battery.charge", ""))), _celsius(as_number(told.get("battery.temperature", "")))
    return Said(level, charging, celsius, _watts(as_number(told.get("ups.realpower", ""))))


def parse_pisugar(text: str) -> Said:
    told = dict(_SUGAR_LINE.findall(text))
    plugged = {"true": True, "false": False}.get(told.get("battery_power_plugged", ""))
    return Said(_level(as_number(told.get("battery", ""))), plugged)


def _within(value: Any, low: float, high: float) -> float | None:
    """Booleans are no numbers, and NaN is within nothing."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and low <= value <= high and math.isfinite(value) else None


def _level(value: Any) -> float | None:
    return _within(value, 0, 100)


def _celsius(value: Any) -> float | None:
    return _within(value, -30, 150)


def _watts(value: Any) -> float | None:
    return _within(value, 0, 1000)
