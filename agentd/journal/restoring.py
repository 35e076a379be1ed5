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
import logging
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.nearby import Nearby
from agentd_sandbox.paths import WalkError

from agentd.errors import JournalError
from agentd.journal.flushing import make_all_durable
from agentd.journal.linking import TEMPORARY, Sources
from agentd.journal.making import (
    MEANWHILE,
    Target,
    cut,
    make_special,
    require_same,
    set_mode,
    set_owner,
    write_file,
    write_over,
)
from agentd.journal.places import Granting, at, reach, reach_ours, shown
from agentd.journal.state import ABSENT, PathState, look_anyhow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from agentd_sandbox.paths import Resolved

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
_STEPS = 5
_PROGRESS_EVERY = 100


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

    `before_granting` is called with a path before its mode is changed for a while; `progress` with how many paths are done.
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
    _now: dict[bytes, PathState] = field(default_factory=dict)
    _changed: set[bytes] = field(default_factory=set)
    _nearby: Nearby = field(default_factory=Nearby)
    _steps: int = 0
    _sources: Sources = field(init=False)

    def __post_init__(self) -> None:
        self._targets = {target.path: target for target in self.targets}
        self._granting = Granting(self.before_granting)
        self._sources = Sources(
            targets=self._targets,
            now=self._now,
            others=self.others,
            mark=self.mark,
            granting=self._granting,
            noted=self._noted,
        )

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
            self._sources.find()
            self._sources.save()
            down = sorted(self._targets, key=lambda p: -p.count(b"/"))
            up = down[::-1]
            for paths, step in ((down, self._clear), (up, self._make_directory), (up, self._fill), (down, self._clear_late)):
                for path in paths:
                    self._attempt(path, step)
            self._sources.remove_asides()
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
                    raise OSError(errno.EAGAIN, MEANWHILE, os.fsdecode(path))
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
        if target.state.kind == "absent" and self._sources.of.get(now.inode) == target.path:
            return
        try:
            self._remove(target.path, now)
        except OSError as e:
            late = target.state.kind == "absent" and e.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not late:
                raise

    def _clear_late(self, target: Target, now: PathState) -> None:
        if target.state.kind == "absent" and self._now[target.path].kind != "absent":
            self._remove(target.path, now)

    def _remove(self, path: bytes, now: PathState) -> None:
        def remove() -> None:
            with at(path, self._nearby) as place:
                require_same(place, now)
                (os.rmdir if now.kind == "folder" else os.unlink)(place.name, dir_fd=place.parent)

        try:
            self._granting.changing(remove, path)
        except WalkError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTDIR):  # gone with its directory
                raise
        except FileNotFoundError:
            pass
        self._became(path, ABSENT)

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
                    self._replace(target, lambda place, name: make_special(place, name, state))
            case _:
                raise OSError(errno.EINVAL, f"a {state.kind} can't be restored")

    def _fill_file(self, target: Target, now: PathState) -> None:
        state = target.state
        if not state.digest:  # only its mode is known: nothing else of it was to be changed
            return
        source = self._sources.of.get(state.inode, b"")
        if source and source != target.path:
            if now.kind == "file" and now.inode == self._sources.inode_at(source):
                return
            if self._link(target, source):
                return
        # A file that has other names, too, is not this path's to change.
        alone = self._is_alone(now, state)
        if alone and not now.mode & stat.S_IRUSR:  # what it is to be may be the beginning of what it is
            self._granting.give(target.path)
        its_own = alone or now.inode == state.inode
        holes = now.holes == state.holes
        if not (now.kind == "file" and now.digest == state.digest and its_own and holes):
            self._write(target, now)
        self._sources.written(target)

    def _is_alone(self, now: PathState, state: PathState) -> bool:
        """Whether what is at a path is a file that has no other name, nor has been given one here."""
        taken = now.inode in self._sources.of and now.inode != state.inode
        return now.kind == "file" and now.links == 1 and not taken

    def _write(self, target: Target, now: PathState) -> None:
        alone = self._is_alone(now, target.state)
        if target.length and alone and self._granting.reading(lambda: cut(target, now), target.path):
            self._became(target.path, target.state)
            return
        try:
            self._replace(target, lambda place, name: write_file(place, name, target))
        except OSError as e:
            if e.errno not in _FULL or not alone or target.length:
                raise
            for _ in target.content():  # all of it must be there
                pass
            # No space for a second copy: what is there is given up first. A kill in between is no harm: what it was and what
            # it is to become are both on disk until this call has ended.
            self._granting.reading(lambda: write_over(target, now), target.path)
            self._became(target.path, target.state)

    def _replace(self, target: Target, make: Callable[[Resolved, bytes], None]) -> None:
        """Make something new under another name, and give it the path's in one step."""
        name = self._sources.temporary()

        def exchange() -> None:
            with at(target.path, self._nearby) as place:
                require_same(place, self._now[target.path])
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
                    its_own = set_owner(place, state)
                    if state.kind != "link":
                        set_mode(place, state, its_own=its_own)
                    os.utime(
                        place.name, ns=(place.status.st_atime_ns, state.mtime_ns), dir_fd=place.parent, follow_symlinks=False
                    )

        if state.kind == "folder" and state.mode & stat.S_IRWXU != stat.S_IRWXU:  # nobody gets at what is below afterwards
            self._granting.take_back(below=target.path)
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
