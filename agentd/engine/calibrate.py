"""Measures this device: the model's speed and the device's heat with each number of threads, then how it cools."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.budgets import OverBudget, Priority
from agentd.budgets.calibration import FASTEST_COOLING, Calibration, Point
from agentd.engine.link import Done
from agentd.engine.prompt import Conversation, Turn
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from agentd.budgets import Admission, Budgets
    from agentd.engine.client import Engine
    from agentd.engine.throttle import Throttle

_TOKENS = 64  # of one generation: others get a turn in between
_COOLING_SHARE = 0.2  # of all the time
_LEAST_COOLING_C = 1.0  # less than that is noise
_LOOK_S = 1.0
_MOST_STEPS = 8
_LONGEST_PAUSE_S = 180.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is (0 to 1), with how many threads it measures now (0: it cools), what was found so far."""

    fraction: float
    threads: int
    points: tuple[Point, ...]
    finished: Calibration | None = None


@dataclass(slots=True)
class _Step:
    tokens: int = 0
    seconds: float = 0.0
    hottest: float | None = None
    watts: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Calibrator:
    """One at a time. Heat stops a step early, not the whole: a board without a fan can be measured, too."""

    engine: Engine
    throttle: Throttle
    budgets: Budgets
    admission: Admission
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, seconds: float) -> AsyncGenerator[Progress, None]:
        """Closing the iterator ends it. Raises OverBudget if the device is too hot or too low to begin, EngineError."""
        if self._busy.locked():
            message, hint = "The device is being calibrated already.", "Wait for that to end."
            raise RequestError(Reason.CALIBRATING, message, hint=hint)
        async with self._busy:
            if self.budgets.limits.holds:
                raise OverBudget(self.budgets.limits)
            model = (await self.engine.load()).name
            steps, points = _steps(self.budgets.threads), list[Point]()
            working = seconds * (1 - _COOLING_SHARE)
            try:
                for number, threads in enumerate(steps):
                    async for _ in self._until_it_may(min(_LONGEST_PAUSE_S, seconds) if number else 0.0):
                        yield Progress(number / len(steps) * (1 - _COOLING_SHARE), 0, tuple(points))
                    async for share in self._step(threads, working / len(steps), points):
                        done = (number + share) / len(steps) * (1 - _COOLING_SHARE)
                        yield Progress(done, threads, tuple(points))
            finally:
                self.throttle.force(0)
            if len(points) < len(steps):
                message = f"Only {len(points)} of {len(steps)} numbers of threads could be measured within the budgets."
                raise RequestError(Reason.CALIBRATION_CUT, message, hint="Try again when the device is cool and charging.")
            slopes: list[float] = []
            async for share in self._cool(seconds - working, slopes):
                yield Progress(1 - _COOLING_SHARE * (1 - share), 0, tuple(points))
            slope = slopes[0] if slopes else None
            yield Progress(1.0, 0, tuple(points), Calibration(model=model, points=tuple(points), cooling_c_per_s=slope))

    async def _until_it_may(self, longest_s: float) -> AsyncGenerator[None, None]:
        """A pause lasts half a minute at least: a board without a fan has to cool between two steps."""
        until = time.monotonic() + longest_s
        while self.budgets.limits.holds and time.monotonic() < until:
            yield
            await asyncio.sleep(_LOOK_S)

    async def _step(self, threads: int, seconds: float, points: list[Point]) -> AsyncGenerator[float, None]:
        """Share by share of the time; in the end there is a point more, if anything could be measured."""
        self.throttle.force(threads)
        step, begun = _Step(), time.monotonic()
        while (passed := time.monotonic() - begun) < seconds and not self.budgets.limits.holds:
            yield passed / seconds
            await self._measure_unless_held(step)
        if step.tokens and step.seconds > 0:
            watts = sum(step.watts) / len(step.watts) if step.watts else None
            point = Point(threads=threads, tokens_per_s=step.tokens / step.seconds, hottest_c=step.hottest, watts=watts)
            points.append(point)

    async def _measure_unless_held(self, step: _Step) -> None:
        """What is held by the budgets, or waits for them, is given up: its time would say nothing of the device."""
        measuring = asyncio.create_task(self._measure(step), name="calibrate")
        try:
            while not measuring.done() and not self.budgets.limits.holds:
                await asyncio.wait([measuring], timeout=_LOOK_S / 4)
        finally:
            measuring.cancel()
            await asyncio.wait([measuring])
        if not measuring.cancelled():
            measuring.result()

    async def _measure(self, step: _Step) -> None:
        ticket = self.admission.admit(Priority.INTERACTIVE, again=True)  # nobody is to make it take longer than was asked
        ticket.alone = True  # or it would measure how fast several are together
        conversation = Conversation("You count.", (), (Turn("Count from one to one thousand, in words.", ()),), thinking=False)
        try:
            async with self.admission.turn(ticket):
                outputs = self.engine.generate(conversation, max_tokens=_TOKENS, temperature=0.0, seed=0)
                async with contextlib.aclosing(outputs) as stream:
                    async for output in stream:
                        if isinstance(output, Done):
                            step.tokens += len(output.ids)
                            step.seconds += output.decode_ms / 1000
        finally:
            self.admission.leave(ticket)
        readings = self.budgets.readings
        if readings.temperature_c is not None:
            step.hottest = max(readings.temperature_c, step.hottest or readings.temperature_c)
        if readings.power_w is not None:
            step.watts.append(readings.power_w)

    async def _cool(self, seconds: float, found: list[float]) -> AsyncGenerator[float, None]:
        """Share by share of the time; in the end its slope is found, if there is one to be seen."""
        begun, first = time.monotonic(), self.budgets.readings.temperature_c
        while (passed := time.monotonic() - begun) < seconds:
            yield passed / seconds
            await asyncio.sleep(min(_LOOK_S, seconds - passed))
        last = self.budgets.readings.temperature_c
        if first is not None and last is not None and first - last >= _LEAST_COOLING_C:
            found.append(min((first - last) / seconds, FASTEST_COOLING))


def _steps(most: int) -> list[int]:
    """Each number of threads; of many, some."""
    if most <= _MOST_STEPS:
        return list(range(1, most + 1))
    return sorted({1, most, *(round(most * part / _MOST_STEPS) for part in range(1, _MOST_STEPS))})
