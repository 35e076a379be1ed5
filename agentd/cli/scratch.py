"""A daemon of its own, in a scratch folder, for commands that show or measure something."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd import config as configuration
from agentd.cli.output import console
from agentd.client import Client
from agentd.errors import AgentdError, DaemonError, EngineError, Reason
from agentd.v1 import budget_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

START_TIMEOUT_S = 30.0
_QUIET = {"approvals": {"notify": False}, "audit": {"journald": False}}
"""Nobody is asked on this device's screen, and nothing of it gets into the system's journal."""
_MEASURABLE = (budget_pb2.Budgets.STATE_NOMINAL, budget_pb2.Budgets.STATE_REDUCED)


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Gone afterwards, also after SIGTERM and SIGHUP. `home` in it is there."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix=f"agentd-{name}-"))
    (folder / "home").mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settings_for(folder: Path, engine: Mapping[str, Any], **tables: Mapping[str, Any] | list[dict[str, str]]) -> str:
    """A configuration with the user's own engine and budgets, but for what `engine` says of it, and with `tables`."""
    mine = configuration.load(None)
    whole = {
        "state": str(folder / "state"),
        "socket": str(folder / "agentd.sock"),
        "engine": mine.engine.model_dump(mode="json") | {"warm": False, **engine},
        "budgets": mine.budgets.model_dump(mode="json", exclude_defaults=True),
        **_QUIET,
        **tables,
        "tools": {"folder": str(folder / "home"), **tables.get("tools", {})},  # type: ignore[dict-item]
    }
    return "".join(f"{key} = {_toml(value)}\n" for key, value in whole.items())


def _toml(value: Any) -> str:
    """A value in one line. JSON's texts are TOML's, but for characters that JSON would write as pairs, and DEL."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)} = {_toml(each)}' for key, each in value.items() if each is not None)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextlib.contextmanager
def daemon_of_its_own(folder: Path, config: str) -> Iterator[Client]:
    """A daemon in a scratch folder, with its socket there; raises DaemonError with its last words if it does not start."""
    (folder / "agentd.toml").write_text(config)
    log, socket = folder / "daemon.log", folder / "agentd.sock"
    command = [sys.executable, "-I", "-m", "agentd", "--socket", str(socket), "serve"]
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [*command, "--config", str(folder / "agentd.toml"), "--log-level", "warning"],
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        with Client(socket) as client:
            _wait_until_ready(daemon, socket, client, log)
            yield client
    finally:
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(START_TIMEOUT_S)
        daemon.kill()
        daemon.wait()


def wait_for_model(client: Client, timeout_s: float) -> None:
    """Raises EngineError if it can't be loaded, or the device's budgets leave nothing to be measured."""
    until = time.monotonic() + timeout_s
    with console.status("loading the model"):
        while not (status := client.status()).model.parameters:
            budgets = client.budgets()
            if status.model.error:
                raise EngineError(Reason.MODEL_INVALID, status.model.error)
            if budgets.state not in _MEASURABLE:
                why = f"The device's budgets do not let the model run now: {budgets.reason}."
                raise EngineError(Reason.BUDGET_MEMORY, why, hint="`agentd budget` shows what is measured.")
            if time.monotonic() > until:
                raise EngineError(Reason.ENGINE_TIMEOUT, f"The model was not loaded after {timeout_s:g} s.")
            time.sleep(0.02)


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
