"""The connections that were made for a call, and how many bytes went over each.

The kernel counts them (TCP_INFO, tcp(7)), as long as somebody has the socket. A worker's own connection is held here, too, and
let go soon after the worker has closed it: its peer sees the end of it up to LOOK_EVERY_S later.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox.outcome import Contact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LOOK_EVERY_S = 0.05
_HELD = 16  # connections of a call at a time; of more than that the bytes are not known
_INFO_BYTES = 256
_CLOSING_S = 1.0
# struct tcp_info of linux/tcp.h: tcpi_bytes_received; tcpi_bytes_sent and tcpi_bytes_retrans came with Linux 4.19.
_RECEIVED, _SENT = (128, struct.Struct("=Q")), (200, struct.Struct("=QQ"))
_FIN_CAME = frozenset({6, 7, 8, 9, 11})  # TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING in linux/tcp_states.h


@dataclass(slots=True)
class _Connection:
    host: str
    port: int
    inode: int
    sent: int | None = None
    received: int | None = None


@dataclass(slots=True)
class Traffic:
    """Of one call. Safe to use from several threads."""

    _made: list[_Connection] = field(default_factory=list)
    _held: dict[int, socket.socket] = field(default_factory=dict)
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _counting: int = 0

    def add(self, host: str, port: int, made: socket.socket) -> None:
        with self._lock:
            self._made.append(_Connection(host, port, os.fstat(made.fileno()).st_ino))

    @contextlib.contextmanager
    def counting(self, made: socket.socket) -> Iterator[None]:
        """Of a connection that is used in the block, whoever closes it there."""
        with self._lock:
            self._counting += 1
        with made.dup() as own:
            try:
                yield
            finally:
                self._count(own)
                with self._lock:
                    self._counting -= 1
                    self._lock.notify_all()

    def hold(self, made: socket.socket) -> None:
        """A connection that is handed to the worker."""
        with self._lock:
            if len(self._held) < _HELD:
                self._held[os.fstat(made.fileno()).st_ino] = made.dup()

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def settle(self, processes: Iterable[int]) -> None:
        """Let go of what none of these processes has open any more."""
        used = {inode for process in processes for inode in _sockets(process)}
        with self._lock:
            closed = [self._held.pop(inode) for inode in list(self._held) if inode not in used]
        for each in closed:
            with each:
                self._count(each)

    def contacts(self) -> tuple[Contact, ...]:
        """By peer, in the order of the first connection to each. Those that are being closed are waited for."""
        with self._lock:
            self._lock.wait_for(lambda: not self._counting, _CLOSING_S)
        found: dict[tuple[str, int], Contact] = {}
        for each in self._made:
            so_far = found.get((each.host, each.port), Contact(each.host, each.port, 0, 0, 0))
            found[each.host, each.port] = Contact(
                *(each.host, each.port, so_far.connections + 1),
                *(_sum(so_far.sent, each.sent), _sum(so_far.received, each.received)),
            )
        return tuple(found.values())

    def _count(self, own: socket.socket) -> None:
        with contextlib.suppress(OSError):
            inode = os.fstat(own.fileno()).st_ino
            sent, received = _bytes(own)
            with self._lock:
                for each in reversed(self._made):
                    if each.inode == inode:
                        each.sent, each.received = sent, received
                        return


def _bytes(own: socket.socket) -> tuple[int | None, int | None]:
    """Sent and received, without what was sent again; None where the kernel does not count. Raises OSError."""
    info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    sent = received = None
    at, form = _RECEIVED
    if len(info) >= at + form.size:
        (received,) = form.unpack_from(info, at)
        received -= received > 0 and info[0] in _FIN_CAME  # FIN counts as one (measured, Linux 6.18)
    at, form = _SENT
    if len(info) >= at + form.size:
        all_sent, again = form.unpack_from(info, at)
        sent = all_sent - again
    return sent, received


def _sockets(process: int) -> Iterator[int]:
    """Inodes of a process's sockets; nothing if it is gone, or can't be looked into."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{process}/fd/{name}")
                if target.startswith("socket:["):
                    yield int(target[8:-1])


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
