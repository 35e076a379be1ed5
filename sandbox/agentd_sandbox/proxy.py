"""The proxy of one call: lets ordinary programs reach granted hosts by HTTP, and adds credentials they never see.

It speaks to one worker over a connection that nobody else has. `CONNECT host:port` gives a tunnel; a request for
`http://host/path` or `https://host/path` is made by the broker itself, which is the only place where `cred://NAME` in a
header becomes the secret. Hosts are read in one strict way (RFC 9112, RFC 3986 without userinfo); the form that is
decided on is the one that is dialled and the one that Host must name. `POST device:NAME` with a JSON object as its body has
a device of the call's scopes operated: what that does, whoever holds the devices knows.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import json
import re
import select
import socket
import ssl
import threading
import urllib.parse
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentd_sandbox.errors import DeviceFailure, SandboxFailure
from agentd_sandbox.network import DEFAULT_PORTS, Network, loopback_pair, split_authority, split_url
from agentd_sandbox.outcome import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Operate = Callable[[str, dict[str, Any]], dict[str, Any]]

DEVICE = "device:"
_HEAD_BYTES = 32 << 10
_BODY_BYTES = 16 << 20
_REQUEST_BYTES, _DEEPEST, _OPERATIONS = 1 << 20, 8, 16  # of what is asked of a device, and of how often in one call
_CHUNK = 64 << 10
_TICK_S = 0.2
_TIMEOUT_S = 30.0
_REQUEST = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]{1,8192}) HTTP/1\.[01]")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\x80-\xff\t]*?)[ \t]*")
_PLACEHOLDER = re.compile(r"cred://([a-z][a-z0-9_-]{0,63})")
_HOP_BY_HOP = frozenset(
    """connection proxy-connection proxy-authorization proxy-authenticate keep-alive te trailer upgrade
    transfer-encoding expect""".split()
)


@dataclass(frozen=True, slots=True)
class Credential:
    """A secret and the only place it may be sent to: over TLS, this host and port, paths at or below `path`."""

    host: str
    port: int
    path: str
    secret: str = field(repr=False)

    def fits(self, scheme: str, host: str, port: int, path: str) -> bool:
        below = self.path.rstrip("/") + "/"
        inside = path == self.path or path.startswith(below)
        return (scheme, host, port) == ("https", self.host, self.port) and inside and _is_plain(path)

    def traces(self) -> list[bytes]:
        """The forms in which an answer could give the secret back."""
        raw = self.secret.encode()
        return [raw, urllib.parse.quote(self.secret, safe="").encode(), *(_in_base64(raw, at) for at in range(3))]


class _Bad(Exception):
    """A request that is not passed on: status and what is wrong with it."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    rest: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


