"""The pace of the real engine with the pocket model: slower, held, ended; and never another text."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentd import models
from agentd.budgets import Allowance, State
from agentd.engine.client import Engine
from agentd.engine.link import Delta, Done, Pace
from agentd.engine.prompt import Conversation, Turn
from agentd.engine.settings import EngineSettings
from agentd.engine.throttle import Throttle
from agentd.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "read notes/todo.txt and tell me everything that is in it " * 12
SLOW = Pace(duty=0.03)  # so that what is said meanwhile comes in time
_TICKS = os.sysconf("SC_CLK_TCK")


def conversation(prompt: str = PROMPT) -> Conversation:
    return Conversation("You are agentd.", (), (Turn(prompt),), thinking=False)


async def answer(engine: Engine, on_delta: Callable[[], None] = lambda: None, tokens: int = 64) -> Done:
    done: Done | None = None
    async for output in engine.generate(conversation(), max_tokens=tokens, temperature=0.0, seed=0):
        if isinstance(output, Delta):
            on_delta()
        done = output if isinstance(output, Done) else done
    assert done is not None
    return done


def with_engine(work: Callable[[Engine], object], threads: int = 2) -> None:
    async def go() -> None:
        engine = Engine(EngineSettings(models.locate("pocket"), 2048, 64, threads, "off", 60))
        try:
            await engine.load()
            await work(engine)  # type: ignore[misc]
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(go(), 120))


def cpu_s(engine: Engine) -> float:
    fields = Path(f"/proc/{engine.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def test_the_text_is_the_same_at_any_pace():
    """Duties, threads, changed in the middle: greedy decoding gives the very same tokens (scenario 5)."""

    async def work(engine: Engine) -> None:
        wanted = (await answer(engine)).ids
        assert len(wanted) > 5
        for pace in (Pace(duty=0.5), Pace(threads=1), Pace(duty=0.2, threads=1), Pace()):
            engine.pace(pace)
            assert (await answer(engine)).ids == wanted
        paces = iter([Pace(duty=0.3), Pace(threads=1), Pace(), Pace(duty=0.8, threads=1)] * 50)
        assert (await answer(engine, lambda: engine.pace(next(paces)))).ids == wanted

    with_engine(work)


def test_at_a_low_duty_it_really_idles():
    """With a quarter of the time it has at least twice as much time as it computes, however slow the machine is."""

    async def work(engine: Engine) -> None:
        engine.pace(Pace(duty=0.25))
        before, begun = cpu_s(engine), time.monotonic()
        for n in range(4):
            async for _ in engine.generate(conversation(f"{n} {PROMPT}"), max_tokens=48, temperature=0.0, seed=0):
                pass
        assert time.monotonic() - begun >= 2 * (cpu_s(engine) - before)

    with_engine(work, threads=1)


def test_a_generation_that_is_held_goes_on_where_it_was():
    async def work(engine: Engine) -> None:
        wanted = (await answer(engine)).ids
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        engine.pace(SLOW)
        loop.call_later(0.2, engine.pace, Pace(hold=True))
        loop.call_later(0.8, engine.pace, Pace())
        assert (await answer(engine)).ids == wanted
        assert time.monotonic() - begun >= 0.8

    with_engine(work)


def test_a_generation_that_is_held_can_be_given_up():
    """Cancelling needs no pace."""

    async def work(engine: Engine) -> None:
        engine.pace(Pace(hold=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(answer(engine), 0.5)
        engine.pace(Pace())
        assert (await answer(engine)).reason in ("stop", "length", "tool")

    with_engine(work)


def test_when_memory_is_shed_it_ends_with_what_it_has_and_the_process_is_gone():
    """The next request is ended at once, and does not load the model; when all is well again it does."""

    async def work(engine: Engine) -> None:
        whole = (await answer(engine)).ids
        throttle, pid = Throttle(engine, 60, 900), engine.pid
        engine.pace(SLOW)
        shed = Allowance(State.SHED, "memory", "there is none")
        asyncio.get_running_loop().call_later(0.3, throttle.apply, shed)
        done = await answer(engine)
        assert (done.reason, done.ids) == ("budget", whole[: len(done.ids)])
        await engine.unload()  # waits for the one that the throttle has begun
        assert not Path(f"/proc/{pid}/exe").exists()  # noqa: ASYNC240 - of procfs
        assert (await answer(engine)).reason == "budget"
        assert engine.pid is None
        throttle.apply(Allowance())
        assert (await answer(engine)).ids == whole
        await throttle.stop()

    with_engine(work)


def test_what_is_held_too_long_ends_with_what_it_has():
    async def work(engine: Engine) -> None:
        throttle = Throttle(engine, 0.3, 900)
        throttle.apply(Allowance(State.PAUSED, "thermal", "hot"))
        throttle.apply(Allowance(State.PAUSED, "thermal", "still hot"))
        assert (await answer(engine)).reason == "budget"
        throttle.apply(Allowance(State.REDUCED, "thermal", "warm", duty=0.9))
        assert (await answer(engine)).reason != "budget"
        await throttle.stop()

    with_engine(work)


def test_an_engine_that_died_keeps_its_pace_when_it_is_started_again():
    async def work(engine: Engine) -> None:
        engine.pace(Pace(duty=0.5, threads=1))
        assert engine.pid is not None
        os.kill(engine.pid, 9)
        with contextlib.suppress(EngineError):  # if it has not been noticed yet
            await answer(engine)
        assert (await answer(engine)).reason != "budget"

    with_engine(work)


def test_a_model_with_nothing_to_do_gives_its_memory_back():
    """And is loaded again by the next request; while it works it stays."""

    async def work(engine: Engine) -> None:
        throttle, whole = Throttle(engine, 60, 0.2), (await answer(engine)).ids
        throttle.start()
        async with asyncio.timeout(20):
            while engine.pid is not None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
        assert engine.needs_mib() > 1
        engine.pace(SLOW)
        assert (await answer(engine)).ids == whole
        await throttle.stop()

    with_engine(work)


def test_a_load_that_was_given_up_does_not_hold_up_the_next():
    """Its link is closed through the loop: one that is closed under it leaves the loop deaf for the next of its number."""

    async def go() -> None:
        engine = Engine(EngineSettings(models.locate("pocket"), 2048, 64, 2, "off", 20))
        for delay in (0.0, 0.02, 0.2):
            loading = asyncio.create_task(engine.load())
            await asyncio.sleep(delay)
            loading.cancel()
            await asyncio.wait([loading])
            pid = engine.pid
            await engine.load()
            assert engine.pid == (pid or engine.pid)
        await engine.stop()

    asyncio.run(asyncio.wait_for(go(), 60))
