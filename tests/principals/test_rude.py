"""Rude connections to a real daemon: garbage, silence, hundreds, ends in the middle, headers that no client would send."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from agentd.api.relay import CONNECTIONS
from agentd.client import Client
from agentd.v1 import token_pb2, tool_pb2
from tests.principals.conftest import open_to_others
from tests.principals.wire import DATA, HELLO, SETTINGS, STATUS, answer, call, descriptors, frame, outcome, reason, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import DaemonProcess

WATCH = b"/agentd.v1.ApprovalService/WatchApprovals"
ASKING = frame(SETTINGS, 0, 0) * 5000

AS_NOBODY = """
import os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
kept = []
for _ in range(int(sys.argv[2])):
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].connect(sys.argv[1])
    try:
        kept[-1].sendall(bytes.fromhex(sys.argv[3]))
    except OSError:  # told to go already
        pass
print("there", flush=True)
sys.stdin.read()
"""

WATCHER = """
import sys
from pathlib import Path
from agentd.client import Client
with Client(Path(sys.argv[1])) as client, client.watching_approvals() as seen:
    print("there", flush=True)
    next(seen)
"""


def connected(where: str | int) -> socket.socket:
    if isinstance(where, int):
        return socket.create_connection(("127.0.0.1", where))
    made = socket.socket(socket.AF_UNIX)
    made.connect(where)
    return made


def settled(daemon: DaemonProcess) -> int:
    """How many descriptors it has, once that number no longer changes."""
    seen = [descriptors(daemon)]

    def still() -> bool:
        seen.append(descriptors(daemon))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    until(still)
    return seen[-1]


def used(daemon: DaemonProcess, owner: Client) -> int:
    """The same, after it has done everything once."""
    owner.call("system.time", {})
    owner.status()
    return settled(daemon)


RUDE = {
    "silence": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "garbage": bytes(range(256)) * 300,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "half a preface": HELLO[:10],
    "hello and no more": HELLO,
    "a frame without an end": HELLO + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1000),
    "half a call": HELLO + call(1, STATUS)[:40],
    "a stream nobody reads": HELLO + call(1, WATCH),
    "calls of nothing": HELLO + b"".join(call(n, b"/nothing/Nothing") for n in range(1, 99, 2)),
    "data for no stream": HELLO + frame(DATA, 0, 7, bytes(100)),
    "settings again and again": HELLO + frame(SETTINGS, 0, 0) * 100,
}


@pytest.mark.parametrize("door", ["socket", "tcp"])
@pytest.mark.parametrize("sent", RUDE.values(), ids=RUDE)
@pytest.mark.parametrize("ends", ["closed", "half open"])
def test_rude_connections_keep_nobody_out(daemon: DaemonProcess, owner: Client, port: int, sent: bytes, door: str, ends: str):
    """Somebody new is served meanwhile; when they go no descriptor stays."""
    before = used(daemon, owner)
    with contextlib.ExitStack() as rude:
        for _ in range(25):
            connection = rude.enter_context(connected(port if door == "tcp" else str(daemon.socket)))
            with contextlib.suppress(OSError):  # it may have been told to go by now
                connection.sendall(sent)
                if ends == "half open":
                    connection.shutdown(socket.SHUT_WR)
        assert outcome(f"unix:{daemon.socket}") == "ok"
        assert outcome(f"127.0.0.1:{port}") == "UNAUTHENTICATED"
    until(lambda: descriptors(daemon) <= before, lambda: (before, descriptors(daemon)))
    assert outcome(f"unix:{daemon.socket}") == "ok"


def test_six_hundred_at_once_do_not_stop_who_is_there(daemon: DaemonProcess, owner: Client):
    """Whoever is connected goes on; all room is back when they have gone."""
    before = used(daemon, owner)
    with contextlib.ExitStack() as rude:
        for _ in range(600):
            with contextlib.suppress(OSError):
                rude.enter_context(connected(str(daemon.socket))).sendall(HELLO)
        until(lambda: descriptors(daemon) > before + CONNECTIONS)
        owner.status()
        assert not owner.call("system.time", {}).failed
    until(lambda: descriptors(daemon) <= before, lambda: (before, descriptors(daemon)))
    assert outcome(f"unix:{daemon.socket}") == "ok"


@contextlib.contextmanager
def of_nobody(path: Path, count: int) -> Iterator[None]:
    """So many connections of another user, who has no role here."""
    command = [sys.executable, "-c", AS_NOBODY, str(path), str(count), HELLO.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        try:
            yield
        finally:
            other.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_users_connections_leave_room_for_the_owner(own_daemon: DaemonProcess):
    """A user without any role holds six hundred; the daemon's own user still gets in."""
    open_to_others(own_daemon).start()
    with of_nobody(own_daemon.socket, 600):
        until(lambda: outcome(f"unix:{own_daemon.socket}") == "ok")  # on a busy machine the kernel's own queue is full at first


