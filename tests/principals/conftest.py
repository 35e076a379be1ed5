"""A real daemon with a TCP port, for a whole file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from tests.e2e.conftest import DaemonProcess
from tests.principals.wire import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[DaemonProcess]:
    extra = f'[listen]\naddress = "127.0.0.1:{port}"\n[approvals]\nnotify = false\n'
    running = DaemonProcess(tmp_path_factory.mktemp("agentd"), extra=extra).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log, running.log


@pytest.fixture
def owner(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.socket) as made:
        yield made


@pytest.fixture
def own_port() -> int:
    return free_port()


@pytest.fixture
def own_daemon(tmp_path: Path, own_port: int) -> Iterator[DaemonProcess]:
    """A daemon with a TCP port that the test starts itself, and may break."""
    extra = f'[listen]\naddress = "127.0.0.1:{own_port}"\n[approvals]\nnotify = false\n'
    broken = DaemonProcess(tmp_path, extra=extra)
    yield broken
    if broken.process and broken.process.poll() is None:
        broken.kill()
