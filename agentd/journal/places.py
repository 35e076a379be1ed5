"""Paths of the journal, reached without following a symlink; and directories and files that are made usable for a while.

What a call has changed may lie in a directory that even its owner may not search by now, and a file may not be readable.
The journal has to look there, and to change it back. It gives the owner that permission for as long as it takes, and each
mode is what it was afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, TypeVar

from agentd_sandbox.nearby import Nearby
from agentd_sandbox.paths import Resolved, WalkError, resolve

from agentd.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
_DIRECTORY, _FILE = 0o700, 0o600
_SHOWN = 240
_DENIED = (errno.EACCES, errno.EPERM)


def at(path: bytes, nearby: Nearby | None = None) -> Resolved:
    """A real path with its directory. Raises WalkError if the way is broken; OSError (ELOOP) if it leads elsewhere now.

    `nearby` is for many paths that lie beside each other.
    """
    place = (nearby.named(path) if nearby else _as_spelled(path)) or resolve(path, follow=False)
    if place.real != path:
        with place:
            raise OSError(errno.ELOOP, "the way there now leads elsewhere", os.fsdecode(path))
    return place


def reach(path: bytes, nearby: Nearby | None = None) -> Resolved | None:
    """As `at`, or None if not even its directory is there."""
    try:
        return at(path, nearby)
    except WalkError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def reach_ours(path: bytes, nearby: Nearby | None = None) -> Resolved | None:
    """As `reach`, or None too if the way leads elsewhere: for what comes back with the directory that was there."""
    try:
        return reach(path, nearby)
    except OSError as e:
        if e.errno == errno.ELOOP:
            return None
        raise


def _as_spelled(path: bytes) -> Resolved | None:
    with contextlib.closing(Nearby()) as nearby:
        return nearby.named(path)


@dataclass(slots=True)
class Granting:
    """Gives the owner of paths the use of them, and takes it back.

    `before` is called with a path before its mode is changed: to note on disk what its mode was. What it raises stops it.
    """

    before: Callable[[bytes], None] = lambda _path: None
    _modes: dict[bytes, tuple[int, int, tuple[int, int]]] = field(default_factory=dict)
    """Path to the mode it had, the mode it was given, and which one it is (device, inode)."""
    _had: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.take_back()

    def reading(self, do: Callable[[], T], path: bytes) -> T:
        """Do something that reads what is at a path; where its owner may not, permit it and do it again. Raises OSError."""
        return self._permitting(do, path)

    def changing(self, do: Callable[[], T], path: bytes) -> T:
        """Do something that changes the name of a path, in the same way: its directory has to be writable."""
        return self._permitting(do, os.path.dirname(path))

    def _permitting(self, do: Callable[[], T], needed: bytes) -> T:
        given = False
        try:
            while True:
                try:
                    return do()
                except OSError as e:
                    # A walk fails at a name in a directory that can't be searched.
                    held = os.path.dirname(e.reached) if isinstance(e, WalkError) else needed
                    if e.errno not in _DENIED or not self.give(held):
                        raise
                    given = given or held == needed
        finally:
            if given and needed in self._modes and not os.path.isdir(needed):
                self._take_back(needed)  # it may have no name by the end of all this, but others

    def give(self, path: bytes) -> bool:
        """Let the owner use a directory or read a file, if that is us and we may not."""
        try:
            place = at(path) if path != b"/" else None
        except WalkError as e:
            return e.errno in _DENIED and self.give(os.path.dirname(e.reached))
        except OSError:
            return False
        if place is None:
            return False
        with place:
            return place.exists and self._give(place, path)

    def _give(self, place: Resolved, path: bytes) -> bool:
        status = place.status
        mode = stat.S_IMODE(status.st_mode)
        wanted = mode | (_DIRECTORY if stat.S_ISDIR(status.st_mode) else _FILE)
        usual = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
        if wanted == mode or not usual or status.st_uid != os.geteuid():
            return False
        if path not in self._modes:
            self.before(path)
        os.chmod(f"/proc/self/fd/{place.descriptor}", wanted)
        self._modes[path] = mode, wanted, (status.st_dev, status.st_ino)
        self._had.setdefault(f"{status.st_dev}:{status.st_ino}", mode)
        return True

    @property
    def used(self) -> bool:
        return bool(self._had)

    def mode_of(self, inode: str) -> int | None:
        """The mode that a file or directory (`DEVICE:INODE`) had when it was permitted; None if it was not."""
        return self._had.get(inode)

    def forget(self, path: bytes) -> None:
        """It has got the mode that it is to have."""
        self._modes.pop(path, None)

    def take_back(self, below: bytes = b"") -> None:
        """All, or what lies below a directory, deepest first: each has its mode again, unless it was given another one
        meanwhile.
        """
        given = [path for path in self._modes if path.startswith(below + b"/")]
        for path in sorted(given, key=lambda p: -p.count(b"/")):
            self._take_back(path)

    def _take_back(self, path: bytes) -> None:
        mode, given, identity = self._modes.pop(path)
        with contextlib.suppress(OSError), at(path) as place:
            status = place.status if place.exists else None
            if status and (status.st_dev, status.st_ino) == identity and stat.S_IMODE(status.st_mode) == given:
                os.chmod(f"/proc/self/fd/{place.descriptor}", mode)


def shown(path: bytes) -> str:
    """A path for a message or the log: on one line, and not longer than one."""
    text = one_line(path.decode("utf-8", "backslashreplace"))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}\u2026{text[-_SHOWN // 2 :]}"


def parents(path: bytes) -> Iterator[bytes]:
    """The directories above a path, nearest first, without the root."""
    while (path := os.path.dirname(path)) not in (b"/", b""):
        yield path
