"""The governor: a pure function from where we are, the time and the readings to where that leads and what may be done there.

Each budget has a state of its own; the worst counts. A worse state comes when what calls for it has lasted a moment, any number
of steps at once; a better one comes one step at a time, past a hysteresis, and after a least stay: a single threshold flaps
(BOINC #5310). Heat is held at a setpoint by a PI controller in between, by fewer threads first and pauses between tokens then:
power falls with the threads faster than speed does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from agentd.budgets.state import NAMES, Allowance, Name, Readings, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentd.budgets.policy import BatteryPolicy, MemoryPolicy, Policy, StatesPolicy, ThermalPolicy

_SMOOTHING_S = 6.0  # time constant of the temperature's filter
_LEAST_U = 0.05
_SLEW_PER_S = 0.05
_FEED_FORWARD = 0.6
_OVER = 3  # above the setpoint it answers harder than below, as the kernel's power allocator does (k_po, k_pu)
_CAUTIOUS_U = 0.5  # where heat can't be seen
_DUTY_STEP = 0.05  # smaller changes would only be told, and make no difference
_MARGIN = 1.25  # of memory, to get back
_ANON_MARGIN = 0.95
SENSORS: dict[Name, str] = {"thermal": "temperature_c", "battery": "battery_pct", "memory": "available_mib"}
"""What each budget is judged by."""
_WATCHED = tuple(SENSORS.values())
_COLD, _HOT = -30.0, 150.0  # beyond these a reading is none
_LIGHT, _SEVERE, _CRITICAL = 1, 3, 4  # of Android's thermal status
_RETRY_BATTERY_S, _RETRY_MEMORY_S = 600.0, 30.0
_LEAST_RETRY_S, _LONGEST_RETRY_S = 2.0, 600.0


@dataclass(frozen=True, slots=True)
class Budget:
    """One of them: its state since when and why; and a worse one that is called for, since when."""

    state: State = State.NOMINAL
    since: float | None = None
    reason: str = ""
    called: State = State.NOMINAL
    called_since: float = 0.0
    code: str = ""
    """Why in a word, of few: for metrics."""


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
    powered: bool = True
    """Whether work that can wait might use some power, when the battery or the charger last said something."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What one budget calls for: `enter` by its thresholds, `stay` by those past the hysteresis."""

    enter: State
    stay: State
    reason: str = ""
    at_once: bool = False
    """Whether the least stay is waived: external power has come."""
    silent: bool = False
    """Whether nothing was said: that is no reason for anything to get better, and none for it to get worse yet."""
    code: str = ""


_NOTHING = _Call(State.NOMINAL, State.NOMINAL)


def step(
    policy: Policy, before: Situation, now: float, readings: Readings, threads: int, needs_mib: float = 0.0
) -> tuple[Situation, Allowance]:
    """`now` is a steady clock in seconds, `threads` how many the engine has at most, `needs_mib` what loading it would take.

    Readings may be those of a former step: what calls for a worse state lasts from sample to sample, not from step to step.
    """
    at = now if readings.at is None else readings.at
    if now - at > policy.states.stale_s:
        readings = Readings(at=at)
    seen = before.seen | {name: at for name in _WATCHED if getattr(readings, name) is not None}
    low = at if readings.undervoltage and policy.thermal.enabled else before.low_voltage
    after = _warmed(policy.thermal, replace(before, seen=seen, low_voltage=low), now, readings)
    calls: dict[Name, _Call] = {
        "thermal": _thermal(policy, after, now, readings),
        "battery": _battery(policy.battery, before.budgets["battery"].state, readings),
        "memory": _memory(policy.memory, before.budgets["memory"].state, readings, needs_mib),
    }
    calls = {name: _silence(policy, name, after, now, calls[name]) for name in NAMES}
    first = before.time is None  # what there is at a start is taken to have lasted
    budgets = {name: _moved(policy.states, before.budgets[name], calls[name], (now, at), first=first) for name in NAMES}
    after = replace(after, budgets=budgets, time=now)
    return _limited(policy, after, now, readings, threads)


# -- what each budget calls for


def _silence(policy: Policy, name: Name, after: Situation, now: float, call: _Call) -> _Call:
    """A sensor that spoke once and says nothing any more is bad news."""
    sensor, enabled = SENSORS[name], getattr(policy, name).enabled
    if not call.silent or not enabled or sensor not in after.seen:
        return call
    silent_s = now - after.seen[sensor]
    if silent_s <= policy.states.stale_s:
        return call
    reduced = max(State.REDUCED, after.budgets[name].state)
    what = sensor.rpartition("_")[0].replace("_", " ")
    return _Call(reduced, reduced, f"no {what} has come for {silent_s:.0f} s", code="silence")


