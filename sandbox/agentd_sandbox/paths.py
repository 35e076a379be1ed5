"""Path resolution: one walker, component by component, that never lets the kernel follow a link.

openat2(RESOLVE_BENEATH) would do, but Android's filter kills whoever calls it; the walk costs about the same.
Symlinks are read and their text is walked like any other, so what counts in the end is the real path. What belongs to
a process in procfs (`/proc/123`, `/proc/self`) does not exist for the walker: its links would lead into the process
that walks.

Most paths lie in a directory that one has been looked up in before. It is kept open, and one open instead of a walk is enough:
if the kernel says that the directory is still called what it was, then no link is on the way to it. Nothing is looked up on
the way there that has not been decided on, one component after another.
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
_KEPT = 24  # what a call keeps open that stays as it is
_DIRECTORIES = 8  # that it has looked something up in last
_LINKS = 40  # as the kernel: path_resolution(7)
_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


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
    steps: list[_Step] = field(default_factory=lambda: [_Step(b"", os.open(b"/", _PATH_FLAGS | os.O_DIRECTORY), False)])

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
        descriptor = os.open(b"/", _PATH_FLAGS | os.O_DIRECTORY)
        for step in self.steps[1:]:
            try:
                below = os.open(step.name, _PATH_FLAGS | os.O_DIRECTORY, dir_fd=descriptor)
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
    return os.open("/proc/self/fd", _PATH_FLAGS | os.O_DIRECTORY)


os.register_at_fork(after_in_child=_own_descriptors.cache_clear)  # it would go on being the parent's


def reopen(descriptor: int, flags: int) -> int:
    """Open the very thing an O_PATH descriptor stands for, whatever its name now leads to."""
    return os.open(b"%d" % descriptor, flags | os.O_CLOEXEC, dir_fd=_own_descriptors())


def is_called(descriptor: int, path: bytes) -> bool:
    """Whether the kernel says that what is open has this very path."""
    return os.readlink(b"%d" % descriptor, dir_fd=_own_descriptors()) == path


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
    found = Directory(os.open(path, _PATH_FLAGS | os.O_DIRECTORY))
    if found.is_called(path) and kernel.file_system(found.descriptor) != _PROC_SUPER_MAGIC:
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
            found = os.open(name, _PATH_FLAGS, dir_fd=at.descriptor)
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
            ordinary = found.is_folder and kernel.file_system(found.descriptor) != _PROC_SUPER_MAGIC
            if found.real != path or not ordinary:
                return None
            return Directory(os.dup(found.descriptor), found.is_protected)


def is_crooked(path: bytes) -> bool:
    """With dots or needless slashes in it, only a walk can tell where a path leads."""
    return b"//" in path or b"/./" in path or b"/../" in path or path.endswith((b"/", b"/.", b"/.."))


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
        found = os.open(name, _PATH_FLAGS, dir_fd=walk.here)
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
    return (name.isdigit() or name in (b"self", b"thread-self")) and kernel.file_system(folder) == _PROC_SUPER_MAGIC


def _join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b"/") + b"/" + name
