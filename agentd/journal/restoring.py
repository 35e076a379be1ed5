"""Paths brought back to former states, many at once, in the order in which that can be done.

One path at a time, in whatever order, loses files: a directory that has its read-only mode again takes no content, and one
that may not be searched hides what is below it. So all paths go through the same steps together:

1. what is in the way, or is to be gone, is removed, deepest first: that frees space, too;
2. directories are made, from the top;
3. files, symlinks, FIFOs and sockets get their contents, in a new file that takes the name in one step;
4. what was left because something still needed it is removed;
5. modes, owners, attributes and times, deepest first.

Where the owner of a directory may not use it, that is permitted for as long as it takes. What fails is reported, and never
stops the rest. All of it can be done again at any time, with the same result.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import secrets
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.paths import Nearby, WalkError

from agentd.errors import JournalError
from agentd.journal.contents import first, write_with_holes
from agentd.journal.flushing import make_all_durable
from agentd.journal.places import Granting, at, parents, reach, reach_ours, shown
from agentd.journal.state import ABSENT, ATTRIBUTES, NO_ATTRIBUTES, PathState, is_file, look, look_anyhow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from agentd_sandbox.paths import Resolved
    from agentd_sandbox.recorder import Operation

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNLINKABLE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EPERM,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.EACCES,
    errno.ENOSYS,
)
_MEANWHILE = "it was changed while it was being restored"
_STEPS = 5
_PROGRESS_EVERY = 100
TEMPORARY = b".agentd-"
"""How the names of files begin that take the place of others; the call's id follows: nobody else's are taken for one."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a path is to become. `content` gives a file's in pieces; what it raises leaves the path as it is."""

    path: bytes
    state: PathState
    content: Callable[[], Iterable[bytes]] = tuple
    length: int = 0
    """Of a file that was only appended to: its content may be the first bytes of what is there."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A path that could not be brought back, and why."""

    path: bytes
    why: str

    def __str__(self) -> str:
        return f"{shown(self.path)} ({self.why})"


