"""What a measurement is, and how a table of them looks."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

console = Console(stderr=True)
"""For progress: figures go to standard output."""


@dataclass(frozen=True)
class Figure:
    """A measurement. `wanted` is the bound it should keep, `baseline` what it is compared with."""

    what: str
    value: float
    unit: str
    wanted: float | None = None
    baseline: str = ""
    baseline_value: float | None = None


def resident_mb(pid: int) -> float:
    """VmRSS in MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(pid)


def milliseconds(do: Callable[[], object], times: int, label: str, *, pause_s: float = 0) -> list[float]:
    """Sorted. `pause_s` lies between two of them, where what is measured gets something ready for the next."""
    taken = []
    for _ in track(range(times), description=f"{label:32}", console=console, transient=True):
        start = time.perf_counter()
        do()
        taken.append((time.perf_counter() - start) * 1000)
        if pause_s:
            time.sleep(pause_s)
    return sorted(taken)


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def held_mb(pid: int) -> float:
    """Pss in MB (10^6 bytes): pages that forks share count once."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(pid)


def show(figures: list[Figure], *, as_json: bool = False) -> None:
    """As a table, or as one figure a line."""
    if as_json:
        for figure in figures:
            print(json.dumps(asdict(figure)))
        return
    table = Table("what", "measured", "wanted", "baseline in this run", "ratio", box=None, header_style="bold")
    for f in figures:
        wanted = f"under {f.wanted:.4g} {f.unit}" if f.wanted else ""
        kept = "" if not f.wanted else "green" if f.value < f.wanted else "red"
        measured = f"[{kept}]{f.value:.2f} {f.unit}[/]" if kept else f"{f.value:.2f} {f.unit}"
        baseline = f"{f.baseline}: {f.baseline_value:.2f} {f.unit}" if f.baseline_value else ""
        ratio = f"x{f.value / f.baseline_value:.2f}" if f.baseline_value else ""
        table.add_row(f.what, measured, wanted, baseline, ratio)
    Console().print(table)
