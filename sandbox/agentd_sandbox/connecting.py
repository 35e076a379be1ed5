"""connect(2) in a worker's place: its address decided on, the connection made here, and put where its socket was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel, network
from agentd_sandbox.processes import signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd_sandbox.kernel import Notification
    from agentd_sandbox.processes import Processes
    from agentd_sandbox.proxy import Proxy

_LOCK_AGAIN_S = 0.02


@dataclass(slots=True)
class Connections:
    """Those of one worker, each made on a thread of its own: a peer that does not answer keeps nothing else waiting."""

    listener: int
    processes: Processes
    network: network.Network
    proxy: Proxy
    deny: Callable[[str, str], None]
    at_a_time: int = 8
    _making: threading.BoundedSemaphore = field(init=False)

    def __post_init__(self) -> None:
        self._making = threading.BoundedSemaphore(self.at_a_time)

    def connect(self, call: Notification, descriptor: int, address: int, size: int) -> None:
        """Answered later, unless it raises OSError."""
        if not 2 <= size <= network.ADDRESS_BYTES:
            raise OSError(errno.EINVAL, "address")
        host, port = self.network.meant(*network.peer(self.processes.read(call.thread, address, size)))
        if (host, port) not in self.network.granted and not ((host, port) == network.PROXY and self.network.has_proxy):
            self.deny(f"{host}:{port}", "no scope to connect to it")
            raise OSError(errno.EACCES, "peer")
        own = self.processes.take(call.thread, descriptor)
        if not stat.S_ISSOCK(os.fstat(own).st_mode):
            os.close(own)
            raise OSError(errno.ENOTSOCK, "descriptor")
        template = socket.socket(fileno=own)
        try:
            flags = self.processes.flags(call.thread, descriptor)
            if not self._making.acquire(blocking=False):
                raise OSError(errno.EAGAIN, "connections")
        except OSError:
            template.close()
            raise
        arguments = (call, signed(descriptor), template, flags, (host, port))
        threading.Thread(target=self._connect, args=arguments, name="connect", daemon=True).start()

    def _connect(self, call: Notification, number: int, template: socket.socket, flags: int, peer: tuple[str, int]) -> None:
        """Make the connection, put it in the place of the worker's socket, answer."""
        code = 0
        try:
            with template, self._dial(peer, wait=not flags & os.O_NONBLOCK) as made:
                network.like(template, made)
                if flags & os.O_NONBLOCK and not _is_connected(made):
                    code = errno.EINPROGRESS
                made.setblocking(not flags & os.O_NONBLOCK)
                if peer != network.PROXY:
                    self.network.traffic.hold(made)
                kernel.replace(self.listener, call.id, made.fileno(), number, close_on_exec=bool(flags & os.O_CLOEXEC))
        except OSError as e:
            code = e.errno or errno.EIO
            if code == errno.EACCES:
                self.deny(f"{peer[0]}:{peer[1]}", str(e.strerror))
        finally:
            self._making.release()
        with contextlib.suppress(OSError):
            kernel.answer(self.listener, call.id, 0, code)

    def _dial(self, peer: tuple[str, int], *, wait: bool) -> socket.socket:
        return self.network.dial(*peer, wait=wait) if peer != network.PROXY else self.proxy.connect()

    def lock(self, call: Notification, own: int, *, wait: bool) -> int | None:
        """Lock an open file of the worker's (flock(2)) by a descriptor of ours, which is closed. Raises OSError."""
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait or not self._making.acquire(blocking=False):
                raise
        else:
            os.close(own)
            return 0
        threading.Thread(target=self._await_lock, args=(call, own), name="lock", daemon=True).start()
        return None

    def _await_lock(self, call: Notification, own: int) -> None:
        """Until it is had, or the caller is gone: nobody keeps it then, as no descriptor of its file is left."""
        code = errno.EINTR
        try:
            while kernel.still_waiting(self.listener, call.id) and not self.network.stopped.wait(_LOCK_AGAIN_S):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    code = 0
                    break
        except OSError as e:
            code = e.errno or errno.EIO
        finally:
            os.close(own)
            self._making.release()
        with contextlib.suppress(OSError):
            kernel.answer(self.listener, call.id, 0, code)


def _is_connected(made: socket.socket) -> bool:
    try:
        made.getpeername()
    except OSError:
        return False
    return True
