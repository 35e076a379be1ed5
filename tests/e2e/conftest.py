"""A real daemon over its real socket, with the pocket model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agentd.client import Client
from agentd.errors import AgentdError

if TYPE_CHECKING:
    from collections.abc import Iterator

START_TIMEOUT_S = 60
BUNDLES = Path(__file__).parent.parent / "bundles"


@dataclass
class DaemonProcess:
    """A daemon with its own state, socket and home folder below `root`. `extra` is appended to its configuration,
    `tools` to the table of that name.
    """

    root: Path
    extra: str = ""
    tools: str = ""
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    """A command that the daemon's is given to."""

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def socket(self) -> Path:
        return self.root / "agentd.sock"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def log(self) -> str:
        return (self.root / "daemon.log").read_text(errors="replace")

    def write_config(self) -> Path:
        self.home.mkdir(parents=True, exist_ok=True)
        grants = [("*", f"read:{self.home}"), ("*", f"write:{self.home}"), ("*", "call:*"), ("system.*", "*")]
        rules = "".join(f'[[grants]]\ntool = "{tool}"\nscope = "{scope}"\n' for tool, scope in grants)
        deny = f'[[grants]]\ntool = "*"\nscope = "read:{self.home}/secret"\ndecision = "deny"\n'
        tools = f'[tools]\nfolder = "{self.home}"\nbundles = ["{BUNDLES}"]\n{self.tools}'
        cold, extra = "engine.warm = false\n", self.extra  # what is decoded at a start takes a second of both cores
        if "[engine]" in extra:
            cold, extra = "", extra if "warm" in extra else extra.replace("[engine]", "[engine]\nwarm = false")
        text = f'{cold}state = "{self.state}"\nsocket = "{self.socket}"\n{tools}{rules}{deny}{extra}'
        config = self.root / "agentd.toml"
        config.write_text(text)
        return config

    def start(self, *, wait: bool = True) -> DaemonProcess:
        config = self.write_config()
        with (self.root / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.before, sys.executable, "-m", "agentd", "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | self.environment,
            )
        if wait:
            self.wait_until_ready()
        return self

    @contextlib.contextmanager
    def running(self) -> Iterator[DaemonProcess]:
        """Started, and at the end stopped: with status 0, and without a traceback in its log."""
        try:
            yield self.start()
        finally:
            status = self.stop()
        assert status == 0
        assert "Traceback" not in self.log, self.log

    def wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the daemon ended with {self.process.returncode}: {self.log}")
            if self.socket.exists():
                with contextlib.suppress(AgentdError), Client(self.socket) as client:
                    client.status()
                    return
            time.sleep(0.02)
        pytest.fail(f"the daemon did not get ready: {self.log}")

    def ended(self) -> int:
        """Wait for a daemon that ends by itself; its exit status."""
        assert self.process is not None
        return self.process.wait(START_TIMEOUT_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The `agentd` command against this daemon."""
        done = subprocess.run(
            [sys.executable, "-m", "agentd", "--socket", str(self.socket), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *arguments: str, check: bool = True) -> list[dict[str, Any]]:
        """A command with --json: its lines as objects."""
        return [json.loads(line) for line in self.command(*arguments, "--json", check=check).stdout.splitlines()]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests of a file."""
    with DaemonProcess(tmp_path_factory.mktemp("agentd")).running() as running:
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.socket) as connected:
        yield connected


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that the test starts itself, and may break."""
    broken = DaemonProcess(tmp_path)
    yield broken
    if broken.process and broken.process.poll() is None:
        broken.stop()
