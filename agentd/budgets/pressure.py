"""Pressure on memory as an event: the kernel, or systemd, says so at once, and the sensors are read without waiting.

systemd's protocol (systemd.io/MEMORY_PRESSURE) comes first, where a service manager set it; else the kernel's own (PSI,
Documentation/accounting/psi.rst). An unprivileged window must be a multiple of 2 s.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import select
import socket
import stat
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_TRIGGER = b"some 200000 2000000\0"  # 10 % of 2 s
_PAUSE_S = 1.0  # after each: while it lasts, sensors need not be read more often
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Alarm:
    """`start`, then `ring` is called on a thread of its own, until `stop`."""

    ring: Callable[[], None]
    descriptor: int
    source: str
    _stop: tuple[int, int] = field(default_factory=os.pipe)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._wait, name="pressure", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        os.write(self._stop[1], b"x")
        if self._thread:
            self._thread.join()
        for descriptor in (self.descriptor, *self._stop):
            os.close(descriptor)

    def _wait(self) -> None:
        poll = select.poll()
        # A file of the kernel tells by POLLPRI; a pipe or socket of a manager that stands in for it by being readable.
        files = stat.S_ISREG(os.fstat(self.descriptor).st_mode)
        poll.register(self.descriptor, select.POLLPRI if files else select.POLLIN)
        poll.register(self._stop[0], select.POLLIN)
        while not self._stopped.is_set():
            for descriptor, event in poll.poll():
                if descriptor != self.descriptor:
                    return
                if event & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                    return  # the cgroup, or whoever watched for us, has gone: the sensors are read all the same
                if not files:
                    os.read(descriptor, 4096)
                self.ring()
            self._stopped.wait(_PAUSE_S)


def alarm(proc: Path, environment: Mapping[str, str], ring: Callable[[], None]) -> Alarm | None:
    """None where nobody tells: no PSI in the kernel, or switched off by the service manager."""
    watched, written = environment.get("MEMORY_PRESSURE_WATCH"), _TRIGGER
    if watched == "/dev/null":
        return None
    if watched:
        try:
            written = base64.b64decode(environment.get("MEMORY_PRESSURE_WRITE", ""), validate=True)
        except binascii.Error:
            _log.warning("MEMORY_PRESSURE_WRITE is not base64; pressure on memory is not waited for")
            return None
    path = watched or str(proc / "pressure" / "memory")
    try:
        descriptor = _open(path)
        try:
            if written:
                os.write(descriptor, written)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as e:
        if watched:
            _log.warning("%s can't be waited for: %s", path, e.strerror)
        return None
    return Alarm(ring, descriptor, path)


def _open(path: str) -> int:
    """A socket is connected to, anything else opened for writing too: the protocol asks for it."""
    if stat.S_ISSOCK(os.stat(path).st_mode):
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(path)
        return connected.detach()
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