@pytest.mark.parametrize("door", ["socket", "tcp"])
def test_connections_never_take_what_tools_need(own_daemon: DaemonProcess, own_port: int, door: str):
    """With the usual 1024 descriptors; nobody has to show who they are to hold a connection."""
    own_daemon.start()
    assert own_daemon.process is not None
    resource.prlimit(own_daemon.process.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    with Client(own_daemon.socket) as owner, contextlib.ExitStack() as rude:
        before = used(own_daemon, owner)
        for _ in range(500 if door == "socket" else 1100):
            with contextlib.suppress(OSError):
                rude.enter_context(connected(own_port if door == "tcp" else str(own_daemon.socket))).sendall(HELLO)
        assert settled(own_daemon) > before + 100  # so many as there may be are there
        assert not owner.call("files.write", {"path": "a.txt", "text": "x"}).failed
        assert not owner.call("system.time", {}).failed


def flood(where: str | int, chunk: bytes) -> socket.socket:
    """A connection that sends until no more is taken, and reads nothing."""
    made = connected(where)
    made.sendall(HELLO)
    made.settimeout(2)
    with contextlib.suppress(TimeoutError, ConnectionError):  # or told to go
        for _ in range(1000):
            made.sendall(chunk)
        raise AssertionError("a client that never reads is never held up")
    return made


def test_a_client_that_never_reads_is_held_up_and_no_other(own_daemon: DaemonProcess, own_port: int):
    """Each of its frames asks for an answer; these are not kept in memory without end."""
    own_daemon.start()
    with flood(str(own_daemon.socket), ASKING):
        assert outcome(f"unix:{own_daemon.socket}") == "ok"
        assert outcome(f"127.0.0.1:{own_port}") == "UNAUTHENTICATED"


@pytest.mark.parametrize("door", ["socket", "tcp"])
def test_a_client_that_never_read_is_forgotten_when_it_goes(own_daemon: DaemonProcess, own_port: int, door: str):
    """Its descriptors are closed, and the daemon ends when it is told to."""
    own_daemon.start()
    with Client(own_daemon.socket) as owner:
        before = used(own_daemon, owner)
        flood(own_port if door == "tcp" else str(own_daemon.socket), ASKING).close()
        until(lambda: descriptors(own_daemon) <= before, lambda: (before, descriptors(own_daemon)), seconds=10)
    assert own_daemon.stop() == 0


def test_a_client_that_never_read_does_not_keep_the_daemon_from_ending(own_daemon: DaemonProcess):
    """SIGTERM ends it, whatever a client of before has left behind."""
    own_daemon.start()
    flood(str(own_daemon.socket), ASKING).close()
    assert own_daemon.process is not None
    own_daemon.process.send_signal(signal.SIGTERM)
    until(lambda: own_daemon.process and own_daemon.process.poll() is not None)
    assert own_daemon.process.returncode == 0


def test_a_killed_watcher_is_nobody_to_ask(daemon: DaemonProcess, owner: Client):
    """What it held is closed; a call that needs an answer does not wait for one that can't come."""
    before = used(daemon, owner)
    watchers = []
    for _ in range(5):
        command = [sys.executable, "-c", WATCHER, str(daemon.socket)]
        watchers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for watcher in watchers:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "there\n"
    for watcher in watchers:
        watcher.kill()
        watcher.communicate()
    until(lambda: descriptors(daemon) <= before, lambda: (before, descriptors(daemon)))

    def refused() -> str:
        wanted = tool_pb2.CallToolRequest(name="tools/files.read")
        wanted.arguments.update({"path": "/etc/hostname"})
        with pytest.raises(grpc.RpcError) as caught:
            owner._tools.CallTool(wanted, timeout=2)
        return reason(caught.value)[0]

    until(lambda: refused() == "GRANT_REQUIRED")


def test_the_way_around_the_relay_leads_to_nobody(daemon: DaemonProcess):
    """The inner socket is in a folder of the owner's alone; there a connection shows nothing of who is there."""
    inner = daemon.state / "api.sock"
    assert (daemon.state.stat().st_mode & 0o777, inner.stat().st_mode & 0o777) == (0o700, 0o600)
    assert outcome(f"unix:{inner}") == "UNAUTHENTICATED"


def test_a_name_like_the_relays_is_not_enough(daemon: DaemonProcess):
    """A connection to the inner socket that is bound to a name as the relay makes them, but not its own."""
    assert daemon.process is not None
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"\0agentd-{daemon.process.pid}-{'0' * 32}")
        made.connect(str(daemon.state / "api.sock"))
        made.sendall(HELLO + call(1, STATUS))
        assert answer(made)[0] == "16"


