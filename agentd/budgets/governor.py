"""The governor: a pure function from where we are, the time and the readings to where that leads and what may be done there.

Each budget has a state of its own; the worst counts. A worse state comes when what calls for it has lasted a moment, any number
of steps at once; a better one comes one step at a time, past a hysteresis, and after a least stay: a single threshold flaps
(BOINC #5310). Heat is held at a setpoint by a PI controller in between, by fewer threads first and pauses between tokens then:
power falls with the threads faster than speed does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentd.budgets.state import NAMES, Allowance, Name, Readings, State

if TYPE_CHECKING:
    from agentd.budgets.policy import BatteryPolicy, MemoryPolicy, Policy, StatesPolicy, ThermalPolicy

_SMOOTHING_S = 6.0  # time constant of the temperature's filter
_LEAST_U = 0.05
_SLEW_PER_S = 0.05
_FEED_FORWARD = 0.6
_OVER = 3  # above the setpoint it answers harder than below, as the kernel's power allocator does (k_po, k_pu)
_COLD, _HOT = -30.0, 150.0  # beyond these a reading is none
_SEVERE, _CRITICAL = 3, 4  # of Android's thermal status
_RETRY_BATTERY_S, _RETRY_MEMORY_S = 600.0, 30.0
_LEAST_RETRY_S, _LONGEST_RETRY_S = 2.0, 600.0
_COOLING_C_PER_S = 0.15  # a guess for a Pi in a case, until its own slope is known


@dataclass(frozen=True, slots=True)
class Budget:
    """One of them: its state since when and why; and a worse one that is called for, since when."""

    state: State = State.NOMINAL
    since: float | None = None
    reason: str = ""
    called: State = State.NOMINAL
    called_since: float = 0.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the governor remembers. `u` is the share of full power that heat allows."""

    budgets: dict[Name, Budget] = field(default_factory=lambda: {name: Budget() for name in NAMES})
    time: float | None = None
    temperature_c: float | None = None
    u: float = 1.0
    integral: float = 0.0
    controlling: bool = False
    threads: int = 0
    threads_since: float = -math.inf
    seen: dict[str, float] = field(default_factory=dict)
    """When each sensor last said something."""
    low_voltage: float = -math.inf


@dataclass(frozen=True, slots=True)
class _Call:
    """What one budget calls for: `enter` by its thresholds, `stay` by those past the hysteresis."""

    enter: State
    stay: State
    reason: str = ""
    at_once: bool = False
    """Whether the least stay is waived: external power has come."""


def step(policy: Policy, before: Situation, now: float, readings: Readings, threads: int) -> tuple[Situation, Allowance]:
    """`now` is a steady clock in seconds, `threads` how many the engine has at most."""
    seen = {name: now if getattr(readings, name) is not None else before.seen[name] for name in _seen(before, readings)}
    low = now if readings.undervoltage else before.low_voltage
    after = _warmed(policy.thermal, replace(before, seen=seen, low_voltage=low), now, readings)
    calls: dict[Name, _Call] = {
        "thermal": _thermal(policy, after, now, readings),
        "battery": _battery(policy.battery, before.budgets["battery"].state, readings),
        "memory": _memory(policy.memory, readings),
    }
    budgets = {name: _moved(policy.states, before.budgets[name], calls[name], now) for name in NAMES}
    after = replace(after, budgets=budgets, time=now)
    return _limited(policy, after, now, readings, threads)


# -- what each budget calls for


