"""Path resolution: one walker, component by component, that never lets the kernel follow a link.

openat2(RESOLVE_BENEATH) would do, but Android's filter kills whoever calls it; the walk costs about the same.
Symlinks are read and their text is walked like any other, so what counts in the end is the real path. What belongs to
a process in procfs (`/proc/123`, `/proc/self`) does not exist for the walker: its links would lead into the process
that walks.

Most paths have no link in them at all. Those take one open instead of a walk: if the kernel says that what it opened as
O_PATH is called exactly what was asked for, then no link was on the way (17 us become 7, measured on x86_64).
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Self

from agentd_sandbox import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

_PROC_SUPER_MAGIC = 0x9FA0  # linux/magic.h
_DEPTH = 4096  # folders on the way
_HELD = 32  # of them that are held open
_KEPT = 32  # what a call keeps open that stays as it is
_LINKS = 40  # as the kernel: path_resolution(7)
_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class WalkError(OSError):
    """A path that leads nowhere; `reached` is the real path up to which it is known."""

    def __init__(self, code: int, reached: bytes) -> None:
        super().__init__(code, os.strerror(code))
        self.reached = reached


@dataclass(slots=True)
class Resolved:
    """A real path with its parent folder and, where it exists, itself, both open as O_PATH. Close after use.

    `parent` is -1 where it was not needed; `status` is that of the thing itself, a link's own for a link.
    """

    real: bytes
    parent: int
    name: bytes
    descriptor: int  # -1 if there is nothing by that name
    trailing_slash: bool = False
    links: tuple[bytes, ...] = ()
    """The real paths of the links that were followed on the way."""
    _status: os.stat_result | None = None
    borrowed: bool = False
    """Whether its descriptors are the walker's, who goes on using them."""

    @property
    def status(self) -> os.stat_result:
        if self._status is None:
            self._status = os.fstat(self.descriptor)
        return self._status

    @property
    def exists(self) -> bool:
        return self.descriptor >= 0

    @property
    def is_folder(self) -> bool:
        return self.exists and stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        return self.exists and stat.S_ISLNK(self.status.st_mode)

    @property
    def is_empty(self) -> bool:
        """Of a folder: whether there is nothing in it."""
        with os.scandir(f"/proc/self/fd/{self.descriptor}") as entries:
            return next(entries, None) is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.borrowed:
            return
        if self.descriptor >= 0:
            os.close(self.descriptor)
        if self.parent >= 0:
            os.close(self.parent)
        self.descriptor = self.parent = -1


@dataclass(slots=True)
class _Walk:
    """The folders from / down to where we are, each held open so that `..` means the real parent.

    What is not `visible` is not there, wherever the way leads on from it.
    """

    visible: Callable[[bytes], bool]
    folders: list[tuple[bytes, int]] = field(default_factory=lambda: [(b"", os.open(b"/", _PATH_FLAGS | os.O_DIRECTORY))])

    @property
    def here(self) -> int:
        name, descriptor = self.folders[-1]
        if descriptor < 0:
            descriptor = self._again()
            self.folders[-1] = name, descriptor
        return descriptor

    def _again(self) -> int:
        """A folder far up a long way, which is held open no more: walked to once more by its real names."""
        descriptor = os.open(b"/", _PATH_FLAGS | os.O_DIRECTORY)
        for name, _ in self.folders[1:]:
            try:
                below = os.open(name, _PATH_FLAGS | os.O_DIRECTORY, dir_fd=descriptor)
            except OSError as e:
                raise WalkError(e.errno or errno.EIO, self.real) from None
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    @property
    def real(self) -> bytes:
        return b"/".join(name for name, _ in self.folders) or b"/"

    def enter(self, name: bytes, descriptor: int) -> None:
        self.folders.append((name, descriptor))
        if len(self.folders) > _DEPTH:
            raise WalkError(errno.ENAMETOOLONG, self.real)
        if len(self.folders) > _HELD:
            former, held = self.folders[-_HELD - 1]
            self.folders[-_HELD - 1] = former, _closed(held)

    def up(self, *, to_root: bool = False) -> None:
        while len(self.folders) > 1:
            _closed(self.folders.pop()[1])
            if not to_root:
                break

    def close(self) -> None:
        for _, descriptor in self.folders:
            _closed(descriptor)
        self.folders.clear()


