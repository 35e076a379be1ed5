"""Watts of the device, from whatever measures them: its battery, a Raspberry Pi 5's regulator, the processor's own counter."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_RAIL = re.compile(r"^[ \t]*(\w+)_(A|V) (?:current|volt)\(\d+\)=([0-9.]+)[AV][ \t]*$", re.MULTILINE)
_MOST_W = 1000.0


def of_regulator(text: str) -> float | None:
    """`vcgencmd pmic_read_adc`: volts and amperes of each rail that has both. The 5 V input has no ampere meter, so this is
    less than what the plug gives.
    """
    rails: dict[str, dict[str, float]] = {}
    for rail, unit, value in _RAIL.findall(text):
        try:
            rails.setdefault(rail, {})[unit] = float(value)
        except ValueError:
            return None
    pairs = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2]
    watts = sum(pairs)
    return watts if pairs and 0 < watts < _MOST_W else None


def of_battery(power_uw: float | None, voltage_uv: float | None, current_ua: float | None) -> float | None:
    """What a discharging battery gives. Drivers disagree about the sign of a current."""
    if power_uw is not None:
        watts = abs(power_uw) / 1e6
    elif voltage_uv is not None and current_ua is not None:
        watts = abs(voltage_uv * current_ua) / 1e12
    else:
        return None
    return watts if 0 < watts < _MOST_W else None


@dataclass(slots=True)
class Counter:
    """Microjoules that count up and wrap (powercap). Readable by root only, since 2020 (CVE-2020-8694)."""

    folder: Path
    clock: Callable[[], float] = time.monotonic
    _last: tuple[float, int] | None = field(default=None)

    def watts(self) -> float | None:
        """Since the last look."""
        try:
            now, energy = self.clock(), int((self.folder / "energy_uj").read_text())
            most = int((self.folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            self._last = None
            return None
        before, self._last = self._last, (now, energy)
        if before is None or now <= before[0]:
            return None
        watts = (energy - before[1]) % max(most, 1) / 1e6 / (now - before[0])
        return watts if 0 < watts < _MOST_W else None
