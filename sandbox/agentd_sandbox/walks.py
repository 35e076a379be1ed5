"""Paths that the kernel walks for a program by itself (chdir, execve), and changes of names: never the same names at once.

What the kernel does is then what was decided on. The memory with the path can't change, as the caller is alone in it; the names
on the way can't, as all that tools do to names is done by brokers, which ask here. People may: they are no attackers.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_S, _LOOK_AGAIN_S = 2.0, 0.0005
_ON_PROCESSOR_S = 0.25
"""The longest walk that never waits for a disk: 4096 bytes of path and 40 links take a Raspberry Pi a tenth of that."""


@dataclass(frozen=True, slots=True)
class _Walk:
    number: int
    """The system call."""
    ways: tuple[bytes, ...]
    """All real paths that it leads over."""
    begun: float


@dataclass(slots=True)
class Walks:
    """Those of all calls of a sandbox. From any thread."""

    changes: int = 0
    """How many changes of names there have been: decide, and `begin` with the number from before."""
    _changing: list[tuple[bytes, ...]] = field(default_factory=list)
    _walking: dict[int, _Walk] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, thread: int, number: int, ways: tuple[bytes, ...], seen: int) -> bool:
        """Whether the kernel may walk these ways for a thread now. If not, names have changed since `seen`: decide again."""
        with self._lock:
            if seen != self.changes or any(_meet(ways, names) for names in self._changing):
                return False
            self._walking[thread] = _Walk(number, ways, time.monotonic())
            return True

    def end(self, thread: int) -> None:
        """It makes another call, so that one is over."""
        if thread in self._walking:
            self._walking.pop(thread, None)

    @contextlib.contextmanager
    def changing(self, *names: bytes) -> Iterator[None]:
        """No walk leads over these names for as long as this lasts. Raises OSError: EBUSY if one does not end."""
        with self._lock:
            self._changing.append(names)
        try:
            if self._walking:
                self._await(names)
            yield
        finally:
            with self._lock:
                self._changing.remove(names)
                self.changes += 1

    def _await(self, names: tuple[bytes, ...]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while walking := [(t, walk) for t, walk in list(self._walking.items()) if _meet(walk.ways, names)]:
            for thread, walk in walking:
                if _is_over(thread, walk):
                    self.end(thread)
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "a program is being looked for on this way")
            time.sleep(_LOOK_AGAIN_S)


def _meet(ways: tuple[bytes, ...], names: tuple[bytes, ...]) -> bool:
    return any(way == name or way.startswith(name + b"/") for way in ways for name in names)


def _is_over(thread: int, walk: _Walk) -> bool:
    """By /proc/TID/syscall: the thread is gone, or in another call, or waits for a broker once more (proc(5))."""
    try:
        with open(f"/proc/{thread}/syscall", "rb") as file:
            doing = file.read(64).split()
        if doing[:1] == [b"running"]:
            return time.monotonic() - walk.begun > _ON_PROCESSOR_S
        if not doing or int(doing[0]) != walk.number:
            return True
        with open(f"/proc/{thread}/wchan", "rb") as file:
            return file.read(64).startswith(b"seccomp")
    except (OSError, ValueError):
        return True
