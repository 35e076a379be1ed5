"""The relay by itself: before a server that tells who came, whole bytes, ends that arrive, room for a number."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from agentd.api.relay import CONNECTIONS, Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

MODES = """
import asyncio, os, sys
from pathlib import Path
from agentd.api.relay import Relay
path, mode, umask = sys.argv[1], int(sys.argv[2], 8), int(sys.argv[3], 8)
changed = []
sys.addaudithook(lambda event, told: changed.append(told[0]) if event == "os.chmod" else None)
async def main():
    os.umask(umask)
    relay = Relay(Path(path), "/nowhere", mode)
    await relay.start()
    print(oct(os.stat(path).st_mode & 0o777), changed, oct(os.umask(0)))
    await relay.stop()
asyncio.run(main())
"""


@pytest.mark.parametrize("umask", ["0", "022", "077"])
@pytest.mark.parametrize("mode", ["0600", "0660", "0666"])
def test_the_socket_has_its_mode_from_its_first_moment(tmp_path: Path, mode: str, umask: str):
    """Whatever the umask is: nothing changes the mode after it was made, and the umask is left as it was."""
    command = [sys.executable, "-c", MODES, str(tmp_path / "s"), mode, umask]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said == [oct(int(mode, 8)), "[]", oct(int(umask, 8))]


class Inner:
    """A server behind a relay: sends back what it gets, up to the end; `came` are its peers as gRPC would name them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "inner.sock"
        self.relay = Relay(folder / "outer.sock", str(self.path), 0o600)
        self.outer = str(folder / "outer.sock")
        self.came: list[str] = []
        self.reads = True
        self.server: asyncio.Server | None = None

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came.append("unix-abstract:" + writer.get_extra_info("peername")[1:].decode())
        with contextlib.suppress(OSError):
            while self.reads and (data := await reader.read(1 << 16)):
                writer.write(data)
                await writer.drain()
            writer.close()

    async def listen(self) -> None:
        self.server = await asyncio.start_unix_server(self.echo, self.path)

    async def close(self) -> None:
        await self.relay.stop()
        if self.server:
            self.server.close()
            await self.server.wait_closed()


@contextlib.asynccontextmanager
async def relayed(folder: Path) -> AsyncIterator[Inner]:
    inner = Inner(folder)
    await inner.listen()
    await inner.relay.start()
    try:
        yield inner
    finally:
        await inner.close()


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for tells nobody
            await asyncio.sleep(0.01)


def go(work: Callable[[], Awaitable[None]]) -> None:
    """Run it, and see that no descriptor stays."""
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(work())  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_connection_has_its_users_number_as_long_as_it_lasts(tmp_path: Path):
    """Under the name that the server knows it by, and under no other."""

    async def work() -> None:
        async with relayed(tmp_path) as inner:
            pairs = [await asyncio.open_unix_connection(inner.outer) for _ in range(40)]
            await until(lambda: len(inner.came) == 40)
            assert len(set(inner.came)) == 40
            who = [inner.relay.peer(peer) for peer in inner.came]
            assert {(each.uid, each.pid) for each in who if each} == {(os.getuid(), os.getpid())}
            assert len(who) == 40
            strangers = ("", "unix:", f"unix:{inner.outer}", inner.came[0][:-1], "ipv4:127.0.0.1:1", "unix-abstract:")
            assert [inner.relay.peer(peer) for peer in strangers] == [None] * len(strangers)
            for _, writer in pairs[:20]:
                writer.close()
            await until(lambda: sum(inner.relay.peer(peer) is None for peer in inner.came) == 20)
            for _, writer in pairs:
                writer.close()
            await until(lambda: not inner.relay._peers)

    go(work)


