"""A real daemon with a TCP port, for a whole file or for a test that breaks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from tests.e2e.conftest import DaemonProcess
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def listening(port: int) -> str:
    """The configuration for it; nobody is asked on a screen."""
    return f'[listen]\naddress = "127.0.0.1:{port}"\n[approvals]\nnotify = false\n'


def open_to_others(daemon: DaemonProcess) -> DaemonProcess:
    """The same daemon; once it is started, every user can reach its socket."""
    config = daemon.write_config()
    for folder in daemon.socket.parents:
        if not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    text = 'socket_mode = "0666"\n' + config.read_text()

    def write() -> Path:
        config.write_text(text)
        return config

    daemon.write_config = write  # type: ignore[method-assign]
    return daemon


def refused(work: Callable[[], object]) -> Reason:
    """The reason that it is refused for."""
    with pytest.raises(AgentdError) as caught:
        work()
    return caught.value.reason


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("agentd"), listening(port)).running() as running:
        yield running


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
    broken = DaemonProcess(tmp_path, listening(own_port))
    yield broken
    if broken.process and broken.process.poll() is None:
        broken.kill()
