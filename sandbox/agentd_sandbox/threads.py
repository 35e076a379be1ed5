"""Threads that are used again: as many as there is work at a time. Nobody waits for them when the process ends."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_IDLE = 8


@dataclass(slots=True)
class Threads:
    """`name` is theirs. Work that never ends keeps a thread of its own, and no other work waiting."""

    name: str
    _idle: int = 0
    _stopped: bool = False
    _work: queue.SimpleQueue[Callable[[], None] | None] = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def do(self, work: Callable[[], None]) -> None:
        """Begin it at once. It must not raise."""
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._work.put(work)
                return
        threading.Thread(target=self._go, args=(work,), name=self.name, daemon=True).start()

    def stop(self) -> None:
        """Threads that have nothing to do end, the others once they have done it."""
        with self._lock:
            self._stopped = True
            for _ in range(self._idle):
                self._work.put(None)
            self._idle = 0

    def _go(self, work: Callable[[], None] | None) -> None:
        while work:
            work()
            with self._lock:
                if self._stopped or self._idle >= _IDLE:
                    return
                self._idle += 1
            work = self._work.get()
