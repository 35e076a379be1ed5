"""Pressure on memory rings: by the kernel's file, by a pipe or a socket of systemd's protocol."""

from __future__ import annotations

import base64
import os
import socket
import threading
from pathlib import Path

import pytest

from agentd.budgets.pressure import alarm


def test_a_pipe_of_a_service_manager_rings(tmp_path: Path):
    """What it wants written is written to it first."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    rung = threading.Event()
    told = {"MEMORY_PRESSURE_WATCH": str(pipe), "MEMORY_PRESSURE_WRITE": base64.b64encode(b"").decode()}
    made = alarm(tmp_path, told, rung.set)
    assert made is not None
    made.start()
    descriptor = os.open(pipe, os.O_WRONLY)
    os.write(descriptor, b"now")
    assert rung.wait(10)
    os.close(descriptor)
    made.stop()


def test_a_socket_of_a_service_manager_gets_what_it_wants_and_rings(tmp_path: Path):
    rung = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        wanted = b"some 1 2\0"
        made = alarm(
            tmp_path,
            {"MEMORY_PRESSURE_WATCH": str(tmp_path / "s"), "MEMORY_PRESSURE_WRITE": base64.b64encode(wanted).decode()},
            rung.set,
        )
        assert made is not None
        peer, _ = server.accept()
        with peer:
            assert peer.recv(100) == wanted
            made.start()
            peer.send(b"x")
            assert rung.wait(10)
            made.stop()


@pytest.mark.parametrize(
    "told",
    [
        {"MEMORY_PRESSURE_WATCH": "/dev/null"},
        {"MEMORY_PRESSURE_WATCH": "/nowhere/at/all"},
        {"MEMORY_PRESSURE_WATCH": "/proc/pressure/memory", "MEMORY_PRESSURE_WRITE": "not base64!"},
        {},
    ],
)
def test_where_nobody_tells_nothing_is_waited_for(tmp_path: Path, told: dict[str, str]):
    """Switched off, gone, nonsense, or no PSI at all."""
    assert alarm(tmp_path, told, lambda: None) is None


@pytest.mark.skipif(not os.access("/proc/pressure/memory", os.W_OK), reason="no PSI here")
def test_the_kernel_takes_our_trigger():
    """An unprivileged window is a multiple of 2 s; it is waited for, and let go at once."""
    made = alarm(Path("/proc"), {}, lambda: None)
    assert made is not None
    made.start()
    made.stop()
