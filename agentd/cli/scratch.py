"""A daemon of its own, in a scratch folder, for commands that show or measure something."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from agentd.cli.output import console
from agentd.client import Client
from agentd.errors import AgentdError, DaemonError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_TIMEOUT_S = 30.0


@contextlib.contextmanager
def daemon_of_its_own(folder: Path, config: str) -> Iterator[Client]:
    """A daemon in a scratch folder, with its socket there; raises DaemonError with its last words if it does not start."""
    (folder / "agentd.toml").write_text(config)
    log = folder / "daemon.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "agentd", "serve", "--config", str(folder / "agentd.toml"), "--log-level", "warning"],
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        with Client(folder / "agentd.sock") as client:
            _wait_until_ready(daemon, folder / "agentd.sock", client, log)
            yield client
    finally:
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(START_TIMEOUT_S)
        daemon.kill()


def _wait_until_ready(daemon: subprocess.Popen[bytes], socket: Path, client: Client, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with console.status("starting the daemon"):
        while time.monotonic() < deadline and daemon.poll() is None:
            if socket.exists():
                with contextlib.suppress(AgentdError):
                    client.status()
                    return
            time.sleep(0.05)
    words = " ".join(log.read_text(errors="replace").split()[-60:]) or "it said nothing"
    raise DaemonError(Reason.DAEMON_UNREACHABLE, f"The daemon did not start: {words}", hint="Try `agentd doctor`.")