@dataclass(slots=True)
class Proxy:
    """Serves connections of one call until it ends. `deny` notes what was refused."""

    network: Network
    credentials: Mapping[str, Credential]
    deny: Callable[[str, str], None]
    stopped: threading.Event
    trust: ssl.SSLContext | None = None
    operate: Operate | None = None
    require_granted: Callable[[], None] = lambda: None
    """Raises SandboxFailure once the call may do nothing more."""
    at_a_time: int = 8
    operations: list[Operation] = field(default_factory=list)
    _places: threading.BoundedSemaphore = field(init=False)
    _open: list[socket.socket] = field(default_factory=list)
    _operating: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._places = threading.BoundedSemaphore(self.at_a_time)

    def connect(self) -> socket.socket:
        """A connection to this proxy, served on a thread of its own. Raises OSError: EAGAIN if there are too many."""
        if not self._places.acquire(blocking=False):
            self.deny("proxy", f"more than {self.at_a_time} connections at a time")
            raise OSError(errno.EAGAIN, "connections")
        try:
            ours, theirs = loopback_pair()
        except OSError:
            self._places.release()
            raise
        threading.Thread(target=self._serve_one, args=(theirs,), name="proxy", daemon=True).start()
        return ours

    def _serve_one(self, worker: socket.socket) -> None:
        try:
            self.serve(worker)
        finally:
            self._places.release()
            for end in [end for end in self._open if end.fileno() < 0]:
                with contextlib.suppress(ValueError):  # another one was quicker
                    self._open.remove(end)

    def stop(self) -> None:
        """End what is under way: whoever waits on a socket of this call stops waiting."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(self, worker: socket.socket) -> None:
        """One connection, one request; closes it. Blocks: run it on a thread of its own."""
        with worker, contextlib.suppress(OSError):
            self._open.append(worker)
            worker.settimeout(_TIMEOUT_S)
            try:
                request = _read_request(worker)
                if request.method == "CONNECT":
                    self._tunnel(worker, request)
                elif request.target.startswith(DEVICE):
                    self._have_operated(worker, request)
                else:
                    self._forward(worker, request)
            except _Bad as e:
                _refuse(worker, e.status, str(e))
            except OSError as e:
                if e.errno == errno.EACCES:
                    self.deny("proxy", str(e.strerror))
                    _refuse(worker, 403, str(e.strerror))
                else:
                    _refuse(worker, 502, f"the host can't be reached: {e.strerror or type(e).__name__}")
            except ValueError as e:  # after OSError: a certificate that can't be verified is both
                _refuse(worker, 400, str(e))
            except http.client.HTTPException as e:
                _refuse(worker, 502, f"the host's answer is not HTTP: {type(e).__name__}")

    # -- CONNECT

    def _tunnel(self, worker: socket.socket, request: _Request) -> None:
        host, port = split_authority(request.target, None)
        _same_host(request, host, port, 443)
        with self.network.dial(host, port) as remote, self.network.traffic.counting(remote):
            self._open.append(remote)
            worker.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if request.rest:
                _send(remote, request.rest)
            self._relay(worker, remote)

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        for end in (one, other):
            end.setblocking(False)
        waiting = {one: b"", other: b""}  # what is still to be sent to each
        ended: set[socket.socket] = set()
        while len(ended) < 2 and not self.stopped.is_set():
            poll = select.poll()
            for end, peer in ((one, other), (other, one)):
                wanted = select.POLLOUT if waiting[end] else 0
                wanted |= select.POLLIN if end not in ended and not waiting[peer] else 0
                if wanted:
                    poll.register(end, wanted)
            ready = dict(poll.poll(_TICK_S * 1000))
            for end, peer in ((one, other), (other, one)):
                events = ready.get(end.fileno(), 0)
                if waiting[end] and events & (select.POLLOUT | select.POLLERR):
                    waiting[end] = waiting[end][end.send(waiting[end]) :]
                elif events & (select.POLLIN | select.POLLHUP | select.POLLERR) and end not in ended and not waiting[peer]:
                    data = end.recv(_CHUNK)
                    waiting[peer] = data
                    if not data:
                        ended.add(end)
                        with contextlib.suppress(OSError):
                            peer.shutdown(socket.SHUT_WR)

    # -- a device

    def _have_operated(self, worker: socket.socket, request: _Request) -> None:
        name = urllib.parse.unquote(request.target.removeprefix(DEVICE))
        if self.operate is None or name not in self.network.devices:
            self.deny("proxy", f"no scope for the device {name[:100]}")
            raise _Bad(403, f"this call has no scope for the device {name[:100]}")
        if request.method != "POST":
            raise _Bad(405, "a device is operated by POST")
        body = _read_body(worker, request)
        if len(body) > _REQUEST_BYTES:
            raise _Bad(413, f"what is asked of a device has {_REQUEST_BYTES >> 20} MiB at most")
        try:
            asked = json.loads(body, parse_constant=_no_json)
        except RecursionError:
            asked = None
        if not isinstance(asked, dict) or not _is_shallow(asked, _DEEPEST):
            raise _Bad(400, "the body is no JSON object, or a deep one")
        _reply(worker, 200, "application/json", json.dumps(self._operated(self.operate, name, asked)).encode())

    def _operated(self, operate: Operate, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """One at a time, so many in a call, and none once it is over."""
        with self._operating:
            try:
                self.require_granted()
            except SandboxFailure as e:
                raise _Bad(403, str(e)) from None
            if self.stopped.is_set():
                raise _Bad(403, "the call is over")
            if len(self.operations) >= _OPERATIONS:
                self.deny("proxy", f"more than {_OPERATIONS} operations of devices")
                raise _Bad(429, f"a call may have devices operated {_OPERATIONS} times")
            operation = Operation(name, asked)
            self.operations.append(operation)
            try:
                answer = operate(name, asked)
            except DeviceFailure as e:
                self.operations[-1] = replace(operation, error=str(e))
                raise _Bad(502, str(e)) from None
            self.operations[-1] = replace(operation, answer=answer)
            return answer

    # -- a request in the broker's own name

    def _forward(self, worker: socket.socket, request: _Request) -> None:
        url = split_url(request.target)
        scheme, host, port, path = url.scheme, url.host, url.port, url.path
        default = DEFAULT_PORTS[scheme]
        _same_host(request, host, port, default)
        headers, used = self._fill_in(request, scheme, host, port, path)
        body = _read_body(worker, request)
        with self.network.dial(host, port) as plain, self.network.traffic.counting(plain):
            self._open.append(plain)
            plain.settimeout(_TIMEOUT_S)
            remote = self._trust().wrap_socket(plain, server_hostname=host) if scheme == "https" else plain
            with remote:
                connection = http.client.HTTPConnection(host, port)
                connection.sock = remote
                connection.putrequest(request.method, path, skip_host=True, skip_accept_encoding=True)
                shown = f"[{host}]" if ":" in host else host
                connection.putheader("Host", shown if port == default else f"{shown}:{port}")
                for name, value in headers:
                    connection.putheader(name, value)
                connection.putheader("Connection", "close")
                connection.endheaders(body or None)
                with connection.getresponse() as response:
                    self._hand_on(worker, response, [credential.traces() for credential in used])

    def _fill_in(
        self, request: _Request, scheme: str, host: str, port: int, path: str
    ) -> tuple[list[tuple[str, str]], list[Credential]]:
        """The headers to send, with secrets in the place of placeholders."""
        used: list[Credential] = []
        if _PLACEHOLDER.search(request.target):
            raise _Bad(400, "a credential belongs in a header, not in the address")

        def secret(match: re.Match[str]) -> str:
            credential = self.credentials.get(match[1])
            if credential is None or not credential.fits(scheme, host, port, path):
                self.deny("proxy", f"{match[0]} for {scheme}://{host}:{port}{path}")
                raise _Bad(403, f"{match[0]} may not be used for {scheme}://{host}:{port}")
            used.append(credential)
            return credential.secret

        dropped = _HOP_BY_HOP | {"host"} | {name.strip().lower() for v in request.values("connection") for name in v.split(",")}
        kept = [(name, _PLACEHOLDER.sub(secret, value)) for name, value in request.headers if name.lower() not in dropped]
        if used:  # what comes back is searched, so it must not be compressed
            kept = [(name, value) for name, value in kept if name.lower() != "accept-encoding"]
            kept.append(("Accept-Encoding", "identity"))
        return kept, used

    def _trust(self) -> ssl.SSLContext:
        if self.trust is None:
            self.trust = ssl.create_default_context()
        return self.trust

    def _hand_on(self, worker: socket.socket, response: http.client.HTTPResponse, traces: list[list[bytes]]) -> None:
        """Pass the answer on. If it gives a secret back, the worker sees nothing of it from there on."""
        needles = [trace for group in traces for trace in group]
        if needles and response.getheader("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise _Bad(502, "the host compressed its answer, so it can't be searched for the credential")
        dropped = _HOP_BY_HOP | {"content-length"}
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.getheaders() if name.lower() not in dropped]
        head = "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1", "replace")
        window = max((len(needle) for needle in needles), default=1) - 1
        if any(needle in head for needle in needles):
            self.deny("proxy", "the answer gave a credential back")
            raise _Bad(502, "the host's answer contained the credential")
        worker.sendall(head)
        held = b""
        while not self.stopped.is_set():
            chunk = response.read(_CHUNK)
            held += chunk
            if any(needle in held for needle in needles):
                self.deny("proxy", "the answer gave a credential back")
                return
            if not chunk:
                worker.sendall(held)
                return
            ready = len(held) - window
            if ready > 0:
                worker.sendall(held[:ready])
                held = held[ready:]


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_shallow(value: Any, left: int) -> bool:
    """What is deep can be read, and then neither copied nor written."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left > 0 and all(_is_shallow(each, left - 1) for each in inside)


