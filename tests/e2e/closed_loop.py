"""A modelled board that is heated by what a real engine really computes, and whose sensor the real daemon reads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agentd.v1 import budget_pb2, run_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentd.client import Client
    from tests.budgets.plant import Board
    from tests.e2e.device import Device

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SCRIPT = Path(__file__).parents[2] / "scripts/synthetic_model.py"


@dataclass(frozen=True)
class Sample:
    """`share` is what the engine's process computed, of all processors; `tokens` a second."""

    seconds: float
    chip: float
    share: float
    tokens: float
    budgets: budget_pb2.Budgets


def synthetic_model(folder: Path) -> Path:
    """260 MiB with random weights: it generates without end, tens of tokens a second."""
    model = folder / "small.gguf"
    subprocess.run([sys.executable, str(SCRIPT), str(model), "--shape", "small"], check=True, capture_output=True)
    return model


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def closed_loop(device: Device, client: Client, board: Board, seconds: float, every_s: float = 0.25) -> Iterator[Sample]:
    """Generates without a break. The board's time is the clock's."""
    device.heat(board.chip)
    run = client.create_run("tell me something")
    while not (pid := client.status().engine_pid):
        time.sleep(0.05)
    cores = os.cpu_count() or 1
    begun = before = time.monotonic()
    computed = cpu_s(pid)
    while (now := time.monotonic()) - begun < seconds:
        time.sleep(every_s)
        if client.get_run(run.name).state not in (run_pb2.Run.STATE_QUEUED, run_pb2.Run.STATE_RUNNING):
            run = client.create_run("tell me something")
        after, now = cpu_s(pid), time.monotonic()
        share = min(1.0, (after - computed) / (cores * (now - before)))
        board.run(now - before, board.threads, share, tick=0.05)
        device.heat(board.chip)
        yield Sample(now - begun, board.chip, share, client.status().tokens_per_second, client.budgets())
        computed, before = after, now
    client.cancel_run(run.name)
