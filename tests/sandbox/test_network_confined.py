"""The network as a confined program sees it: real workers, real servers, curl where it is installed."""

from __future__ import annotations

import errno
import http.server
import os
import shutil
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, Contact, Job, Outcome, PathRule, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change

PROGRAM = b'''
import asyncio, errno, fcntl, os, select, socket, subprocess, urllib.request
from agentd_sandbox.sdk import tool

@tool("connect")
def connect(host, port):
    with socket.create_connection((host, port), 5) as made:
        made.sendall(b"hello")
        return {"got": made.recv(64).decode()}

@tool("fetch")
def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return {"got": answer.read().decode()}

@tool("kept")
def kept(port):
    """What was set before connect is there after it."""
    made = socket.socket()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    os.set_inheritable(made.fileno(), True)
    number = made.fileno()
    made.connect(("127.0.0.1", port))
    return {
        "delay": made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
        "inheritable": os.get_inheritable(made.fileno()),
        "same": number == made.fileno(),
        "blocking": os.get_blocking(made.fileno()),
        "peer": list(made.getpeername()),
    }

@tool("without_waiting")
def without_waiting(port):
    made = socket.socket()
    made.setblocking(False)
    code = made.connect_ex(("127.0.0.1", port))
    select.select([], [made], [], 5)
    return {"code": code, "end": made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "blocking": os.get_blocking(made.fileno())}

@tool("loop")
def loop(port):
    async def talk():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello")
        await writer.drain()
        got = await reader.read(64)
        writer.close()
        return got.decode()
    return {"got": asyncio.run(talk())}

@tool("talk_often")
def talk_often(port, times, fork):
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", port), 5) as made:
            if fork and os.fork():
                made.close()
                os.wait()
                continue
            made.sendall(b"x" * 60)
            while made.recv(64):
                pass
            if fork:
                os._exit(0)
    return {}

@tool("close_then_ask")
def close_then_ask(port):
    with socket.create_connection(("127.0.0.1", port), 5) as made:
        made.sendall(b"that is all")
    with socket.create_connection(("127.0.0.1", port), 5) as made:
        return {"got": made.recv(64).decode()}

@tool("many")
def many(port, count):
    held = []
    for _ in range(count):
        held.append(socket.create_connection(("127.0.0.1", port), 5))
    return {"held": len(held)}

@tool("look_up")
def look_up(name):
    return {"found": sorted({entry[4][0] for entry in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)})}

@tool("curl")
def curl(arguments):
    done = subprocess.run(["curl", "-sS", "--max-time", "10", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return {"status": done.returncode, "got": done.stdout.decode(), "said": done.stderr.decode()}
'''


class Silent:
    """A recorder that agrees to everything."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        pass


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{self.headers['Host'].partition(':')[0]}{self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """Of a web server, and of one that says what it heard."""
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
    echo = socket.create_server(("127.0.0.1", 0), backlog=128)

    def answer() -> None:
        while True:
            try:
                connection, _ = echo.accept()
            except OSError:
                return
            threading.Thread(target=say, args=(connection,), daemon=True).start()

    def say(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"heard " + connection.recv(64))

    threading.Thread(target=answer, daemon=True).start()
    yield site.server_port, echo.getsockname()[1]
    site.shutdown()
    site.server_close()
    echo.close()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The names that the broker has looked up."""
    return []


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> Iterator[Sandbox]:
    def resolve(name: str) -> list[str]:
        asked.append(name)
        return ["127.0.0.1"]

    made = Sandbox({"tool": PROGRAM}, tmp_path_factory.mktemp("work"), resolve=resolve)
    made.start()
    assert made.level is not None
    if "broker" not in made.level.layers:
        pytest.skip("no broker in this kernel")
    yield made
    made.stop()


def run(sandbox: Sandbox, tool: str, *peers: tuple[str, int], **arguments: Any) -> Outcome:
    access = Access(execute=(PathRule(b"/usr"),), connect=frozenset(peers))
    return sandbox.run(Job("tool", tool, arguments, {}, 20, 8192), access, Silent(), threading.Event())


def test_an_address_and_a_name_lead_to_the_same(sandbox: Sandbox, ports: tuple[int, int]):
    """The name by a made-up hosts file, and the literal that it needs as it is private."""
    literal, named = ("127.0.0.1", ports[1]), ("device.example", ports[1])
    assert run(sandbox, "connect", literal, host="127.0.0.1", port=ports[1]).result == {"got": "heard hello"}
    outcome = run(sandbox, "connect", literal, named, host="device.example", port=ports[1])
    assert outcome.result == {"got": "heard hello"}
    assert outcome.contacts == (Contact(*named, connections=1, sent=5, received=11),)


def test_what_a_program_had_set_is_kept(sandbox: Sandbox, ports: tuple[int, int]):
    """Options, flags and number of its socket."""
    assert run(sandbox, "kept", ("127.0.0.1", ports[1]), port=ports[1]).result == {
        "delay": 1,
        "inheritable": True,
        "same": True,
        "blocking": True,
        "peer": ["127.0.0.1", ports[1]],
    }


