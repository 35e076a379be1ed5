"""Network mediation: a connection is made by the broker and put in the place of the worker's own socket.

A worker can't look names up. Each name of its scopes has a made-up address (198.18.0.0/15, RFC 2544: never routed),
which a made-up /etc/hosts tells. A connect to it is for that name: the broker resolves it, once for each call, and takes
public addresses only. Private ones (RFC 6890) must be granted as they are. One more made-up address is the proxy.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Callable

ADDRESS_BYTES = 128  # sizeof(struct sockaddr_storage)
PROXY = ("198.19.255.254", 3128)
_FIRST = int(ipaddress.IPv4Address("198.18.0.1"))
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?", re.ASCII)
_PLAIN = re.compile(r"""[^\x00-\x20\x7f-\U0010ffff#"<>\\^`{|}]+""")
_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is given out to be reached from anywhere (RFC 4291; site-local, unique local, link-local, NAT64 and
IPv4-compatible ones lie outside)."""
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
            *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
        ),
    )
)
"""IANA's registries of special-purpose addresses for IPv4 and IPv6 (iana.org/assignments/iana-ipv4-special-registry and
iana-ipv6-special-registry, as of 2024-10), whole blocks even where a part is globally reachable; multicast; the reserved rest.
"""
DEFAULT_PORTS = {"http": 80, "https": 443}
_TICK_S = 0.1
_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
)
"""What programs like to set before they connect."""


def canonical_host(text: str) -> str | None:
    """The one form of a host name or address that is decided on and dialled; None if it is neither.

    Letters, digits and hyphens in labels (RFC 1123), lower case, no dot at the end. A last label of digits, or one that
    starts with 0x, would be read as a number by some resolvers: only the four decimal numbers of IPv4 are an address.
    """
    bare = text.removeprefix("[").removesuffix("]") if text.startswith("[") and text.endswith("]") else text
    if bare != text and ":" not in bare:
        return None
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        pass
    else:
        if isinstance(address, ipaddress.IPv6Address):
            if address.scope_id:
                return None
            return str(address.ipv4_mapped or address)
        return str(address)
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not name.isascii() or not _NAME.fullmatch(name):
        return None
    last = name.rpartition(".")[2]
    return None if last.isdigit() or last.startswith("0x") else name


@dataclass(frozen=True, slots=True)
class Url:
    """An address of the web, taken apart in the one strict way that is decided on. `path` has the query with it."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def split_authority(text: str, default: int | None) -> tuple[str, int]:
    """Host and port. Raises ValueError for anything that two parsers could read differently."""
    match = _AUTHORITY.fullmatch(text)
    host = canonical_host(match[1]) if match else None
    port = int(match[2]) if match and match[2] else default
    if host is None or port is None or not 0 < port < 65536:
        raise ValueError("the host is not a plain name or address with a port")
    return host, port


def split_url(text: str) -> Url:
    """An http or https address (RFC 3986) without userinfo and fragment. Raises ValueError."""
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in DEFAULT_PORTS:
        raise ValueError("only http:// and https:// are fetched")
    if not _PLAIN.fullmatch(rest):
        raise ValueError("the address has characters that do not belong in one")
    end = min((i for i in (rest.find(c) for c in "/?") if i >= 0), default=len(rest))
    host, port = split_authority(rest[:end], DEFAULT_PORTS[scheme])
    path = rest[end:]
    return Url(scheme, host, port, path if path.startswith("/") else "/" + path)


def is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's, and stands for no other: not private, loopback, link-local (cloud metadata),
    multicast, nor one that a translator turns into an IPv4 one. By `_SPECIAL`, as Python's own tables differ by version.
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return is_public(str(parsed.ipv4_mapped))
        return parsed in _UNICAST and not any(parsed in block for block in _SPECIAL if block.version == 6)
    return not any(parsed in block for block in _SPECIAL if block.version == 4)