def test_all_bytes_arrive_in_order_and_so_does_their_end(tmp_path: Path):
    """Megabytes in both directions at once, through a client that says it has no more and then reads the rest."""
    sent = os.urandom(1 << 20) * 5

    async def work() -> None:
        async with relayed(tmp_path) as inner:
            reader, writer = await asyncio.open_unix_connection(inner.outer)
            got = asyncio.create_task(reader.read(-1))
            writer.write(sent)
            writer.write_eof()
            async with asyncio.timeout(20):
                assert await got == sent
            writer.close()
            await until(lambda: not inner.relay._peers)

    go(work)


def test_nobody_behind_the_relay_is_an_end_and_not_a_leak(tmp_path: Path):
    """The client sees that nobody answers; as soon as somebody does, it is relayed again."""

    async def work() -> None:
        inner = Inner(tmp_path)
        await inner.relay.start()
        for _ in range(50):
            reader, writer = await asyncio.open_unix_connection(inner.outer)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
        assert not inner.relay._peers
        await inner.listen()
        reader, writer = await asyncio.open_unix_connection(inner.outer)
        writer.write(b"there")
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"there"
        writer.close()
        await inner.close()

    go(work)


async def fill(inner: Inner) -> socket.socket:
    """A client that sends until no more is taken, and reads nothing of what comes back."""
    stubborn = socket.socket(socket.AF_UNIX)
    stubborn.connect(inner.outer)
    stubborn.setblocking(False)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 64 << 20:
            async with asyncio.timeout(1):
                await asyncio.get_running_loop().sock_sendall(stubborn, bytes(1 << 16))
                sent += 1 << 16
    assert 0 < sent < 64 << 20  # nothing of it is kept in memory
    return stubborn


def test_a_client_that_never_reads_holds_up_itself_only(tmp_path: Path):
    """What it sends is no longer taken at some point; others are served."""

    async def work() -> None:
        async with relayed(tmp_path) as inner:
            with await fill(inner):
                reader, writer = await asyncio.open_unix_connection(inner.outer)
                writer.write(b"x")
                assert await asyncio.wait_for(reader.readexactly(1), 20) == b"x"
                writer.close()

    go(work)


def test_a_client_that_never_read_is_let_go_of_when_it_goes(tmp_path: Path):
    """Even where the server has stopped reading because nobody reads what it says."""

    async def work() -> None:
        async with relayed(tmp_path) as inner:
            (await fill(inner)).close()
            await until(lambda: not inner.relay._peers, 5)

    go(work)


def test_stopping_ends_connections_that_are_going_on(tmp_path: Path):
    """Silent ones and one that is full; nobody new is taken."""

    async def work() -> None:
        inner = Inner(tmp_path)
        await inner.listen()
        await inner.relay.start()
        pairs = [await asyncio.open_unix_connection(inner.outer) for _ in range(10)]
        await until(lambda: len(inner.came) == 10)
        await inner.relay.stop()
        assert not inner.relay._peers
        for reader, writer in pairs:
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(inner.outer)
        await inner.close()

    go(work)


def test_there_is_room_for_a_number_of_connections(tmp_path: Path):
    """One more is shut at once; when one goes there is room again."""

    async def work() -> None:
        async with relayed(tmp_path) as inner:
            pairs = [await asyncio.open_unix_connection(inner.outer) for _ in range(CONNECTIONS)]
            await until(lambda: len(inner.came) == CONNECTIONS)
            reader, writer = await asyncio.open_unix_connection(inner.outer)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
            pairs[0][1].close()
            await until(lambda: len(inner.relay._peers) < CONNECTIONS)
            reader, writer = await asyncio.open_unix_connection(inner.outer)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.readexactly(1), 20) == b"x"
            for _, each in [*pairs[1:], (reader, writer)]:
                each.close()
            await until(lambda: not inner.relay._peers)

    go(work)


def test_a_path_that_can_not_be_listened_at_is_an_oserror(tmp_path: Path):
    """And leaves nothing open, nor another umask."""

    async def work() -> None:
        for path in (tmp_path / "missing" / "s", tmp_path):
            with pytest.raises(OSError):
                await Relay(path, "/nowhere", 0o600).start()

    umask = os.umask(0o022)
    go(work)
    assert os.umask(umask) == 0o022
