"""One worker being served: from its greeting, through its calls, until nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.errors import BrokerStuck, Unsupported, WorkerDied, WorkerOffence
from agentd_sandbox.processes import ALL_PROCESSORS, Processes, share_processor
from agentd_sandbox.traffic import LOOK_EVERY_S
from agentd_sandbox.worker import HELLO

if TYPE_CHECKING:
    import socket

    from agentd_sandbox.broker import Broker
    from agentd_sandbox.desk import Desk
    from agentd_sandbox.threads import Threads

_GREETING_TIMEOUT_S = 10.0
_GONE_TIMEOUT_S = 5.0
_TICK_S = 0.1
_MEMORY_EVERY_S = 0.2


@dataclass(slots=True)
class Waiting:
    """A worker that locks itself, or has, and waits for its request."""

    channel: socket.socket
    processor: int = -1
    questions: socket.socket | None = None
    """At level 1 the worker asks here; there is no listener then."""
    listener: int = -1
    processes: Processes = field(default_factory=lambda: Processes(0, -1))

    @property
    def is_alive(self) -> bool:
        """A spare whose zygote was killed is dead too: its end of the channel is closed."""
        poll = select.poll()
        poll.register(self.channel, 0)
        return not poll.poll(0)

    def greet(self) -> None:
        """Take the listener out of the worker, unless that is done. Raises Unsupported if it couldn't lock itself."""
        if self.processes.root:
            return
        self.channel.settimeout(_GREETING_TIMEOUT_S)
        hello = b""
        while len(hello) < HELLO.size:
            chunk = self.channel.recv(HELLO.size - len(hello))
            if not chunk:
                raise WorkerDied("the worker died while it was locking itself down")
            hello += chunk
        kind, pid, listener = HELLO.unpack(hello)
        if kind == b"E":
            raise Unsupported("seccomp", pid, os.strerror(pid))
        self.processes = Processes(pid, os.pidfd_open(pid))
        if kind == b"A":
            return
        self.listener = kernel.take_descriptor(self.processes.pidfd, listener)
        kernel.wake_at_once(self.listener)
        self.channel.sendall(b"g")

    def discard(self) -> None:
        """Kill a worker that was never asked for anything."""
        if self.processes.root:
            self.processes.kill()
        self.close()

    def close(self) -> None:
        for descriptor in (self.listener, self.processes.pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.listener = self.processes.pidfd = -1
        self.processes.forget()
        for each in (self.channel, self.questions):
            if each:
                each.close()


@dataclass(slots=True)
class Serving:
    """The broker of one call at work. `begin`, then `end`; `offence` is set if the broker has ended the call."""

    broker: Broker | Desk
    worker: Waiting
    offence: WorkerOffence | None = None
    _gone: threading.Event = field(default_factory=threading.Event)
    _begun: bool = False
    _is_stuck: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_stuck(self) -> bool:
        """Whether it was given up, and its thread still waits for a file system."""
        return self._is_stuck and not self._gone.is_set()

    def begin(self, threads: Threads) -> None:
        """On a thread of its own, for as long as it takes: a file system may not answer for ever."""
        self._begun = True
        threads.do(self._serve)

    def end(self) -> None:
        """Kill the worker and all it has started, and return when nothing that is under its filter is left.

        Only then is its work final. Raises BrokerStuck if the broker itself does not come back.
        """
        self.broker.network.stopped.set()
        self.broker.proxy.stop()
        self.worker.processes.kill()
        deadline = time.monotonic() + _GONE_TIMEOUT_S
        while self._begun and not self._gone.wait(0.002 if self.worker.processes.many else _TICK_S):
            if time.monotonic() > deadline and self._give_up():
                raise BrokerStuck(f"the broker still waits for the file system in {self.broker.busy or 'a call'}")
            self.worker.processes.kill()
        self.worker.close()

    def _give_up(self) -> bool:
        with self._lock:
            self._is_stuck = not self._gone.is_set()
        return self._is_stuck

    def _serve(self) -> None:
        """The broker's thread: until the listener hangs up, which is when the last process under the filter is gone."""
        try:
            share_processor(self.worker.processor)
            self._answer_all()
            if self.worker.questions:
                self._await_death()
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, ALL_PROCESSORS)
            self.broker.network.traffic.settle(())
            self.broker.files.close()
            with self._lock:
                self._gone.set()
            if self._is_stuck:
                self.worker.close()

    def _await_death(self) -> None:
        """At level 1 there is one process, and no listener that would hang up with it."""
        poll = select.poll()
        poll.register(self.worker.processes.pidfd, select.POLLIN)
        poll.poll()

    def _answer_all(self) -> None:
        poll = select.poll()
        poll.register(self.worker.questions or self.worker.listener, select.POLLIN)
        look = settle = time.monotonic() + _MEMORY_EVERY_S
        traffic = self.broker.network.traffic
        while True:
            ready = poll.poll((LOOK_EVERY_S if traffic.holds else _MEMORY_EVERY_S) * 1000)
            try:
                if ready and ready[0][1] & select.POLLIN:
                    self.broker.serve_one()
                elif ready:
                    return
                if time.monotonic() > look:
                    self.broker.check()
                    look = time.monotonic() + _MEMORY_EVERY_S
                if traffic.holds and time.monotonic() > settle:
                    processes = self.worker.processes
                    traffic.settle(processes.members() if processes.many else (processes.root,))
                    settle = time.monotonic() + LOOK_EVERY_S
            except WorkerOffence as e:
                self.offence = self.offence or e
                self.worker.processes.kill()
            except ConnectionError:  # level 1: the worker has closed its end
                return
            except Exception as e:  # a fault of the broker's must end this call, not leave its worker waiting for ever
                self.offence = self.offence or WorkerOffence(f"the broker failed: {type(e).__name__}: {e}")
                self.worker.processes.kill()
