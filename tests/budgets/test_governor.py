"""The governor: a pure function, so time and temperatures are made up here, and an hour takes a moment."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.budgets import Allowance, Readings, State, policy_for
from agentd.budgets.governor import Situation, speed, split, step
from tests.budgets.plant import FULL_SPEED, Board

PI5 = policy_for("pi5", 8000, {})
PHONE = policy_for("android", 4000, {})


@dataclass
class Run:
    """A governor with its situation, and the changes of each budget so far."""

    policy: Any = PI5
    threads: int = 4
    now: float = 0.0
    situation: Situation = field(default_factory=Situation)
    allowed: Allowance = field(default_factory=Allowance)
    states: list[State] = field(default_factory=lambda: [State.NOMINAL])
    changes: int = 0

    def look(self, seconds: float = 2.0, **readings: Any) -> Allowance:
        self.now += seconds
        threads = self.allowed.threads
        self.situation, self.allowed = step(self.policy, self.situation, self.now, Readings(**readings), self.threads)
        self.changes += self.allowed.threads != threads
        if self.allowed.state is not self.states[-1]:
            self.states.append(self.allowed.state)
        return self.allowed

    def stay(self, seconds: float, **readings: Any) -> Allowance:
        for _ in range(round(seconds / 2)):
            self.look(2.0, **readings)
        return self.allowed


def hour(board: Board, run: Run | None, noise: float = 0.0) -> tuple[float, float, list[float]]:
    """Tokens a second in the second half, the highest temperature since control was on, and the second half's temperatures."""
    chance, threads, duty = random.Random(1), 4, 1.0
    half, highest, temperatures = 0.0, 0.0, []
    for second in range(0, 3600, 2):
        board.run(2, threads, duty)
        if second == 1800:
            half = board.tokens
        if second >= 1800:
            temperatures.append(board.chip)
        if run:
            allowed = run.look(temperature_c=round(board.chip + chance.uniform(-noise, noise), 1))
            threads, duty = allowed.threads or 4, 0.0 if allowed.holds else allowed.duty
            if run.situation.controlling:
                highest = max(highest, board.chip)
    return (board.tokens - half) / 1800, highest, temperatures


@pytest.mark.parametrize(
    ("resistance", "ambient", "noise"), [(14, 25, 0), (14, 25, 1), (18, 25, 0), (14, 35, 0), (12, 30, 0.5)]
)
def test_a_hot_board_is_held_below_80_degrees_at_little_cost(resistance: float, ambient: float, noise: float):
    """Scenario 1, modelled: within 2 degrees of the setpoint, 85 % of what the firmware's throttling gives, few changes."""
    run = Run()
    rate, highest, temperatures = hour(Board(resistance, ambient), run, noise)
    firmware, _, _ = hour(Board(resistance, ambient), None)
    assert highest < 80
    assert max(abs(each - PI5.thermal.setpoint_c) for each in temperatures) <= 2
    assert rate >= 0.85 * firmware
    assert run.changes <= 3600 / PI5.thermal.thread_change_s
    assert State.PAUSED not in run.states


@pytest.mark.parametrize("resistance", [5, 8])
def test_a_cool_board_is_left_alone(resistance: float):
    """Scenario 2, modelled: full power the whole hour."""
    run = Run()
    rate, _, _ = hour(Board(resistance), run)
    assert rate == pytest.approx(FULL_SPEED, rel=0.002)
    assert run.states == [State.NOMINAL]
    assert run.changes == 0


def test_a_critical_trip_sheds_and_comes_back_in_order():
    """Scenario 3: 86 degrees at once, then 60; each step back lasts its least stay."""
    run = Run()
    run.stay(20, temperature_c=60.0)
    run.look(1.0, temperature_c=86.0)
    assert run.look(1.0, temperature_c=86.0).state is State.SHED
    assert run.allowed.retry_s >= 2
    began = run.now
    while run.allowed.state is not State.NOMINAL:
        run.look(1.0, temperature_c=60.0)
    assert run.states == [State.NOMINAL, State.SHED, State.PAUSED, State.REDUCED, State.NOMINAL]
    states = PI5.states
    assert run.now - began >= states.shed_s + states.paused_s + states.reduced_s


@pytest.mark.parametrize("middle", [PI5.thermal.pause_c, PI5.thermal.control_on_c, PI5.thermal.critical_c])
def test_noise_round_a_threshold_is_no_flapping(middle: float):
    """Scenario 4: a degree up and down for 10 minutes."""
    run, chance = Run(), random.Random(2)
    for _ in range(300):
        run.look(temperature_c=middle + chance.uniform(-1, 1))
    assert len(run.states) - 1 <= 2


