"""The engine's process by itself: it ends when its daemon is gone, however that went."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from agentd import models
from agentd.engine.link import Load, frame


def load() -> Load:
    return Load(
        path=str(models.locate("pocket")),
        context=512,
        batch=32,
        threads=1,
        parallel=1,
        prefixes="",
        prefixes_mib=0,
        repack="off",
        least_context=256,
        room_mib=1e9,
        ever_mib=1e9,
        footprint=None,
    )


@pytest.mark.parametrize("last", ["everything was read", "something was not", "half a message", "no message"])
def test_it_ends_with_its_daemon(last: str):
    """A unix socket that is closed with something unread gives ECONNRESET, and not an end."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-m", "agentd.engine.child", str(theirs.fileno())]
    child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    theirs.close()
    try:
        ours.settimeout(60)
        ours.send(frame(load()))
        if last == "something was not":
            deadline = time.monotonic() + 60
            while not _readable(ours):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        else:
            assert ours.recv(1 << 20)
        if last == "half a message":
            ours.send(frame(load())[:10])
        if last == "no message":
            ours.send(b"\xff" * 100)
        ours.close()
        child.wait(20)
    finally:
        child.kill()


def _readable(link: socket.socket) -> bool:
    try:
        return bool(link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False
