"""Notices of the kernel that something has happened in a folder, by watchdog: one thread for all folders, asleep until then."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog.observers.api import BaseObserver, ObservedWatch

_MOST_REMEMBERED = 100_000
_WANTED: list[type[FileSystemEvent]] = [
    *(FileCreatedEvent, FileModifiedEvent, FileClosedEvent, FileMovedEvent, FileDeletedEvent),
    *(DirCreatedEvent, DirMovedEvent, DirDeletedEvent),
]
_numbers = count(1)


@dataclass(slots=True, eq=False)
class Bell(FileSystemEventHandler):
    """Rings once for all that happens until it is looked at. `came` numbers the paths that came, `went` are those that went."""

    ring: Callable[[], object]
    came: dict[bytes, int] = field(default_factory=dict)
    went: set[bytes] = field(default_factory=set)
    _rung: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def on_any_event(self, event: FileSystemEvent) -> None:
        with self._lock:
            self._remember(event)
            rung, self._rung = self._rung, True
        if not rung:
            self.ring()

    def _remember(self, event: FileSystemEvent) -> None:
        if len(self.came) + len(self.went) >= _MOST_REMEMBERED:
            return  # the look at the folder finds them in the order of their times
        source, target = os.fsencode(event.src_path), os.fsencode(event.dest_path)
        if isinstance(event, FileDeletedEvent | FileMovedEvent) and source:
            self.went.add(source)
            self.came.pop(source, None)
        arrived = target if isinstance(event, FileMovedEvent) else source if isinstance(event, FileCreatedEvent) else b""
        if arrived:
            self.came[arrived] = next(_numbers)

    def take(self) -> tuple[dict[bytes, int], set[bytes]]:
        """What came and went since it was looked at; from here on it rings again."""
        with self._lock:
            taken = self.came, self.went
            self.came, self.went, self._rung = {}, set(), False
        return taken


class Watch:
    """All folders that are watched. Not for the event loop: a watch of a whole tree takes its time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._observer: BaseObserver | None = None
        self._watches: dict[Bell, ObservedWatch] = {}

    def add(self, folder: str, bell: Bell, *, recursive: bool) -> None:
        """Raises OSError where the kernel has no more watches (inotify(7), /proc/sys/fs/inotify)."""
        with self._lock:
            if self._observer is None:
                self._observer = Observer()
                self._observer.start()
            self._watches[bell] = self._observer.schedule(bell, folder, recursive=recursive, event_filter=_WANTED)

    def remove(self, bell: Bell) -> None:
        with self._lock:
            watch = self._watches.pop(bell, None)
            if watch is None or self._observer is None:
                return
            self._observer.remove_handler_for_watch(bell, watch)
            if watch not in self._watches.values():
                self._observer.unschedule(watch)

    def stop(self) -> None:
        """Waits for the threads."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(5)
            self._observer = None
