"""The parts of the daemon that the configuration describes, made from it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agentd_sandbox import Limits as SandboxLimits

from agentd import models
from agentd.api import Tcp
from agentd.audit.notes import BadNote
from agentd.audit.ship import Shipper, receiver
from agentd.audit.witness import Witness
from agentd.budgets import ZONES, Budgets, Device, Program, Quota, calibration, policy_for, this_device, total_mib
from agentd.budgets.athermal import EVERY_S
from agentd.budgets.memory import Cgroup
from agentd.budgets.memory import Engine as EngineMemory
from agentd.budgets.policy import calibrated
from agentd.budgets.power import Counter
from agentd.budgets.pressure import alarm
from agentd.budgets.programs import Teller
from agentd.budgets.supplies import supply
from agentd.engine import automaton
from agentd.engine.prompt import ToolSpec
from agentd.engine.settings import EngineSettings, Room
from agentd.errors import ConfigError, Reason, RequestError, SandboxError
from agentd.grants import Grant, Own, programs
from agentd.journal import Keep
from agentd.runs import Limits, ModelSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd_sandbox import Level

    from agentd.audit import AuditLog
    from agentd.budgets import Allowance, Policy
    from agentd.budgets.governor import Budget
    from agentd.budgets.state import Name
    from agentd.calls import Toolbox
    from agentd.config import Config
    from agentd.engine.client import Engine
    from agentd.store import Store

_ROOM = 0.9  # of the limit: what grows while it runs is not to reach it
_VCGENCMD_S, _PMIC_S = 10.0, 10.0  # between two questions: asking 10 times a second slows decoding


def own(config: Config, file: Path | None) -> Own:
    """What belongs to the daemon, or is run by it. Directories of ours are made, so that nobody makes them elsewhere and moves
    them here: from then on they are known by identity.
    """
    with contextlib.suppress(OSError):  # who starts says why it can't be had
        config.automations.mkdir(parents=True, exist_ok=True)
    tls = (config.listen.key, config.listen.certificate, config.listen.client_ca) if config.listen else (None, None, None)
    single = (file, config.audit.anchor_file, tls[0])
    absent = (config.state, config.socket, config.automations, *config.tools.bundles, *(path for path in single if path))
    model = Path(config.engine.model)
    protected = (*programs(), *(path for path in (*tls[1:], model) if path and path.is_absolute()))
    return Own(absent, protected)


def rules(config: Config) -> list[Grant]:
    """Raises ConfigError for a rule that says nothing."""
    made_all = []
    for number, grant in enumerate(config.grants, 1):
        where = f"agentd.toml, grant {number}"
        try:
            made_all.append(Grant.configured(where, **grant.model_dump()))
        except RequestError as e:
            hint = "docs/grants.md shows scopes of every kind."
            raise ConfigError(Reason.CONFIG_INVALID, f"In {where}: {e.message}", hint=hint, metadata=e.metadata) from None
    return made_all


def witnesses(config: Config) -> tuple[Witness, ...]:
    """Raises ConfigError."""
    try:
        return tuple(Witness.parse(witness.key, witness.url) for witness in config.audit.witness)
    except BadNote as e:
        hint = "`agentd witness --key` prints the key of a witness."
        raise ConfigError(Reason.CONFIG_INVALID, f"In [[audit.witness]] of agentd.toml: {e}.", hint=hint) from None


def shippers(config: Config, store: Store, audit: AuditLog) -> tuple[Shipper, ...]:
    """Raises ConfigError."""
    made = []
    for ship in config.audit.ship:
        try:
            made.append(Shipper(ship.name, ship.format, receiver(ship.to, ship.format), store, audit))
        except ValueError as e:
            message = f"In [[audit.ship]] {ship.name!r} of agentd.toml: {e}."
            raise ConfigError(Reason.CONFIG_INVALID, message, hint="docs/audit.md shows receivers of every kind.") from None
    return tuple(made)


def policy(config: Config) -> Policy:
    """Raises ConfigError for thresholds that make no sense."""
    given, proc = config.budgets, Path(config.tools.proc)
    device = this_device(proc, os.environ) if given.device == "auto" else given.device
    names = ("thermal", "battery", "memory", "states", "admission")
    headroom = _cgroup(config).headroom()
    total = min(total_mib(proc), headroom.limit_mib if headroom else math.inf)
    made = policy_for(device, total, {name: getattr(given, name) for name in names})
    return calibrated(made, calibration.load(calibration_file(config)), threads(config))


def calibration_file(config: Config) -> Path:
    return config.state / "calibration.json"


def threads(config: Config) -> int:
    """The most that the engine computes with."""
    return config.engine.threads or os.cpu_count() or 1


def budgets(
    config: Config,
    pace: Callable[[Allowance], None],
    changed: Callable[[Allowance], None],
    record: Callable[[Name, Budget, Budget], None],
    engine: Engine,
    made: Policy,
) -> Budgets:
    sysfs, proc = Path(config.tools.sysfs), Path(config.tools.proc)
    own = EngineMemory(
        Path("/proc"),  # of this process's child, whatever stands in for the device's own
        engine.settings.path,
        pid=lambda: engine.pid or 0,
        passes=lambda: engine.meter.total.passes,
    )
    battery, android = made.battery, made.device == "android"
    provider = "termux" if battery.provider == "auto" and shutil.which("termux-battery-status") else battery.provider
    firmware = shutil.which("vcgencmd") is not None
    sensors = Device(
        *(sysfs, proc, made.thermal.zones or (() if android else ZONES)),
        supply=supply(provider, battery.address, battery.command) if battery.enabled else None,
        vcgencmd=Program(("vcgencmd", "get_throttled"), _VCGENCMD_S) if firmware else None,
        pmic=Program(("vcgencmd", "pmic_read_adc"), _PMIC_S) if firmware and made.device == "pi5" else None,
        athermal=Teller((sys.executable, "-I", "-m", "agentd.budgets.athermal"), EVERY_S) if android else None,
        rapl=Counter(sysfs / "class" / "powercap" / "intel-rapl:0"),
        batteries=battery.provider in ("auto", "sysfs"),
        cgroup=_cgroup(config),
        engine=own,
    )
    beside = (sensors.supply.asked if sensors.supply else None, sensors.vcgencmd, sensors.pmic, sensors.athermal)
    programs = tuple(each for each in beside if each)
    made_alarm = functools.partial(alarm, proc, os.environ)
    return Budgets(made, sensors, threads(config), pace, changed, record, engine.needs_mib, programs, made_alarm)


def _cgroup(config: Config) -> Cgroup:
    return Cgroup(Path(config.tools.proc), Path(config.tools.sysfs) / "fs" / "cgroup")


async def room(budgets: Budgets) -> Room:
    """What the engine may take beside its weights: less than the policy's own limit, and what others leave by now."""
    memory = budgets.policy.memory
    if not memory.enabled:
        return Room()
    await budgets.fresh()
    readings = budgets.readings
    ever = min(memory.max_anon_mib * _ROOM, (readings.memory_limit_mib or math.inf) - memory.shed_available_mib)
    left = (math.inf if readings.available_mib is None else readings.available_mib) - memory.shed_available_mib
    return Room(max(1.0, min(ever, left)), max(1.0, ever))


