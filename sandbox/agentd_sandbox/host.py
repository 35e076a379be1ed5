"""The daemon's side: one zygote, workers taken from it, and for each call a broker on a thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox import network
from agentd_sandbox.broker import Broker
from agentd_sandbox.cgroup import Cgroup
from agentd_sandbox.desk import Desk
from agentd_sandbox.errors import OutputTooLarge, SandboxFailure, WorkerCancelled, WorkerDied, WorkerTimeout
from agentd_sandbox.files import Files
from agentd_sandbox.levels import Level, probe
from agentd_sandbox.limits import Limits
from agentd_sandbox.outcome import Outcome
from agentd_sandbox.proxy import Credential, Proxy
from agentd_sandbox.serving import Serving, Waiting
from agentd_sandbox.system import environment, system_rules
from agentd_sandbox.threads import Threads
from agentd_sandbox.walks import Walks
from agentd_sandbox.worker import LENGTH
from agentd_sandbox.zygote import REQUEST

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from agentd_sandbox.access import Access
    from agentd_sandbox.proxy import Operate
    from agentd_sandbox.recorder import Recorder

_START = "import sys; sys.path.insert(0, sys.argv[1]); from agentd_sandbox.zygote import main; main(int(sys.argv[2]))"
_START_TIMEOUT_S = 10.0
_TICK_S = 0.1
_OVERHEAD_BYTES = 4096  # usage and JSON syntax around a result
_WORKERS, _LARGE_WORKERS = 8, 4  # at a time, and how many of them may take all the memory that one may
_STUCK = 128  # brokers that wait for file systems which do not answer


@dataclass(frozen=True, slots=True)
class Job:
    """One call of one tool: what to run, with what, for how long, and how much it may answer."""

    bundle: str
    tool: str
    arguments: Mapping[str, Any]
    variables: Mapping[str, str]
    deadline_s: float
    output_bytes: int


@dataclass(slots=True)
class Sandbox:
    """Runs tool programs in one-shot workers. `programs` maps bundle names to Python source.

    `folder` is the workers' working folder. `level` says which layers there are; left out, it is probed. `keep_open` are
    descriptors that the zygote holds until nothing of any worker is left, such as the lock of the daemon's state.
    `operate` is given the name of a device of the call's scopes and what a tool asks of it; it answers, or raises
    DeviceFailure. It and `run` may be called from several threads at once.
    """

    programs: Mapping[str, bytes]
    folder: Path
    level: Level | None = None
    credentials: Mapping[str, Credential] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    resolve: Callable[[str], list[str]] = network.look_up
    trust: ssl.SSLContext | None = None
    operate: Operate | None = None
    keep_open: tuple[int, ...] = ()
    _zygote: subprocess.Popen[bytes] | None = None
    _control: socket.socket | None = None
    _spare: Waiting | None = None
    _cgroup: Cgroup | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _walks: Walks = field(default_factory=Walks)
    _threads: Threads = field(default_factory=lambda: Threads("broker"))
    _stuck: list[Serving] = field(default_factory=list)
    _processors: itertools.cycle[int] = field(default_factory=lambda: itertools.cycle(sorted(os.sched_getaffinity(0))))

    @property
    def zygote_pid(self) -> int | None:
        return self._zygote.pid if self._zygote else None

    def start(self) -> None:
        """Start the zygote and one worker ahead. Raises Unsupported where nothing can be confined."""
        with self._lock:
            self._start_zygote()
            self._spare = self._fork()
            try:
                self._spare.greet()
            except SandboxFailure:
                self._spare = None
                raise

    def stop(self) -> None:
        with self._lock:
            if self._spare:
                self._spare.discard()
                self._spare = None
            self._stop_zygote()
            if self._cgroup:
                self._cgroup.remove()
            self._threads.stop()

    def run(
        self,
        job: Job,
        access: Access,
        recorder: Recorder,
        cancelled: threading.Event,
        revoked: threading.Event | None = None,
    ) -> Outcome:
        """Run one call to its end; blocks. The worker and all it started are gone when this returns or raises.

        Once `revoked` is set, no more system call is done for it: it ends with WorkerRevoked.
        """
        self._require_brokers()
        revoked = revoked or threading.Event()
        started = time.monotonic()
        worker = self._take()
        try:
            broker = self._broker(worker, access, recorder, started + job.deadline_s, revoked)
        except BaseException:
            worker.discard()
            raise
        serving = Serving(broker, worker)
        try:
            try:
                serving.begin(self._threads)
                body = _exchange(worker, serving, job, cancelled)
            finally:
                serving.end()
            result, error, cpu_us, rss_kb = _answer(body)
        except SandboxFailure as e:
            e.outcome = _outcome(broker, started, None, str(e))
            if serving.is_stuck:
                with self._lock:
                    self._stuck.append(serving)
            raise
        return _outcome(broker, started, result, error, cpu_us, rss_kb)

    def _require_brokers(self) -> None:
        with self._lock:
            self._stuck = [serving for serving in self._stuck if serving.is_stuck]
            if len(self._stuck) >= _STUCK:
                raise SandboxFailure(f"{_STUCK} calls still wait for file systems that do not answer")

    def _broker(
        self, worker: Waiting, access: Access, recorder: Recorder, deadline: float, revoked: threading.Event
    ) -> Broker | Desk:
        stopped = threading.Event()
        peers = network.Network(access.connect, deadline, stopped, self.resolve, access.operate)
        reach = replace(access, system=system_rules(programs=bool(access.execute)))
        made_up = peers.made_up_files() if access.connect else {}
        files = Files(reach, recorder, made_up, self._walks, appends=not worker.questions, revoked=revoked)
        credentials = {name: self.credentials[name] for name in access.use if name in self.credentials}
        proxy = Proxy(
            peers, credentials, files.deny, stopped, self.trust, self.operate, files.require_granted, self.limits.connections
        )
        folder = os.fsencode(os.path.realpath(self.folder))
        if worker.questions:
            return Desk(worker.questions, worker.processes, files, peers, proxy, folder, self.limits)
        one_step = "addfd_send" not in self._level.without
        return Broker(worker.listener, worker.processes, files, peers, proxy, folder, self.limits, one_step=one_step)

    @property
    def _level(self) -> Level:
        if self.level is None:
            self.level = probe()
        return self.level

    def _take(self) -> Waiting:
        with self._lock:
            worker, self._spare = self._spare, None
            dying = self._zygote is None or self._zygote.poll() is not None  # and its workers with it
            if worker is not None and (dying or not worker.is_alive):
                worker.discard()
                worker = None
            try:
                worker = self._greeted(worker or self._fork())
            except (WorkerDied, OSError):  # it was dying with its zygote: once more, with a new one
                worker = self._greeted(self._fork())
            self._spare = self._fork()  # locks itself while the call runs; greeted when it is taken
            return worker

    def _greeted(self, worker: Waiting) -> Waiting:
        try:
            worker.greet()
        except (SandboxFailure, OSError):
            worker.discard()
            raise
        return worker

    def _fork(self) -> Waiting:
        ours, theirs = socket.socketpair()
        asked, asking = (None, None) if "broker" in self._level.layers else socket.socketpair()
        processor = next(self._processors)
        with theirs, asking or contextlib.nullcontext():
            for attempt in (1, 2):
                if self._zygote is None or self._zygote.poll() is not None:
                    self._start_zygote()
                assert self._control is not None
                try:
                    given = [end.fileno() for end in (theirs, asking) if end]
                    socket.send_fds(self._control, [REQUEST.pack(processor)], given)
                    return Waiting(ours, processor, asked)
                except OSError:
                    if attempt == 2:
                        raise
                    self._stop_zygote()
        raise AssertionError("unreachable")

    def _start_zygote(self) -> None:
        self._stop_zygote()
        if "cgroup" in self._level.layers and self._cgroup is None:
            self._cgroup = Cgroup.create(_LARGE_WORKERS * self.limits.memory_mib, _WORKERS * self.limits.processes)
        ours, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parent.parent)
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, package_root, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *self.keep_open],
                env=environment(str(self.folder)),
                start_new_session=True,
            )
        level = self._level
        setup = {
            "programs": {name: source.decode() for name, source in self.programs.items()},
            "folder": str(self.folder),
            "layers": list(level.layers),
            "wait_killable": "wait_killable" not in level.without,
        }
        body = json.dumps(setup).encode()
        ours.settimeout(_START_TIMEOUT_S)
        ours.sendall(struct.pack("=I", len(body)) + body)
        if ours.recv(1) != b"r":
            raise SandboxFailure("the zygote did not start")
        self._control = ours
        if self._cgroup:
            self._cgroup.add(self._zygote.pid)

    def _stop_zygote(self) -> None:
        """Closing the connection ends it, once all that its workers have left behind is killed."""
        if self._control:
            self._control.close()
            self._control = None
        if self._zygote:
            try:
                self._zygote.wait(_START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait(_START_TIMEOUT_S)
            self._zygote = None


def _outcome(
    broker: Broker | Desk, started: float, result: dict[str, Any] | None, error: str | None, cpu_us: int = 0, rss_kb: int = 0
) -> Outcome:
    return Outcome(
        result=result,
        error=error,
        denials=tuple(broker.files.denials),
        denied=broker.files.denied,
        contacts=broker.network.traffic.contacts(),
        operations=tuple(broker.proxy.operations),
        mediated=broker.calls,
        cpu_us=cpu_us,
        rss_kb=rss_kb,
        wall_us=round((time.monotonic() - started) * 1e6),
    )


def _exchange(worker: Waiting, serving: Serving, job: Job, cancelled: threading.Event) -> bytes:
    """Send the request and wait until the worker's answer is complete."""
    variables = {**job.variables, "deadline_s": f"{job.deadline_s:g}"}
    request = {"bundle": job.bundle, "tool": job.tool, "arguments": dict(job.arguments), "variables": variables}
    body = json.dumps(request).encode()
    deadline = serving.broker.network.deadline
    cap = job.output_bytes + _OVERHEAD_BYTES
    poll = select.poll()
    poll.register(worker.channel, select.POLLIN)
    with contextlib.suppress(BrokenPipeError):  # it died: what it was, the answer that does not come will say
        worker.channel.sendall(LENGTH.pack(len(body)) + body)
    data = b""
    while True:
        remaining = deadline - time.monotonic()
        if cancelled.is_set():
            raise WorkerCancelled("the call was cancelled")
        serving.broker.files.require_granted()
        if remaining <= 0:
            raise WorkerTimeout(f"the tool was still running after {job.deadline_s:g} s")
        if not poll.poll(min(remaining, _TICK_S) * 1000):
            continue
        try:
            chunk = worker.channel.recv(1 << 16)
        except ConnectionResetError:
            chunk = b""
        data += chunk
        announced = LENGTH.unpack_from(data)[0] if len(data) >= LENGTH.size else 0
        if max(announced, len(data)) > cap:
            raise OutputTooLarge(f"the tool answered more than {job.output_bytes} bytes")
        if announced and len(data) >= LENGTH.size + announced:
            return data[LENGTH.size : LENGTH.size + announced]
        if not chunk:
            raise serving.offence or WorkerDied("the tool ended without an answer: a forbidden system call, a limit or a crash")


def _answer(body: bytes) -> tuple[dict[str, Any] | None, str | None, int, int]:
    """Result, error, CPU time and memory out of a worker's answer, which may be forged. Raises WorkerDied if it is none."""
    try:
        answer = _clean(json.loads(body, parse_constant=_no_json))
        result, error, usage = answer.get("result"), answer.get("error"), answer["usage"]
        numbers = int(usage["cpu_us"]), int(usage["rss_kb"])
        if not all(0 <= number < 1 << 53 for number in numbers):
            raise ValueError("usage")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise WorkerDied("the tool's answer is not in the form of one") from None
    sound = isinstance(result, dict) if error is None else isinstance(error, str) and result is None
    if not sound:
        raise WorkerDied("the tool's answer is neither a result nor an error")
    return result, error, *numbers


def _no_json(constant: str) -> None:
    raise ValueError(constant)


def _clean(value: Any) -> Any:
    """JSON from a worker, with lone surrogates (file names that are not UTF-8) replaced."""
    match value:
        case str():
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if not value.isascii() else value
        case dict():
            return {_clean(k): _clean(v) for k, v in value.items()}
        case list():
            return [_clean(item) for item in value]
        case _:
            return value
