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


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that has connected, and the user who had logged in, whatever user that became since; None if nobody had."""

    uid: int
    pid: int
    login: int | None


class Relay:
    """Listens at `path` with file mode `mode`, or at a socket that is `given` and listens already; connects onward to `inner`,
    where nobody else gets to.
    """

    def __init__(self, path: Path, inner: str, mode: int, given: socket.socket | None = None) -> None:
        self._path, self._inner, self._mode = path, inner, mode
        self._listener: socket.socket | None = given
        self._accepting: asyncio.Task[None] | None = None
        self._open: dict[asyncio.Task[None], int] = {}
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
            if not self._has_room(uid):
                client.close()
                continue
            client.setblocking(False)
            task = asyncio.create_task(self._serve(client, Peer(uid, pid, _login(pid))), name="relayed connection")
            self._open[task] = uid
            task.add_done_callback(self._open.pop)

    def _has_room(self, uid: int) -> bool:
        """Other users never keep out those to whom the daemon belongs."""
        own = (0, os.geteuid())
        others = sum(user not in own for user in self._open.values())
        return len(self._open) < CONNECTIONS and (uid in own or others < _OF_OTHERS)

    async def _serve(self, client: socket.socket, who: Peer) -> None:
        name = f"agentd-{os.getpid()}-{secrets.token_hex(16)}"
        peer = f"unix-abstract:{name}"
        with client, contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as onward:
            onward.setblocking(False)
            onward.bind(f"\0{name}")
            self._peers[peer] = who
            try:
                await asyncio.get_running_loop().sock_connect(onward, self._inner)
                async with asyncio.TaskGroup() as both:
                    both.create_task(_pump(client, onward))
                    both.create_task(_pump(onward, client))
            except* OSError:  # one side is gone: whatever the other still waits for will not come
                pass
            finally:
                del self._peers[peer]


def _login(pid: int) -> int | None:
    """The audit user id of proc_pid_loginuid(5): su and sudo leave it alone. A kernel without auditing has none."""
    try:
        with open(f"/proc/{pid}/loginuid", encoding="ascii") as file:
            uid = int(file.read())
    except (OSError, ValueError):
        return None
    return uid if uid != _NOBODY else None


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Until the source ends; then the target is told so. Raises OSError."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(target, data)
    target.shutdown(socket.SHUT_WR)