def quotas(config: Config) -> tuple[Quota, ...]:
    return tuple(Quota(**each.model_dump()) for each in config.quotas)


def limits(config: Config) -> Limits:
    runs = config.runs
    return Limits(runs.steps, runs.tokens, runs.seconds, runs.repeats, runs.calls, runs.joules)


def sandbox_limits(config: Config) -> SandboxLimits:
    sandbox = config.sandbox
    return SandboxLimits(sandbox.processes, memory_mib=sandbox.memory_mib, written_mib=sandbox.written_mib)


def keep(config: Config) -> Keep:
    journal = config.journal
    sizes = (journal.file_limit_mib << 20, journal.call_limit_mib << 20, journal.total_mib << 20)
    return Keep(*sizes, journal.days, journal.runs, journal.low_space_mib << 20)


def tcp(config: Config) -> Tcp | None:
    """Raises ConfigError if certificate or key can't be read."""
    listen = config.listen
    if listen is None:
        return None
    try:
        texts = [path.read_bytes() if path else b"" for path in (listen.certificate, listen.key, listen.client_ca)]
    except OSError as e:
        message = f"In [listen] of agentd.toml: {e.filename} can't be read: {e.strerror}."
        raise ConfigError(Reason.CONFIG_INVALID, message, hint="Give the paths of PEM files.") from None
    return Tcp(listen.address, *texts)


def engine_settings(config: Config, made: Policy) -> EngineSettings:
    engine = config.engine
    return EngineSettings(
        *(models.locate(engine.model), engine.context, engine.batch, engine.threads, engine.repack, engine.load_timeout_s),
        least_context=made.memory.least_context,
        kept=config.state / "footprint.json",
        parallel=engine.parallel,
        prefixes=config.state / "prefixes",
        prefixes_mib=engine.prefixes_mib,
    )


def model_settings(config: Config, toolbox: Toolbox) -> ModelSettings:
    """Raises ConfigError (MANIFEST_INVALID) for a tool that no grammar can be made of."""
    specs = tuple(ToolSpec(tool.name, tool.manifest.description, tool.schema()) for tool in toolbox.tools.values())
    for each in (*([spec] for spec in specs), specs):
        try:
            automaton.calls([(spec.name, spec.parameters) for spec in each])
        except automaton.NotExpressible as e:
            which = each[0].name if len(each) == 1 else "all tools together"
            message = f"The parameters of {which} can't be told to the model: {e}."
            raise ConfigError(Reason.MANIFEST_INVALID, message, hint="Make them fewer or flatter.") from None
    engine = config.engine
    return ModelSettings(engine.system, specs, engine.thinking, engine.temperature, engine.seed)


def below_minimum(level: Level, minimum: str) -> SandboxError:
    return SandboxError(
        Reason.SANDBOX_UNSUPPORTED,
        f"This machine confines tools at {level.name}, and sandbox.minimum in agentd.toml is {minimum}.",
        hint=f"Missing: {'; '.join(level.missing) or 'nothing that was looked for'}. docs/sandbox.md explains the levels.",
        metadata={"level": level.name, "minimum": minimum},
    )
