"""The daemon's side: one zygote, workers taken from it, one broker loop per call on the caller's thread."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox import kernel
from agentd_sandbox.access import Access, PathRule
from agentd_sandbox.broker import Broker, Denial, Recorder
from agentd_sandbox.errors import OutputTooLarge, SandboxFailure, Unsupported, WorkerCancelled, WorkerDied, WorkerTimeout
from agentd_sandbox.target import Target
from agentd_sandbox.worker import HELLO, LENGTH

if TYPE_CHECKING:
    from collections.abc import Mapping

_START = "import sys; sys.path.insert(0, sys.argv[1]); from agentd_sandbox.zygote import main; main(int(sys.argv[2]))"
_START_TIMEOUT_S = 10.0
_GONE_TIMEOUT_S = 5.0
_TICK_S = 0.1
_OVERHEAD_BYTES = 4096  # usage and JSON syntax around a result


@dataclass(frozen=True, slots=True)
class Job:
    """One call of one tool: what to run, with what, for how long, and how much it may answer."""

    bundle: str
    tool: str
    arguments: Mapping[str, Any]
    variables: Mapping[str, str]
    deadline_s: float
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker ended. Exactly one of `result` and `error` is set."""

    result: dict[str, Any] | None
    error: str | None
    denials: tuple[Denial, ...]
    denied: int
    peers: tuple[tuple[str, int], ...]
    mediated: int
    cpu_us: int
    rss_kb: int
    wall_us: int


@dataclass(slots=True)
class _Worker:
    """A locked worker that waits for its request."""

    channel: socket.socket
    pid: int = 0
    pidfd: int = -1
    listener: int = -1

    def greet(self) -> None:
        """Take the listener out of the worker. Raises Unsupported if it couldn't lock itself."""
        self.channel.settimeout(_START_TIMEOUT_S)
        hello = b""
        while len(hello) < HELLO.size:
            chunk = self.channel.recv(HELLO.size - len(hello))
            if not chunk:
                raise WorkerDied("the worker died while it was locking itself down")
            hello += chunk
        kind, self.pid, listener = HELLO.unpack(hello)
        if kind != b"P":
            raise Unsupported("seccomp", self.pid, os.strerror(self.pid))
        self.pidfd = os.pidfd_open(self.pid)
        self.listener = kernel.take_descriptor(self.pidfd, listener)
        self.channel.sendall(b"g")

    def kill(self) -> None:
        """Kill it and wait until nothing that is under its filter is left: only then is its work final."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        if self.listener >= 0:
            self._await_hang_up()
        for descriptor in (self.listener, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.listener = self.pidfd = -1
        self.channel.close()

    def _await_hang_up(self) -> None:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        deadline = time.monotonic() + _GONE_TIMEOUT_S
        while time.monotonic() < deadline:
            for _, events in poll.poll(_TICK_S * 1000):
                if events & select.POLLHUP:
                    return
                with contextlib.suppress(OSError):  # a call that died with its caller
                    kernel.receive(self.listener)
        raise SandboxFailure("a killed worker does not go away")


def runtime_rules() -> tuple[PathRule, ...]:
    """What every tool may read: Python's own library and the time zones."""
    folders = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/usr/share/zoneinfo", "/etc/localtime")
    return tuple(PathRule(os.fsencode(os.path.realpath(folder))) for folder in dict.fromkeys(folders))