def _thermal(policy: Policy, after: Situation, now: float, readings: Readings) -> _Call:
    thermal = policy.thermal
    if not thermal.enabled:
        return _NOTHING
    status = readings.thermal_status
    if status is not None and status >= _SEVERE:
        state = State.SHED if status >= _CRITICAL else State.PAUSED
        return _Call(state, state, f"the device says that it is too hot (status {status})", code="status")
    t, smooth = _plausible(readings.temperature_c), after.temperature_c
    low = now - after.low_voltage < thermal.undervoltage_s
    warm = status is not None and status >= _LIGHT
    reduced = State.REDUCED if after.controlling or low or warm else State.NOMINAL
    if t is None and status is not None:
        return _Call(reduced, reduced, f"the device says that it is warm (status {status})", code="status")
    if t is None or smooth is None:
        why = "the supply voltage was too low"
        unmeasured = low and "temperature_c" not in after.seen
        return _Call(reduced, reduced, why, code="undervoltage") if unmeasured else replace(_NOTHING, silent=True)
    # One sample may be wrong: what is held is the smoothed one, or the raw one for as long as `_moved` wants.
    felt = max(t, smooth)
    enter = State.SHED if felt >= thermal.critical_c else State.PAUSED if felt >= thermal.pause_c else reduced
    stay = State.SHED if felt >= thermal.pause_c else State.PAUSED if felt > thermal.resume_c else reduced
    marks = {State.SHED: thermal.critical_c, State.PAUSED: thermal.pause_c, State.REDUCED: thermal.control_on_c}
    reason = "the supply voltage was too low" if low and enter is State.REDUCED else f"it is {felt:.1f} C hot"
    reason += f" ({marks[enter]:g} and more)" if enter in marks and felt >= marks[enter] else ""
    code = "undervoltage" if low and enter is State.REDUCED else "temperature"
    return _Call(enter, max(stay, enter), reason, code=code)


def _battery(battery: BatteryPolicy, state: State, readings: Readings) -> _Call:
    level = readings.battery_pct
    if not battery.enabled:
        return _NOTHING
    if readings.charging:
        return _Call(State.NOMINAL, State.NOMINAL, "charging", at_once=True, code="charging")
    if level is None:
        return replace(_NOTHING, silent=True)
    marks = (battery.reduce_below_pct, battery.pause_below_pct, battery.shed_below_pct)
    enter = State(sum(level < mark for mark in marks))
    stay = State(sum(level < mark + battery.hysteresis_pct for mark in marks))
    return _Call(enter, min(stay, max(state, enter)), f"the battery is at {level:.0f} %", code="level")


def _memory(memory: MemoryPolicy, state: State, readings: Readings, needs_mib: float) -> _Call:
    """Past the margin there must be room for the model, too, or it would be loaded and shed over and over."""
    free, some, full = readings.available_mib, readings.pressure_some_pct or 0.0, readings.pressure_full_pct or 0.0
    if not memory.enabled:
        return _NOTHING
    if free is None:
        return replace(_NOTHING, silent=True)
    stay, enter = State.NOMINAL, State.NOMINAL
    crowded, why = _crowded(memory, readings)
    if some >= memory.reduce_pressure_some_pct / 2 or free < memory.reduce_available_mib * _MARGIN or crowded:
        stay = State.REDUCED
    if full >= memory.shed_pressure_full_pct / 2 or free < memory.shed_available_mib * _MARGIN + needs_mib:
        stay = State.SHED
    reason = f"{free:.0f} MiB of memory are left"
    if some >= memory.reduce_pressure_some_pct or free < memory.reduce_available_mib or crowded == "yes":
        enter = State.REDUCED
    if full >= memory.shed_pressure_full_pct or free < memory.shed_available_mib:
        enter = State.SHED
    if free >= memory.reduce_available_mib and enter:
        reason = why if crowded == "yes" else f"tasks wait for memory {max(some, full):.0f} % of the time"
    code = "available" if free < memory.reduce_available_mib else "engine" if crowded == "yes" else "pressure"
    return _Call(enter, min(stay, max(state, enter)), reason, code=code)


def _crowded(memory: MemoryPolicy, readings: Readings) -> tuple[Literal["", "nearly", "yes"], str]:
    """Whether the model takes too much itself: its weights do not fit and are read over and over, or it has grown."""
    reread, anonymous = readings.reread_pct or 0.0, readings.anonymous_mib or 0.0
    if reread >= memory.reduce_reread_pct:
        return "yes", f"the weights do not fit: {reread:.0f} % of them are read from disk again for each pass"
    if anonymous >= memory.max_anon_mib:
        return "yes", f"the model takes {anonymous:.0f} MiB beside its weights"
    near = reread >= memory.reduce_reread_pct / 2 or anonymous >= memory.max_anon_mib * _ANON_MARGIN
    return "nearly" if near else "", ""


# -- from state to state


