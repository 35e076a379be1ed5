"""The proxy of a call: what it passes on, what it refuses, and where a credential goes."""

from __future__ import annotations

import base64
import http.server
import socket
import ssl
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Credential
from agentd_sandbox.network import Network, loopback_pair
from agentd_sandbox.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "s3cret+of/the=server"
NAME = "device.example"


@dataclass
class Seen:
    """What servers got, and how the next answer is to be."""

    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"answer"
    chunked: bool = False


def handler(seen: Seen) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.requests.append((self.command, self.path, dict(self.headers), body))
            self.send_response(seen.status)
            for name, value in seen.headers.items():
                self.send_header(name, value)
            if seen.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for at in range(0, len(seen.body), 7):
                    piece = seen.body[at : at + 7]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
                return
            if seen.status not in (204, 304):
                self.send_header("Content-Length", str(len(seen.body)))
            self.end_headers()
            if self.command != "HEAD" and seen.status not in (204, 304):
                self.wfile.write(seen.body)

        do_GET = do_POST = do_HEAD = do_PUT = answer  # noqa: N815 # the names that the base class looks for

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@dataclass
class Bench:
    """A proxy, a plain and a secure server behind one name, and a credential for the secure one."""

    seen: Seen
    plain: int
    secure: int
    trust: ssl.SSLContext
    denials: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def proxy(self) -> Proxy:
        ports = (self.plain, self.secure)
        granted = frozenset((host, port) for host in (NAME, "127.0.0.1") for port in ports)

        def resolve(name: str) -> list[str]:
            self.asked.append(name)
            return ["127.0.0.1"]

        network = Network(granted, time.monotonic() + 30, self.stopped, resolve)
        credential = Credential(NAME, self.secure, "/api", SECRET)
        return Proxy(network, {"device": credential}, lambda *said: self.denials.append(said), self.stopped, self.trust)

    def say(self, data: bytes, proxy: Proxy | None = None) -> bytes:
        """All that comes back for these bytes."""
        ours, theirs = loopback_pair()
        thread = threading.Thread(target=(proxy or self.proxy()).serve, args=(theirs,))
        thread.start()
        with ours:
            ours.settimeout(20)
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            back = b""
            while chunk := ours.recv(1 << 16):
                back += chunk
        thread.join(20)
        return back

    def fetch(self, url: str, *headers: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
        host = url.split("/")[2]
        lines = [f"{method} {url} HTTP/1.1", f"Host: {host}", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        back = self.say("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return int(back.split(b" ")[1]), back.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's, and one that trusts it."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(NAME).configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
def bench(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[Bench]:
    seen = Seen()
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(seen)) for _ in range(2)]
    servers[1].socket = contexts[0].wrap_socket(servers[1].socket, server_side=True)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    made = Bench(seen, servers[0].server_port, servers[1].server_port, contexts[1])
    yield made
    made.stopped.set()
    for server in servers:
        server.shutdown()
        server.server_close()
    everything = str(made.denials)
    assert SECRET not in everything


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_is_made_in_the_brokers_name(bench: Bench, scheme: str):
    """With its method, headers and body, and without what concerns the proxy only."""
    port = bench.plain if scheme == "http" else bench.secure
    url = f"{scheme}://{NAME}:{port}/x?y=1"
    status, body = bench.fetch(
        url, "X-Own: 1", "Proxy-Authorization: x", "Connection: X-Hop", "X-Hop: 1", method="POST", body=b"sent"
    )
    assert (status, body) == (200, b"answer")
    method, path, headers, sent = bench.seen.requests[0]
    assert (method, path, sent) == ("POST", "/x?y=1", b"sent")
    assert headers["X-Own"] == "1"
    assert headers["Host"] == f"{NAME}:{port}"
    assert not {"Proxy-Authorization", "X-Hop"} & set(headers)


@pytest.mark.parametrize(
    ("status", "chunked", "method", "body"),
    [
        (200, True, "GET", b"in pieces" * 100),
        (404, False, "GET", b"no"),
        (204, False, "GET", b""),
        (304, False, "GET", b""),
        (200, False, "HEAD", b"x"),
    ],
)
def test_answers_of_every_kind_come_through(bench: Bench, status: int, chunked: bool, method: str, body: bytes):
    """Chunks are put together; what has no body has none."""
    bench.seen.status, bench.seen.chunked, bench.seen.body = status, chunked, body
    assert bench.fetch(f"http://{NAME}:{bench.plain}/", method=method) == (status, b"" if method == "HEAD" else body)


def test_a_tunnel_carries_both_ways_unchanged(bench: Bench):
    """Ten megabytes there and back, and the end of one side first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        data = bytes(range(256)) * 40_000

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                got = b""
                while chunk := connection.recv(1 << 16):
                    got += chunk
                connection.sendall(got)

        threading.Thread(target=echo, daemon=True).start()
        proxy = bench.proxy()
        proxy.network.granted = frozenset({("127.0.0.1", port)})
        back = bench.say(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode() + data, proxy)
    head, _, body = back.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == data


BAD = [
    "GET / HTTP/1.1\r\nHost: {n}:{p}\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nHost: other\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nHost: {n}\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nHost: {n}:{p}\r\nHost: other\r\n\r\n",
    "GET http://user@{n}:{p}/ HTTP/1.1\r\n\r\n",
    "GET http://{n}:{p}/#x HTTP/1.1\r\n\r\n",
    "GET http://{n}:{p}\\@other/ HTTP/1.1\r\n\r\n",
    "GET ftp://{n}:{p}/ HTTP/1.1\r\n\r\n",
    "get http://{n}:{p}/ HTTP/1.1\r\n\r\n",
    "GET  http://{n}:{p}/ HTTP/1.1\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/2\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\nHost: {n}:{p}\n\n\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nX: a\r\n b\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nX : a\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nX: a\0b\r\n\r\n",
    "GET http://{n}:{p}/ HTTP/1.1\r\nX: a\nY: b\r\n\r\n",
    "POST http://{n}:{p}/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "POST http://{n}:{p}/ HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
    "POST http://{n}:{p}/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
    "POST http://{n}:{p}/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "POST http://{n}:{p}/ HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    "CONNECT {n} HTTP/1.1\r\n\r\n",
    "CONNECT {n}:{p}/ HTTP/1.1\r\n\r\n",
    "CONNECT {n}:{p} HTTP/1.1\r\nHost: other:1\r\n\r\n",
    "CONNECT {n}\0.other:{p} HTTP/1.1\r\n\r\n",
    "CONNECT user@{n}:{p} HTTP/1.1\r\n\r\n",
    "CONNECT 2130706433:{p} HTTP/1.1\r\n\r\n",
    "CONNECT http://{n}:{p} HTTP/1.1\r\n\r\n",
    "X" * 40_000 + "\r\n\r\n",
    "GET http://{n}:{p}/cred://device HTTP/1.1\r\n\r\n",
    "\r\n\r\n",
    "",
]


@pytest.mark.parametrize("request_text", BAD)
def test_a_request_that_could_be_read_in_two_ways_goes_nowhere(bench: Bench, request_text: str):
    """An error of the 4xx kind, and no server sees anything."""
    back = bench.say(request_text.format(n=NAME, p=bench.plain).encode("latin-1"))
    assert back.startswith(b"HTTP/1.1 4"), back[:200]
    assert bench.seen.requests == []


@pytest.mark.parametrize(
    "target", ["GET http://other.example/", "CONNECT other.example:443", f"CONNECT {NAME}:1", "GET http://127.0.0.2/"]
)
def test_what_is_not_granted_is_refused_and_noted(bench: Bench, target: str):
    """403; nothing is resolved for it."""
    assert bench.say(f"{target} HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.1 403")
    assert bench.asked == []
    assert bench.denials


def test_a_credential_is_put_in_where_it_belongs(bench: Bench):
    """In a header, over TLS, at or below its path."""
    for path in ("/api", "/api/state?x=1"):
        assert bench.fetch(f"https://{NAME}:{bench.secure}{path}", "Authorization: Bearer cred://device")[0] == 200
    assert [headers["Authorization"] for _, _, headers, _ in bench.seen.requests] == [f"Bearer {SECRET}"] * 2
    assert all(headers["Accept-Encoding"] == "identity" for _, _, headers, _ in bench.seen.requests)


@pytest.mark.parametrize(
    ("scheme", "host", "path", "name"),
    [
        ("http", NAME, "/api", "device"),
        ("https", "127.0.0.1", "/api", "device"),
        ("https", NAME, "/", "device"),
        ("https", NAME, "/apix", "device"),
        ("https", NAME, "/API", "device"),
        ("https", NAME, "/api/../x", "device"),
        ("https", NAME, "/api/./x", "device"),
        ("https", NAME, "/api//x", "device"),
        ("https", NAME, "/api/%2e%2e/x", "device"),
        ("https", NAME, "/api/%2E%2E%2Fx", "device"),
        ("https", NAME, "/api/..;/x", "device"),
        ("https", NAME, "/api/..%5cx", "device"),
        ("https", NAME, "/api", "other"),
    ],
)
def test_a_credential_goes_nowhere_else(bench: Bench, scheme: str, host: str, path: str, name: str):
    """403, noted without the secret, and no server hears of it."""
    port = bench.plain if scheme == "http" else bench.secure
    status, body = bench.fetch(f"{scheme}://{host}:{port}{path}", f"X-Key: cred://{name}")
    assert status == 403
    assert SECRET.encode() not in body
    assert bench.seen.requests == []
    assert any(f"cred://{name}" in why for _, why in bench.denials)


def test_a_placeholder_in_a_body_stays_one(bench: Bench):
    """Only headers are filled in."""
    bench.fetch(f"https://{NAME}:{bench.secure}/api", method="POST", body=b"cred://device")
    assert bench.seen.requests[0][3] == b"cred://device"


ECHOES = {
    "plain": SECRET.encode(),
    "in the middle": b"x" * 70_000 + SECRET.encode() + b"y" * 70_000,
    "at the border of two reads": b"x" * (65536 - 5) + SECRET.encode(),
    "percent-encoded": urllib.parse.quote(SECRET, safe="").encode(),
    "base64": base64.b64encode(SECRET.encode()),
    "base64 of a header": base64.b64encode(b"id:" + SECRET.encode()),
    "base64 one byte further": base64.b64encode(b"user" + SECRET.encode() + b"!"),
    "base64 two bytes further": base64.b64encode(b"a user" + b":x" + SECRET.encode() + b"and more"),
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_an_answer_that_gives_the_secret_back_is_cut_off(bench: Bench, echo: bytes, chunked: bool):
    """Before the secret, in whatever pieces it comes."""
    bench.seen.body, bench.seen.chunked = echo, chunked
    _, body = bench.fetch(f"https://{NAME}:{bench.secure}/api", "X-Key: cred://device")
    assert SECRET.encode() not in body
    assert urllib.parse.quote(SECRET, safe="").encode() not in body
    assert base64.b64encode(SECRET.encode()).rstrip(b"=") not in body
    assert echo.strip(b"xy=") not in body
    assert ("proxy", "the answer gave a credential back") in bench.denials


def test_a_secret_in_a_header_of_the_answer_is_kept_back(bench: Bench):
    """502, and nothing of the answer."""
    bench.seen.headers = {"X-Echo": SECRET}
    status, body = bench.fetch(f"https://{NAME}:{bench.secure}/api", "X-Key: cred://device")
    assert status == 502
    assert SECRET.encode() not in body


def test_an_answer_that_can_not_be_searched_is_kept_back(bench: Bench):
    """It is compressed although nobody asked for that."""
    bench.seen.headers = {"Content-Encoding": "gzip"}
    assert bench.fetch(f"https://{NAME}:{bench.secure}/api", "X-Key: cred://device")[0] == 502
    assert bench.fetch(f"https://{NAME}:{bench.secure}/api")[0] == 200


def test_a_redirect_is_handed_on_and_not_followed(bench: Bench):
    """Whoever follows it asks anew, for a place that the credential does not fit."""
    bench.seen.status, bench.seen.headers = 302, {"Location": "https://other.example/"}
    assert bench.fetch(f"https://{NAME}:{bench.secure}/api", "X-Key: cred://device")[0] == 302
    assert len(bench.seen.requests) == 1


def test_a_certificate_that_nobody_vouches_for_is_refused(bench: Bench):
    """The secret does not leave."""
    bench.trust = ssl.create_default_context()
    assert bench.fetch(f"https://{NAME}:{bench.secure}/api", "X-Key: cred://device")[0] == 502
    assert bench.seen.requests == []


def test_a_credential_does_not_show_its_secret():
    """In logs and tracebacks."""
    assert SECRET not in repr(Credential(NAME, 443, "/", SECRET))


@pytest.mark.parametrize("said", [b"", b"GET http://", b"CONNECT {p} HTTP/1.1\r\n\r\n"])
def test_a_connection_ends_with_the_call(bench: Bench, said: bytes):
    """Whatever it was waiting for."""
    proxy = bench.proxy()
    ours, theirs = loopback_pair()
    thread = threading.Thread(target=proxy.serve, args=(theirs,))
    thread.start()
    with ours:
        ours.sendall(said.replace(b"{p}", f"127.0.0.1:{bench.plain}".encode()))
        time.sleep(0.2)
        bench.stopped.set()
        proxy.stop()
        thread.join(5)
        assert not thread.is_alive()