def _thermal(policy: Policy, after: Situation, now: float, readings: Readings) -> _Call:
    thermal, states = policy.thermal, policy.states
    if not thermal.enabled:
        return _Call(State.NOMINAL, State.NOMINAL)
    status = readings.thermal_status
    if status is not None and status >= _SEVERE:
        state = State.SHED if status >= _CRITICAL else State.PAUSED
        return _Call(state, state, f"the device says that it is too hot (status {status})")
    if (at := after.seen.get("temperature_c")) is not None and now - at > states.stale_s:
        return _Call(State.REDUCED, State.REDUCED, f"no temperature has come for {now - at:.0f} s")
    t = _plausible(readings.temperature_c)
    low = now - after.low_voltage < thermal.undervoltage_s
    reduced = State.REDUCED if after.controlling or low else State.NOMINAL
    if t is None:
        return _Call(reduced, reduced, "the supply voltage was too low" if low else "")
    enter = State.SHED if t >= thermal.critical_c else State.PAUSED if t >= thermal.pause_c else reduced
    stay = State.SHED if t >= thermal.pause_c else State.PAUSED if t > thermal.resume_c else reduced
    marks = {State.SHED: thermal.critical_c, State.PAUSED: thermal.pause_c, State.REDUCED: thermal.control_on_c}
    reason = "the supply voltage was too low" if low and enter is State.REDUCED else f"it is {t:.1f} C hot"
    reason += f" ({marks[enter]:g} and more)" if enter in marks and t >= marks[enter] else ""
    return _Call(enter, max(stay, enter), reason)


def _battery(battery: BatteryPolicy, state: State, readings: Readings) -> _Call:
    level = readings.battery_pct
    if not battery.enabled or level is None:
        return _Call(State.NOMINAL, State.NOMINAL)
    if readings.charging:
        return _Call(State.NOMINAL, State.NOMINAL, f"{level:.0f} %, charging", at_once=True)
    marks = (battery.reduce_below_pct, battery.pause_below_pct, battery.shed_below_pct)
    enter = State(sum(level < mark for mark in marks))
    stay = State(sum(level < mark + battery.hysteresis_pct for mark in marks))
    return _Call(enter, min(stay, max(state, enter)), f"the battery is at {level:.0f} %")


def _memory(memory: MemoryPolicy, readings: Readings) -> _Call:
    free, some, full = readings.available_mib, readings.pressure_some_pct or 0.0, readings.pressure_full_pct or 0.0
    if not memory.enabled:
        return _Call(State.NOMINAL, State.NOMINAL)
    if full >= memory.shed_pressure_full_pct:
        return _Call(State.SHED, State.SHED, f"all tasks wait for memory {full:.0f} % of the time")
    if free is not None and free < memory.shed_available_mib:
        return _Call(State.SHED, State.SHED, f"{free:.0f} MiB of memory are left")
    if some >= memory.reduce_pressure_some_pct:
        return _Call(State.REDUCED, State.REDUCED, f"tasks wait for memory {some:.0f} % of the time")
    if free is not None and free < memory.reduce_available_mib:
        return _Call(State.REDUCED, State.REDUCED, f"{free:.0f} MiB of memory are left")
    return _Call(State.NOMINAL, State.NOMINAL)


# -- from state to state


def _moved(states: StatesPolicy, budget: Budget, call: _Call, now: float) -> Budget:
    if call.enter > budget.state:
        since = budget.called_since if budget.called >= call.enter else now
        called = replace(budget, called=call.enter, called_since=since)
        wait = states.critical_s if call.enter is State.SHED else states.escalate_s if call.enter is State.PAUSED else 0.0
        if now - since >= wait:
            return Budget(call.enter, now, call.reason)
        # What is called for less has lasted, too: heat passes through where it is slowed on its way to where it is held.
        return called
    budget = replace(budget, called=State.NOMINAL, called_since=now, since=now if budget.since is None else budget.since)
    if call.stay >= budget.state:
        return replace(budget, reason=call.reason or budget.reason)
    least = {State.REDUCED: states.reduced_s, State.PAUSED: states.paused_s, State.SHED: states.shed_s}[budget.state]
    if not call.at_once and now - (budget.since or 0.0) < least:
        return budget
    better = State.NOMINAL if call.at_once else State(budget.state - 1)
    return Budget(better, now, (call.reason or budget.reason) if better else "")


# -- heat


