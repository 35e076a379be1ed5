"""Many look-ups of one call: beside each other, and of what stays as it is. Nothing on the way is looked up undecided.

Most paths lie in a directory that one has been looked up in before. It is kept open, and one open instead of a walk is enough:
if the kernel says that the directory is still called what it was, then no link is on the way to it.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.paths import PATH_FLAGS, PROC_SUPER_MAGIC, Absent, Resolved, Sight, WalkError, identity, is_called, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT = 24  # what a call keeps open that stays as it is
_DIRECTORIES = 8  # that it has looked something up in last


@cache
def _merged() -> tuple[dict[bytes, bytes], tuple[bytes, ...]]:
    """Where the folders that most distributions have merged into /usr lead: `/lib` and the like are links of root's.
    Those alone, too.
    """
    names = (b"/bin", b"/sbin", b"/lib", b"/lib32", b"/lib64")
    leads = {name + b"/": os.path.realpath(name) + b"/" for name in names if os.path.islink(name)}
    return leads, tuple(leads)


def _unmerged(path: bytes) -> bytes:
    """The path as it is spelled without those links. Whether that is right, opening it will say."""
    leads, links = _merged()
    if path.startswith(links):
        for link, real in leads.items():
            if path.startswith(link):
                return real + path[len(link) :]
    return path


@dataclass(slots=True)
class Directory:
    """One that is kept open as O_PATH."""

    descriptor: int
    is_protected: bool = False

    def is_called(self, path: bytes) -> bool:
        return is_called(self.descriptor, path)


def _as_spelled(path: bytes) -> Directory | None:
    """None if its name leads past a link, or to what belongs to a process. Raises OSError."""
    found = Directory(os.open(path, PATH_FLAGS | os.O_DIRECTORY))
    if found.is_called(path) and kernel.file_system(found.descriptor) != PROC_SUPER_MAGIC:
        return found
    os.close(found.descriptor)
    return None


@dataclass(slots=True)
class Nearby:
    """Resolves names that lie beside each other: their directories are kept open, `most` at a time, and used again for as long
    as each is called what it was. `find` opens one that is there as it is spelled. Close after use.
    """

    find: Callable[[bytes], Directory | None] = _as_spelled
    most: int = 1
    _kept: dict[bytes, Directory] = field(default_factory=dict)

    def named(self, path: bytes, *, with_parent: bool = True) -> Resolved | None:
        """The path with its directory, itself not followed if it is a link. None if it has to be walked: it is not there as it
        is spelled, or can't be had. Raises WalkError if `find` does.
        """
        folder, _, name = path.rpartition(b"/")
        if not name or name in (b".", b".."):
            return None
        try:
            at = self._directory(folder or b"/")
        except WalkError:
            raise
        except (OSError, ValueError):
            return None
        if at is None:
            return None
        try:
            found = os.open(name, PATH_FLAGS, dir_fd=at.descriptor)
        except FileNotFoundError:
            found = -1
        except (OSError, ValueError):
            return None
        parent = os.dup(at.descriptor) if with_parent or found < 0 else -1
        return Resolved(path, parent, name, found, is_protected=at.is_protected)

    def _directory(self, path: bytes) -> Directory | None:
        kept = self._kept.get(path)
        if kept is not None:
            if kept.is_called(path):
                return kept
            os.close(self._kept.pop(path).descriptor)
        while len(self._kept) >= self.most:
            os.close(self._kept.pop(next(iter(self._kept))).descriptor)
        found = self.find(path)
        if found is not None:
            self._kept[path] = found
        return found

    def close(self) -> None:
        while self._kept:
            os.close(self._kept.popitem()[1].descriptor)


@dataclass(slots=True)
class Walker:
    """Resolves paths for one call, as far as it has `sight` of them.

    What is `steady` it looks up only once: every program that starts opens the same libraries.
    """

    sight: Sight
    steady: Callable[[bytes], bool]
    _kept: dict[bytes, Resolved] = field(default_factory=dict)
    _nearby: Nearby = field(init=False)

    def __post_init__(self) -> None:
        self._nearby = Nearby(self._directory, _DIRECTORIES)

    def named(self, path: bytes) -> Resolved:
        """As `resolve` without following a link at its end: something that is to be made, renamed or removed."""
        return self._beside(path, with_parent=True) or self.walked(path, follow=False)

    def existing(self, path: bytes, *, follow: bool) -> Resolved:
        """As `resolve`, but without the parent where that was not needed."""
        if kept := self._kept.get(path):
            return kept
        found = self._beside(_unmerged(path), with_parent=False)
        if found is not None and follow and found.is_link:
            found.__exit__()
            found = None
        if found is None:
            return self.walked(path, follow=follow)
        if self.steady(found.real) and len(self._kept) < _KEPT and not found.is_link:
            found.borrowed = True
            self._kept[path] = found
        return found

    def walked(self, path: bytes, *, follow: bool) -> Resolved:
        """As `resolve`."""
        return resolve(path, follow=follow, sight=self.sight)

    def close(self) -> None:
        for kept in self._kept.values():
            kept.borrowed = False
            kept.__exit__()
        self._kept.clear()
        self._nearby.close()

    def _beside(self, path: bytes, *, with_parent: bool) -> Resolved | None:
        """By the directory that it lies in. None if it has to be walked."""
        if is_crooked(path) or not self.sight.visible(path):
            return None
        found = self._nearby.named(path, with_parent=with_parent)
        if found is not None and found.exists:
            which = identity(found.status)
            if which in self.sight.absent:
                found.__exit__()
                raise Absent(errno.ENOENT, path)
            found.is_protected = found.is_protected or which in self.sight.protected
        return found

    def _directory(self, path: bytes) -> Directory | None:
        with self.walked(path, follow=False) as found:
            if not found.exists:
                raise WalkError(errno.ENOENT, found.real)
            ordinary = found.is_folder and kernel.file_system(found.descriptor) != PROC_SUPER_MAGIC
            if found.real != path or not ordinary:
                return None
            return Directory(os.dup(found.descriptor), found.is_protected)


def is_crooked(path: bytes) -> bool:
    """With dots or needless slashes in it, only a walk can tell where a path leads."""
    return b"//" in path or b"/./" in path or b"/../" in path or path.endswith((b"/", b"/.", b"/.."))
