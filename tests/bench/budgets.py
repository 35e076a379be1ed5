"""What the governor costs, and the idling of the engine at half the time: CPU time of its process, by threads and wall time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agentd import models
from agentd.budgets import Device as Sensors
from agentd.budgets import policy_for
from agentd.budgets.governor import Situation, step
from agentd.client import Client
from agentd.engine.client import Engine
from agentd.engine.link import Done, Pace
from agentd.engine.prompt import Conversation, Turn
from agentd.engine.settings import EngineSettings
from agentd.v1 import budget_pb2, run_pb2
from tests.bench.figures import Figure, milliseconds, percentile
from tests.e2e.conftest import DaemonProcess
from tests.e2e.device import QUICK, Device

_PROMPT = "read notes/todo.txt and tell me everything that is in it " * 12
_TICK_S = 0.01


def figures() -> list[Figure]:
    policy, device = policy_for("pi5", 8000, {}), Sensors(Path("/sys"), Path("/proc"))
    readings, situation = device.read(), Situation()
    reading = percentile(milliseconds(device.read, 300, "reading all sensors"), 0.5)
    stepping = percentile(
        milliseconds(lambda: step(policy, situation, time.monotonic(), readings, 4), 300, "a step of the governor"), 0.5
    )
    share = (reading + stepping) / (policy.states.poll_s * 1000) * 100
    idle = asyncio.run(_idling())
    return [
        _idle(),
        *_control_plane(),
        Figure("governor: reading all sensors and a step, share of one core", share, "%", 1),
        *(Figure(f"engine at a duty of {duty:g}: computes, of the time", idle[duty] * 100, "%") for duty in idle),
    ]


def _control_plane() -> list[Figure]:
    """Of a real daemon with a model of 470 M parameters at work: what GetBudgets and GetStatus take in each state."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "small.gguf"
        subprocess.run(
            [sys.executable, "scripts/synthetic_model.py", model, "--shape", "small"], check=True, capture_output=True
        )
        extra = QUICK + f'[engine]\nmodel = "{model}"\n[runs]\ntokens = 100000\nseconds = 600\n'
        with Device(Path(folder), extra=extra).made().running() as device, Client(device.socket) as client:
            figures = []
            for name, celsius in (("nominal", 50), ("reduced", 77), ("paused", 83), ("shed", 90)):
                client.create_run("what time is it", priority=run_pb2.Run.PRIORITY_BACKGROUND)
                device.heat(celsius)
                while client.budgets().state != budget_pb2.Budgets.State.Value(f"STATE_{name.upper()}"):
                    time.sleep(0.05)
                taken = milliseconds(client.budgets, 300, f"GetBudgets while {name}")
                taken += milliseconds(client.status, 300, f"GetStatus while {name}")
                figures.append(Figure(f"control plane while {name}, p99", percentile(taken, 0.99), "ms", 100))
            for run in client.list_runs():
                client.cancel_run(run.name)
    return figures


def _idle() -> Figure:
    """All that a daemon does with nothing to do and a model loaded, the budgets at their usual pace."""
    with (
        tempfile.TemporaryDirectory() as folder,
        DaemonProcess(Path(folder)).running() as daemon,
        Client(daemon.socket) as client,
    ):
        list(client.run("what time is it"))
        pid, seconds = client.status().pid, 20.0
        before = _process_cpu_s(pid)
        time.sleep(seconds)
        share = (_process_cpu_s(pid) - before) / seconds * 100
    return Figure("daemon with nothing to do, model loaded, share of one core", share, "%", 1)


async def _idling() -> dict[float, float]:
    """By duty: the share of the time in which it computes, on one thread."""
    engine = Engine(EngineSettings(models.locate("pocket"), 2048, 64, 1, "off", 60))
    found = {}
    try:
        await engine.load()
        for duty in (1.0, 0.5, 0.25):
            engine.pace(Pace(duty=duty))
            before, begun, worked = _cpu_s(engine), time.monotonic(), 0.0
            for n in range(12):
                turns = (Turn(f"{n} {_PROMPT}"),)
                conversation = Conversation("You are agentd.", (), turns, thinking=False)
                async for output in engine.generate(conversation, max_tokens=48, temperature=0.0, seed=0):
                    if isinstance(output, Done):
                        worked += (output.prefill_ms + output.decode_ms) / 1000
            assert time.monotonic() - begun >= worked
            found[duty] = (_cpu_s(engine) - before) / worked
    finally:
        await engine.stop()
    return found


def _cpu_s(engine: Engine) -> float:
    return _process_cpu_s(engine.pid or 0)


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
