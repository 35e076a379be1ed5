"""What a daemon and systemd tell each other: ready, alive, stopping; a socket that was opened beforehand; the log.

The protocols are a datagram to a socket named in the environment (sd_notify(3)) and descriptors from 3 on (sd_listen_fds(3)).
Without systemd all of it does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat

_FIRST = 3
_ERRORS = 2
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_SHARE = 0.5  # of the time after which systemd takes us for dead (sd_watchdog_enabled(3))


def notify(*states: str) -> None:
    """Such as READY=1. What can't be told is not worth dying for."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as told,
    ):
        told.connect("\0" + address[1:] if address[0] == "@" else address)
        told.send("\n".join(states).encode())


def watchdog_s() -> float:
    """How often to say that we are alive; 0 for never."""
    if os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 * _SHARE)
    return 0.0


async def keep_telling() -> None:
    """That the event loop turns, for as long as it does. Ends at once where nobody wants to know."""
    every_s = watchdog_s()
    while every_s:
        notify("WATCHDOG=1")
        await asyncio.sleep(every_s)


class JournalFormatter(logging.Formatter):
    """Each line begins with its priority, as sd-daemon(3) has it: `journalctl -p warning` finds what is one."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines() or [""])


def is_journal() -> bool:
    """Whether standard error is a stream to journald (systemd.exec(5), JOURNAL_STREAM), and not to a terminal or a file."""
    with contextlib.suppress(OSError):
        status = os.fstat(_ERRORS)
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def listener() -> socket.socket | None:
    """The unix socket that systemd listens at for us, if it does."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(_FIRST).st_mode):
            os.set_inheritable(_FIRST, False)
            found = socket.socket(fileno=_FIRST)
            if found.family == socket.AF_UNIX and found.type == socket.SOCK_STREAM:
                return found
            found.detach()
    return None
