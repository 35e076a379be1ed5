"""Programs that are asked for a reading. They hang and fail: one at a time, killed with all it started, asked more rarely then.

termux-battery-status hangs in one of 10 to 20 calls on some phones (termux-api #861) and takes 7 s on others; every hung child
counts against Android's limit of 32.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_PAUSE_S = 600.0
_LONGEST_ANSWER = 64 << 10
_TICK_S = 0.2


@dataclass(slots=True)
class Program:
    """`start`, then `latest` at any time, then `stop`."""

    command: Sequence[str]
    every_s: float
    timeout_s: float = 5.0
    trouble: str = ""
    """Why it said nothing the last time, in words."""
    _said: tuple[float, str] | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"ask {self.command[0]}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread:
            self._thread.join(self.timeout_s + 1)

    def latest(self) -> str | None:
        """What it said last, unless that is older than three times the pause between questions."""
        said = self._said
        return said[1] if said and time.monotonic() - said[0] < 3 * self.every_s + self.timeout_s else None

    def _run(self) -> None:
        pause = self.every_s
        while not self._stopped.is_set():
            answer = self._ask()
            if answer is None:
                pause = min(pause * 2, max(_LONGEST_PAUSE_S, self.every_s))
            else:
                self._said, self.trouble, pause = (time.monotonic(), answer), "", self.every_s
            self._stopped.wait(pause)

    def _ask(self) -> str | None:
        try:
            process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            self.trouble = f"{self.command[0]} can't be started: {e.strerror}"
            return None
        with process:
            output = self._answer(process)
            if output is None:
                self.trouble = f"{self.command[0]} did not answer in {self.timeout_s:g} s"
                os.killpg(process.pid, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
        if output is not None and process.returncode:
            self.trouble = f"{self.command[0]} ended with status {process.returncode}"
            return None
        return output

    def _answer(self, process: subprocess.Popen[bytes]) -> str | None:
        """All it says until it ends; None if it does not end in time, or says too much."""
        assert process.stdout is not None
        deadline, said = time.monotonic() + self.timeout_s, b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and len(said) < _LONGEST_ANSWER and not self._stopped.is_set():
            if poll.poll(min(left, _TICK_S) * 1000):
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
                        return said.decode("utf-8", "replace")
                    return None
                said += chunk
        return None
