"""Paths that the kernel walks for a program by itself (chdir, execve), and changes of names: never the same names at once.

What the kernel does is then what was decided on. The memory with the path can't change, as the caller is alone in it; the names
on the way can't, as all that tools do to names is done by brokers, which ask here. People may: they are no attackers.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox.errors import SandboxFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MOST = 256
"""Ways of one walk that are remembered: what leads over more is refused."""
_PATIENCE_S, _LOOK_AGAIN_S = 2.0, 0.0005
_REMEMBERED = 1024  # changes of names: more of them between a decision and its walk, and it is decided again
_ON_PROCESSOR_NS = 250_000_000
"""The longest walk that never waits for a disk: 4096 bytes of path and 40 links take a Raspberry Pi a tenth of that."""


@dataclass(slots=True)
class _Walk:
    owner: int
    """The call that it is of."""
    number: int
    """The system call."""
    ways: tuple[bytes, ...]
    """Real paths that it leads over, without those above them."""
    files: tuple[bytes, ...] = ()
    """Mapped files that the path lies in: the kernel reads it there."""
    spent_ns: int | None = None
    """What its thread had had of a processor when it was let through; None before that: until then it can't be over."""


@dataclass(slots=True, eq=False)
class _Change:
    names: tuple[bytes, ...]


@dataclass(slots=True)
class Walks:
    """Those of all calls of a sandbox. From any thread."""

    changes: int = 0
    """How many changes of names there have been: decide, and `begin` with the number from before."""
    _changed: deque[tuple[bytes, ...]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """The names of the last changes."""
    _changing: list[_Change] = field(default_factory=list)
    _walking: dict[int, _Walk] = field(default_factory=dict)
    _writing: dict[int, Callable[[bytes], bool]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, call: int, may_write: Callable[[bytes], bool]) -> None:
        """A call begins that may write to these paths, once no walk goes on whose path lies in one of them. `leave` is its end.

        Raises SandboxFailure if that does not come about.
        """
        with self._lock:
            self._writing[call] = may_write
            walking = [(t, walk) for t, walk in self._walking.items() if any(may_write(file) for file in walk.files)]
        deadline = time.monotonic() + _PATIENCE_S
        while self._goes_on(walking):
            if time.monotonic() > deadline:
                self.leave(call)
                raise SandboxFailure("another call starts a program by a path in a file that this call may write")
            time.sleep(_LOOK_AGAIN_S)

    def leave(self, call: int) -> None:
        """Nothing of it goes on any more."""
        self._writing.pop(call, None)
        with self._lock:
            self._walking = {thread: walk for thread, walk in self._walking.items() if walk.owner != call}

    def may_be_written(self, path: bytes) -> bool:
        """Whether any call may write to it now."""
        return any(may_write(path) for may_write in list(self._writing.values()))

    def begin(
        self, owner: int, thread: int, number: int, ways: Iterable[bytes], seen: int, files: Iterable[bytes] = ()
    ) -> bool:
        """Whether the kernel may walk these ways for a thread now, by a path that lies in `files`. If not, names have changed
        since `seen`, or a call has begun that may write to one of the files: decide again.

        Then `let_through` is to be called. Raises OSError: ELOOP if there are too many.
        """
        kept = _deepest(ways)
        with self._lock:
            if self._has_changed(kept, seen) or any(_meet(kept, change.names) for change in self._changing):
                return False
            lies_in = tuple(files)
            if any(map(self.may_be_written, lies_in)):
                return False
            self._walking[thread] = _Walk(owner, number, kept, lies_in)
            return True

    def _has_changed(self, ways: tuple[bytes, ...], seen: int) -> bool:
        since = self.changes - seen
        return since > len(self._changed) or any(_meet(ways, self._changed[-n]) for n in range(1, since + 1))

    def let_through(self, thread: int) -> None:
        """From now on it can come to its end."""
        if walk := self._walking.get(thread):
            walk.spent_ns = _spent_ns(thread)

    def end(self, thread: int) -> None:
        """It makes another call, so that one is over."""
        if thread in self._walking:
            self._walking.pop(thread, None)

    @contextlib.contextmanager
    def changing(self, *names: bytes) -> Iterator[None]:
        """No walk leads over these names for as long as this lasts, and nobody else changes them, or what they lie in or what
        lies in them. Raises OSError: EBUSY if that does not come about.
        """
        change = _Change(names)
        with self._lock:
            self._changing.append(change)
        try:
            self._await(change)
            yield
        finally:
            with self._lock:
                self._changing.remove(change)
                self._changed.append(names)
                self.changes += 1

    def _await(self, change: _Change) -> None:
        """In the order in which they came: so no two wait for each other."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._is_held_up(change):
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "a program is being looked for on this way")
            time.sleep(_LOOK_AGAIN_S)

    def _is_held_up(self, change: _Change) -> bool:
        with self._lock:
            if len(self._changing) > 1:
                before = self._changing[: self._changing.index(change)]
                if any(_meet(each.names, change.names) or _meet(change.names, each.names) for each in before):
                    return True
            walking = [(t, walk) for t, walk in self._walking.items() if _meet(walk.ways, change.names)]
        return self._goes_on(walking)

    def _goes_on(self, walking: list[tuple[int, _Walk]]) -> bool:
        for thread, walk in walking:
            if _is_over(thread, walk):
                self.end(thread)
        return any(self._walking.get(thread) is walk for thread, walk in walking)


def _deepest(ways: Iterable[bytes]) -> tuple[bytes, ...]:
    """Without those that the next one lies below: what changes them, changes that."""
    kept: list[bytes] = []
    for way in ways:
        if kept and way.startswith(kept[-1] + b"/"):
            kept.pop()
        kept.append(way)
    if len(kept) > MOST:
        raise OSError(errno.ELOOP, "too many links and folders")
    return tuple(dict.fromkeys(kept))


def _meet(ways: tuple[bytes, ...], names: tuple[bytes, ...]) -> bool:
    return any(way == name or way.startswith(name + b"/") for way in ways for name in names)


def _is_over(thread: int, walk: _Walk) -> bool:
    """By /proc/TID/syscall: the thread is gone, or in another call, or waits for a broker once more (proc(5)).

    On a processor, or waiting for one, it says nothing: then it has had more of one than any walk takes.
    """
    if walk.spent_ns is None:
        return False
    try:
        with open(f"/proc/{thread}/syscall", "rb") as file:
            doing = file.read(64).split()
        if doing[:1] == [b"running"]:
            spent = _spent_ns(thread)
            return spent >= 0 and spent - walk.spent_ns > _ON_PROCESSOR_NS
        if not doing or int(doing[0]) != walk.number:
            return True
        with open(f"/proc/{thread}/wchan", "rb") as file:
            return file.read(64).startswith(b"seccomp") and _is_asleep(thread)
    except (OSError, ValueError):
        return True


def _is_asleep(thread: int) -> bool:
    """It waits for an answer, and has not just been given one."""
    with open(f"/proc/{thread}/stat", "rb") as file:
        return file.read(512).rpartition(b")")[2].split()[0] in (b"S", b"D")


def _spent_ns(thread: int) -> int:
    """Of a processor, by /proc/TID/schedstat; -1 if that can't be had."""
    try:
        with open(f"/proc/{thread}/schedstat", "rb") as file:
            return int(file.read(64).split()[0])
    except (OSError, ValueError, IndexError):
        return -1
