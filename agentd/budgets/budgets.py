"""The budgets at work: sensors read on a thread, the governor stepped, its limits told to whoever keeps them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentd.budgets.governor import SENSORS, Situation, step
from agentd.budgets.state import Allowance, Readings
from agentd.budgets.tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from agentd.budgets.governor import Budget
    from agentd.budgets.policy import Policy
    from agentd.budgets.pressure import Alarm
    from agentd.budgets.programs import Asked
    from agentd.budgets.sensors import Sensors
    from agentd.budgets.state import Name

_NOTICED = 0.1  # of the duty
_FIRST_S = 2.0  # that a start waits for the sensors
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Budgets:
    """Lives on the event loop. `pace` gets each change of what the engine may do, `changed` what makes a difference to people,
    `record` each change of a budget's state: its name, how it was, how it is.

    `needs_mib` says what loading the model would take, 0 while it is loaded.
    """

    policy: Policy
    sensors: Sensors
    threads: int
    pace: Callable[[Allowance], None]
    changed: Callable[[Allowance], None]
    record: Callable[[Name, Budget, Budget], None]
    needs_mib: Callable[[], float] = lambda: 0.0
    programs: Sequence[Asked] = ()
    alarm: Callable[[Callable[[], None]], Alarm | None] = lambda _ring: None
    """Makes what rings when memory gets short."""
    clock: Callable[[], float] = time.monotonic
    limits: Allowance = field(default_factory=lambda: Allowance(background=False))  # until something was read
    situation: Situation = field(default_factory=Situation)
    tally: Tally = field(default_factory=Tally)
    joules: float = 0.0
    """Used since the start, as far as the device's power is known."""
    _power: tuple[float, float] | None = None
    """When it was read last, watts."""
    _low: bool = False
    _counted: float | None = None
    _paced: Allowance = field(default_factory=Allowance)
    _told: Allowance = field(default_factory=Allowance)
    _read: Readings = field(default_factory=Readings)
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    _has_read: threading.Event = field(default_factory=threading.Event)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _hurry: threading.Event = field(default_factory=threading.Event)
    _loop: asyncio.AbstractEventLoop | None = None
    _alarm: Alarm | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def readings(self) -> Readings:
        """The newest ones; none if they are old, as a driver that hangs keeps all others waiting."""
        read = self._read
        if read.at is None or self.clock() - read.at <= self.policy.states.stale_s:
            return read
        return Readings(faults={"sensors": f"nothing was read for {self.clock() - read.at:.0f} s"}, at=read.at)

    def unenforced(self) -> dict[str, str]:
        """Budgets that can't be kept, and why."""
        found: dict[str, str] = {}
        for name, sensor in SENSORS.items():
            readings, seen = self.readings, sensor in self.situation.seen
            if not getattr(self.policy, name).enabled:
                found[name] = "switched off in agentd.toml"
            elif name == "battery" and not seen and readings.charging is None:
                found[name] = "no battery is seen; external power is taken for granted"
            elif name == "thermal" and not seen and readings.thermal_status is None:
                found[name] = "no sensor tells how hot it is"
            elif name == "memory" and not seen:
                found[name] = "nothing tells how much memory is left"
        return found

    async def start(self) -> None:
        """What the device is like is known before anything is loaded, if its sensors answer in time."""
        self._loop = asyncio.get_running_loop()
        for program in self.programs:
            program.start()
        self._alarm = self.alarm(self._hurry.set) if self.policy.memory.enabled else None
        if self._alarm:
            self._alarm.start()
        threading.Thread(target=self._keep_reading, name="sensors", daemon=True).start()  # a driver may never answer
        await asyncio.to_thread(self._has_read.wait, _FIRST_S)
        self._look_safely()
        self._tasks = [asyncio.create_task(self._govern(), name="budgets")]

    async def stop(self) -> None:
        self._stopped.set()
        self._hurry.set()
        if self._alarm:
            await asyncio.to_thread(self._alarm.stop)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for program in self.programs:
            await asyncio.to_thread(program.stop)

    async def fresh(self) -> None:
        """Wait for readings that are newer than this, if the sensors answer in time."""
        self._has_read.clear()
        self._hurry.set()
        await asyncio.to_thread(self._has_read.wait, _FIRST_S)

    async def watch(self) -> AsyncIterator[Allowance]:
        """The limits now, and each time they change."""
        while True:
            more, limits = self._more, self.limits
            yield limits
            await more.wait()

    def _keep_reading(self) -> None:
        while not self._stopped.is_set():
            hurried = self._hurry.is_set()
            self._hurry.clear()
            at = self.clock()
            try:
                self._read = replace(self.sensors.read(), at=at)
            except Exception as e:  # one that lies in a new way must not silence all others for ever
                _log.exception("the sensors could not be read")
                self._read = Readings(faults={"sensors": type(e).__name__}, at=at)
            self._has_read.set()
            if hurried and self._loop and not self._stopped.is_set():
                with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                    self._loop.call_soon_threadsafe(self._look_safely)
            self._hurry.wait(self.policy.states.poll_s)

    def _count_energy(self, now: float) -> None:
        """By the power that was read last, for as long as it is fresh."""
        before, watts = self._power, self.readings.power_w
        if before is not None and now - before[0] <= self.policy.states.stale_s:
            self.joules += before[1] * (now - before[0])
        self._power = None if watts is None else (now, watts)

    def _count(self, before: Situation, readings: Readings) -> None:
        """For the metrics: one step has been made."""
        after, tally = self.situation, self.tally
        passed = (after.time or 0.0) - before.time if before.time is not None else 0.0
        for name, budget in before.budgets.items():
            was, now = budget.state.name.lower(), after.budgets[name].state.name.lower()
            tally.add("agentd_budget_state_seconds_total", {"budget": name, "state": was}, passed)
            if was != now:
                tally.add(
                    "agentd_budget_transitions_total",
                    {"budget": name, "from": was, "to": now, "reason": after.budgets[name].code},
                )
        if readings.undervoltage and not self._low:
            tally.add("agentd_undervoltage_events_total")
        self._low = bool(readings.undervoltage)
        if readings.at != self._counted:
            self._counted = readings.at
            for sensor in readings.faults:
                tally.add("agentd_sensor_errors_total", {"sensor": sensor.partition(" (")[0], "kind": "invalid"})

    def _record(self, before: Situation) -> None:
        """One that can't be put on record must not keep the others from what they are told."""
        for name, budget in before.budgets.items():
            after = self.situation.budgets[name]
            if after.state is not budget.state:
                try:
                    self.record(name, budget, after)
                except Exception:
                    _log.exception("a change of the budget %s is not on record", name)

    async def _govern(self) -> None:
        while True:
            await asyncio.sleep(self.policy.states.poll_s)
            self._look_safely()

    def _look_safely(self) -> None:
        try:
            self.look()
        except Exception:  # a bug here must not end what keeps the device within its limits
            _log.exception("the budgets could not be looked at")

    def look(self) -> None:
        """One step. What could not be told is told the next time."""
        if self._read.at is None:
            return
        now = self.clock()
        self._count_energy(now)
        before_step, readings = self.situation, self._read
        self.situation, self.limits = step(
            self.policy, self.situation, now, self._read, self.threads, needs_mib=self.needs_mib()
        )
        self._count(before_step, readings)
        self._record(before_step)
        before, limits = self._told, self.limits
        if _pace(limits) != _pace(self._paced):
            self.pace(limits)
            self._paced = limits
        if not _differ(before, limits):
            return
        self.changed(limits)
        self._told = limits
        more, self._more = self._more, asyncio.Event()
        more.set()
        if limits.state is not before.state:
            why = f": {limits.reason}" if limits.reason else ""
            _log.warning("budgets: %s, was %s%s", limits.state.name, before.state.name, why)


def _pace(limits: Allowance) -> tuple[object, ...]:
    """What the engine is told of them."""
    return limits.state, limits.threads, limits.duty, limits.trim


def _differ(one: Allowance, other: Allowance) -> bool:
    """Whether that makes a difference to people: a controller at work changes the duty a little all the time."""
    same = ((each.state, each.cause, each.threads, each.background) for each in (one, other))
    return next(same) != next(same) or abs(one.duty - other.duty) > _NOTICED
