"""Who is asked for a reading, on a thread: programs and servers. They hang and fail: then they are asked more rarely.

termux-battery-status hangs in one of 10 to 20 calls on some phones (termux-api #861) and takes 7 s on others; every hung child
counts against Android's limit of 32, so one that does not answer is killed with all it started.
"""

from __future__ import annotations

import abc
import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_PAUSE_S = 600.0
_LONGEST_ANSWER = 64 << 10
_TICK_S = 0.2
_REAP_S = 1.0


class Asked(abc.ABC):
    """`start`, then `latest` at any time, then `stop`."""

    def __init__(self, name: str, every_s: float, timeout_s: float) -> None:
        self.name, self.every_s, self.timeout_s = name, every_s, timeout_s
        self.pause_s = every_s
        """After an answer."""
        self.trouble = ""
        """Why it said nothing the last time, in words."""
        self._said: tuple[float, str] | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"ask {self.name}", daemon=True)
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
            try:
                answer = self._ask()
            except Exception as e:  # its thread must live: nobody else would say that it is silent
                answer, self.trouble = None, f"{self.name} can't be asked: {e}"
            if answer is None:
                pause = min(pause * 2, max(_LONGEST_PAUSE_S, self.every_s))
                self._stopped.wait(pause)
            else:
                self._said, self.trouble, pause = (time.monotonic(), answer), "", self.every_s
                self._stopped.wait(self.pause_s)
        self._end()

    @abc.abstractmethod
    def _ask(self) -> str | None:
        """An answer; None, with `trouble` set, if there is none in time."""

    def _end(self) -> None:  # noqa: B027 - only some have something to end
        """Nobody asks any more."""


class Program(Asked):
    """Run anew for each answer, which is all it says until it ends."""

    def __init__(self, command: Sequence[str], every_s: float, timeout_s: float = 5.0) -> None:
        super().__init__(command[0], every_s, timeout_s)
        self.command = tuple(command)

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
        output = self._answer(process)
        if output is None:
            self.trouble = f"{self.command[0]} did not answer in {self.timeout_s:g} s"
            _kill(process)
        elif process.stdout:
            process.stdout.close()
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all it has started; what is another user's (setuid) stays. It is not waited for yet: the number is still its own."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout:
        process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)


class Teller(Asked):
    """A program that runs on and says a line every `every_s` seconds. One that falls silent is killed and started anew."""

    def __init__(self, command: Sequence[str], every_s: float, timeout_s: float = 5.0) -> None:
        super().__init__(command[0], every_s, timeout_s)
        self.command, self.pause_s = tuple(command), 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def _ask(self) -> str | None:
        try:
            process = self._process or self._started()
        except OSError as e:
            self.trouble = f"{self.name} can't be started: {e.strerror}"
            return None
        assert process.stdout is not None
        deadline = time.monotonic() + 2 * self.every_s + self.timeout_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._rest and not self._stopped.is_set():
            left = deadline - time.monotonic()
            chunk = os.read(process.stdout.fileno(), 4096) if poll.poll(max(0.0, min(left, _TICK_S)) * 1000) else None
            if chunk == b"" or left <= 0 or len(self._rest) > _LONGEST_ANSWER:
                self._end()
                self.trouble = f"{self.name} " + ("has ended" if chunk == b"" else "says nothing")
                return None
            self._rest += chunk or b""
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _started(self) -> subprocess.Popen[bytes]:
        self._rest = b""
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def _end(self) -> None:
        if self._process:
            _kill(self._process)
            self._process = None


class Server(Asked):
    """Asked over TCP, at HOST:PORT: all questions at once, a line for each of `answers` comes back."""

    def __init__(self, address: str, question: bytes, answers: int, every_s: float, timeout_s: float = 5.0) -> None:
        super().__init__(address, every_s, timeout_s)
        self._question, self._answers = question, answers

    def _ask(self) -> str | None:
        host, _, port = self.name.rpartition(":")
        deadline, said = time.monotonic() + self.timeout_s, b""
        try:
            with socket.create_connection((host, int(port)), self.timeout_s) as connection:
                connection.sendall(self._question)
                while said.count(b"\n") < self._answers and len(said) < _LONGEST_ANSWER:
                    if (left := deadline - time.monotonic()) <= 0:
                        raise TimeoutError
                    connection.settimeout(left)
                    if not (chunk := connection.recv(4096)):
                        break
                    said += chunk
        except TimeoutError:
            self.trouble = f"{self.name} did not answer in {self.timeout_s:g} s"
            return None
        except OSError as e:
            self.trouble = f"{self.name} can't be asked: {e.strerror or e}"
            return None
        return said.decode("utf-8", "replace")
