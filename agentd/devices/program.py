"""Programs of this device that are run for a tool: by full path, without a shell, with an end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

from agentd_sandbox import DeviceFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST = 1 << 20
_SHOWN = (
    "PATH",
    "PREFIX",
    "HOME",
    "TMPDIR",
    "DISPLAY",
    "XAUTHORITY",
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "DBUS_SESSION_BUS_ADDRESS",
)
_SHOWN_FROM = (
    "LANG",
    "LC_",
    "XDG_",
    "WAYLAND_",
    "TERMUX_",
    "ANDROID_",
    "BOOTCLASSPATH",
    "DEX2OATBOOTCLASSPATH",
    "SYSTEMSERVER",
)
"""What they need of the environment: not what systemd tells the daemon, and no secret of its user's."""


class Programs:
    """What runs now; at its end all of it does."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, command: Sequence[str], text: str = "", patience_s: float = 15.0) -> str:
        """What it prints; `text` is its standard input. Raises DeviceFailure if it fails, or does not end in time.

        Programs of Termux:API hang now and then (termux-api #861): one that does is killed with all it has started.
        """
        name = os.path.basename(command[0])
        process = self._started(name, command)
        with process:
            try:
                said, complained = process.communicate(text.encode(), patience_s)
            except subprocess.TimeoutExpired:
                _kill(process)
                raise DeviceFailure(f"{name} did not answer in {patience_s:g} s") from None
            finally:
                self._running.discard(process)
        if process.returncode:
            why = (complained or said).decode("utf-8", "replace").strip().splitlines()
            raise DeviceFailure(f"{name} ended with status {process.returncode}" + (f": {why[-1][:200]}" if why else ""))
        return said[:_LONGEST].decode("utf-8", "replace").strip()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in list(self._running):
                _kill(process)

    def _started(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key in _SHOWN or key.startswith(_SHOWN_FROM)}
        pipe = subprocess.PIPE
        with self._lock:
            if self._closed:
                raise DeviceFailure("agentd is stopping")
            try:
                process = subprocess.Popen(
                    list(command), stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
                )
            except OSError as e:
                raise DeviceFailure(f"{name} can't be started: {e.strerror}") from None
            self._running.add(process)
            return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Its number is still its own: it has not been waited for."""
    if process.returncode is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