def _in_base64(raw: bytes, before: int) -> bytes:
    """The characters that only `raw` decides if that many bytes, modulo 3, stand before it."""
    encoded = base64.b64encode(bytes(before) + raw).rstrip(b"=")
    complete = len(encoded) - ((before + len(raw)) % 3 != 0)
    return encoded[(0, 2, 3)[before] : complete]


def _read_request(worker: socket.socket) -> _Request:
    data = b""
    while b"\r\n\r\n" not in data:
        if len(data) > _HEAD_BYTES:
            raise _Bad(431, "the head of the request is too long")
        chunk = worker.recv(_CHUNK)
        if not chunk:
            raise _Bad(400, "the request has no end")
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    match = _REQUEST.fullmatch(first)
    headers = [_HEADER.fullmatch(line) for line in lines]
    if match is None or not all(headers):
        raise _Bad(400, "the request is not HTTP/1.1")
    parsed = tuple((m[1].decode("latin-1"), m[2].decode("latin-1")) for m in headers if m)
    return _Request(match[1].decode(), match[2].decode(), parsed, rest)


def _same_host(request: _Request, host: str, port: int, default: int) -> None:
    named = request.values("host")
    if len(named) > 1 or (named and split_authority(named[0], default) != (host, port)):
        raise _Bad(400, "Host names another host than the request")


