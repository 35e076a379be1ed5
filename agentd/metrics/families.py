"""All metrics at a moment. docs/metrics.md has the list; labels have few values, and nothing of what people write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agentd.budgets import Priority
from agentd.budgets.governor import SENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentd.budgets import Admission, Budgets
    from agentd.budgets.tally import Labels
    from agentd.engine.client import Engine

Kind = Literal["gauge", "counter"]
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with its values by labels, none where nothing is known yet. A counter's name ends with `_total`."""

    name: str
    help: str
    values: Mapping[Labels, float]

    @property
    def kind(self) -> Kind:
        return "counter" if self.name.endswith("_total") else "gauge"


@dataclass(frozen=True, slots=True)
class Sources:
    """Where they are from; and how many calls of tools and how many runs go on."""

    budgets: Budgets
    admission: Admission
    engine: Engine
    calls: int
    runs: int
    leftovers: int
    """Paths of failed calls that could not be restored yet."""


@dataclass(slots=True)
class _Made:
    families: dict[str, Family] = field(default_factory=dict)

    def add(self, name: str, text: str, value: float | None, **labels: str) -> None:
        family = self.families.setdefault(name, Family(name, text, {}))
        if value is not None:
            self.families[name] = Family(name, text, {**family.values, tuple(sorted(labels.items())): float(value)})


def collect(sources: Sources) -> list[Family]:
    """On the event loop."""
    made = _Made()
    _budgets(made, sources.budgets)
    _readings(made, sources.budgets)
    _sensors(made, sources.budgets)
    _engine(made, sources)
    _admission(made, sources)
    made.add("agentd_leftover_paths", "Paths of failed calls that could not be restored yet.", sources.leftovers)
    for name, text in _COUNTED.items():
        made.add(name, text, None)
        for labels, value in sources.budgets.tally.counts.get(name, {}).items():
            made.add(name, text, value, **dict(labels))
    return list(made.families.values())


_COUNTED = {
    "agentd_budget_transitions_total": "Changes of a budget's state.",
    "agentd_budget_state_seconds_total": "How long each budget was in each state.",
    "agentd_undervoltage_events_total": "How often the supply voltage became too low.",
    "agentd_sensor_errors_total": "Rounds in which a sensor failed or said what can't be true.",
    "agentd_admission_total": "Runs that were admitted, deferred or refused.",
}


def _budgets(made: _Made, budgets: Budgets) -> None:
    for name, budget in budgets.situation.budgets.items():
        made.add("agentd_budget_state", "0 nominal, 1 reduced, 2 paused, 3 shed.", budget.state, budget=name)
    limits = budgets.limits
    made.add("agentd_budget_thermal_u", "Share of full power that heat allows.", budgets.situation.u)
    made.add("agentd_pacing_duty_ratio", "Share of the time in which the model computes.", limits.duty)
    made.add("agentd_pacing_threads", "Threads that it computes with.", limits.threads or budgets.threads)
    made.add("agentd_retry_after_seconds", "When clients are told to come back; 0 if at once.", limits.retry_s)
    made.add("agentd_thermal_setpoint_celsius", "What heat is held at.", budgets.policy.thermal.setpoint_c)


