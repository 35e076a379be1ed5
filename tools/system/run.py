"""The bundle `system`: readings of this device from sysfs and procfs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from agentd_sandbox.sdk import ToolFailure, tool, variables

BOARD_ZONES = ("cpu", "soc", "x86_pkg", "acpitz", "tsens")
"""Types of thermal zones that tell how hot the device is, best first (a phone has dozens of others)."""
PLAUSIBLE_C = (-40.0, 130.0)


def _value(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


@tool("battery")
def battery() -> dict[str, Any]:
    supplies = Path(variables["sysfs"], "class/power_supply")
    for supply in sorted(supplies.iterdir()) if supplies.is_dir() else []:
        capacity = _value(supply / "capacity")
        if _value(supply / "type") == "Battery" and capacity.isdigit():
            return {"percent": min(int(capacity), 100), "status": _value(supply / "status").lower() or "unknown"}
    raise ToolFailure("no battery found")


@tool("temperature")
def temperature() -> dict[str, Any]:
    zones = Path(variables["sysfs"], "class/thermal")
    readings: dict[str, float] = {}
    for zone in sorted(zones.glob("thermal_zone*")) if zones.is_dir() else []:
        raw = _value(zone / "temp")
        if raw.lstrip("-").isdigit() and PLAUSIBLE_C[0] <= int(raw) / 1000 <= PLAUSIBLE_C[1]:
            readings.setdefault(_value(zone / "type").lower(), round(int(raw) / 1000, 1))
    for wanted in BOARD_ZONES:
        for kind, celsius in readings.items():
            if wanted in kind:
                return {"celsius": celsius}
    raise ToolFailure("no sensor found")


@tool("memory")
def memory() -> dict[str, Any]:
    lines = Path(variables["proc"], "meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"free_mb": kib["MemAvailable"] // 1024, "total_mb": kib["MemTotal"] // 1024}


@tool("disk")
def disk() -> dict[str, Any]:
    status = os.statvfs(".")
    return {
        "free_gb": round(status.f_bavail * status.f_frsize / 1e9, 1),
        "total_gb": round(status.f_blocks * status.f_frsize / 1e9, 1),
    }


@tool("time")
def date_and_time() -> dict[str, Any]:
    now = time.localtime()
    return {"date": time.strftime("%Y-%m-%d", now), "time": time.strftime("%H:%M", now)}