def look_up(name: str) -> list[str]:
    """The addresses of a name, by the system's resolver. Raises OSError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def peer(raw: bytes) -> tuple[str, int]:
    """(address, port) of a sockaddr. Addresses mapped into IPv6 are given in their IPv4 form. Raises OSError."""
    (family,) = struct.unpack_from("=H", raw)
    if family == socket.AF_INET and len(raw) >= 8:
        (port,) = struct.unpack_from("!H", raw, 2)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    if family == socket.AF_INET6 and len(raw) >= 24:
        (port,) = struct.unpack_from("!H", raw, 2)
        address = ipaddress.IPv6Address(raw[8:24])
        return str(address.ipv4_mapped or address), port
    raise OSError(errno.EAFNOSUPPORT, "address family")


@dataclass(slots=True)
class Network:
    """The peers of one call. `resolve` looks names up; what it said is kept for the call, so that it can't change.

    Safe to use from several threads.
    """

    granted: frozenset[tuple[str, int]]
    deadline: float
    """monotonic(3) time past which nothing waits any more"""
    stopped: threading.Event
    resolve: Callable[[str], list[str]] = look_up
    devices: frozenset[str] = frozenset()
    """Those that are operated through the proxy."""
    traffic: Traffic = field(default_factory=Traffic)
    _pinned: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def has_proxy(self) -> bool:
        return bool(self.granted or self.devices)

    @property
    def made_up_addresses(self) -> dict[str, str]:
        """Address by name."""
        names = sorted({host for host, _ in self.granted if is_name(host)})
        return {name: str(ipaddress.IPv4Address(_FIRST + n)) for n, name in enumerate(names)}

    def made_up_files(self) -> dict[bytes, bytes]:
        """What the C library looks names up in: files only, as nobody in there can be asked."""
        lines = [f"{address} {name}\n" for name, address in self.made_up_addresses.items()]
        return {
            b"/etc/hosts": "".join(("127.0.0.1 localhost\n", *lines)).encode(),
            b"/etc/nsswitch.conf": b"hosts: files\n",
        }

    def meant(self, address: str, port: int) -> tuple[str, int]:
        """What a worker that connects to this address wants: the name, if the address is a made-up one."""
        names = {made_up: name for name, made_up in self.made_up_addresses.items()}
        return names.get(address, address), port

    def dial(self, host: str, port: int, *, wait: bool = True) -> socket.socket:
        """A socket connected to a granted peer; without `wait` perhaps still connecting.

        Raises OSError: EACCES if it is not granted or the name leads to no public address.
        """
        if (host, port) not in self.granted:
            raise OSError(errno.EACCES, f"no scope to connect to {host}:{port}")
        failure = OSError(errno.EHOSTUNREACH, f"{host} has no address")
        for address in self._addresses(host, port):
            try:
                made = self._connect(address, port, wait=wait)
            except OSError as e:
                failure = e
                continue
            self.traffic.add(host, port, made)
            return made
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        """Public ones of a name, and private ones that are granted as they are, with this port."""
        if not is_name(host):
            return [host]
        with self._lock:
            if host not in self._pinned:
                try:
                    self._pinned[host] = self.resolve(host)
                except (OSError, UnicodeError):
                    raise OSError(errno.EHOSTUNREACH, f"{host} can't be resolved") from None
            found = self._pinned[host]
        allowed = [address for address in found if is_public(address) or (canonical_host(address), port) in self.granted]
        if found and not allowed:
            raise OSError(
                errno.EACCES, f"{host} leads to a private address ({found[0]}), which is not granted with port {port}"
            )
        return allowed

    def _connect(self, address: str, port: int, *, wait: bool) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            code = made.connect_ex((address, port))
            if code == errno.EINPROGRESS and wait:
                code = self._wait(made)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except OSError:
            made.close()
            raise
        return made

    def _wait(self, made: socket.socket) -> int:
        poll = select.poll()
        poll.register(made, select.POLLOUT)
        while not self.stopped.is_set() and time.monotonic() < self.deadline:
            if poll.poll(_TICK_S * 1000):
                return made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return errno.ETIMEDOUT


def like(template: socket.socket, made: socket.socket) -> None:
    """Give a socket the options that a program has set on its own before."""
    for level, option in _OPTIONS:
        value = template.getsockopt(level, option)
        if value != made.getsockopt(level, option):
            made.setsockopt(level, option, value)


def loopback_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection that nobody else has: programs expect TCP of what they connected."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        ours = socket.create_connection(server.getsockname(), timeout=5)
        server.settimeout(5)
        while True:
            theirs, address = server.accept()
            if address == ours.getsockname():
                ours.setblocking(True)  # its time-out has made it non-blocking, for whoever gets the descriptor too
                return ours, theirs
            theirs.close()  # somebody else on this machine was quicker
