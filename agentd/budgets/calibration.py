"""What calibration has found of this device: how fast the model is with how many threads, how hot it gets, how it cools."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentd.store.durable import arriving

if TYPE_CHECKING:
    from pathlib import Path


FASTEST_COOLING = 10.0
"""Degrees a second; more is no cooling but a sensor that jumps."""


class Point(BaseModel):
    """With so many threads: tokens a second, the hottest it got in Celsius, watts; None where there is no sensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(ge=1, le=1024)
    tokens_per_s: float = Field(gt=0, allow_inf_nan=False)
    hottest_c: float | None = None
    watts: float | None = None


class Calibration(BaseModel):
    """`cooling_c_per_s` is how fast it cooled when all was over; None where it was not warm enough to see."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    points: tuple[Point, ...] = Field(min_length=1)
    cooling_c_per_s: float | None = Field(default=None, gt=0, le=FASTEST_COOLING)

    def curve(self, most: int) -> tuple[float, ...]:
        """Speed with 1, 2, ... threads as shares of the fastest, those in between drawn straight; () for another processor."""
        known = {point.threads: point.tokens_per_s for point in self.points}
        if 1 not in known or max(known) != most:
            return ()
        fastest, counts = max(known.values()), sorted(known)
        curve = []
        for threads in range(1, most + 1):
            low = max(each for each in counts if each <= threads)
            high = min(each for each in counts if each >= threads)
            part = (threads - low) / (high - low) if high > low else 0.0
            curve.append((known[low] + (known[high] - known[low]) * part) / fastest)
        return tuple(curve)


def load(file: Path) -> Calibration | None:
    """None if there is none, or it can't be read."""
    with contextlib.suppress(OSError, ValidationError, UnicodeDecodeError):
        return Calibration.model_validate_json(file.read_text())
    return None


def save(calibration: Calibration, file: Path) -> None:
    """Raises OSError."""
    with arriving(file) as arrived:
        arrived.write(calibration.model_dump_json(indent=2).encode())