def _closed(descriptor: int) -> int:
    if descriptor >= 0:
        os.close(descriptor)
    return -1


@cache
def _own_descriptors() -> int:
    """/proc/self/fd, kept open: the way there is half the cost of using it."""
    return os.open("/proc/self/fd", _PATH_FLAGS | os.O_DIRECTORY)


os.register_at_fork(after_in_child=_own_descriptors.cache_clear)  # it would go on being the parent's


def reopen(descriptor: int, flags: int) -> int:
    """Open the very thing an O_PATH descriptor stands for, whatever its name now leads to."""
    return os.open(b"%d" % descriptor, flags | os.O_CLOEXEC, dir_fd=_own_descriptors())


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
class Nearby:
    """Resolves names that lie beside each other: the folder of the last one is kept open, and used again for as long as it is
    called what it was. Close after use.
    """

    _folder: bytes = b""
    _descriptor: int = -1

    def named(self, path: bytes) -> Resolved | None:
        """The path with its folder, itself not followed if it is a link. None if it has to be walked: it is not there as it is
        spelled, or can't be had.
        """
        folder, _, name = path.rpartition(b"/")
        if not name or name in (b".", b".."):
            return None
        try:
            if not self._stand_in(folder or b"/"):
                return None
            parent = os.dup(self._descriptor)
        except (OSError, ValueError):
            return None
        try:
            return Resolved(path, parent, name, os.open(name, _PATH_FLAGS, dir_fd=parent))
        except FileNotFoundError:
            return Resolved(path, parent, name, -1)
        except (OSError, ValueError):
            os.close(parent)
            return None

    def _stand_in(self, folder: bytes) -> bool:
        if folder != self._folder or self._descriptor < 0:
            self.close()
            self._descriptor, self._folder = os.open(folder, _PATH_FLAGS | os.O_DIRECTORY), folder
            if kernel.file_system(self._descriptor) == _PROC_SUPER_MAGIC:
                self.close()
                return False
        if os.readlink(b"%d" % self._descriptor, dir_fd=_own_descriptors()) == folder:
            return True
        self.close()
        return False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


@dataclass(slots=True)
class Walker:
    """Resolves paths for one call. Knows which devices it has seen are not procfs.

    What is `steady` it looks up only once: every program that starts opens the same libraries.
    """

    steady: Callable[[bytes], bool]
    _ordinary: set[int] = field(default_factory=set)
    _kept: dict[bytes, Resolved] = field(default_factory=dict)
    _nearby: Nearby = field(default_factory=Nearby)

    def named(self, path: bytes, *, visible: Callable[[bytes], bool]) -> Resolved:
        """As `resolve` without following a link at its end: something that is to be made, renamed or removed."""
        return self._nearby.named(path) or resolve(path, follow=False, visible=visible)

    def existing(self, path: bytes, *, follow: bool, visible: Callable[[bytes], bool]) -> Resolved:
        """As `resolve`, but without the parent where the path is there as it is spelled."""
        if kept := self._kept.get(path):
            return kept
        spelled = _unmerged(path)
        found = self._as_spelled(spelled, follow=follow) or self._missing(spelled)
        if found is None:
            return resolve(path, follow=follow, visible=visible)
        if self.steady(found.real) and len(self._kept) < _KEPT and not found.is_link:
            found.borrowed = True
            self._kept[path] = found
        return found

    def close(self) -> None:
        for kept in self._kept.values():
            kept.borrowed = False
            kept.__exit__()
        self._kept.clear()
        self._nearby.close()

    def _as_spelled(self, path: bytes, *, follow: bool) -> Resolved | None:
        try:
            found = os.open(path, _PATH_FLAGS)
        except (OSError, ValueError):
            return None
        real = os.readlink(b"%d" % found, dir_fd=_own_descriptors())
        status = os.fstat(found)
        plain = status.st_dev in self._ordinary or self._is_ordinary(found, status.st_dev)
        if real == path and plain and not (follow and stat.S_ISLNK(status.st_mode)):
            return Resolved(real, -1, b"", found, _status=status)
        os.close(found)
        return None

    def _missing(self, path: bytes) -> Resolved | None:
        """Nothing by that name in a folder that is there as it is spelled."""
        folder, _, name = path.rpartition(b"/")
        if not name or name in (b".", b".."):
            return None
        parent = self._as_spelled(folder or b"/", follow=False)
        if parent is None:
            return None
        try:
            os.close(os.open(name, _PATH_FLAGS, dir_fd=parent.descriptor))
        except FileNotFoundError:
            return Resolved(path, parent.descriptor, name, -1)
        except OSError:
            pass
        parent.__exit__()  # no folder, or there is something after all: a link that leads nowhere, or one that came this moment
        return None

    def _is_ordinary(self, descriptor: int, device: int) -> bool:
        if kernel.file_system(descriptor) == _PROC_SUPER_MAGIC:
            return False
        self._ordinary.add(device)
        return True


