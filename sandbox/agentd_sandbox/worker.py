"""A worker: locks itself down, and only then learns what it is to do. Runs one call and is never reused."""

from __future__ import annotations

import _thread
import itertools
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from agentd_sandbox import kernel, layers, sdk, shim
from agentd_sandbox.errors import Unsupported
from agentd_sandbox.limits import limit_resources
from agentd_sandbox.processes import share_processor

if TYPE_CHECKING:
    import socket
    from types import CodeType

HELLO = struct.Struct("=cii")
"""First message: b"P", pid, listener; b"A", pid, 0 at level 1; b"E", errno, 0 if this kernel can't confine it."""
LENGTH = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Manner:
    """How workers are locked: the layers beside the filter, whether signals wait for the broker, and who their parent is."""

    layers: frozenset[str]
    wait_killable: bool = True
    zygote: int = 0


class _WhileAlone:
    """True in a process of one thread: what a child may start by memory that others share is not let through."""

    def __bool__(self) -> bool:
        return _thread._count() == 0  # of threads beside the first


def main(
    channel: socket.socket, questions: socket.socket | None, programs: dict[str, CodeType], manner: Manner, processor: int
) -> NoReturn:
    """Never returns: answers one request over `channel` and exits. `questions` is for level 1 only."""
    try:
        _lock([channel, *([questions] if questions else [])], manner, processor)
        if questions:
            shim.install(questions)
        request = json.loads(_receive(channel))
        body = json.dumps(_run(request, programs), ensure_ascii=False).encode("utf-8", "replace")
        channel.sendall(LENGTH.pack(len(body)) + body)
    finally:  # whatever happened, this process must not live on
        os._exit(0)


def close_all_but(kept: list[int]) -> None:
    """Beside standard input and output."""
    for start, end in itertools.pairwise((2, *sorted(kept), 1 << 16)):
        os.closerange(start + 1, end)


def _lock(sockets: list[socket.socket], manner: Manner, processor: int) -> None:
    """From here on the process can do nothing that the policy does not name."""
    channel = sockets[0]
    close_all_but([each.fileno() for each in sockets])
    os.setsid()  # what it starts stays in this session, and is found by it
    share_processor(processor)
    kernel.die_with_parent()
    if os.getppid() != manner.zygote:
        os._exit(0)  # it died before that was said
    limit_resources()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the zygote ignores it, and who ignores it can't wait for children
    random.seed()  # all workers are forks of one process
    subprocess._USE_VFORK = _WhileAlone()  # type: ignore[assignment, misc]
    os.dup2(1, 2)  # stdout is /dev/null: a tool must not write into the daemon's log or onto its terminal
    try:
        listener = lock(manner)
    except Unsupported as e:
        channel.sendall(HELLO.pack(b"E", e.errno, 0))
        raise
    except OSError as e:
        channel.sendall(HELLO.pack(b"E", e.errno or 0, 0))
        raise
    if listener < 0:
        channel.sendall(HELLO.pack(b"A", os.getpid(), 0))
        return
    channel.sendall(HELLO.pack(b"P", os.getpid(), listener))
    if channel.recv(1) != b"g":  # the daemon has its copy of the listener now
        os._exit(0)
    os.close(listener)  # whoever holds it could approve its own calls


def lock(manner: Manner) -> int:
    """Give everything up that can be, then install the filter; returns the listener, -1 at level 1."""
    kernel.drop_capabilities()
    kernel.stay_inspectable()
    if "landlock" in manner.layers:
        kernel.no_new_privileges()
        layers.restrict_by_landlock()
    if "broker" not in manner.layers:
        kernel.lock_alone()
        return -1
    return kernel.lock(wait_killable=manner.wait_killable)


def _receive(channel: socket.socket) -> bytes:
    (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
    return _exactly(channel, length)


def _exactly(channel: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        chunk = channel.recv(n - len(data))
        if not chunk:
            os._exit(0)
        data += chunk
    return data


def _run(request: dict[str, Any], programs: dict[str, CodeType]) -> dict[str, Any]:
    answer: dict[str, Any]
    try:
        sdk.variables.update(request["variables"])
        exec(programs[request["bundle"]], {"__name__": f"agentd_tool.{request['bundle']}"})  # noqa: S102
        result = sdk.registered[request["tool"]](**request["arguments"])
        if not isinstance(result, dict):
            raise TypeError(f"returned {type(result).__name__}, not an object")
        answer = {"result": result}
    except sdk.ToolFailure as e:
        answer = {"error": str(e)}
    except OSError as e:
        answer = {"error": sdk.explain(e)}
    except MemoryError:
        answer = {"error": "the tool ran out of memory"}
    except Exception as e:
        answer = {"error": f"the tool failed: {type(e).__name__}: {e}"}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    answer["usage"] = {"cpu_us": round((usage.ru_utime + usage.ru_stime) * 1e6), "rss_kb": usage.ru_maxrss}
    sys.stdout.flush()
    return answer
