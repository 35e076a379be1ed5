"""Several names of one file: where the file is that names are to be made of, while paths are restored."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.journal.places import at, parents
from agentd.journal.state import ABSENT, PathState, is_file, look_anyhow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from agentd.journal.making import Target
    from agentd.journal.places import Granting

TEMPORARY = b".agentd-"
"""How the names of files begin that take the place of others; the call's id follows: nobody else's are taken for one."""


@dataclass(slots=True)
class Sources:
    """Of the files that are to have several names, one name that each has now. `now` is what is at the targets; `others` are
    paths that are no targets and may be other names of their files, and what each was; `mark` is the call's.
    """

    targets: Mapping[bytes, Target]
    now: Mapping[bytes, PathState]
    others: Mapping[bytes, PathState]
    mark: bytes
    granting: Granting
    noted: Callable[[bytes], AbstractContextManager[None]]
    of: dict[str, bytes] = field(default_factory=dict)
    """By the former device and inode of the file."""
    _files: dict[str, PathState] = field(init=False)
    """What each file is to be, by its device and inode."""
    _linked: set[str] = field(init=False)
    _aside: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = [t.state for t in self.targets.values() if t.state.kind == "file" and t.state.inode]
        self._files = {state.inode: state for state in files}
        self._linked = {state.inode for state in files if state.links > 1}

    def written(self, target: Target) -> None:
        """A file that is to have several names is at the target's path now."""
        if target.state.inode in self._linked:
            self.of[target.state.inode] = target.path

    def find(self) -> None:
        """Where the files that are to have several names are now: under a name that stays, goes, or was not touched."""
        if not self._linked:
            return
        for path, now in self.now.items():
            state = self.targets[path].state
            if now.inode in self._linked and now.kind == "file" and self._is_wanted(now):
                stays = state.kind == "file" and state.inode == now.inode
                if stays or now.inode not in self.of:
                    self.of[now.inode] = path
        twins = {os.fsencode(name) for target in self.targets.values() for name in target.state.twins}
        for path in twins - self.targets.keys():
            with contextlib.suppress(OSError):
                inode = self.granting.reading(functools.partial(self._inode, path), path)
                found = look_anyhow(path, self.granting, self._files.get(inode, ABSENT))
                if found.inode in self._linked and self._is_wanted(found):
                    self.of.setdefault(found.inode, path)
        for path, state in self.others.items():
            if path not in self.targets and state.inode in self._linked:
                with contextlib.suppress(OSError):
                    if look_anyhow(path, self.granting, state).same_as(state):
                        self.of.setdefault(state.inode, path)

    def save(self) -> None:
        """A name that is to be something else, or to go before the others are made of its file, is kept as another one."""
        for path in [path for path in self.of.values() if path in self.targets]:
            state, now = self.targets[path].state, self.now[path]
            above = self._in_the_way(path)
            stays = state.kind == "file" and state.inode == now.inode
            if above or not (stays or state.kind == "absent"):
                beside = above or path
                set_aside = functools.partial(self._set_aside, path, os.path.dirname(beside))
                with self.noted(path):
                    self.granting.changing(set_aside, beside)

    def _in_the_way(self, path: bytes) -> bytes:
        """The topmost directory above a path that is to be something else, and so has to be emptied first."""
        above = (p for p in parents(path) if p in self.targets)
        return next((p for p in reversed(list(above)) if self.targets[p].state.kind not in ("folder", "absent")), b"")

    def _set_aside(self, path: bytes, directory: bytes) -> None:
        aside = os.path.join(directory, self.temporary())
        with at(path) as place, at(aside) as other:
            try:
                os.link(f"/proc/self/fd/{place.descriptor}", other.name, dst_dir_fd=other.parent, follow_symlinks=True)
            except OSError as e:  # its content is written anew then
                if e.errno == errno.EACCES:
                    raise
                return
        self.of[self.now[path].inode] = aside
        self._aside.append(aside)

    def remove_asides(self) -> None:
        for path in self._aside:
            with contextlib.suppress(OSError), at(path) as place:
                os.unlink(place.name, dir_fd=place.parent)

    def temporary(self) -> bytes:
        return TEMPORARY + self.mark + b"-" + secrets.token_hex(4).encode()

    def _is_wanted(self, now: PathState) -> bool:
        """Whether it is the file that its names are to be of: numbers of inodes are used again."""
        state = self._files.get(now.inode, ABSENT)
        return state.digest == now.digest and (now.holes or not state.holes)

    def inode_at(self, path: bytes) -> str:
        with contextlib.suppress(OSError):
            return self._inode(path)
        return ""

    @staticmethod
    def _inode(path: bytes) -> str:
        with at(path) as place:
            return f"{place.status.st_dev}:{place.status.st_ino}" if is_file(place) else ""