ODD = {
    "nothing": b"",
    "a space": b" ",
    "no scheme": b"wrong",
    "only a scheme": b"Bearer",
    "an empty token": b"Bearer ",
    "another scheme": b"Basic YTpi",
    "a glued scheme": b"Bearerwrong",
    "small letters": b"bearer wrong",
    "a token of the right form": b"Bearer agentd_" + b"0" * 26 + b"_" + b"A" * 43,
    "underscores": b"Bearer ___",
    "utf-8": "Bearer agentd_ü_ü".encode(),
    "a nul": b"Bearer a\0b",
    "a line end": b"Bearer a\r\nauthorization: b",
    "seven kilobytes": b"Bearer " + b"x" * 7000,
    "a hundred kilobytes": b"Bearer " + b"x" * 100_000,
}


@pytest.mark.parametrize("door", ["socket", "tcp"])
@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_a_wrong_authorization_is_nobodys_whatever_it_looks_like(daemon: DaemonProcess, port: int, value: bytes, door: str):
    """Never a bug of ours, and with our details; on the socket too, where its sender would be known without it."""
    with connected(port if door == "tcp" else str(daemon.socket)) as connection:
        connection.sendall(HELLO + call(1, STATUS, (b"authorization", value)))
        code, said = answer(connection)
    assert code in ("16", "8"), said
    assert b"UNAUTHENTICATED" in said or b"TOO_MANY_ATTEMPTS" in said
    assert b"agentd.local" in said


def test_an_authorization_that_is_no_text_is_nobodys(own_daemon: DaemonProcess, own_port: int):
    """Not UTF-8, nor anything else; whole or in part."""
    own_daemon.start()
    for value in (b"Bearer agentd_\xfc_\xfc", b"\xff\xfe", b"Bearer \xff"):
        with connected(own_port) as connection:
            connection.sendall(HELLO + call(1, STATUS, (b"authorization", value)))
            code, said = answer(connection)
        assert code == "16", said
        assert b"agentd.local" in said


def test_a_secret_with_a_stray_byte_is_not_in_the_log(own_daemon: DaemonProcess, own_port: int):
    """Whoever reads the log would have it; nor is there a traceback for what any stranger can send."""
    own_daemon.start()
    with Client(own_daemon.socket) as owner:
        secret = owner.create_token(token_pb2.Token(label="phone")).secret
    with connected(own_port) as connection:
        connection.sendall(HELLO + call(1, STATUS, (b"authorization", f"Bearer {secret}".encode() + b"\xff")))
        assert answer(connection)[0] == "16"
    assert own_daemon.stop() == 0
    assert secret.split("_", 2)[2] not in own_daemon.log
    assert "Traceback" not in own_daemon.log
