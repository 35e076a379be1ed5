"""Path resolution: one walker, component by component, that never lets the kernel follow a link.

openat2(RESOLVE_BENEATH) would do, but Android's filter kills whoever calls it; the walk costs about the same.
Symlinks are read and their text is walked like any other, so what counts in the end is the real path. What belongs to
a process in procfs (`/proc/123`, `/proc/self`) does not exist for the walker: its links would lead into the process
that walks.
Nothing is looked up on the way that has not been decided on, one component after another.
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

PROC_SUPER_MAGIC = 0x9FA0  # linux/magic.h
_DEPTH = 4096  # folders on the way
_HELD = 32  # of them that are held open
_LINKS = 40  # as the kernel: path_resolution(7)
PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class WalkError(OSError):
    """A path that leads nowhere; `reached` is the real path up to which it is known."""

    def __init__(self, code: int, reached: bytes) -> None:
        super().__init__(code, os.strerror(code))
        self.reached = reached


class Absent(WalkError):
    """It is there, but not for this walker, whatever it is called."""


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
    ways: tuple[bytes, ...] = ()
    """The real paths that the walk led over, itself the last; none if there was no walk."""
    is_protected: bool = False
    """Whether it is, or lies in, something that may not be changed."""
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


Identity = tuple[int, int]
"""Device and inode: which file or directory it is, whatever it is called and wherever it is mounted."""


def identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def everything(_: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Sight:
    """What is there for a walker. What is not `visible`, by its real path, is not looked up; what is among `absent` does not
    exist, wherever the way leads on from it; `protected` is there, but not to be changed, with all below it.
    """

    visible: Callable[[bytes], bool] = everything
    absent: frozenset[Identity] = frozenset()
    protected: frozenset[Identity] = frozenset()


@dataclass(slots=True)
class _Step:
    """A directory on the way; its descriptor is -1 while it is not held open."""

    name: bytes
    descriptor: int
    is_protected: bool


@dataclass(slots=True)
class _Walk:
    """The directories from / down to where we are, each held open so that `..` means the real parent."""

    sight: Sight
    todo: list[bytes] = field(default_factory=list)
    """The components that are left, the next one last."""
    trailing: bool = False
    """Whether the path says of itself that it leads to a directory."""
    ways: list[bytes] = field(default_factory=list)
    links: int = 0
    steps: list[_Step] = field(default_factory=lambda: [_Step(b"", os.open(b"/", PATH_FLAGS | os.O_DIRECTORY), False)])

    @property
    def here(self) -> int:
        step = self.steps[-1]
        if step.descriptor < 0:
            step.descriptor = self._again()
        return step.descriptor

    @property
    def is_protected(self) -> bool:
        return self.steps[-1].is_protected

    def _again(self) -> int:
        """A directory far up a long way, which is held open no more: walked to once more by its real names."""
        descriptor = os.open(b"/", PATH_FLAGS | os.O_DIRECTORY)
        for step in self.steps[1:]:
            try:
                below = os.open(step.name, PATH_FLAGS | os.O_DIRECTORY, dir_fd=descriptor)
            except OSError as e:
                raise WalkError(e.errno or errno.EIO, self.real) from None
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    @property
    def real(self) -> bytes:
        return b"/".join(step.name for step in self.steps) or b"/"

    def enter(self, name: bytes, descriptor: int, *, is_protected: bool) -> None:
        self.steps.append(_Step(name, descriptor, is_protected))
        if len(self.steps) > _DEPTH:
            raise WalkError(errno.ENAMETOOLONG, self.real)
        if len(self.steps) > _HELD:
            former = self.steps[-_HELD - 1]
            former.descriptor = _closed(former.descriptor)

    def up(self, *, to_root: bool = False) -> None:
        while len(self.steps) > 1:
            _closed(self.steps.pop().descriptor)
            if not to_root:
                break

    def add(self, path: bytes) -> None:
        self.trailing = self.trailing or (not self.todo and path.endswith((b"/", b"/.")))
        self.todo.extend(part for part in reversed(path.split(b"/")) if part not in (b"", b"."))

    def follow(self, link: int) -> None:
        """Go on where a link, which is closed, leads to."""
        self.links += 1
        target = os.readlink(b"", dir_fd=link)
        os.close(link)
        if self.links > _LINKS:
            raise WalkError(errno.ELOOP, self.ways[-1])
        if target.startswith(b"/"):
            self.up(to_root=True)
        self.add(target)

    def at(self, name: bytes, found: int, status: os.stat_result | None, *, is_protected: bool) -> Resolved:
        """What the way has led to."""
        ways = tuple(self.ways)
        return Resolved(ways[-1], os.dup(self.here), name, found, self.trailing, ways, is_protected, _status=status)

    def close(self) -> None:
        for step in self.steps:
            _closed(step.descriptor)
        self.steps.clear()


def _closed(descriptor: int) -> int:
    if descriptor >= 0:
        os.close(descriptor)
    return -1


@cache
def _own_descriptors() -> int:
    """/proc/self/fd, kept open: the way there is half the cost of using it."""
    return os.open("/proc/self/fd", PATH_FLAGS | os.O_DIRECTORY)


os.register_at_fork(after_in_child=_own_descriptors.cache_clear)  # it would go on being the parent's


def reopen(descriptor: int, flags: int) -> int:
    """Open the very thing an O_PATH descriptor stands for, whatever its name now leads to."""
    return os.open(b"%d" % descriptor, flags | os.O_CLOEXEC, dir_fd=_own_descriptors())


def is_called(descriptor: int, path: bytes) -> bool:
    """Whether the kernel says that what is open has this very path."""
    return os.readlink(b"%d" % descriptor, dir_fd=_own_descriptors()) == path


def resolve(path: bytes, *, follow: bool, sight: Sight | None = None) -> Resolved:
    """Walk an absolute path. The last component may be missing; if it is a link, `follow` says what to do.

    Raises WalkError where the way there is broken, or leads through what is not there for this walker.
    """
    if not path.startswith(b"/"):
        raise WalkError(errno.ENOENT, b"/")
    walk = _Walk(sight or Sight())
    try:
        return _resolve(walk, path, follow=follow)
    finally:
        walk.close()


def _resolve(walk: _Walk, path: bytes, *, follow: bool) -> Resolved:
    walk.add(path)
    while walk.todo:
        name = walk.todo.pop()
        if name == b"..":
            walk.up()
            continue
        found = _open(walk, name)
        if found < 0:
            return walk.at(name, found, None, is_protected=walk.is_protected)
        status = os.fstat(found)
        if stat.S_ISLNK(status.st_mode) and (walk.todo or follow or walk.trailing):
            walk.follow(found)
            continue
        is_protected = walk.is_protected or identity(status) in walk.sight.protected
        if not stat.S_ISDIR(status.st_mode) and (walk.todo or walk.trailing):
            os.close(found)
            raise WalkError(errno.ENOTDIR, walk.ways[-1])
        if not walk.todo:
            return walk.at(name, found, status, is_protected=is_protected)
        walk.enter(name, found, is_protected=is_protected)
    # The path ended in `..` or is / itself: the directory we stand in.
    real, name, here, is_protected = walk.real, walk.steps[-1].name, os.dup(walk.here), walk.is_protected
    walk.up()
    return Resolved(real, os.dup(walk.here), name or b".", here, True, (*walk.ways, real), is_protected)


def _open(walk: _Walk, name: bytes) -> int:
    """A component as O_PATH; -1 if it is the last one and there is nothing by that name."""
    real = _join(walk.real, name)
    if _names_a_process(walk.here, name) or not walk.sight.visible(real):
        raise WalkError(errno.ENOENT, real)
    walk.ways.append(real)
    if len(walk.ways) > _DEPTH:
        raise WalkError(errno.ELOOP, real)
    try:
        found = os.open(name, PATH_FLAGS, dir_fd=walk.here)
    except OSError as e:
        if e.errno == errno.ENOENT and not walk.todo:
            return -1
        raise WalkError(e.errno or errno.EIO, real) from None
    if walk.sight.absent and identity(os.fstat(found)) in walk.sight.absent:
        os.close(found)
        raise Absent(errno.ENOENT, real)
    return found


def _names_a_process(folder: int, name: bytes) -> bool:
    """By the type of the file system, so that a second mount of procfs is no way around it."""
    return (name.isdigit() or name in (b"self", b"thread-self")) and kernel.file_system(folder) == PROC_SUPER_MAGIC


def _join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b"/") + b"/" + name