@dataclass(slots=True)
class Restoring:
    """Brings paths to their targets. `mark` is the call that does it; `times` are of directories that are no targets.

    `before_granting` is called with a directory that is no target before its mode is changed for a while; `progress` with
    how many paths are done.
    """

    targets: Iterable[Target]
    mark: bytes
    times: Mapping[bytes, int] = field(default_factory=dict)
    before_granting: Callable[[bytes], None] = lambda _path: None
    progress: Callable[[int], None] = lambda _count: None
    sweeps: bytes = b""
    """A call that was killed: files that it has left under names that were to be given up are removed."""
    others: Mapping[bytes, PathState] = field(default_factory=dict)
    """Paths that are no targets and may be other names of their files, and what each was."""
    expected: Mapping[bytes, PathState] = field(default_factory=dict)
    """What was kept of paths a moment ago: one that is something else by now is somebody's."""
    failures: dict[bytes, Failure] = field(default_factory=dict)
    _granting: Granting = field(init=False)
    _targets: dict[bytes, Target] = field(init=False)
    _files: dict[str, PathState] = field(init=False)
    """What each file is to be, by its device and inode."""
    _linked: set[str] = field(init=False)
    """Files that are to have several names."""
    _now: dict[bytes, PathState] = field(default_factory=dict)
    _changed: set[bytes] = field(default_factory=set)
    _aside: list[bytes] = field(default_factory=list)
    _nearby: Nearby = field(default_factory=Nearby)
    _steps: int = 0
    _sources: dict[str, bytes] = field(default_factory=dict)
    """Where a file is that is to have several names: by its former device and inode."""

    def __post_init__(self) -> None:
        self._targets = {target.path: target for target in self.targets}
        files = [t.state for t in self._targets.values() if t.state.kind == "file" and t.state.inode]
        self._files = {state.inode: state for state in files}
        self._linked = {state.inode for state in files if state.links > 1}
        self._granting = Granting(lambda path: None if path in self._targets else self.before_granting(path))

    @property
    def changed(self) -> frozenset[bytes]:
        """The paths that something was done to."""
        return frozenset(self._changed)

    def run(self) -> list[Failure]:
        """All steps; returns what could not be done. What was done is durable."""
        with contextlib.closing(self._nearby), self._granting:
            self._look()
            for directory in {os.path.dirname(path) for path in self._targets} if self.sweeps else ():
                self._sweep(directory)
            self._note_sources()
            self._save_sources()
            down = sorted(self._targets, key=lambda p: -p.count(b"/"))
            up = down[::-1]
            for paths, step in ((down, self._clear), (up, self._make_directory), (up, self._fill), (down, self._clear_late)):
                for path in paths:
                    self._attempt(path, step)
            self._remove_asides()
            for path in sorted(self._targets.keys() | self.times.keys(), key=lambda p: -p.count(b"/")):
                if path in self._targets:
                    self._attempt(path, self._set_attributes)
                else:
                    self._set_time(path)
        try:
            make_all_durable(self._changed, one_by_one=not self._granting.used)
        except OSError as e:  # nobody knows which of them
            for path in self._changed:
                self.failures.setdefault(path, Failure(path, e.strerror or str(e)))
        return list(self.failures.values())

    def _look(self) -> None:
        """What is there now; in a directory that is not there is nothing."""
        for path in sorted(self._targets, key=lambda p: p.count(b"/")):
            above = self._now.get(os.path.dirname(path))
            if above is not None and above.kind != "folder":
                self._now[path] = ABSENT
                continue
            with self._noted(path):
                now = look_anyhow(path, self._granting, self._targets[path].state, self._nearby)
                if path in self.expected and not now.same_as(self.expected[path]):
                    raise OSError(errno.EAGAIN, _MEANWHILE, os.fsdecode(path))
                self._now[path] = now

    def _attempt(self, path: bytes, step: Callable[[Target, PathState], None]) -> None:
        self._steps += 1
        if self._steps % _PROGRESS_EVERY == 0:
            self.progress(self._steps // _STEPS)
        if path in self.failures or path not in self._now:
            return
        with self._noted(path):
            step(self._targets[path], self._now[path])

    @contextlib.contextmanager
    def _noted(self, path: bytes) -> Iterator[None]:
        """A failure is the path's own."""
        try:
            yield
        except JournalError as e:
            self.failures.setdefault(path, Failure(path, e.message.rstrip(".")))
        except OSError as e:
            self.failures.setdefault(path, Failure(path, e.strerror or str(e)))

    def _sweep(self, directory: bytes) -> None:
        beginning = TEMPORARY + self.sweeps + b"-"

        def sweep() -> None:
            place = reach_ours(directory)
            if place is None:
                return
            with place:
                names = os.listdir(f"/proc/self/fd/{place.descriptor}") if place.is_folder else []
                for name in (name for name in names if os.fsencode(name).startswith(beginning)):
                    with contextlib.suppress(IsADirectoryError):  # none of ours
                        os.unlink(name, dir_fd=place.descriptor)

        try:
            self._granting.changing(sweep, os.path.join(directory, b"."))
        except OSError as e:
            _log.warning("what a killed call has left in %s can't be removed: %s", shown(directory), e)

    # -- names

    def _clear(self, target: Target, now: PathState) -> None:
        """Remove what is to be gone, or is of another kind; what another name is to be made of waits."""
        if now.kind in ("absent", target.state.kind):
            return
        if target.state.kind == "absent" and self._sources.get(now.inode) == target.path:
            return
        try:
            self._remove(target.path, now)
        except OSError as e:
            late = target.state.kind == "absent" and e.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not late:
                raise

    def _in_the_way(self, path: bytes) -> bytes:
        """The topmost directory above a path that is to be something else, and so has to be emptied first."""
        above = (p for p in parents(path) if p in self._targets)
        return next((p for p in reversed(list(above)) if self._targets[p].state.kind not in ("folder", "absent")), b"")

    def _save_sources(self) -> None:
        """A name that is to be something else, or to go before the others are made of its file, is kept as another one."""
        for path in [path for path in self._sources.values() if path in self._targets]:
            state, now = self._targets[path].state, self._now[path]
            above = self._in_the_way(path)
            stays = state.kind == "file" and state.inode == now.inode
            if above or not (stays or state.kind == "absent"):
                beside = above or path
                set_aside = functools.partial(self._set_aside, path, os.path.dirname(beside))
                with self._noted(path):
                    self._granting.changing(set_aside, beside)

    def _set_aside(self, path: bytes, directory: bytes) -> None:
        aside = os.path.join(directory, self._temporary())
        with at(path) as place, at(aside) as other:
            try:
                os.link(f"/proc/self/fd/{place.descriptor}", other.name, dst_dir_fd=other.parent, follow_symlinks=True)
            except OSError as e:  # its content is written anew then
                if e.errno == errno.EACCES:
                    raise
                return
        self._sources[self._now[path].inode] = aside
        self._aside.append(aside)

    def _remove_asides(self) -> None:
        for path in self._aside:
            with contextlib.suppress(OSError), at(path) as place:
                os.unlink(place.name, dir_fd=place.parent)

    def _temporary(self) -> bytes:
        return TEMPORARY + self.mark + b"-" + secrets.token_hex(4).encode()

    def _clear_late(self, target: Target, now: PathState) -> None:
        if target.state.kind == "absent" and self._now[target.path].kind != "absent":
            self._remove(target.path, now)

    def _remove(self, path: bytes, now: PathState) -> None:
        def remove() -> None:
            with at(path, self._nearby) as place:
                self._require_same(place, now)
                (os.rmdir if now.kind == "folder" else os.unlink)(place.name, dir_fd=place.parent)

        try:
            self._granting.changing(remove, path)
        except WalkError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTDIR):  # gone with its directory
                raise
        except FileNotFoundError:
            pass
        self._became(path, ABSENT)

    @staticmethod
    def _require_same(place: Resolved, now: PathState) -> None:
        """Nobody has put something else there since it was looked at."""
        if not place.exists or not now.inode:
            return
        status = place.status
        same = now.inode == f"{status.st_dev}:{status.st_ino}" and (now.kind == "folder" or now.mtime_ns == status.st_mtime_ns)
        if not same:
            raise OSError(errno.EAGAIN, _MEANWHILE, os.fsdecode(place.real))

    def _became(self, path: bytes, state: PathState) -> None:
        self._now[path] = state
        self._changed.add(path)

    def _make_directory(self, target: Target, now: PathState) -> None:
        if target.state.kind != "folder" or now.kind == "folder":
            return

        def make() -> None:
            with at(target.path, self._nearby) as place:
                os.mkdir(place.name, 0o700, dir_fd=place.parent)

        self._granting.changing(make, target.path)
        self._became(target.path, PathState("folder", 0o700))

    # -- contents

    def _fill(self, target: Target, now: PathState) -> None:
        state = target.state
        match state.kind:
            case "absent" | "folder":
                return
            case "file":
                self._fill_file(target, now)
            case "link" | "fifo" | "socket":
                if (now.kind, now.target) != (state.kind, state.target):
                    self._replace(target, lambda place, name: _make_special(place, name, state))
            case _:
                raise OSError(errno.EINVAL, f"a {state.kind} can't be restored")

    def _fill_file(self, target: Target, now: PathState) -> None:
        state = target.state
        if not state.digest:  # only its mode is known: nothing else of it was to be changed
            return
        source = self._sources.get(state.inode, b"")
        if source and source != target.path:
            if now.kind == "file" and now.inode == self._inode_at(source):
                return
            if self._link(target, source):
                return
        # A file that has other names, too, is not this path's to change.
        if (
            now.kind == "file" and now.links == 1 and not now.mode & stat.S_IRUSR
        ):  # what it is to be may be the beginning of what it is
            self._granting.give(target.path)
        its_own = now.links == 1 or now.inode == state.inode
        holes = now.holes or not state.holes
        if not (now.kind == "file" and now.digest == state.digest and its_own and holes):
            self._write(target, now)
        if state.inode in self._linked:
            self._sources[state.inode] = target.path

    def _write(self, target: Target, now: PathState) -> None:
        if (
            target.length
            and now.kind == "file"
            and now.links == 1
            and self._granting.reading(lambda: _cut(target, now), target.path)
        ):
            self._became(target.path, target.state)
            return
        try:
            self._replace(target, lambda place, name: _write_file(place, name, target))
        except OSError as e:
            if e.errno not in _FULL or now.kind != "file" or now.links != 1 or target.length:
                raise
            for _ in target.content():  # all of it must be there
                pass
            # No space for a second copy: what is there is given up first. A kill in between is no harm: what it was and what
            # it is to become are both on disk until this call has ended.
            self._granting.reading(lambda: _write_over(target, now), target.path)
            self._became(target.path, target.state)

    def _replace(self, target: Target, make: Callable[[Resolved, bytes], None]) -> None:
        """Make something new under another name, and give it the path's in one step."""
        name = self._temporary()

        def exchange() -> None:
            with at(target.path, self._nearby) as place:
                self._require_same(place, self._now[target.path])
                try:
                    make(place, name)
                    if self._now[target.path].kind == "absent":
                        kernel.rename_to_new((place.parent, name), (place.parent, place.name))
                    else:
                        os.rename(name, place.name, src_dir_fd=place.parent, dst_dir_fd=place.parent)
                except (OSError, JournalError):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=place.parent)
                    raise

        self._granting.changing(exchange, target.path)
        self._became(target.path, PathState(target.state.kind, digest=target.state.digest, target=target.state.target))

    # -- several names of one file

    def _note_sources(self) -> None:
        """Where the files that are to have several names are now: under a name that stays, goes, or was not touched."""
        if not self._linked:
            return
        for path, now in self._now.items():
            state = self._targets[path].state
            if now.inode in self._linked and now.kind == "file" and self._is_wanted(now):
                stays = state.kind == "file" and state.inode == now.inode
                if stays or now.inode not in self._sources:
                    self._sources[now.inode] = path
        twins = {os.fsencode(name) for target in self._targets.values() for name in target.state.twins}
        for path in twins - self._targets.keys():
            with contextlib.suppress(OSError):
                found = look(path, self._files.get(self._inode_at(path), ABSENT))
                if found.inode in self._linked and self._is_wanted(found):
                    self._sources.setdefault(found.inode, path)
        for path, state in self.others.items():
            if path not in self._targets and state.inode in self._linked:
                with contextlib.suppress(OSError):
                    if look(path, state).same_as(state):
                        self._sources.setdefault(state.inode, path)

    def _is_wanted(self, now: PathState) -> bool:
        """Whether it is the file that its names are to be of: numbers of inodes are used again."""
        state = self._files.get(now.inode, ABSENT)
        return state.digest == now.digest and (now.holes or not state.holes)

    @staticmethod
    def _inode_at(path: bytes) -> str:
        with contextlib.suppress(OSError), at(path) as place:
            if is_file(place):
                return f"{place.status.st_dev}:{place.status.st_ino}"
        return ""

    def _link(self, target: Target, source: bytes) -> bool:
        """Whether the path is another name of the file at `source` now; not where there are no hard links."""

        def link(place: Resolved, name: bytes) -> None:
            with at(source) as other:
                if not other.exists:
                    raise OSError(errno.EXDEV, "gone")
                os.link(f"/proc/self/fd/{other.descriptor}", name, dst_dir_fd=place.parent, follow_symlinks=True)

        try:
            self._granting.reading(lambda: at(source).__exit__(), source)
            self._replace(target, link)
        except OSError as e:
            if e.errno in _UNLINKABLE:
                return False
            raise
        return True

    # -- what they are known by

    def _set_attributes(self, target: Target, now: PathState) -> None:
        state = target.state
        if state.kind == "absent" or now.kind == "absent":
            return

        def set_all() -> None:
            with at(target.path, self._nearby) as place:
                if place.exists:
                    its_own = _set_owner(place, state)
                    if state.kind != "link":
                        _set_mode(place, state, its_own=its_own)
                    os.utime(
                        place.name, ns=(place.status.st_atime_ns, state.mtime_ns), dir_fd=place.parent, follow_symlinks=False
                    )

        if target.path in self._changed or self._has_other_attributes(target.path, state):
            self._granting.reading(set_all, target.path)
            self._granting.forget(target.path)
            self._changed.add(target.path)

    def _has_other_attributes(self, path: bytes, state: PathState) -> bool:
        """Its contents are right, and so may be all else. A directory's time is changed by every name in it."""
        now = self._now[path]
        return state.kind == "folder" or now.mode != state.mode or now.differs_from(state)

    def _set_time(self, directory: bytes) -> None:
        """Of a directory around targets: it was changed by what was in it, and is changed back."""
        with contextlib.suppress(OSError):
            place = self._granting.reading(lambda: reach(directory), directory)
            if place is not None:
                with place:
                    if place.is_folder and place.status.st_mtime_ns != self.times[directory]:
                        there = f"/proc/self/fd/{place.descriptor}"
                        os.utime(there, ns=(place.status.st_atime_ns, self.times[directory]))