def test_a_battery_that_dithers_is_no_flapping():
    """Scenario 4: 24, 25, 26 % and back."""
    run = Run(policy_for("generic", 4000, {"battery": {"pause_below_pct": 25}}))
    for n in range(300):
        run.look(battery_pct=(24.0, 25.0, 26.0, 25.0)[n % 4], charging=False)
    assert len(run.states) - 1 <= 2


def test_the_ladder_of_a_battery():
    """Scenario 6: reduced at 40, paused at 25, shed at 15; waiting work stops below 70; the charger ends it all at once."""
    run, seen = Run(PHONE), dict[State, float]()
    for level in range(80, 4, -1):
        allowed = run.stay(20, battery_pct=float(level), charging=False)
        seen.setdefault(allowed.state, level)
        assert allowed.background is (level >= 70)
    assert seen == {State.NOMINAL: 80, State.REDUCED: 39, State.PAUSED: 24, State.SHED: 14}
    assert run.look(battery_pct=10.0, charging=True).state is State.NOMINAL
    assert run.allowed.background


def test_a_battery_climbs_one_step_at_a_time_past_a_margin():
    """Without the charger being seen: 5 percent more than what it fell at."""
    run = Run(PHONE)
    run.stay(10, battery_pct=20.0, charging=False)
    assert run.allowed.state is State.PAUSED
    run.stay(200, battery_pct=29.0, charging=False)
    assert run.allowed.state is State.PAUSED
    run.stay(200, battery_pct=31.0, charging=False)
    assert run.allowed.state is State.REDUCED


def test_a_sensor_that_falls_silent_is_bad_news_until_it_speaks():
    """Scenario 8: within the time that counts as stale; one that never spoke is none."""
    run = Run()
    run.stay(60, available_mib=4000.0)
    assert run.allowed.state is State.NOMINAL
    run.stay(10, temperature_c=50.0, available_mib=4000.0)
    run.stay(PI5.states.stale_s + 4, available_mib=4000.0)
    assert (run.allowed.state, run.allowed.cause) == (State.REDUCED, "thermal")
    assert "no temperature" in run.allowed.reason
    assert (run.allowed.threads or 4) * run.allowed.duty <= 2
    run.stay(PI5.states.reduced_s + 4, temperature_c=50.0, available_mib=4000.0)
    assert run.allowed.state is State.NOMINAL


@pytest.mark.parametrize(
    "bad",
    [{"temperature_c": 90.0}, {"battery_pct": 5.0, "charging": False}, {"available_mib": 100.0}],
    ids=lambda bad: next(iter(bad)),
)
def test_silence_makes_nothing_better(bad: dict[str, Any]):
    """Neither a missed read nor a sensor that is gone ends what it has called for."""
    run = Run()
    run.stay(20, **bad)
    state = run.allowed.state
    assert state >= State.PAUSED
    run.stay(600)
    assert run.allowed.state is state


def test_one_sample_seen_twice_is_one_sample():
    """A driver that hangs, or is slower than the steps: what it said once does not last for that."""
    run = Run()
    run.look(temperature_c=50.0, at=2.0)
    for _ in range(5):
        assert run.look(2.0, temperature_c=110.0, at=3.0).state <= State.REDUCED
    assert run.look(2.0, temperature_c=110.0, at=13.0).state is State.SHED


@pytest.mark.parametrize("pair", [(81.9, 84.4), (81.5, 95.0), (84.0, None)])
def test_noise_does_not_hide_that_it_is_too_hot(pair: tuple[float, float | None]):
    """Every second sample below the mark, or missing."""
    run = Run()
    for n in range(60):
        run.look(temperature_c=pair[n % 2])
    assert run.allowed.state >= State.PAUSED


def test_a_model_that_does_not_fit_is_not_loaded_over_and_over():
    """Shed for memory; when its own is back there is not enough for it to come again."""
    run = Run()
    free, needed, loaded, loads = 350.0, 300.0, True, 0
    for _ in range(1800):
        now = free if loaded else free + needed
        run.now += 2
        readings = Readings(available_mib=now)
        run.situation, run.allowed = step(PI5, run.situation, run.now, readings, 4, needs_mib=0 if loaded else needed)
        if run.allowed.state is State.SHED:
            loaded = False
        elif not loaded and run.allowed.state <= State.REDUCED:
            loaded, loads = True, loads + 1
    assert loads <= 1


