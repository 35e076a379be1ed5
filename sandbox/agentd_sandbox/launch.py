"""Run one ordinary program confined, from its start to the end of all that it has started.

Its standard input and output are the caller's own. There is no zygote: a child of this process locks itself down and
becomes the program.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from agentd_sandbox import kernel, network
from agentd_sandbox.access import Access
from agentd_sandbox.broker import Broker
from agentd_sandbox.errors import SandboxFailure, Unsupported, WorkerTimeout
from agentd_sandbox.files import Files
from agentd_sandbox.limits import Limits, limit_resources
from agentd_sandbox.proxy import Proxy
from agentd_sandbox.serving import Serving, Waiting
from agentd_sandbox.system import environment as basic_environment
from agentd_sandbox.system import program_rules
from agentd_sandbox.threads import Threads
from agentd_sandbox.worker import HELLO, Manner, close_all_but, lock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agentd_sandbox.levels import Level
    from agentd_sandbox.outcome import Contact, Denial
    from agentd_sandbox.recorder import Change

_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: its exit status, or 128 and the number of the signal that ended it."""

    status: int
    denied: int
    denials: tuple[Denial, ...]
    contacts: tuple[Contact, ...]
    mediated: int


class _Unrecorded:
    """Nothing is kept for undoing: whoever runs a program like this keeps his own copies."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        pass


def launch(
    program: Sequence[str],
    access: Access,
    folder: str,
    variables: Mapping[str, str],
    deadline_s: float,
    limits: Limits,
    level: Level,
) -> Ended:
    """Start `program` (looked up in PATH) and serve it until nothing of it is left.

    Raises Unsupported where the kernel has no broker, WorkerTimeout, WorkerOffence, OSError for a folder that is not there.
    """
    if "broker" not in level.layers:
        raise Unsupported("seccomp", 0, f"no broker here: {'; '.join(level.missing)}")
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ours.close()
        _become(
            theirs, program, folder, {**basic_environment(folder), **variables}, Manner(frozenset(level.layers), zygote=parent)
        )
    theirs.close()
    waiting = Waiting(ours)
    waiting.greet()
    serving = Serving(_broker(waiting, access, folder, time.monotonic() + deadline_s, limits), waiting)
    threads = Threads("broker")
    serving.begin(threads)
    try:
        status = _wait(child, serving, deadline_s)
    finally:
        serving.end()
        threads.stop()
    if serving.offence:
        raise serving.offence
    files = serving.broker.files
    return Ended(status, files.denied, tuple(files.denials), serving.broker.network.traffic.contacts(), serving.broker.calls)


def _broker(waiting: Waiting, access: Access, folder: str, deadline: float, limits: Limits) -> Broker:
    stopped = threading.Event()
    peers = network.Network(access.connect, deadline, stopped)
    reach = Access(access.read + program_rules(), access.write, access.connect, access.execute)
    files = Files(reach, _Unrecorded(), peers.made_up_files() if access.connect else {})
    proxy = Proxy(peers, {}, files.deny, stopped)
    return Broker(waiting.listener, waiting.processes, files, peers, proxy, os.fsencode(folder), limits)


def _wait(child: int, serving: Serving, deadline_s: float) -> int:
    """The exit status of the program itself; what it leaves behind is killed with the call."""
    pidfd = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll(_TICK_S * 1000):
            if time.monotonic() > serving.broker.network.deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise WorkerTimeout(f"the program was still running after {deadline_s:g} s")
    finally:
        os.close(pidfd)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _become(
    channel: socket.socket, program: Sequence[str], folder: str, variables: Mapping[str, str], manner: Manner
) -> NoReturn:
    """In the child: lock down, then be the program."""
    code = 127
    try:
        os.chdir(folder)
        close_all_but([channel.fileno()])
        os.setsid()
        kernel.die_with_parent()
        if os.getppid() != manner.zygote:
            os._exit(code)  # it died before that was said
        limit_resources()
        listener = lock(manner)
        channel.sendall(HELLO.pack(b"P", os.getpid(), listener))
        if channel.recv(1) != b"g":
            os._exit(code)
        os.close(listener)
        channel.close()
        os.execvpe(program[0], list(program), dict(variables))  # noqa: S606 # no shell, and confined already
    except (OSError, SandboxFailure) as e:
        sys.stderr.write(f"agentd_sandbox: {program[0]}: {e.strerror if isinstance(e, OSError) else e}\n")
        sys.stderr.flush()
    finally:
        os._exit(code)
