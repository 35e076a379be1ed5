"""Where checkpoints go besides the store: whoever cuts or replaces the log does not get at those."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

JOURNALD = "/run/systemd/journal/socket"
IDENTIFIER = "agentd-audit"
_LONGEST_FILE = 64 << 20
_NOTE = re.compile("[^\n]+\n[0-9]+\n[A-Za-z0-9+/=]+\n\n(?:\u2014 [^\n]+\n)+")


class Anchor(Protocol):
    """A place that takes notes."""

    @property
    def name(self) -> str: ...

    def publish(self, note: str) -> None:
        """Raises OSError."""


@dataclass(frozen=True, slots=True)
class FileAnchor:
    """A file that is only appended to, best on another disk and with `chattr +a`."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def publish(self, note: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, f"{note}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class JournaldAnchor:
    """systemd's journal, by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): another user's files."""

    socket: str = JOURNALD
    name: str = "journald"

    def publish(self, note: str) -> None:
        value = note.encode()
        # A value with line ends has its length before it, 64 bits, little-endian.
        message = b"MESSAGE\n" + len(value).to_bytes(8, "little") + value + b"\n"
        fields = f"SYSLOG_IDENTIFIER={IDENTIFIER}\nPRIORITY=6\n".encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as journal:
            journal.sendto(fields + message, self.socket)


def read_notes(text: str) -> list[str]:
    """The checkpoints in a text that holds several, such as an anchor file; what is cut off is left out."""
    return _NOTE.findall(text[-_LONGEST_FILE:])


def found(file: Path | None, *, journal: bool) -> tuple[Anchor, ...]:
    """Those of a configuration that are there."""
    anchors: list[Anchor] = []
    with contextlib.suppress(OSError):
        if journal and os.path.exists(JOURNALD):
            anchors.append(JournaldAnchor())
    if file is not None:
        anchors.append(FileAnchor(file))
    return tuple(anchors)