@pytest.mark.parametrize(("readings", "state"), [
    ({"available_mib": 5000.0}, State.NOMINAL),
    ({"available_mib": 900.0}, State.REDUCED),
    ({"available_mib": 300.0}, State.SHED),
    ({"available_mib": 5000.0, "pressure_some_pct": 12.0}, State.REDUCED),
    ({"available_mib": 5000.0, "pressure_some_pct": 50.0, "pressure_full_pct": 25.0}, State.SHED),
    ({"thermal_status": 0}, State.NOMINAL),
    ({"thermal_status": 2}, State.REDUCED),
    ({"available_mib": 4000, "reread_pct": 30}, State.REDUCED),
    ({"available_mib": 4000, "anonymous_mib": 1600}, State.REDUCED),
    ({"thermal_status": 3}, State.PAUSED),
    ({"thermal_status": 4}, State.SHED),
    ({"undervoltage": True, "temperature_c": 40.0}, State.REDUCED),
])  # fmt: skip
def test_what_each_reading_calls_for(readings: dict[str, Any], state: State):
    assert Run().stay(10, **readings).state is state


def test_undervoltage_slows_for_a_minute():
    run = Run()
    run.look(undervoltage=True, temperature_c=40.0)
    assert (run.allowed.threads or 4) * run.allowed.duty <= 2
    run.stay(58, undervoltage=False, temperature_c=40.0)
    assert run.allowed.state is State.REDUCED
    run.stay(20, undervoltage=False, temperature_c=40.0)
    assert run.allowed == Allowance()


READINGS = st.fixed_dictionaries({}, optional={
    "temperature_c": st.floats(allow_nan=True, allow_infinity=True), "thermal_status": st.integers(-1, 7),
    "undervoltage": st.booleans(), "battery_pct": st.floats(0, 100), "charging": st.booleans(),
    "available_mib": st.floats(0, 1e6), "pressure_some_pct": st.floats(0, 100), "pressure_full_pct": st.floats(0, 100),
})  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 120), READINGS), max_size=40), st.integers(1, 16))
def test_whatever_is_read_the_allowance_makes_sense(rounds: list[tuple[float, dict[str, Any]]], threads: int):
    """A duty above nothing and threads that there are; better states come one step at a time but for the charger."""
    run = Run(threads=threads)
    for seconds, readings in rounds:
        before = run.situation.budgets
        allowed = run.look(seconds, **readings)
        assert 0 < allowed.duty <= 1
        assert 0 <= allowed.threads < threads
        assert allowed.state == max(each.state for each in run.situation.budgets.values())
        assert (allowed.cause is None) == (allowed.state is State.NOMINAL)
        assert bool(allowed.reason) >= bool(allowed.state)
        for name, each in run.situation.budgets.items():
            if not (name == "battery" and readings.get("charging")):
                assert each.state >= before[name].state - 1


@given(st.floats(0.05, 1), st.integers(1, 16))
def test_power_is_spent_on_few_threads_first(u: float, most: int):
    """Never more than there is, and never slower than all threads with pauses."""
    threads, duty = split(u, most)
    assert 1 <= threads <= most
    assert threads * duty <= u * most + 1e-9 or threads == 1
    assert speed(threads, most) * duty >= u - 1e-9


def test_a_phone_that_tells_no_temperature_is_slowed_by_its_status():
    """Half of full power while it is warm; all of it when it no longer is."""
    run = Run(PHONE)
    assert run.stay(60, thermal_status=0).duty == 1
    warm = run.stay(60, thermal_status=1)
    assert (warm.state, warm.cause) == (State.REDUCED, "thermal")
    assert (warm.threads or 4) * warm.duty <= 2
    assert run.stay(120, thermal_status=0).state is State.NOMINAL


def test_memory_that_is_short_is_trimmed():
    """Weights that do not fit: reduced, with a margin before it is over."""
    run = Run()
    assert not run.stay(60, available_mib=4000).trim
    assert run.stay(20, available_mib=4000, reread_pct=10).trim
    assert run.stay(60, available_mib=4000, reread_pct=1.5).trim
    assert not run.stay(60, available_mib=4000, reread_pct=0.5).trim


def test_a_battery_that_says_nothing_is_no_external_power():
    """Before its first word, when it has fallen silent, and discharging without a level: what can wait waits."""
    run = Run()
    assert run.stay(20, temperature_c=40).background  # no battery at all
    assert not run.look(temperature_c=40, faults={"battery_pct": "has said nothing yet"}).background
    assert run.look(battery_pct=80).background
    assert run.look(temperature_c=40).background  # one round is nothing
    assert not run.stay(20, temperature_c=40).background
    assert not run.look(battery_pct=30).background
    assert not run.look(temperature_c=40).background
    assert not Run().look(charging=False).background
    assert run.look(charging=True).background