def _readings(made: _Made, budgets: Budgets) -> None:
    readings = budgets.readings
    sources = readings.sources
    sensor = sources.get("temperature_c", "")
    made.add("agentd_temperature_celsius", "The hottest sensor that counts.", readings.temperature_c, sensor=sensor)
    made.add("agentd_thermal_headroom_ratio", "Android's: 1 is where it throttles severely.", readings.headroom)
    for flag, bit in _FLAGS.items():
        on = None if readings.throttled is None else bool(readings.throttled >> bit & 1)
        made.add("agentd_firmware_throttled", "What the Raspberry Pi's firmware does now.", on, flag=flag)
    level = readings.battery_pct
    made.add("agentd_battery_level_ratio", "Of a full charge.", None if level is None else level / 100)
    made.add("agentd_battery_charging", "1 on external power.", readings.charging)
    watts = {"source": sources.get("power_w", "none")}
    made.add("agentd_power_watts", "Of the device, or what of it can be measured.", readings.power_w, **watts)
    known = readings.power_w is not None or budgets.joules > 0
    text = "Used since the start, as far as power was known."
    made.add("agentd_energy_joules_total", text, budgets.joules if known else None, **watts)
    available = readings.available_mib
    made.add("agentd_memory_available_bytes", "What the system, or our cgroup, has left.", _bytes(available))
    for kind, share in (("some", readings.pressure_some_pct), ("full", readings.pressure_full_pct)):
        value = None if share is None else share / 100
        made.add("agentd_memory_psi_ratio", "Share of 10 s in which tasks waited for memory.", value, kind=kind)
    made.add("agentd_memory_anon_bytes", "Of the engine, swap included.", _bytes(readings.anonymous_mib))
    made.add("agentd_memory_weights_mapped_bytes", "Weights that are mapped and resident.", _bytes(readings.mapped_mib))
    made.add("agentd_memory_weights_cached_bytes", "Weights in the page cache.", _bytes(readings.cached_mib))
    reread = readings.reread_pct
    made.add("agentd_memory_reread_ratio", "Of the weights, for each pass.", None if reread is None else reread / 100)


_FLAGS = {"undervoltage": 0, "frequency_capped": 1, "throttled": 2, "soft_limit": 3}  # bits of `vcgencmd get_throttled`


def _sensors(made: _Made, budgets: Budgets) -> None:
    readings, now = budgets.readings, budgets.clock()
    for sensor in SENSORS.values():
        seen = budgets.situation.seen.get(sensor)
        if seen is not None or sensor in readings.faults:
            up = getattr(readings, sensor) is not None
            made.add("agentd_sensor_up", "Whether it says something that can be true.", up, sensor=sensor)
        made.add("agentd_sensor_age_seconds", "Since it last did.", None if seen is None else now - seen, sensor=sensor)


def _engine(made: _Made, sources: Sources) -> None:
    engine = sources.engine
    total = engine.meter.total
    made.add("agentd_compute_seconds_total", "In which the model computed.", total.busy_s)
    made.add("agentd_pacing_sleep_seconds_total", "In which it rested to keep its duty.", total.rest_s)
    made.add("agentd_tokens_total", "Tokens of the model.", total.prefilled, kind="prompt")
    made.add("agentd_tokens_total", "Tokens of the model.", total.generated, kind="generated")
    made.add("agentd_tokens_per_second", "Written, of late.", engine.meter.speed())
    joules = sources.budgets.joules
    source = sources.budgets.readings.sources.get("power_w", "none")
    per_token = joules / total.generated if joules and total.generated else None
    made.add("agentd_energy_joules_per_token", "Of the whole device, since the start.", per_token, source=source)
    for what in ("load", "unload"):
        name, text = f"agentd_model_{what}s_total", f"How often the model was {what}ed."
        made.add(name, text, None)
        for (happened, why), times in sorted(engine.loads.items()):
            if happened == what:
                made.add(name, text, times, reason=why)
    made.add("agentd_calls_running", "Calls of tools that go on.", sources.calls)
    made.add("agentd_runs_active", "Runs that wait or go on.", sources.runs)


def _admission(made: _Made, sources: Sources) -> None:
    for priority, waiting in sources.admission.waiting().items():
        name = priority.name.lower()
        made.add("agentd_queue_depth", "Runs that have not begun.", waiting, **{"class": name})
    deferred = sources.admission.waiting()[Priority.BACKGROUND]
    held = not sources.budgets.limits.background
    made.add("agentd_deferred_jobs", "Runs that wait for power or a cool device.", deferred if held else 0)


def _bytes(mib: float | None) -> float | None:
    return None if mib is None else round(mib * _MIB)
