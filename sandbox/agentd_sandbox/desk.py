"""Level 1, the daemon's side: the broker's work for a worker that asks by message (see `shim`).

The same `Files` and `Network` decide and do it. There are no other processes to serve: without a broker none may start.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentd_sandbox import network
from agentd_sandbox.errors import WorkerOffence
from agentd_sandbox.recorder import Refusal
from agentd_sandbox.shim import LENGTH, STATUS

if TYPE_CHECKING:
    from agentd_sandbox.files import Files
    from agentd_sandbox.limits import Limits
    from agentd_sandbox.processes import Processes
    from agentd_sandbox.proxy import Proxy

_LONGEST = 1 << 16


@dataclass(slots=True)
class Desk:
    """Answers the questions of one worker. Stands in for `Broker` in `Serving`."""

    questions: socket.socket
    processes: Processes
    files: Files
    network: network.Network
    proxy: Proxy
    folder: bytes
    limits: Limits
    calls: int = 0
    busy: str = ""
    _data: bytearray = field(default_factory=bytearray)

    def serve_one(self) -> None:
        """Answer what has come. Raises WorkerOffence, and OSError when the worker is gone."""
        chunk = self.questions.recv(_LONGEST)
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "gone")
        self._data += chunk
        while len(self._data) >= LENGTH.size and len(self._data) >= LENGTH.size + (size := LENGTH.unpack_from(self._data)[0]):
            if size > _LONGEST:
                raise WorkerOffence("it asked a question that is too long")
            question = bytes(self._data[LENGTH.size : LENGTH.size + size])
            del self._data[: LENGTH.size + size]
            self._answer(question)
        if len(self._data) > 2 * _LONGEST:
            raise WorkerOffence("it asked a question that is too long")

    def check(self) -> None:
        """Its memory the kernel limits, as there is one process; its threads nobody but we. Raises WorkerOffence."""
        if self.processes.threads() > self.limits.threads:
            raise WorkerOffence(f"it has more than {self.limits.threads} threads")
        if self.files.written() > self.limits.written_mib << 20:
            raise WorkerOffence(f"it wrote more than {self.limits.written_mib} MiB")

    def _answer(self, question: bytes) -> None:
        self.calls += 1
        self.files.require_granted()
        code, given = 0, -1
        try:
            asked = json.loads(question)
            self.busy = self.files.call = str(asked["call"])
            given = self._do(self.busy, self._place(asked), asked)
        except Refusal as e:
            self.files.deny("", str(e))
            code = e.errno
        except OSError as e:
            code = e.errno or errno.EIO
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            code = errno.EINVAL
        try:
            socket.send_fds(self.questions, [LENGTH.pack(code)], [given] if given >= 0 else [])
        finally:
            if given >= 0:
                os.close(given)
        if self.files.denied > self.limits.refused:
            raise WorkerOffence(f"it made more than {self.limits.refused} calls that were refused")

    def _place(self, asked: dict[str, Any]) -> bytes:
        return self._absolute(str(asked.get("path", "")))

    def _absolute(self, text: str) -> bytes:
        path = text.encode("latin-1")
        if b"\0" in path:
            raise ValueError("NUL")
        return path if path.startswith(b"/") else self.folder.rstrip(b"/") + b"/" + path

    def _do(self, call: str, place: bytes, asked: dict[str, Any]) -> int:
        files = self.files
        match call:
            case "open":
                return files.open(place, int(asked["flags"]), int(asked["mode"]), 0o022)
            case "look":
                with files.existing(place, "see", follow=bool(asked["follow"])) as target:
                    return _holding(json.dumps([getattr(target.status, name) for name in STATUS]).encode())
            case "statfs":
                return files.file_system_of(place, free=self.folder)
            case "readlink":
                return _holding(files.link_text(place))
            case "connect":
                return self._connect(str(asked["host"]), int(asked["port"]))
        self._change(call, place, asked)
        return -1

    def _change(self, call: str, place: bytes, asked: dict[str, Any]) -> None:
        files = self.files
        match call:
            case "access":
                files.may(place, int(asked["mode"]) & 7)
            case "mkdir":
                files.make_folder(place, int(asked["mode"]) & ~0o022)
            case "unlink" | "rmdir":
                files.remove(place, folder=call == "rmdir")
            case "rename":
                files.rename(place, self._absolute(str(asked["new"])), replace=True)
            case "truncate":
                files.truncate(place, int(asked["length"]))
            case "chmod":
                files.change_mode(place, int(asked["mode"]))
            case _:
                raise OSError(errno.ENOSYS, call)

    def _connect(self, host: str, port: int) -> int:
        peer = (network.canonical_host(host) or host, port)
        if peer == network.PROXY and self.network.has_proxy:
            return self.proxy.connect().detach()
        try:
            made = self.network.dial(*peer)
        except OSError as e:
            if e.errno == errno.EACCES:
                self.files.deny(f"{peer[0]}:{port}", str(e.strerror))
            raise
        made.setblocking(True)
        self.network.traffic.hold(made)
        return made.detach()


def _holding(data: bytes) -> int:
    """A pipe with some bytes in it and nobody who writes more."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.write(writing, data)
    os.close(writing)
    return reading
