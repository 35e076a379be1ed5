"""The budgets' thresholds: defaults for each class of device, and what the configuration says instead.

The temperatures lie below documented limits (Raspberry Pi: the firmware throttles from 80 C on and hard at 85), the memory
figures are calculations; none has been tried on the hardware it is for. docs/budgets.md has the table.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from agentd.budgets.supplies import Provider, supply
from agentd.errors import ConfigError, Reason, first_mistake

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from agentd.budgets.calibration import Calibration

Device = Literal["pi4", "pi5", "pizero2w", "android", "generic"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A text with a unit in it, or a yes, is a mistake and no number."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        if wanted in (float, int) and isinstance(value, str | bool):
            raise ValueError(f"it must be a number, not {value!r}")
        return value


class ThermalPolicy(_Strict):
    """In degrees Celsius. Between `control_on_c` and `pause_c` the engine is slowed to hold `setpoint_c`."""

    enabled: bool = True
    zones: tuple[str, ...] = ()
    """Types of thermal zones, or names of hwmon chips, that count; by default those of the processor."""
    control_off_c: float = Field(ge=20, le=110)
    control_on_c: float = Field(ge=20, le=110)
    setpoint_c: float = Field(ge=20, le=110)
    resume_c: float = Field(ge=20, le=110)
    pause_c: float = Field(ge=20, le=115)
    critical_c: float = Field(ge=20, le=120)
    kp_per_c: float = Field(default=0.05, ge=0, le=1)
    ki_per_c_s: float = Field(default=0.0006, ge=0, le=0.1)
    thread_change_s: float = Field(default=30, ge=0, le=600)
    undervoltage_s: float = Field(default=60, ge=0, le=3600)
    """How long the engine is slowed after the supply voltage was too low."""
    thread_curve: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Speed with 1, 2, ... threads as shares of the fastest: what `agentd calibrate` finds."""
    cooling_c_per_s: float = Field(default=0.15, gt=0, le=10)
    """How fast the device cools with nothing to do, to say when to try again; a guess for a Pi in a case."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        names = ("control_off_c", "control_on_c", "setpoint_c", "pause_c", "critical_c")
        for low, high in itertools.pairwise(names):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low):g}) must be below {high} ({getattr(self, high):g})")
        if self.resume_c > self.pause_c - 5:
            raise ValueError(f"resume_c ({self.resume_c:g}) must be at least 5 below pause_c ({self.pause_c:g})")
        return self


class BatteryPolicy(_Strict):
    """In percent of a full charge, while discharging. `provider` says who knows: the kernel's files and Termux:API if nothing
    else is said; `none` takes external power for granted.
    """

    enabled: bool = True
    provider: Provider = "auto"
    address: str = ""
    """Of `nut` (UPS@HOST) or `pisugar` (HOST)."""
    command: tuple[str, ...] = ()
    """Of `command`: prints JSON with percentage, charging, temperature, watts, as far as it knows them."""
    reduce_below_pct: float = Field(ge=0, le=100)
    pause_below_pct: float = Field(ge=0, le=100)
    shed_below_pct: float = Field(ge=0, le=100)
    hysteresis_pct: float = Field(default=5, gt=0, le=30)
    reduced_duty: float = Field(default=0.5, ge=0.05, le=1)
    background_above_pct: float = Field(ge=0, le=101)
    """Work that can wait runs above this, or on external power; 101: on external power only."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        supply(self.provider, self.address, self.command)
        if not self.shed_below_pct < self.pause_below_pct < self.reduce_below_pct:
            raise ValueError("shed_below_pct must be below pause_below_pct, and that below reduce_below_pct")
        return self


