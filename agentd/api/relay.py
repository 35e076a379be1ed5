"""The daemon's socket: takes each connection itself, to ask the kernel who is there, and hands its bytes on to gRPC.

gRPC for Python does not tell a unix peer's credentials (SO_PEERCRED, unix(7)). It does tell the address that the other
end is bound to: each connection onward has a name of its own, by which the credentials are found again. Costs 0.1 ms a
request, measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_NOBODY = 0xFFFF_FFFF
_CHUNK = 1 << 16
CONNECTIONS = 96
"""As many may be open; each takes three descriptors, of which a process usually has 1024."""
_OF_OTHERS = 48  # of these; the others are for the daemon's own user and root
_BACKLOG = 128
_SILENT_S, _IDLE_S = 1.0, 30.0  # after that a connection makes way where no other fits: that never said anything, or not lately


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that has connected, and the user who had logged in, whatever user that became since; None if nobody had."""

    uid: int
    pid: int
    login: int | None


@dataclass(slots=True)
class _Connection:
    """`heard` is when it said something last, 0 if it never did."""

    uid: int
    begun: float
    heard: float = 0.0

    def since(self, now: float) -> float:
        """For how long it could have made way for another; below 0 if it may stay."""
        return now - self.heard - _IDLE_S if self.heard else now - self.begun - _SILENT_S


class Relay:
    """Listens at `path` with file mode `mode`, or at a socket that is `given` and listens already; connects onward to `inner`,
    where nobody else gets to.
    """

    def __init__(self, path: Path, inner: str, mode: int, given: socket.socket | None = None) -> None:
        self._path, self._inner, self._mode = path, inner, mode
        self._listener: socket.socket | None = given
        self._accepting: asyncio.Task[None] | None = None
        self._open: dict[asyncio.Task[None], _Connection] = {}
        self._peers: dict[str, Peer] = {}

    def peer(self, name: str) -> Peer | None:
        """Who is behind a gRPC peer; None if it is no connection of ours."""
        return self._peers.get(name)

    async def start(self) -> None:
        """Raises OSError."""
        listener = self._listener or self._bound()
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name="relay")

    def _bound(self) -> socket.socket:
        """Raises OSError."""
        listener = socket.socket(socket.AF_UNIX)
        umask = os.umask(0o777 & ~self._mode)  # what it is meant to have from its first moment on
        try:
            listener.bind(os.fspath(self._path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(umask)
        listener.listen(_BACKLOG)
        return listener

    async def stop(self) -> None:
        """Take nobody new, and end every connection."""
        tasks = [*self._open, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._listener:
            self._listener.close()

    def close_door(self) -> None:
        """Take nobody new."""
        if self._accepting:
            self._accepting.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors, or gone again
                await asyncio.sleep(0.05)
                continue
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _ = _CREDENTIALS.unpack(credentials)
            if not self._has_room(uid) and not self._make_room(uid):
                client.close()
                continue
            client.setblocking(False)
            made = _Connection(uid, time.monotonic())
            task = asyncio.create_task(self._serve(client, Peer(uid, pid, _login(pid)), made), name="relayed connection")
            self._open[task] = made
            task.add_done_callback(self._open.pop)
            await asyncio.sleep(0)  # those that were ended are gone before the next one comes

    def _has_room(self, uid: int) -> bool:
        """Other users never keep out those to whom the daemon belongs."""
        others = sum(not _is_own(each.uid) for each in self._open.values())
        return len(self._open) < CONNECTIONS and (_is_own(uid) or others < _OF_OTHERS)

    def _make_room(self, uid: int) -> bool:
        """Whether one has been ended that says nothing; of others only, if it is for one of those."""
        now = time.monotonic()
        there = [(task, each) for task, each in self._open.items() if not task.cancelling()]
        may = {task: each.since(now) for task, each in there if _is_own(uid) or not _is_own(each.uid)}
        longest = max(may, key=may.__getitem__, default=None)
        if longest is None or may[longest] < 0:
            return False
        longest.cancel()
        return True

    async def _serve(self, client: socket.socket, who: Peer, made: _Connection) -> None:
        name = f"agentd-{os.getpid()}-{secrets.token_hex(16)}"
        peer = f"unix-abstract:{name}"
        with client, contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as onward:
            onward.setblocking(False)
            onward.bind(f"\0{name}")
            self._peers[peer] = who
            try:
                await asyncio.get_running_loop().sock_connect(onward, self._inner)
                async with asyncio.TaskGroup() as both:
                    asked = both.create_task(_pump(client, onward, made))
                    answered = both.create_task(_pump(onward, client))
                    answered.add_done_callback(lambda _: asked.cancel())  # nobody is there to hear more
            except* OSError:  # one side is gone: whatever the other still waits for will not come
                pass
            finally:
                del self._peers[peer]


def _is_own(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _login(pid: int) -> int | None:
    """The audit user id of proc_pid_loginuid(5): su and sudo leave it alone. A kernel without auditing has none."""
    try:
        with open(f"/proc/{pid}/loginuid", encoding="ascii") as file:
            uid = int(file.read())
    except (OSError, ValueError):
        return None
    return uid if uid != _NOBODY else None


async def _pump(source: socket.socket, target: socket.socket, heard: _Connection | None = None) -> None:
    """Until the source ends; then the target is told so. Raises OSError."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        if heard:
            heard.heard = time.monotonic()
        await loop.sock_sendall(target, data)
    target.shutdown(socket.SHUT_WR)
