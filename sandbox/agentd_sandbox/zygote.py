"""The zygote: a clean interpreter that holds no secrets and forks workers on demand.

    python -I -S -c "...; from agentd_sandbox.zygote import main; main(DESCRIPTOR)"

It is started by exec with an empty environment before anything worth stealing exists in its memory. It reads
the tool programs once (as source, from the daemon), imports what tools commonly need, and then only forks:
one message with one descriptor gives one worker. It adopts what workers leave behind, and when the daemon is gone it
kills all of it before it ends itself.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
from typing import NoReturn

from agentd_sandbox import kernel, layers, worker
from agentd_sandbox.processes import kill_descendants

_LENGTH = struct.Struct("=I")
REQUEST = struct.Struct("=i")
"""A message that asks for a worker: the processor it shares with its broker, or -1."""
_PREIMPORTED = (
    *("codecs", "collections", "datetime", "encodings.idna", "fnmatch", "http.client", "io", "json", "math", "pathlib"),
    *("random", "re", "shutil", "stat", "string", "subprocess", "textwrap", "time", "urllib.parse", "uuid", "zoneinfo"),
    "agentd_sandbox.sdk",
)
"""Imported before the lock: afterwards every import costs mediated opens."""


def main(descriptor: int) -> NoReturn:
    """Serve `descriptor` (a stream socket to the daemon) until it closes."""
    control = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers need no reaping
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kernel.adopt_orphans()
    os.umask(0o022)
    setup = json.loads(_receive(control))
    for name in _PREIMPORTED:
        importlib.import_module(name)
    programs = {name: compile(source, f"<{name}>", "exec", dont_inherit=True) for name, source in setup["programs"].items()}
    os.chdir(setup["folder"])
    if "namespaces" in setup["layers"]:
        layers.enter_namespaces()
        os.chdir(setup["folder"])  # the same one, in the mounts that can't be written
    try:
        control.sendall(b"r")
    except OSError:  # the daemon was killed meanwhile: there is nobody to work for
        os._exit(0)
    manner = worker.Manner(frozenset(setup["layers"]), setup["wait_killable"], os.getpid())
    while True:
        message, descriptors, _flags, _address = socket.recv_fds(control, REQUEST.size, 2)
        if not message:
            kill_descendants(os.getpid())
            os._exit(0)
        channel, *more = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        if os.fork() == 0:
            control.close()
            worker.main(channel, more[0] if more else None, programs, manner, *REQUEST.unpack(message))
        for each in (channel, *more):
            each.close()


def _receive(control: socket.socket) -> bytes:
    data = b""
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        chunk = control.recv(1 << 16)
        if not chunk:
            os._exit(0)
        data += chunk
    return data[_LENGTH.size :]
