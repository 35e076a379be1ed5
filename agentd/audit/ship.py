"""Sends events on as they are recorded: to a file, a syslog server, an OpenTelemetry collector.

Each receiver has a cursor in the store, which moves on once it has got the events: at least once, over restarts and dead
receivers. What it means to have got them depends on the way: synced to a file, acknowledged by an HTTP server, taken by the
kernel for TCP; with UDP nobody knows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from agentd.audit.formats import LINES, otlp
from agentd.errors import AgentdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentd.audit.formats import Record
    from agentd.audit.log import AuditLog
    from agentd.store import Store

SCHEMES = ("file", "tcp", "tls", "udp", "http", "https")
_BATCH = 100
_TIMEOUT_S = 10.0
_LONGEST_WAIT_S = 60.0
_LARGEST_DATAGRAM = 8192  # more than any syslog server must take (RFC 5424, 6.1: 2048); longer messages are cut
_log = logging.getLogger(__name__)


class Receiver(Protocol):
    def send(self, messages: Sequence[str]) -> None:
        """Raises OSError; then all of them are sent again."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _File:
    path: str

    def send(self, messages: Sequence[str]) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.writelines(f"{message}\n".encode() for message in messages)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Stream:
    """TCP. `counted`: each message has its length before it (RFC 6587, 3.4.1), as one may have line ends in it."""

    host: str
    port: int
    counted: bool
    context: ssl.SSLContext | None = None
    _connection: socket.socket | None = None

    def send(self, messages: Sequence[str]) -> None:
        encoded = [message.encode() for message in messages]
        data = b"".join(b"%d %s" % (len(each), each) if self.counted else each + b"\n" for each in encoded)
        try:
            self._connected().sendall(data)
        except OSError:
            self.close()
            raise

    def _connected(self) -> socket.socket:
        if self._connection is not None and self._has_ended(self._connection):
            self.close()
        if self._connection is None:
            plain = socket.create_connection((self.host, self.port), _TIMEOUT_S)
            self._connection = self.context.wrap_socket(plain, server_hostname=self.host) if self.context else plain
        return self._connection

    @staticmethod
    def _has_ended(connection: socket.socket) -> bool:
        """A receiver that has hung up is noticed before something is written to it, which the kernel would still take."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if isinstance(connection, ssl.SSLSocket) or not poll.poll(0):
            return False
        return not connection.recv(1, socket.MSG_PEEK)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None


@dataclass(slots=True)
class _Datagrams:
    host: str
    port: int

    def send(self, messages: Sequence[str]) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sending:
            for message in messages:
                sending.sendto(message.encode()[:_LARGEST_DATAGRAM], address)

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Http:
    """OTLP over HTTP: an answer of 2xx is what it waits for."""

    url: str

    def send(self, messages: Sequence[str]) -> None:
        for message in messages:
            request = urllib.request.Request(  # noqa: S310 - the scheme is checked where the receiver is made
                self.url, message.encode(), {"Content-Type": "application/json"}, method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
                    pass
            except urllib.error.HTTPError as e:
                e.close()
                raise OSError(0, f"it answered {e.code}") from None

    def close(self) -> None:
        pass


def receiver(to: str, form: str) -> Receiver:
    """For `file:///PATH`, `tcp://HOST:PORT`, `tls://`, `udp://`, and for otlp `http(s)://HOST:PORT`. Raises ValueError."""
    url = urlsplit(to)
    if url.scheme not in SCHEMES or (form == "otlp") != (url.scheme in ("http", "https")):
        raise ValueError(f"{form} can't be sent to {to}: otlp goes to http(s), all others to {', '.join(SCHEMES[:4])}")
    match url.scheme:
        case "file":
            if not url.path.startswith("/") or url.netloc:
                raise ValueError("a file is written file:///PATH")
            return _File(url.path)
        case "http" | "https":
            return _Http(to if url.path.strip("/") else to.rstrip("/") + "/v1/traces")
    if not url.hostname or not url.port:
        raise ValueError(f"{to} has no host and port")
    if url.scheme == "udp":
        return _Datagrams(url.hostname, url.port)
    context = ssl.create_default_context() if url.scheme == "tls" else None
    return _Stream(url.hostname, url.port, form in ("syslog", "cef"), context)


@dataclass(slots=True)
class Shipper:
    """One receiver, on a thread of its own: `start`, then `stop`."""

    name: str
    form: str
    receiver: Receiver
    store: Store
    audit: AuditLog
    first_wait_s: float = 1.0
    _more: threading.Event = field(default_factory=threading.Event)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self.store.on_commit.append(self._more.set)
        self._thread = threading.Thread(target=self._run, name=f"ship to {self.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """What is not sent by now is sent after the next start."""
        self._stopped.set()
        self._more.set()
        if self._thread:
            self.store.on_commit.remove(self._more.set)
            self._thread.join(_TIMEOUT_S)
        self.receiver.close()

    def cursor(self) -> int:
        """The last event that the receiver has got."""
        query = "SELECT seq FROM shipped WHERE name = ?"
        return int(self.store.read(lambda db: db.execute(query, (self.name,)).get) or 0)

    def _run(self) -> None:
        wait, said = self.first_wait_s, False
        while not self._stopped.is_set():
            try:
                self._more.clear()
                while self._send_some() and not self._stopped.is_set():
                    pass
                wait, said = self.first_wait_s, False
                self._more.wait()
            except (OSError, AgentdError) as e:
                if not said:  # once, however long it is away
                    _log.warning("events can't be sent to %s now, and will be later: %s", self.name, e)
                said = True
                self._stopped.wait(wait)
                wait = min(wait * 2, _LONGEST_WAIT_S)

    def _send_some(self) -> bool:
        """Whether there were any. Raises OSError, StoreError."""
        after = self.cursor()
        records = self.audit.records(after=after, limit=_BATCH)
        if not records:
            return False
        self.receiver.send(_messages(self.form, records))
        row = (self.name, records[-1].seq)
        self.store.write(lambda db: db.execute("INSERT OR REPLACE INTO shipped VALUES (?, ?)", row))
        return True


def _messages(form: str, records: Sequence[Record]) -> list[str]:
    if form == "otlp":
        whole = otlp(records)
        return [whole] if whole else []
    return [LINES[form](record) for record in records]