@dataclass(slots=True)
class Sandbox:
    """Runs tool programs in one-shot workers. `programs` maps bundle names to Python source.

    `folder` is the workers' working folder. `run` may be called from several threads at once.
    """

    programs: Mapping[str, bytes]
    folder: Path
    _zygote: subprocess.Popen[bytes] | None = None
    _control: socket.socket | None = None
    _spare: _Worker | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _runtime: tuple[PathRule, ...] = field(default_factory=runtime_rules)

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
                self._spare.kill()
                self._spare = None
            self._stop_zygote()

    def run(self, job: Job, access: Access, recorder: Recorder, cancelled: threading.Event) -> Outcome:
        """Run one call to its end; blocks. The worker and all it started are gone when this returns or raises."""
        started = time.monotonic()
        worker = self._take()
        broker = Broker(
            worker.listener,
            Target(worker.pid, worker.pidfd, os.fsencode(os.path.realpath(self.folder))),
            Access(access.read + self._runtime, access.write, access.connect),
            recorder,
            started + job.deadline_s,
        )
        try:
            body = _exchange(worker, broker, job, cancelled)
        finally:
            try:
                worker.kill()
            finally:
                broker.target.close()
        result, error, cpu_us, rss_kb = _answer(body)
        return Outcome(
            result=result,
            error=error,
            denials=tuple(broker.denials),
            denied=broker.denied,
            peers=tuple(broker.peers),
            mediated=broker.calls,
            cpu_us=cpu_us,
            rss_kb=rss_kb,
            wall_us=round((time.monotonic() - started) * 1e6),
        )

    def _take(self) -> _Worker:
        with self._lock:
            worker, self._spare = self._spare, None
            if worker is not None and not _alive(worker):
                worker.kill()
                worker = None
            try:
                worker = self._greeted(worker or self._fork())
            except (WorkerDied, OSError):  # it was dying with its zygote: once more, with a new one
                worker = self._greeted(self._fork())
            self._spare = self._fork()  # locks itself while the call runs; greeted when it is taken
            return worker

    def _greeted(self, worker: _Worker) -> _Worker:
        try:
            if worker.listener < 0:
                worker.greet()
        except (SandboxFailure, OSError):
            worker.kill()
            raise
        return worker

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            for attempt in (1, 2):
                if self._zygote is None or self._zygote.poll() is not None:
                    self._start_zygote()
                assert self._control is not None
                try:
                    socket.send_fds(self._control, [b"f"], [theirs.fileno()])
                    return _Worker(ours)
                except OSError:
                    if attempt == 2:
                        raise
                    self._stop_zygote()
        raise AssertionError("unreachable")

    def _start_zygote(self) -> None:
        self._stop_zygote()
        ours, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parent.parent)
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, package_root, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(self.folder), **_time_zone()},
                start_new_session=True,
            )
        sources = {name: source.decode() for name, source in self.programs.items()}
        body = json.dumps({"programs": sources, "folder": str(self.folder)}).encode()
        ours.settimeout(_START_TIMEOUT_S)
        ours.sendall(struct.pack("=I", len(body)) + body)
        if ours.recv(1) != b"r":
            raise SandboxFailure("the zygote did not start")
        self._control = ours

    def _stop_zygote(self) -> None:
        if self._control:
            self._control.close()
            self._control = None
        if self._zygote:
            self._zygote.kill()
            self._zygote.wait(_GONE_TIMEOUT_S)
            self._zygote = None


def _exchange(worker: _Worker, broker: Broker, job: Job, cancelled: threading.Event) -> bytes:
    """Send the request and answer the worker's calls until its own answer is complete."""
    request = {"bundle": job.bundle, "tool": job.tool, "arguments": dict(job.arguments), "variables": dict(job.variables)}
    body = json.dumps(request).encode()
    worker.channel.sendall(LENGTH.pack(len(body)) + body)
    poll = select.poll()
    poll.register(worker.listener, select.POLLIN)
    poll.register(worker.channel, select.POLLIN)
    cap = job.output_bytes + _OVERHEAD_BYTES
    data = b""
    while True:
        remaining = broker.deadline - time.monotonic()
        if cancelled.is_set():
            raise WorkerCancelled("the call was cancelled")
        if remaining <= 0:
            raise WorkerTimeout(f"the tool was still running after {job.deadline_s:g} s")
        for descriptor, events in poll.poll(min(remaining, _TICK_S) * 1000):
            if descriptor == worker.listener:
                if events & select.POLLIN:
                    broker.serve_one()
                continue
            chunk = worker.channel.recv(1 << 16)
            data += chunk
            announced = LENGTH.unpack_from(data)[0] if len(data) >= LENGTH.size else 0
            if max(announced, len(data)) > cap:
                raise OutputTooLarge(f"the tool answered more than {job.output_bytes} bytes")
            if announced and len(data) >= LENGTH.size + announced:
                return data[LENGTH.size : LENGTH.size + announced]
            if not chunk:
                raise WorkerDied("the tool ended without an answer: a forbidden system call, a limit or a crash")


def _alive(worker: _Worker) -> bool:
    """A spare whose zygote was killed is dead too: its end of the channel is closed."""
    poll = select.poll()
    poll.register(worker.channel, 0)
    return not poll.poll(0)


def _answer(body: bytes) -> tuple[dict[str, Any] | None, str | None, int, int]:
    """Result, error, CPU time and memory out of a worker's answer, which may be forged. Raises WorkerDied if it is none."""
    try:
        answer = _clean(json.loads(body))
        result, error, usage = answer.get("result"), answer.get("error"), answer["usage"]
        numbers = int(usage["cpu_us"]), int(usage["rss_kb"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise WorkerDied("the tool's answer is not in the form of one") from None
    sound = isinstance(result, dict) if error is None else isinstance(error, str) and result is None
    if not sound:
        raise WorkerDied("the tool's answer is neither a result nor an error")
    return result, error, *numbers


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


def _time_zone() -> dict[str, str]:
    return {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}
