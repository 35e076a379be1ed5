"""The composition root: the one place that knows all parts, starts them in order and stops them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar

from agentd_sandbox import Sandbox, SandboxFailure, no_level, probe

from agentd import automations, calls, models, parts, standing, systemd
from agentd.api import ApiParts, ApiServer, AuditParts
from agentd.audit import (
    Archive,
    AuditLog,
    Checkpoints,
    Index,
    Redaction,
    Renewal,
    Upkeep,
    load_signer,
    settle_key,
)
from agentd.audit.anchors import found
from agentd.automations import Automations, Events, unmet
from agentd.budgets import Admission, Quotas, State, Usage, calibration
from agentd.budgets.policy import calibrated
from agentd.calls import Calls, Permission, Places
from agentd.chronicle import Chronicle
from agentd.config import DEVICES
from agentd.descriptors import calls_at_once
from agentd.devices import Devices
from agentd.engine.calibrate import Calibrator, Progress
from agentd.engine.client import Engine
from agentd.engine.throttle import Throttle
from agentd.errors import AgentdError, EngineError, Reason, StoreError
from agentd.grants import Approvals, Clock, FileLabels, Grant, Grants, Notifier, Taint, moment, propose
from agentd.journal import Journal
from agentd.metrics import Sources, collect, exporters
from agentd.principals import Roster, Tokens
from agentd.principals.roster import user_name
from agentd.runs import Runs
from agentd.runs.record import RunRecords
from agentd.runs.warm import warm
from agentd.store import Reserve, Store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable
    from pathlib import Path

    from agentd.budgets import Allowance, Priority
    from agentd.budgets.governor import Budget
    from agentd.budgets.state import Name
    from agentd.config import Config
    from agentd.grants import Moment
    from agentd.metrics import Family
    from agentd.runs import Run
    from agentd.v1 import system_pb2

T = TypeVar("T")
_log = logging.getLogger(__name__)
_GRACE_S = 5.0
_SWEEP_S = 3600.0
_RECOVER_S = 30.0


class Daemon:
    """Builds everything from a configuration. `start`, then `stop`; `run` does both around the signals."""

    def __init__(self, config: Config, file: Path | None = None) -> None:
        """Opens the store and reads the tools. `file` is where the configuration is from. Raises StoreError, ConfigError."""
        self._config = config
        self._calls_at_once = calls_at_once(calls.CONCURRENT_CALLS)
        self._own = parts.own(config, file)
        self._toolbox = calls.load(config.tools.bundles, files("agentd.bundled_tools"), config.tools.bundled)
        self._credentials = calls.load_credentials(config.credentials, config.state)
        if Reserve(config.state).release_if_full():
            _log.error("the disk of %s is full: the space that was set aside for a start is used", config.state)
        self._store = Store(config.state)
        self._audit = AuditLog(self._store)
        self._key_file = config.state / "audit.key"
        settle_key(self._key_file, self._audit)
        signer = load_signer(self._key_file, config.audit.origin)
        anchors = found(config.audit.anchor_file, journal=config.audit.journald)
        policy = parts.policy(config)
        self._settings = parts.model_settings(config, self._toolbox)
        self._engine = Engine(parts.engine_settings(config, policy), lambda: parts.room(self._budgets))
        self._index = Index(config.state / "index.db", self._audit)
        self._checkpoints = Checkpoints(self._store, self._audit, signer, anchors, parts.witnesses(config))
        self._journal = Journal(self._store, self._audit, config.state / "objects", parts.keep(config))
        self._records = RunRecords(self._store)
        self._clock = clock = Clock(self._audit.newest_ns())
        self._grants = Grants(
            self._rules(automations.rules(automations.read_all(config.automations)[0])),
            self._store,
            self._audit,
            lambda: self._moment(clock),
            self._own,
        )
        self._labels = FileLabels(self._store)
        self._approvals = Approvals(config.approvals.timeout_s, config.approvals.pending)
        self._devices = Devices(config.state)
        self._notifier = Notifier(self._approvals, f"unix:{user_name(os.getuid())}", config.socket, self._devices.screen)
        self._archive = Archive(self._store, self._audit, self._checkpoints, config.state / "archive")
        self._checkpoints.rows = self._archive.rows
        self._upkeep = Upkeep(
            *(self._audit, self._checkpoints, self._index, self._archive),
            *(config.audit.keep_events, config.audit.anchor_file),
        )
        self._redaction = Redaction(
            self._store, self._audit, self._index, self._records.forget, self._engine.forget_from_outside
        )
        self._shippers = parts.shippers(config, self._store, self._audit)
        tell = (self._keep_pace, self._tell_runs, self._record_budget)
        self._budgets = parts.budgets(config, *tell, self._engine, policy)
        self._chronicle = Chronicle(self._store, self._audit, self._budgets)
        self._admission = Admission(
            *(policy.admission, lambda: self._budgets.limits, self._count_admission), parallel=config.engine.parallel
        )
        metrics = config.metrics
        self._exporters = exporters(metrics.listen, metrics.otlp, metrics.every_s, self._metrics)
        self._quotas = Quotas(parts.quotas(config), self._store)
        self._quotas.load()
        roles = {principal.name: frozenset(principal.roles) for principal in config.principals}
        self._tokens = Tokens(self._store, self._audit, self._grants.now_ns)
        self._roster = Roster(os.getuid(), roles, self._tokens, self._chronicle.wrong_token)
        self._recovered: list[str] = []
        self._model_error = ""
        self._digests = models.Digests(self._engine.settings.path, config.state / "model.json")
        self._preload: asyncio.Task[None] | None = None

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends at once."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(1)  # nothing is lost: the next start puts back what is open
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            await self.start()
            ready()
            systemd.notify("READY=1", f"STATUS=ready on {self._config.socket}", f"MAINPID={os.getpid()}")
            alive = asyncio.create_task(systemd.keep_telling(), name="watchdog")
            await stop.wait()
            alive.cancel()
        finally:
            systemd.notify("STOPPING=1")
            await self.stop()

    async def start(self) -> None:
        """Recover, confine, listen; the model loads meanwhile. Raises DaemonError."""
        config = self._config
        self._upkeep.look()
        self._unless_damaged(self._redaction.finish)
        self._recovered = self._journal.recover()
        await asyncio.to_thread(self._devices.recover)
        lost = self._records.close_lost()
        deferred = self._records.deferred()
        self._confine()
        devices = DEVICES | config.devices
        places = Places(config.tools.folder, config.tools.sysfs, config.tools.proc, devices, self._own)
        taint = Taint(config.taint.trusted, config.taint.private)
        permission = Permission(self._grants, self._approvals, taint, self._labels, self._journal, self._audit)
        self._calls = Calls(
            *(self._toolbox, permission, self._journal, self._audit, self._sandbox, self._level, places),
            at_once=self._calls_at_once,
            keep_outputs=config.audit.outputs,
            budget=self._chronicle.device,
            spend=self._quotas.call,
        )
        policy = self._budgets.policy
        self._throttle = Throttle(self._engine, policy.states.hold_s, policy.memory.idle_unload_s)
        self._calibrator = Calibrator(self._engine, self._throttle, self._budgets, self._admission)
        self._runs = Runs(
            *(self._records, self._engine, self._calls, self._settings, parts.limits(config)),
            record=self._record_run,
            admission=self._admission,
            quotas=self._quotas,
            used=self._used,
            is_known=lambda name, token: self._automations.knows(name) or self._roster.knows(name, token),
            prepare=self._engine.prepare,
        )
        self._automations = Automations(
            *(config.automations, Events(self._store), self._runs, self._calls.undoing.take_back),
            unmet=lambda when: unmet(when, self._moment(self._clock), self._budgets.readings),
            fix=self._change_rules,
            commands=self._toolbox.commands,
        )
        self._record_boot()
        self._record_lost(lost)
        await self._budgets.start()  # what it allows is known before anybody can ask for anything
        self._throttle.start()
        for exporter in self._exporters:
            exporter.start()
        await self._automations.reload()  # before anybody can ask what they are
        self._server = ApiServer(
            *(self._parts(), config.socket, int(config.socket_mode, 8), config.state),
            *(parts.tcp(config), systemd.listener()),
        )
        await self._server.start()
        self._runs.resume(deferred)
        await self._automations.start()
        if config.approvals.notify:
            self._notifier.start()
        self._preload = asyncio.create_task(self._load_model(), name="load model")
        for shipper in self._shippers:
            shipper.start()
        self._sweeping = asyncio.create_task(self._sweep(), name="sweep the journal")
        self._recovering = asyncio.create_task(self._recover(), name="restore what is left")
        self._upkeep.start()

    async def stop(self) -> None:
        """In reverse order; each step even if the one before failed."""
        self._digests.close()
        if self._preload:
            self._preload.cancel()
            self._sweeping.cancel()
            self._recovering.cancel()
            await asyncio.wait([self._preload, self._sweeping, self._recovering])
            await self._upkeep.stop()
            for exporter in self._exporters:
                await asyncio.to_thread(exporter.stop)
            await self._automations.stop()
            await self._budgets.stop()
            await self._throttle.stop()
            await self._notifier.stop()
            self._approvals.stop()
            self._audit.end()
            await self._runs.stop()
            await self._server.stop(_GRACE_S)
            await self._calls.undoing.stop()
            await self._engine.stop()
            self._calls.close()
            await self._upkeep.end()
            for shipper in self._shippers:
                await asyncio.to_thread(shipper.stop)
        if hasattr(self, "_sandbox"):
            self._sandbox.stop()
        await asyncio.to_thread(self._devices.close)
        self._index.close()
        self._store.close()

    def _parts(self) -> ApiParts:
        renewal = Renewal(
            *(self._store, self._audit, self._checkpoints, self._index, self._archive),
            *(self._key_file, self._config.state / "archive"),
        )
        audit = AuditParts(self._audit, self._checkpoints, self._index, self._archive, self._redaction, renewal)
        return ApiParts(
            *(self._runs, self._calls, audit, self._budgets, self._calibrate),
            *(self._grants, self._approvals, self._tokens, self._roster, self._automations),
            *(self.status, self._propose),
        )

    def _record_boot(self) -> None:
        chronicle, grants = self._chronicle, self._grants
        tools = {tool.name: tool.digest for tool in self._toolbox.tools.values()}
        before = self._unless_damaged(lambda: self._audit.newest("boot"))
        try:
            chronicle.boot(self._level, grants, tools, self._recovered, str(self._checkpoints.verifier))
            if before:
                chronicle.changed_rules(before.body.get("detail"), grants)
        except AgentdError:
            if not self._audit.closed:
                raise

    def _record_lost(self, lost: list[Run]) -> None:
        for run in lost:
            with contextlib.suppress(AgentdError):  # the log is closed: that is said elsewhere
                self._record_run(run)

    def _unless_damaged(self, do: Callable[[], T]) -> T | None:
        """Where it meets pages that can't be read, the log is closed, and the daemon goes on. Raises StoreError."""
        try:
            return do()
        except StoreError as e:
            if e.reason is not Reason.STORE_DAMAGED:
                raise
            self._upkeep.damaged(e)
            return None

    def _record_run(self, run: Run) -> None:
        engine, loaded = self._config.engine, self._engine.model
        model = {
            "name": loaded.name if loaded else "",
            "file": str(self._engine.settings.path),
            "sha256": self._digests.of(self._engine.loaded_file),
        }
        self._chronicle.run(run, {"model": model, "seed": engine.seed, "temperature": engine.temperature})

    def _rules(self, of_automations: Iterable[Grant]) -> list[Grant]:
        return [*parts.rules(self._config), *of_automations]

    def _change_rules(self, of_automations: Iterable[Grant]) -> None:
        """What has changed is on record. Not for the event loop."""
        former = {"grants": [str(grant) for grant in self._grants.all()]}
        self._grants.fix(self._rules(of_automations))
        with contextlib.suppress(AgentdError):  # a log that is closed is told of elsewhere
            self._chronicle.changed_rules(former, self._grants)

    def _moment(self, clock: Clock) -> Moment:
        """What conditions of grants are held against."""
        now, limits, readings = moment(clock, self._config.tools.sysfs), self._budgets.limits, self._budgets.readings
        charging = readings.charging if now.charging is None else now.charging
        return replace(now, charging=charging, nominal=limits.state is State.NOMINAL)

    async def _calibrate(self, seconds: float) -> AsyncGenerator[Progress, None]:
        """Measure this device, keep what was found, and govern by it from now on."""
        config = self._config
        async with contextlib.aclosing(self._calibrator.run(seconds)) as measuring:
            async for progress in measuring:
                if found := progress.finished:
                    try:
                        await asyncio.to_thread(calibration.save, found, parts.calibration_file(config))
                    except OSError as e:
                        message = f"What was measured can't be kept: {e.strerror}."
                        raise StoreError(Reason.STORE_FULL, message, hint="Free some space in the state folder.") from None
                    self._budgets.policy = calibrated(self._budgets.policy, found, parts.threads(config))
                yield progress

    def _used(self) -> Usage:
        total = self._engine.meter.total
        return Usage(total.generated, total.busy_s, 0, self._budgets.joules)

    def _metrics(self) -> list[Family]:
        numbers = len(self._calls.running()), len(self._runs.going_on()), self._calls.undoing.left_count
        return collect(Sources(self._budgets, self._admission, self._engine, *numbers))

    def _count_admission(self, priority: Priority, decision: str, reason: str) -> None:
        labels = {"class": priority.name.lower(), "decision": decision, "reason": reason}
        self._budgets.tally.add("agentd_admission_total", labels)

    def _record_budget(self, name: Name, before: Budget, after: Budget) -> None:
        self._chronicle.budget(name, before, after)

    def _keep_pace(self, limits: Allowance) -> None:
        self._throttle.apply(limits)

    def _tell_runs(self, limits: Allowance) -> None:
        pace = {"duty": limits.duty, "threads": limits.threads}
        self._runs.notice({"state": limits.state.name, "reason": limits.reason, **pace}, holds=limits.holds)

    def _propose(self, since_ns: int) -> tuple[list[Grant], int]:
        bodies = (entry.body for entry in self._audit.since(since_ns))
        return propose(bodies, self._grants.decide, self._calls.fixed_scopes, self._calls.asks)

    def status(self) -> system_pb2.Status:
        return standing.status(
            self._config,
            engine=self._engine,
            level=self._level,
            calls=self._calls,
            runs=self._runs,
            zygote_pid=self._sandbox.zygote_pid or 0,
            model_error=self._model_error,
            grants=len(self._grants.all()),
            audit_closed=self._audit.closed,
            recovered=self._recovered,
        )

    def _confine(self) -> None:
        """Raises SandboxError where less can be confined than the configuration wants."""
        config = self._config
        self._level = probe()
        if not self._level.reaches(config.sandbox.minimum):
            raise parts.below_minimum(self._level, config.sandbox.minimum)
        self._sandbox = Sandbox(
            self._toolbox.programs,
            config.tools.folder,
            self._level,
            self._credentials,
            parts.sandbox_limits(config),
            operate=self._devices.operate,
            keep_open=(self._store.lock_descriptor,),
        )
        if self._level.confines:
            self._start_sandbox()

    def _start_sandbox(self) -> None:
        try:
            self._sandbox.start()
        except (SandboxFailure, OSError) as e:  # the probe was right a moment ago: say so, refuse tools, go on
            _log.error("the sandbox does not start: %s", e)
            self._level = no_level(str(e))

    async def _sweep(self) -> None:
        """At the start and every hour. What can't be done now is tried again then."""
        while True:
            with contextlib.suppress(AgentdError, OSError):
                await asyncio.to_thread(self._journal.retention.sweep)
                await asyncio.to_thread(self._labels.forget_gone)
            await asyncio.sleep(_SWEEP_S)

    async def _recover(self) -> None:
        """Of failed calls, what could not be restored at once: a disk was full, or somebody's mount was away."""
        while True:
            await asyncio.sleep(_RECOVER_S)
            if self._calls.undoing.left_count:
                with contextlib.suppress(AgentdError, OSError):
                    await self._calls.undoing.recover(patience_s=0.0)  # what others change now waits for another time

    async def _load_model(self) -> None:
        """Ahead of the first request; if it fails, that request says why again."""
        try:
            holds = self._budgets.limits.holds
            if not holds:
                await self._engine.load()
            reader = ThreadPoolExecutor(1, "digest")
            loaded = self._engine.loaded_file or models.identity(self._engine.settings.path)
            await asyncio.get_running_loop().run_in_executor(reader, self._digests.read, loaded)
            reader.shutdown(wait=False)
            if self._config.engine.warm and not holds:
                await warm(self._engine, self._admission, self._settings)
        except EngineError as e:
            self._model_error = str(e)
            _log.error("%s", e)