def _moved(states: StatesPolicy, budget: Budget, call: _Call, time: tuple[float, float], *, first: bool) -> Budget:
    """`time` is now, and when the sample was taken."""
    now, at = time
    if budget.since is None:
        budget = replace(budget, since=now)
    if call.silent:
        return budget
    if call.enter > budget.state:
        since = budget.called_since if budget.called >= call.enter else at
        wait = states.critical_s if call.enter is State.SHED else states.escalate_s if call.enter is State.PAUSED else 0.0
        if first or at - since >= wait:
            return Budget(call.enter, now, call.reason, code=call.code)
        return replace(budget, called=call.enter, called_since=since)
    budget = replace(budget, called=State.NOMINAL, called_since=at)
    if call.stay >= budget.state:
        return replace(budget, reason=call.reason or budget.reason)
    least = {State.REDUCED: states.reduced_s, State.PAUSED: states.paused_s, State.SHED: states.shed_s}[budget.state]
    if not call.at_once and now - (budget.since or 0.0) < least:
        return budget
    better = State.NOMINAL if call.at_once else State(budget.state - 1)
    code = call.code if call.at_once else "recovered"
    return Budget(better, now, (call.reason or budget.reason) if better else "", code=code)


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


def speed(threads: int, most: int, curve: Sequence[float] = ()) -> float:
    """Of decoding, as a share of the fastest: it is bound by memory, so the last threads add little.

    As calibrated, or else modelled; 2 of 4 threads gave 83 % on a Snapdragon 778G (llama-bench, others' measurement), this
    says 75.
    """
    if len(curve) == most:
        return curve[threads - 1]
    return 1 - (1 - threads / most) ** 2


def split(u: float, most: int, curve: Sequence[float] = ()) -> tuple[int, float]:
    """Threads and duty that make the best of a share of full power; a thread takes its share of it."""
    options = [(threads, min(1.0, u * most / threads)) for threads in range(1, most + 1)]
    return max(options, key=lambda option: (round(speed(option[0], most, curve) * option[1], 9), -option[0]))


# -- what follows


def _limited(policy: Policy, after: Situation, now: float, readings: Readings, most: int) -> tuple[Situation, Allowance]:
    most = max(1, most)
    cause: Name = max(NAMES, key=lambda name: after.budgets[name].state)
    worst = after.budgets[cause]
    u = after.u if after.controlling else 1.0
    blind = now - after.seen.get("temperature_c", now) > policy.states.stale_s
    warned = (readings.thermal_status or 0) >= _LIGHT and readings.temperature_c is None
    if policy.thermal.enabled and (blind or warned or now - after.low_voltage < policy.thermal.undervoltage_s):
        u = min(u, _CAUTIOUS_U)
    threads, duty = split(u, most, policy.thermal.thread_curve)
    held = after.threads or most
    if threads != held and now - after.threads_since < policy.thermal.thread_change_s:
        threads, duty = held, min(1.0, u * most / held)
    if threads != held:
        after = replace(after, threads=threads, threads_since=now)
    if after.budgets["battery"].state is State.REDUCED:
        duty = min(duty, policy.battery.reduced_duty)
    after = replace(after, powered=_has_power(policy, after, now, readings))
    background = worst.state is State.NOMINAL and after.powered
    limits = Allowance(
        state=worst.state,
        cause=cause if worst.state else None,
        reason=worst.reason if worst.state else "",
        threads=0 if threads == most else threads,
        duty=max(_LEAST_U, round(duty / _DUTY_STEP) * _DUTY_STEP),
        background=background,
        retry_s=_retry(policy, cause, worst, now, readings) if worst.state >= State.PAUSED else 0.0,
        trim=after.budgets["memory"].state > State.NOMINAL,
    )
    return after, limits


def _has_power(policy: Policy, after: Situation, now: float, readings: Readings) -> bool:
    """Whether work that can wait may use some. A battery that has fallen silent, or not spoken yet, is no external power."""
    sensor = SENSORS["battery"]
    if readings.charging or not policy.battery.enabled:
        return True
    if readings.battery_pct is not None:
        return readings.battery_pct >= policy.battery.background_above_pct
    if sensor in after.seen:
        return after.powered and now - after.seen[sensor] <= policy.states.stale_s
    return readings.charging is None and sensor not in readings.faults


def _retry(policy: Policy, cause: Name, worst: Budget, now: float, readings: Readings) -> float:
    """When it can be otherwise at the earliest, in seconds: after the least stays at any rate."""
    states = policy.states
    least = states.paused_s + (states.shed_s if worst.state is State.SHED else 0.0) - (now - (worst.since or now))
    if cause == "battery":
        return _RETRY_BATTERY_S
    if cause == "memory":
        return max(_RETRY_MEMORY_S, least)
    above = (_plausible(readings.temperature_c) or policy.thermal.pause_c) - policy.thermal.resume_c
    return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, least, above / policy.thermal.cooling_c_per_s))


def _plausible(celsius: float | None) -> float | None:
    return celsius if celsius is not None and _COLD < celsius < _HOT else None