def _read_body(worker: socket.socket, request: _Request) -> bytes:
    """The body by its Content-Length; two lengths, or chunks, could be read in two ways and are refused."""
    if request.values("transfer-encoding"):
        raise _Bad(411, "send a Content-Length, not chunks")
    lengths = request.values("content-length")
    if len(lengths) > 1 or not all(length.isascii() and length.isdigit() for length in lengths):
        raise _Bad(400, "Content-Length is not one number")
    wanted = int(lengths[0]) if lengths else 0
    if wanted > _BODY_BYTES:
        raise _Bad(413, f"the body is larger than {_BODY_BYTES >> 20} MiB")
    if "100-continue" in [value.lower() for value in request.values("expect")]:
        worker.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    data = request.rest[:wanted]
    while len(data) < wanted:
        chunk = worker.recv(min(_CHUNK, wanted - len(data)))
        if not chunk:
            raise _Bad(400, "the body ended early")
        data += chunk
    return data


def _is_plain(path: str) -> bool:
    """Whether every server reads this path alike: no dot segments, empty segments, backslashes, or encoded ones."""
    plain = path.partition("?")[0]
    return not re.search(r"//|\\|%2e|%2f|%5c|/\.{1,2}(/|$)|;", plain, re.IGNORECASE)


def _send(remote: socket.socket, data: bytes) -> None:
    remote.settimeout(_TIMEOUT_S)
    remote.sendall(data)


def _refuse(worker: socket.socket, status: int, why: str) -> None:
    _reply(worker, status, "text/plain", f"agentd: {why}\n".encode("utf-8", "replace"))


def _reply(worker: socket.socket, status: int, kind: str, body: bytes) -> None:
    reason = http.client.responses.get(status, "Error")
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with contextlib.suppress(OSError):
        worker.sendall(head.encode() + body)
