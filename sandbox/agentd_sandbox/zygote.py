"""The zygote: a clean interpreter that holds no secrets and forks workers on demand.

    python -I -S -c "...; from agentd_sandbox.zygote import main; main(DESCRIPTOR)"

It is started by exec with an empty environment before anything worth stealing exists in its memory. It reads
the tool programs once (as source, from the daemon), imports what tools commonly need, and then only forks:
one message with one descriptor gives one worker.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
from typing import NoReturn

from agentd_sandbox import kernel, worker

_LENGTH = struct.Struct("=I")
_PREIMPORTED = (
    *("codecs", "collections", "datetime", "encodings.idna", "fnmatch", "io", "json", "math", "pathlib", "random", "re"),
    *("shutil", "stat", "string", "textwrap", "time", "zoneinfo", "agentd_sandbox.sdk"),
)
"""Imported before the lock: afterwards every import costs mediated opens."""


def main(descriptor: int) -> NoReturn:
    """Serve `descriptor` (a stream socket to the daemon) until it closes."""
    control = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers need no reaping
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kernel.die_with_parent()
    os.umask(0o022)
    setup = json.loads(_receive(control))
    for name in _PREIMPORTED:
        importlib.import_module(name)
    programs = {name: compile(source, f"<{name}>", "exec", dont_inherit=True) for name, source in setup["programs"].items()}
    os.chdir(setup["folder"])
    control.sendall(b"r")
    while True:
        message, descriptors, _flags, _address = socket.recv_fds(control, 1, 1)
        if not message:
            os._exit(0)
        channel = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            worker.main(channel, programs)
        channel.close()


def _receive(control: socket.socket) -> bytes:
    data = b""
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        chunk = control.recv(1 << 16)
        if not chunk:
            os._exit(0)
        data += chunk
    return data[_LENGTH.size :]