def restoring_does(now: PathState, target: PathState) -> Operation:
    """What bringing a path to its target does to what is there: only what is replaced may be kept as it is."""
    return "write" if now.kind == target.kind and now.digest == target.digest else "replace"


def _make_special(place: Resolved, name: bytes, state: PathState) -> None:
    if state.kind == "link":
        os.symlink(os.fsencode(state.target), name, dir_fd=place.parent)
    else:
        kind = stat.S_IFIFO if state.kind == "fifo" else stat.S_IFSOCK
        os.mknod(name, kind | 0o600, dir_fd=place.parent)


def _write_file(place: Resolved, name: bytes, target: Target) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=place.parent), "wb") as file:
        _write_content(file.fileno(), target)


def _cut(target: Target, now: PathState) -> bool:
    """Take off what was appended, if what is before it is what was there: needs no space, and no copy."""
    with at(target.path) as place:
        Restoring._require_same(place, now)
        descriptor = os.open(f"/proc/self/fd/{place.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            with open(descriptor, "rb", closefd=False) as file:
                found = hashlib.sha256()
                for chunk in first(iter(lambda: file.read(1 << 20), b""), target.length):
                    found.update(chunk)
            if found.hexdigest() != target.state.digest:
                return False
            os.ftruncate(descriptor, target.length)
        finally:
            os.close(descriptor)
    return True


def _write_over(target: Target, now: PathState) -> None:
    with at(target.path) as place:
        Restoring._require_same(place, now)
        descriptor = os.open(f"/proc/self/fd/{place.descriptor}", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            _write_content(descriptor, target)
        finally:
            os.close(descriptor)


def _write_content(descriptor: int, target: Target) -> None:
    with open(descriptor, "wb", closefd=False) as file:
        if target.state.holes:
            write_with_holes(target.content(), file)
        else:
            file.writelines(target.content())


def _set_owner(place: Resolved, state: PathState) -> bool:
    """Whether it has its former owner and group: only root can give away what is another one's; the content matters more."""
    if (place.status.st_uid, place.status.st_gid) != (state.uid, state.gid):
        try:
            os.chown(place.name, state.uid, state.gid, dir_fd=place.parent, follow_symlinks=False)
        except PermissionError:
            return False
    return True


def _set_mode(place: Resolved, state: PathState, *, its_own: bool) -> None:
    """Attributes first: an access list is part of the mode, and some can't be set on what may not be written. What would run as
    another user than before never does.
    """
    there = f"/proc/self/fd/{place.descriptor}"
    if state.attributes is not None:
        _set_extended(there, dict(state.attributes))
    os.chmod(there, state.mode if its_own or state.kind == "folder" else state.mode & 0o1777)


def _set_extended(there: str, wanted: dict[str, str]) -> None:
    """As far as the file system has such things: content and mode matter more. The mode is set after this."""
    mode = stat.S_IMODE(os.stat(there).st_mode)
    if mode & 0o600 != 0o600:  # or even the owner may not
        os.chmod(there, mode | 0o600)
    try:
        present = {name: os.getxattr(there, name).hex() for name in os.listxattr(there) if name.startswith(ATTRIBUTES)}
        if present == wanted:
            return
        for name in present.keys() - wanted.keys():
            os.removexattr(there, name)
        for name, value in wanted.items():
            os.setxattr(there, name, bytes.fromhex(value))
    except OSError as e:
        if e.errno not in NO_ATTRIBUTES:
            raise
