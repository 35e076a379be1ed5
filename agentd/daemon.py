"""The composition root: the one place that knows all parts, starts them in order and stops them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from agentd_sandbox import Limits as SandboxLimits
from agentd_sandbox import Sandbox, SandboxFailure, no_level, probe

from agentd import __version__, calls, models
from agentd.api import ApiParts, ApiServer, Tcp
from agentd.audit import Archive, AuditLog, Checkpoints, Event, Index, load_signer
from agentd.audit.anchors import found, read_notes
from agentd.audit.notes import BadNote
from agentd.audit.ship import Shipper, receiver
from agentd.audit.witness import Witness
from agentd.calls import Calls, Permission, Places
from agentd.config import DEVICES
from agentd.engine.client import Engine, EngineSettings
from agentd.engine.prompt import ToolSpec
from agentd.errors import AgentdError, ConfigError, EngineError, Reason, RequestError, SandboxError
from agentd.grants import Approvals, Clock, Conditions, Grant, Grants, Notifier, Taint, moment, parse, propose
from agentd.journal import Journal, Keep
from agentd.principals import Roster, Tokens
from agentd.principals.roster import user_name
from agentd.runs import Limits, ModelSettings, Runs
from agentd.runs.record import RunRecords
from agentd.store import Store
from agentd.v1 import system_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agentd_sandbox import Level

    from agentd.calls import Toolbox
    from agentd.config import Config
    from agentd.runs import Run

_log = logging.getLogger(__name__)
_GRACE_S = 5.0
_LOOK_S = 5.0  # whether a checkpoint is due
_SWEEP_S = 3600.0


class Daemon:
    """Builds everything from a configuration. `start`, then `stop`; `run` does both around the signals."""

    def __init__(self, config: Config, file: Path | None = None) -> None:
        """Opens the store and reads the tools. `file` is where the configuration is from. Raises StoreError, ConfigError."""
        self._config = config
        single = (file, config.audit.anchor_file)
        own = (config.state, config.socket, *config.tools.bundles, *(path for path in single if path))
        self._own = tuple(dict.fromkeys(path.resolve() for path in own))
        self._toolbox = calls.load(config.tools.bundles, files("agentd.bundled_tools"), config.tools.bundled)
        self._credentials = calls.load_credentials(config.credentials, config.state)
        self._store = Store(config.state)
        self._audit = AuditLog(self._store)
        signer = load_signer(config.state / "audit.key", config.audit.origin)
        anchors = found(config.audit.anchor_file, journal=config.audit.journald)
        self._index = Index(config.state / "index.db", self._audit)
        self._checkpoints = Checkpoints(self._store, self._audit, signer, anchors, _witnesses(config))
        self._journal = Journal(self._store, self._audit, config.state / "objects", _keep(config))
        self._records = RunRecords(self._store)
        clock = Clock(self._audit.newest_ns())
        self._grants = Grants(_rules(config), self._store, self._audit, lambda: moment(clock, config.tools.sysfs), self._own)
        self._approvals = Approvals(config.approvals.timeout_s, config.approvals.pending)
        self._notifier = Notifier(self._approvals, f"unix:{user_name(os.getuid())}", config.socket)
        self._archive = Archive(self._store, self._audit, self._checkpoints, config.state / "archive")
        self._checkpoints.rows = self._archive.rows
        self._shippers = _shippers(config, self._store, self._audit)
        self._recovered: list[str] = []
        self._model_error = ""
        self._model_digest = ""
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
            await stop.wait()
        finally:
            await self.stop()

    async def start(self) -> None:
        """Recover, confine, listen; the model loads meanwhile. Raises DaemonError."""
        config = self._config
        self._recovered = self._journal.recover()
        self._records.close_lost()
        self._level = probe()
        if not self._level.reaches(config.sandbox.minimum):
            raise _below_minimum(self._level, config.sandbox.minimum)
        self._sandbox = Sandbox(
            self._toolbox.programs,
            config.tools.folder,
            self._level,
            self._credentials,
            SandboxLimits(config.sandbox.processes, memory_mib=config.sandbox.memory_mib),
            keep_open=(self._store.lock_descriptor,),
        )
        if self._level.confines:
            self._start_sandbox()
        devices = DEVICES | config.devices
        places = Places(config.tools.folder, config.tools.sysfs, config.tools.proc, devices, self._own)
        taint = Taint(config.taint.trusted, config.taint.private)
        permission = Permission(self._grants, self._approvals, taint, self._journal, self._audit)
        self._calls = Calls(self._toolbox, permission, self._journal, self._audit, self._sandbox, self._level, places)
        self._engine = Engine(_engine_settings(config))
        limits = Limits(config.runs.steps, config.runs.tokens, config.runs.seconds, config.runs.repeats)
        settings = _model_settings(config, self._toolbox)
        self._runs = Runs(self._records, self._engine, self._calls, settings, limits, self._record_run)
        self._look_for_lost_events()
        self._audit.record(_boot(self._level, self._grants, self._toolbox, self._recovered, str(self._checkpoints.verifier)))
        self._server = ApiServer(self._parts(), config.socket, int(config.socket_mode, 8), config.state, _tcp(config))
        await self._server.start()
        if config.approvals.notify:
            self._notifier.start()
        self._preload = asyncio.create_task(self._load_model(), name="load model")
        for shipper in self._shippers:
            shipper.start()
        self._sweeping = asyncio.create_task(self._sweep(), name="sweep the journal")
        self._signing = asyncio.create_task(self._sign(), name="checkpoints of the log")

    async def stop(self) -> None:
        """In reverse order; each step even if the one before failed."""
        if self._preload:
            self._preload.cancel()
            self._sweeping.cancel()
            self._signing.cancel()
            await asyncio.wait([self._preload, self._sweeping, self._signing])
            await self._notifier.stop()
            self._approvals.stop()
            self._audit.end()
            await self._runs.stop()
            await self._server.stop(_GRACE_S)
            await self._engine.stop()
            self._calls.close()
            with contextlib.suppress(AgentdError):  # a full disk must not keep the daemon from stopping
                self._audit.record(Event(kind="stop", principal="agentd"))
                self._checkpoints.make()
            for shipper in self._shippers:
                await asyncio.to_thread(shipper.stop)
        if hasattr(self, "_sandbox"):
            self._sandbox.stop()
        self._index.close()
        self._store.close()

    def _parts(self) -> ApiParts:
        roles = {principal.name: frozenset(principal.roles) for principal in self._config.principals}
        tokens = Tokens(self._store, self._audit, self._grants.now_ns)
        roster = Roster(os.getuid(), roles, tokens, self._wrong_token)
        return ApiParts(
            *(
                self._runs,
                self._calls,
                self._audit,
                self._checkpoints,
                self._index,
                self._archive,
                self._grants,
                self._approvals,
            ),
            *(tokens, roster),
            *(self.status, self._propose),
        )

    def _look_for_lost_events(self) -> None:
        """An end of the log that was cut off fits together; what was kept elsewhere knows better."""
        file = self._config.audit.anchor_file
        notes = read_notes(file.read_text(errors="replace")) if file and file.exists() else []
        if lost := self._checkpoints.lost([*notes, *self._checkpoints.all().values()]):
            _log.error("%d events of the audit log are lost that were signed once; `agentd audit verify` says more", lost)
            self._audit.record(Event(kind="gap", principal="agentd", detail={"lost": lost}))

    async def _sign(self) -> None:
        """A checkpoint at the start, and whenever there is enough new."""
        with contextlib.suppress(AgentdError):
            await asyncio.to_thread(self._checkpoints.make)
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await asyncio.to_thread(self._index.keep_up)
                if await asyncio.to_thread(self._checkpoints.is_due):
                    await asyncio.to_thread(self._checkpoints.make)
            except AgentdError as e:
                _log.warning("the log could not be indexed or signed: %s", e)

    def _record_run(self, run: Run) -> None:
        """What began, from which prompt, with which model; and how it ended."""
        if run.ended:
            stop = run.stop_reason.value if run.stop_reason else ""
            used = {"prompt_tokens": run.prompt_tokens, "generated_tokens": run.generated_tokens, "calls": run.calls}
            answer = hashlib.sha256(run.answer.encode("utf-8", "replace")).hexdigest()
            detail: dict[str, Any] = {"state": run.state.value, "stop_reason": stop, "answer_sha256": answer, **used}
            error = run.error[1] if run.error else ""
        else:
            model = self._engine.model
            prompt = hashlib.sha256(run.prompt.encode("utf-8", "surrogatepass")).hexdigest()
            engine = self._config.engine
            sampler = {"seed": engine.seed, "temperature": engine.temperature}
            named = {"name": model.name if model else "", "file": str(self._engine.settings.path), "sha256": self._model_digest}
            detail, error = {"prompt_sha256": prompt, "model": named, **sampler}, ""
        kind: Any = "run.end" if run.ended else "run.start"
        event = Event(kind=kind, principal=run.principal, session=run.session, run=run.id, error=error, detail=detail)
        self._audit.record(event.model_copy(update={"labels": run.labels.names}))

    def _wrong_token(self, peer: str, why: str) -> None:
        """Nobody waits for this to be durable."""
        event = Event(kind="auth.fail", principal=peer, error=why)
        self._store.submit(lambda db: self._audit.append(db, event))

    def _propose(self, since_ns: int) -> tuple[list[Grant], int]:
        bodies = (entry.body for entry in self._audit.since(since_ns))
        return propose(bodies, self._grants.decide, self._calls.fixed_scopes)

    def status(self) -> system_pb2.Status:
        model, level = self._engine.model, self._level
        return system_pb2.Status(
            version=__version__,
            pid=os.getpid(),
            zygote_pid=self._sandbox.zygote_pid or 0,
            engine_pid=self._engine.pid or 0,
            model=system_pb2.Status.Model(
                name=model.name if model else "",
                path=str(self._engine.settings.path),
                parameters=model.parameters if model else 0,
                context=model.context if model else 0,
                error=self._model_error,
            ),
            sandbox=system_pb2.Status.Sandbox(
                level=level.name, architecture=level.architecture, kernel=level.kernel, missing=level.missing
            ),
            state_folder=str(self._config.state),
            folder=str(self._config.tools.folder),
            tools=len(self._toolbox.tools),
            grants=len(self._grants.all()),
            recovered_calls=[f"calls/{call}" for call in self._recovered],
        )

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
                if moved := await asyncio.to_thread(self._archive.prune, self._config.audit.keep_events, "agentd"):
                    await asyncio.to_thread(self._index.forget, moved.last)
            await asyncio.sleep(_SWEEP_S)

    async def _load_model(self) -> None:
        """Ahead of the first request; if it fails, that request says why again."""
        try:
            await self._engine.load()
            path, known = self._engine.settings.path, self._config.state / "model.json"
            self._model_digest = await asyncio.to_thread(models.digest, path, known)
        except EngineError as e:
            self._model_error = str(e)
            _log.error("%s", e)


def _below_minimum(level: Level, minimum: str) -> SandboxError:
    return SandboxError(
        Reason.SANDBOX_UNSUPPORTED,
        f"This machine confines tools at {level.name}, and sandbox.minimum in agentd.toml is {minimum}.",
        hint=f"Missing: {'; '.join(level.missing) or 'nothing that was looked for'}. docs/sandbox.md explains the levels.",
        metadata={"level": level.name, "minimum": minimum},
    )


def _rules(config: Config) -> list[Grant]:
    """Raises ConfigError for a rule that says nothing."""
    rules = []
    for number, grant in enumerate(config.grants, 1):
        where = f"agentd.toml, grant {number}"
        try:
            conditions = Conditions(grant.charging, grant.hours, grant.nominal)
            made = Grant(grant.principal, grant.tool, parse(grant.scope), grant.decision, "config", where, grant.scope)
        except RequestError as e:
            hint = "docs/grants.md shows scopes of every kind."
            raise ConfigError(Reason.CONFIG_INVALID, f"In {where}: {e.message}", hint=hint, metadata=e.metadata) from None
        expire = int(grant.expires.timestamp() * 1e9) if grant.expires else 0
        rules.append(replace(made, conditions=conditions, expire_ns=expire, rehearse=grant.rehearse))
    return rules


def _witnesses(config: Config) -> tuple[Witness, ...]:
    """Raises ConfigError."""
    try:
        return tuple(Witness.parse(witness.key, witness.url) for witness in config.audit.witness)
    except BadNote as e:
        hint = "`agentd witness --key` prints the key of a witness."
        raise ConfigError(Reason.CONFIG_INVALID, f"In [[audit.witness]] of agentd.toml: {e}.", hint=hint) from None


def _shippers(config: Config, store: Store, audit: AuditLog) -> tuple[Shipper, ...]:
    """Raises ConfigError."""
    made = []
    for ship in config.audit.ship:
        try:
            made.append(Shipper(ship.name, ship.format, receiver(ship.to, ship.format), store, audit))
        except ValueError as e:
            message = f"In [[audit.ship]] {ship.name!r} of agentd.toml: {e}."
            raise ConfigError(Reason.CONFIG_INVALID, message, hint="docs/audit.md shows receivers of every kind.") from None
    return tuple(made)


def _keep(config: Config) -> Keep:
    journal = config.journal
    sizes = (journal.file_limit_mib << 20, journal.call_limit_mib << 20, journal.total_mib << 20)
    return Keep(*sizes, journal.days, journal.runs, journal.low_space_mib << 20)


def _tcp(config: Config) -> Tcp | None:
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


def _engine_settings(config: Config) -> EngineSettings:
    engine = config.engine
    return EngineSettings(
        models.locate(engine.model), engine.context, engine.batch, engine.threads, engine.repack, engine.load_timeout_s
    )


def _model_settings(config: Config, toolbox: Toolbox) -> ModelSettings:
    specs = tuple(ToolSpec(tool.name, tool.manifest.description, tool.schema()) for tool in toolbox.tools.values())
    engine = config.engine
    return ModelSettings(engine.system, specs, engine.thinking, engine.temperature, engine.seed)


def _boot(level: Level, grants: Grants, toolbox: Toolbox, recovered: list[str], key: str) -> Event:
    detail = {
        "version": __version__,
        "pid": os.getpid(),
        "sandbox": level.name,
        "kernel": level.kernel,
        "grants": [str(grant) for grant in grants.all()],
        "tools": {tool.name: tool.digest for tool in toolbox.tools.values()},
        "recovered": recovered,
        "key": key,
    }
    return Event(kind="boot", principal="agentd", detail=detail)
