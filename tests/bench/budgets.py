"""What the governor costs, and the idling of the engine at half the time: CPU time of its process, by threads and wall time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from agentd import models
from agentd.budgets import Device, policy_for
from agentd.budgets.governor import Situation, step
from agentd.engine.client import Engine, EngineSettings
from agentd.engine.link import Done, Pace
from agentd.engine.prompt import Conversation, Turn
from tests.bench.figures import Figure, milliseconds, percentile

_PROMPT = "read notes/todo.txt and tell me everything that is in it " * 12
_TICK_S = 0.01


def figures() -> list[Figure]:
    policy, device = policy_for("pi5", 8000, {}), Device(Path("/sys"), Path("/proc"))
    readings, situation = device.read(), Situation()
    reading = percentile(milliseconds(device.read, 300, "reading all sensors"), 0.5)
    stepping = percentile(
        milliseconds(lambda: step(policy, situation, time.monotonic(), readings, 4), 300, "a step of the governor"), 0.5
    )
    share = (reading + stepping) / (policy.states.poll_s * 1000) * 100
    idle = asyncio.run(_idling())
    return [
        Figure("governor: reading all sensors and a step, share of one core", share, "%", 1),
        *(Figure(f"engine at a duty of {duty:g}: computes, of the time", idle[duty] * 100, "%") for duty in idle),
    ]


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
    fields = Path(f"/proc/{engine.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