def everything(_: bytes) -> bool:
    return True


def resolve(path: bytes, *, follow: bool, visible: Callable[[bytes], bool] = everything) -> Resolved:
    """Walk an absolute path. The last component may be missing; if it is a link, `follow` says what to do.

    Raises WalkError where the way there is broken, or leads through what is not visible.
    """
    if not path.startswith(b"/"):
        raise WalkError(errno.ENOENT, b"/")
    walk = _Walk(visible)
    try:
        return _resolve(walk, path, follow=follow)
    finally:
        walk.close()


def _resolve(walk: _Walk, path: bytes, *, follow: bool) -> Resolved:
    trailing = path.endswith((b"/", b"/."))
    todo = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
    links: list[bytes] = []
    while todo:
        name = todo.pop()
        if name == b"..":
            walk.up()
            continue
        found = _open(walk, name, last=not todo)
        if found < 0:
            return Resolved(_join(walk.real, name), os.dup(walk.here), name, -1, trailing, tuple(links))
        mode = os.fstat(found).st_mode
        if stat.S_ISLNK(mode) and (todo or follow or trailing):
            links.append(_join(walk.real, name))
            target = os.readlink(b"", dir_fd=found)
            os.close(found)
            if len(links) > _LINKS:
                raise WalkError(errno.ELOOP, _join(walk.real, name))
            trailing = trailing or (not todo and target.endswith((b"/", b"/.")))
            if target.startswith(b"/"):
                walk.up(to_root=True)
            todo.extend(part for part in reversed(target.split(b"/")) if part not in (b"", b"."))
        elif not todo:
            return _found(walk, name, found, mode, trailing=trailing, links=tuple(links))
        elif stat.S_ISDIR(mode):
            walk.enter(name, found)
        else:
            os.close(found)
            raise WalkError(errno.ENOTDIR, _join(walk.real, name))
    # The path ended in `..` or is / itself: the folder we stand in.
    real, name, here = walk.real, walk.folders[-1][0], os.dup(walk.here)
    walk.up()
    return Resolved(real, os.dup(walk.here), name or b".", here, trailing_slash=True, links=tuple(links))


def _open(walk: _Walk, name: bytes, *, last: bool) -> int:
    """A component as O_PATH; -1 if it is the last one and there is nothing by that name."""
    real = _join(walk.real, name)
    if _names_a_process(walk.here, name) or not walk.visible(real):
        raise WalkError(errno.ENOENT, real)
    try:
        return os.open(name, _PATH_FLAGS, dir_fd=walk.here)
    except OSError as e:
        if e.errno == errno.ENOENT and last:
            return -1
        raise WalkError(e.errno or errno.EIO, _join(walk.real, name)) from None


def _names_a_process(folder: int, name: bytes) -> bool:
    """By the type of the file system, so that a second mount of procfs is no way around it."""
    return (name.isdigit() or name in (b"self", b"thread-self")) and kernel.file_system(folder) == _PROC_SUPER_MAGIC


def _found(walk: _Walk, name: bytes, found: int, mode: int, *, trailing: bool, links: tuple[bytes, ...]) -> Resolved:
    real = _join(walk.real, name)
    if trailing and not stat.S_ISDIR(mode):
        os.close(found)
        raise WalkError(errno.ENOTDIR, real)
    return Resolved(real, os.dup(walk.here), name, found, trailing, links)


def _join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b"/") + b"/" + name