class MemoryPolicy(_Strict):
    """MemAvailable in MiB; pressure (PSI) in percent of the time."""

    enabled: bool = True
    reduce_available_mib: float = Field(ge=0)
    shed_available_mib: float = Field(ge=0)
    reduce_pressure_some_pct: float = Field(default=10, gt=0, le=100)
    shed_pressure_full_pct: float = Field(default=20, gt=0, le=100)
    reduce_reread_pct: float = Field(default=2, gt=0, le=100)
    """How much of the weights is read from disk again for each pass over them: they do not fit."""
    max_anon_mib: float = Field(gt=0)
    """The most that the engine may take beside its weights."""
    least_context: int = Field(default=1024, ge=256, le=131072)
    """Down to this the context is halved until the model fits."""
    idle_unload_s: float = Field(gt=0, le=1e7)
    """A model that has had nothing to do for so long gives its memory back."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.shed_available_mib >= self.reduce_available_mib:
            raise ValueError("shed_available_mib must be below reduce_available_mib")
        return self


class StatesPolicy(_Strict):
    """How long a state lasts at least, and for how long what calls for a worse one must last."""

    reduced_s: float = Field(default=15, ge=0)
    paused_s: float = Field(default=30, ge=0)
    shed_s: float = Field(default=60, ge=0)
    escalate_s: float = Field(default=3, ge=0)
    critical_s: float = Field(default=1, ge=0)
    stale_s: float = Field(default=15, gt=0)
    """A sensor that was there and says nothing for so long is taken for bad news."""
    hold_s: float = Field(default=120, ge=0)
    """A generation is held for so long when the state is paused; then it ends with what it has."""
    poll_s: float = Field(default=2, ge=0.05, le=60)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.stale_s <= self.poll_s:
            raise ValueError(f"stale_s ({self.stale_s:g}) must be more than poll_s ({self.poll_s:g})")
        return self


class AdmissionPolicy(_Strict):
    """How much work may wait for the model, and for how long."""

    queue_max: int = Field(default=8, ge=1, le=1000)
    """Runs of people and programs that have not begun."""
    background_queue_max: int = Field(default=64, ge=1, le=10000)
    wait_s: float = Field(default=300, gt=0, le=86400)
    """A run that could not begin, or go on, for so long ends; one in the background that has not begun waits for `defer_s`."""
    defer_s: float = Field(default=86400, gt=0, le=31536000)


class Policy(_Strict):
    """All of them, for one device."""

    device: Device
    thermal: ThermalPolicy
    battery: BatteryPolicy
    memory: MemoryPolicy
    states: StatesPolicy = StatesPolicy()
    admission: AdmissionPolicy = AdmissionPolicy()


_Table = dict[str, tuple[float, ...]]
_THERMAL: _Table = {  # setpoint, on, off, pause, resume, critical
    "pi4": (76, 70, 64, 82, 72, 84.5),
    "pi5": (78, 72, 66, 82, 74, 84.5),
    "pizero2w": (72, 66, 60, 78, 68, 83),
    "android": (38, 36, 34, 42, 38 - 1, 45),  # of the battery, which is what Termux:API tells
    "generic": (80, 74, 68, 90, 80, 95),
}
_BATTERY: _Table = {  # reduce, pause, shed, background
    "pi4": (50, 25, 12, 60),
    "pi5": (50, 25, 12, 60),
    "pizero2w": (50, 25, 12, 101),
    "android": (40, 25, 15, 70),
    "generic": (40, 20, 10, 60),
}
_MEMORY: _Table = {"pi4": (700, 300), "pi5": (1000, 400), "pizero2w": (130, 70)}  # reduce, shed
_ANON_MIB = {"pi4": 900, "pi5": 1500, "pizero2w": 160, "android": 700}
_ANON_SHARE, _MOST_ANON_SHARE = {"generic": 0.25}, 0.5  # of all there is
_IDLE_S = {"pi4": 900, "pi5": 1800, "pizero2w": 120, "android": 300, "generic": 900}
_MEMORY_SHARE: _Table = {"android": (0.30, 0.20), "generic": (0.15, 0.05)}  # of all there is
_MOST_SHARE = (0.35, 0.20)  # of a board of the class that has less, or in a container
_ANY = (math.inf, math.inf)


def defaults(device: Device, total_mib: float) -> dict[str, dict[str, Any]]:
    """Of a class of device with so much memory."""
    setpoint, on, off, pause, resume, critical = _THERMAL[device]
    reduce, hold, shed, background = _BATTERY[device]
    shares = _MEMORY_SHARE.get(device, _MOST_SHARE)
    memory = [min(known, round(share * total_mib)) for known, share in zip(_MEMORY.get(device, _ANY), shares, strict=True)]
    return {
        "thermal": {
            "setpoint_c": setpoint,
            "control_on_c": on,
            "control_off_c": off,
            "pause_c": pause,
            "resume_c": resume,
            "critical_c": critical,
        },
        "battery": {
            "reduce_below_pct": reduce,
            "pause_below_pct": hold,
            "shed_below_pct": shed,
            "background_above_pct": background,
        },
        "memory": {
            "reduce_available_mib": memory[0],
            "shed_available_mib": memory[1],
            "max_anon_mib": min(_ANON_MIB.get(device, math.inf), round(_ANON_SHARE.get(device, _MOST_ANON_SHARE) * total_mib)),
            "idle_unload_s": _IDLE_S[device],
        },
        "states": {"poll_s": 10, "stale_s": 180} if device == "android" else {},
        "admission": {},
    }


def calibrated(policy: Policy, found: Calibration | None, threads: int) -> Policy:
    """With what calibration has found, where the configuration says nothing else."""
    if found is None:
        return policy
    given, update = policy.thermal.model_fields_set, dict[str, Any]()
    if "thread_curve" not in given and (curve := found.curve(threads)):
        update["thread_curve"] = curve
    if "cooling_c_per_s" not in given and found.cooling_c_per_s:
        update["cooling_c_per_s"] = found.cooling_c_per_s
    thermal = ThermalPolicy.model_construct(given, **{**dict(policy.thermal), **update})
    return policy.model_copy(update={"thermal": thermal})


def policy_for(device: Device, total_mib: float, given: Mapping[str, Mapping[str, Any]]) -> Policy:
    """The defaults with what the configuration says. Raises ConfigError (CONFIG_INVALID) naming the key."""
    merged = {part: {**values, **given.get(part, {})} for part, values in defaults(device, total_mib).items()}
    try:
        return Policy(device=device, **merged)  # type: ignore[arg-type] # checked right here
    except ValidationError as e:
        field, what = first_mistake(e)
        key = f"budgets.{field}" if field else "budgets"
        raise ConfigError(
            Reason.CONFIG_INVALID, f"{key} in agentd.toml: {what}.", hint="docs/budgets.md has all keys.", metadata={"key": key}
        ) from None


def total_mib(proc: Path) -> float:
    """MemTotal; 4 GiB where nothing says so."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) / 1024
    return 4096.0


def this_device(proc: Path, environment: Mapping[str, str]) -> Device:
    """By the board's own name (device-tree), or Termux's environment."""
    if "com.termux" in environment.get("PREFIX", ""):
        return "android"
    try:
        model = (proc / "device-tree" / "model").read_text(errors="replace")
    except OSError:
        return "generic"
    boards = ("Pi 5", "pi5"), ("Module 5", "pi5"), ("Pi 4", "pi4"), ("Module 4", "pi4"), ("Zero 2", "pizero2w")
    for name, device in boards:
        if name in model:
            return device  # type: ignore[return-value] # of the table above
    return "generic"