def test_a_socket_that_does_not_wait_is_not_made_to(sandbox: Sandbox, ports: tuple[int, int]):
    """EINPROGRESS or done, then ready; asyncio works on it."""
    result = run(sandbox, "without_waiting", ("127.0.0.1", ports[1]), port=ports[1]).result
    assert result is not None
    assert result["code"] in (0, errno.EINPROGRESS)
    assert (result["end"], result["blocking"]) == (0, False)
    assert run(sandbox, "loop", ("127.0.0.1", ports[1]), port=ports[1]).result == {"got": "heard hello"}


def test_many_connections_can_be_held(sandbox: Sandbox, ports: tuple[int, int]):
    """More than may be made at the same moment; the daemon keeps none of them."""
    before = len(os.listdir("/proc/self/fd"))
    assert run(sandbox, "many", ("127.0.0.1", ports[1]), port=ports[1], count=60).result == {"held": 60}
    end = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before + 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("name", ["secret-in-a-name.attacker.example", "device.example.attacker.example"])
def test_a_name_without_a_grant_is_never_looked_up(sandbox: Sandbox, ports: tuple[int, int], asked: list[str], name: str):
    """Neither by the worker, which can reach no name server, nor for it."""
    asked.clear()
    peers = (("device.example", ports[0]), ("127.0.0.1", ports[0]))
    assert run(sandbox, "look_up", *peers, name=name).error
    assert run(sandbox, "fetch", *peers, url=f"http://{name}:{ports[0]}/").error
    assert asked == []


def test_a_granted_name_is_told_without_being_looked_up(sandbox: Sandbox, asked: list[str]):
    """Its made-up address is no secret; what it stands for is asked for only to connect."""
    asked.clear()
    result = run(sandbox, "look_up", ("device.example", 80), name="device.example").result
    assert result == {"found": ["198.18.0.1"]}
    assert asked == []


def test_the_proxy_fetches_for_ordinary_libraries(sandbox: Sandbox, ports: tuple[int, int]):
    """urllib takes http_proxy from its environment."""
    peers = (("device.example", ports[0]), ("127.0.0.1", ports[0]))
    outcome = run(sandbox, "fetch", *peers, url=f"http://device.example:{ports[0]}/page")
    assert outcome.result == {"got": "device.example/page"}
    (contact,) = outcome.contacts
    assert (contact.host, contact.port, contact.connections) == ("device.example", ports[0], 1)
    assert (contact.received or 0) > len("device.example/page")


def test_what_went_over_each_connection_is_counted(sandbox: Sandbox, ports: tuple[int, int]):
    """By the kernel, without what TCP adds; by peer."""
    peer = ("127.0.0.1", ports[1])
    (contact,) = run(sandbox, "talk_often", peer, port=ports[1], times=5, fork=False).contacts
    assert contact == Contact(*peer, connections=5, sent=300, received=5 * (6 + 60))


def test_what_a_child_process_says_is_counted(sandbox: Sandbox, ports: tuple[int, int]):
    peer = ("127.0.0.1", ports[1])
    (contact,) = run(sandbox, "talk_often", peer, port=ports[1], times=1, fork=True).contacts
    assert contact == Contact(*peer, connections=1, sent=60, received=6 + 60)


def test_a_peer_learns_soon_that_a_connection_was_closed(sandbox: Sandbox):
    """Though it is held to be counted: a tool may wait for what its peer does then."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def tell() -> None:
            first, _ = server.accept()
            with first:
                while first.recv(64):
                    pass
            second, _ = server.accept()
            with second:
                second.sendall(b"seen")

        telling = threading.Thread(target=tell)
        telling.start()
        outcome = run(sandbox, "close_then_ask", ("127.0.0.1", port), port=port)
        telling.join(5)
    assert outcome.result == {"got": "seen"}


CURL = {"through the proxy": [], "without it": ["--noproxy", "*"], "by a tunnel": ["--proxytunnel"]}


@pytest.mark.parametrize("options", CURL.values(), ids=CURL)
def test_curl_works_unchanged(sandbox: Sandbox, ports: tuple[int, int], options: list[str]):
    """By any of its ways, to what is granted only."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    peers = (("device.example", ports[0]), ("127.0.0.1", ports[0]))
    good = run(sandbox, "curl", *peers, arguments=[*options, f"http://device.example:{ports[0]}/x"]).result
    assert good is not None
    assert good["got"] == "device.example/x", good
    bad = run(sandbox, "curl", *peers, arguments=[*options, "-f", f"http://other.example:{ports[0]}/x"]).result
    assert bad is not None
    assert bad["status"] != 0


def test_no_peer_is_connected_to_without_a_grant(sandbox: Sandbox, ports: tuple[int, int]):
    """Not even the proxy is there."""
    assert run(sandbox, "connect", host="127.0.0.1", port=ports[1]).error
    assert run(sandbox, "connect", host="198.19.255.254", port=3128).error