def _warmed(thermal: ThermalPolicy, before: Situation, now: float, readings: Readings) -> Situation:
    """The filtered temperature, and what share of full power it allows."""
    t = _plausible(readings.temperature_c)
    if t is None or not thermal.enabled:
        return before if thermal.enabled else replace(before, controlling=False, u=1.0)
    passed = max(0.0, now - before.time) if before.time is not None else 0.0
    former = before.temperature_c
    smooth = t if former is None else former + (t - former) * (1 - math.exp(-passed / _SMOOTHING_S))
    if not before.controlling and smooth < thermal.control_on_c:
        return replace(before, temperature_c=smooth, u=1.0, integral=0.0)
    if before.controlling and smooth < thermal.control_off_c and before.u >= 1.0:
        return replace(before, temperature_c=smooth, controlling=False, u=1.0, integral=0.0)
    error = thermal.setpoint_c - smooth
    gain = thermal.kp_per_c * (_OVER if error < 0 else 1)
    start = before.integral if before.controlling else 1.0 - _FEED_FORWARD - thermal.kp_per_c * error
    wanted = _FEED_FORWARD + gain * error + start + thermal.ki_per_c_s * error * passed
    u = min(1.0, max(_LEAST_U, wanted))
    u = max(before.u - _SLEW_PER_S * max(passed, 0.1), min(before.u + _SLEW_PER_S * max(passed, 0.1), u))
    # The integral stands still where the output can't follow it.
    integral = start + thermal.ki_per_c_s * error * passed if _LEAST_U < wanted < 1.0 or wanted * error < 0 else start
    return replace(before, temperature_c=smooth, controlling=True, u=u, integral=integral)


def speed(threads: int, most: int) -> float:
    """Of decoding, as a share of that with all threads: it is bound by memory, so the last ones add little.

    Modelled; 2 of 4 threads gave 83 % on a Snapdragon 778G (llama-bench, others' measurement), this says 75.
    """
    return 1 - (1 - threads / most) ** 2


def split(u: float, most: int) -> tuple[int, float]:
    """Threads and duty that make the best of a share of full power; a thread takes its share of it."""
    options = [(threads, min(1.0, u * most / threads)) for threads in range(1, most + 1)]
    return max(options, key=lambda option: (round(speed(option[0], most) * option[1], 9), -option[0]))


# -- what follows


def _limited(policy: Policy, after: Situation, now: float, readings: Readings, most: int) -> tuple[Situation, Allowance]:
    most = max(1, most)
    cause: Name = max(NAMES, key=lambda name: after.budgets[name].state)
    worst = after.budgets[cause]
    u = after.u if after.controlling else 1.0
    if now - after.low_voltage < policy.thermal.undervoltage_s:
        u = min(u, 0.5)
    if "no temperature" in after.budgets["thermal"].reason:
        u = min(u, 0.5)
    threads, duty = split(u, most)
    held = after.threads or most
    if threads != held and now - after.threads_since < policy.thermal.thread_change_s:
        threads, duty = held, min(1.0, u * most / held)
    if threads != held:
        after = replace(after, threads=threads, threads_since=now)
    if after.budgets["battery"].state is State.REDUCED:
        duty = min(duty, policy.battery.reduced_duty)
    power = readings.battery_pct is None or bool(readings.charging)
    background = worst.state is State.NOMINAL and (power or (readings.battery_pct or 0) >= policy.battery.background_above_pct)
    limits = Allowance(
        state=worst.state,
        cause=cause if worst.state else None,
        reason=worst.reason if worst.state else "",
        threads=0 if threads == most else threads,
        duty=round(duty, 3),
        background=background,
        retry_s=_retry(policy, cause, readings) if worst.state >= State.PAUSED else 0.0,
    )
    return after, limits


def _retry(policy: Policy, cause: Name, readings: Readings) -> float:
    """When it can be otherwise at the earliest, in seconds."""
    if cause == "battery":
        return _RETRY_BATTERY_S
    if cause == "memory":
        return _RETRY_MEMORY_S
    above = (_plausible(readings.temperature_c) or policy.thermal.pause_c) - policy.thermal.resume_c
    return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, policy.states.paused_s, above / _COOLING_C_PER_S))


def _seen(before: Situation, readings: Readings) -> set[str]:
    named = ("temperature_c", "battery_pct", "available_mib")
    return {name for name in named if name in before.seen or getattr(readings, name) is not None}


def _plausible(celsius: float | None) -> float | None:
    return celsius if celsius is not None and _COLD < celsius < _HOT else None
