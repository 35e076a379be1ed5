"""A watched folder: what lies in it, and which of that is new and has come to rest.

Notices of the kernel only say when to look. What is true is the folder itself, held against what it was known to hold: so
nothing is lost where notices are (a full queue, a network share, a daemon that was killed).
"""

from __future__ import annotations

import fnmatch
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.automations.events import Fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from agentd.automations.automation import FileTrigger

_MOST_FILES = 100_000
_DEEPEST = 64
_UNSEEN = 1 << 62
_SOON_NS = 1_000_000_000  # a file from the future by more is one of a clock that was put back
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs", "fuse.rclone", "davfs"})
"""File systems on which others' changes make no notices (inotify(7), "Limitations and caveats"); those of FUSE vary."""


class FolderGone(Exception):
    """It can't be looked at, in words."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file in the folder. `ctime_ns` is when it came there, or was written to last."""

    path: bytes
    fingerprint: Fingerprint
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Sight:
    """What a look has shown. `identity` is the folder's own (device, inode)."""

    identity: tuple[int, int]
    files: Mapping[bytes, Found]
    mounted: bool = False
    """Whether it lies on another disk than the root folder."""


def look(trigger: FileTrigger, real: str, *, was_mounted: bool = False) -> Sight:
    """All files that fit, by path. `real` is where the folder was when the automation was loaded. One that `was_mounted` is
    not the empty folder that is left when its disk is gone.

    Raises FolderGone.
    """
    try:
        now = os.path.realpath(trigger.path)
        if now != real:
            raise FolderGone(f"{trigger.path} leads to {now} now, and not to {real}; `agentd automations reload` accepts that")
        if not os.path.isdir(real):
            raise FolderGone(f"{trigger.path} is {'not a folder' if os.path.exists(real) else 'not there'}")
        own = os.stat(real)
        mounted = own.st_dev != os.stat("/").st_dev
        if was_mounted and not mounted:
            raise FolderGone(f"{trigger.path} lay on a disk of its own, which is not mounted now")
        files: dict[bytes, Found] = {}
        for found in _walk(os.fsencode(real), trigger):
            files[found.path] = found
            if len(files) > _MOST_FILES:
                raise FolderGone(f"{trigger.path} holds more than {_MOST_FILES:,} files that fit")
    except OSError as e:
        raise FolderGone(f"{trigger.path} can't be read: {e.strerror}") from None
    return Sight((own.st_dev, own.st_ino), files, mounted)


def _walk(top: bytes, trigger: FileTrigger) -> Iterator[Found]:
    """What can't be looked at below the folder is left out. Raises OSError for the folder itself."""
    folders = [(top, 0)]
    while folders:
        folder, depth = folders.pop()
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError:
            if folder == top:
                raise
            continue
        for entry in listed:
            try:
                if entry.is_dir(follow_symlinks=False):
                    if trigger.recursive and depth < _DEEPEST and not entry.name.startswith(b"."):
                        folders.append((entry.path, depth + 1))
                    continue
                if not fits(os.fsdecode(entry.name), trigger.pattern):
                    continue
                about = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # it went meanwhile
            if stat.S_ISREG(about.st_mode):
                fingerprint = Fingerprint(about.st_ino, about.st_mtime_ns, about.st_size)
                yield Found(entry.path, fingerprint, about.st_ctime_ns)


def fits(name: str, pattern: str) -> bool:
    """Hidden files only where the pattern is for hidden ones."""
    return (pattern.startswith(".") or not name.startswith(".")) and fnmatch.fnmatchcase(name, pattern)


@dataclass(slots=True)
class Settling:
    """Which of the files are new and have not changed for a while. `changes` is whether a changed file counts as a new one."""

    changes: bool
    quiet_s: float
    known: dict[bytes, Fingerprint]
    local: bool = True
    """Whether the times of files are those of this device's clock."""
    _moving: dict[bytes, tuple[Fingerprint, float]] = field(default_factory=dict)
    """Files that may still be written to: as they were last seen, and since when they have been so."""
    _order: dict[bytes, int] = field(default_factory=dict)
    """Of those, and of what was seen to come and not yet found."""

    def step(
        self, sight: Sight, now: tuple[float, int], order: Mapping[bytes, int], gone: AbstractSet[bytes]
    ) -> tuple[list[Found], list[bytes], float | None]:
        """Files to handle in order of their arrival, paths to forget, and after how many seconds to look again at the latest.

        `now` is the time by a steady clock in seconds, and by the clock of the files in nanoseconds. Theirs is as coarse as
        the kernel's ticks: `order` numbers the files that were seen to come, for those of one tick. `gone` are those that
        were seen to go (and may have come again).
        """
        now_s, now_ns = now
        files = sight.files
        lost = [path for path in self.known if path not in files or path in gone]
        for path in lost:
            del self.known[path]
        self._moving = {path: each for path, each in self._moving.items() if path in files}
        self._order = {path: n for path, n in self._order.items() if path in files} | dict(order)
        ready, wait_s = [], None
        for path, found in files.items():
            if not self._is_new(path, found.fingerprint):
                continue
            seen, since = self._moving.get(path, (None, now_s))
            if seen != found.fingerprint:
                since = now_s
                if seen is None and self.local:
                    # A look at a folder that is being filled misses some, which came before others it has seen.
                    since -= min(max(now_ns - found.ctime_ns, -_SOON_NS), self.quiet_s * 1e9) / 1e9
                self._moving[path] = found.fingerprint, since
            left = since + self.quiet_s - now_s
            if left <= 0:
                ready.append(found)
            else:
                wait_s = left if wait_s is None else min(wait_s, left)
        ready.sort(key=lambda found: (found.ctime_ns, self._order.get(found.path, _UNSEEN), found.path))
        return ready, lost, wait_s

    def _is_new(self, path: bytes, fingerprint: Fingerprint) -> bool:
        known = self.known.get(path)
        if known is None:
            return True
        if (known.mtime_ns, known.size) == (fingerprint.mtime_ns, fingerprint.size):
            # What the journal puts back is another inode with the same times: it is the file that it was.
            self.known[path] = fingerprint
            return False
        return self.changes or known.inode != fingerprint.inode

    def settled(self, found: list[Found]) -> None:
        """These are on record now."""
        for each in found:
            self.known[each.path] = each.fingerprint
            self._moving.pop(each.path, None)
            self._order.pop(each.path, None)


def is_remote(path: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether it lies on a file system on which others' changes make no notices; as far as that is known."""
    try:
        device = os.stat(path).st_dev
        with open(mounts, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                mount, _, rest = line.partition(" - ")
                if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                    kind = rest.split()[0]
                    return kind in _NETWORK or kind.startswith("fuse")
    except (OSError, IndexError):
        pass
    return False
