"""The state of one path: taken and compared. Follows no symlink, and changes nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from agentd_sandbox.paths import reopen

from agentd.journal.contents import Kept, TooLarge
from agentd.journal.digests import PLAIN_BYTES, digest
from agentd.journal.places import reach, reach_ours

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentd_sandbox.nearby import Nearby
    from agentd_sandbox.paths import Resolved

    from agentd.journal.contents import Contents
    from agentd.journal.places import Granting

NO_ATTRIBUTES = (errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES)  # of the file system, or not ours to set
ATTRIBUTES = ("user.", "system.posix_acl_")
_CHUNK = 1 << 20
_KINDS = (
    *((stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISLNK, "link")),
    *((stat.S_ISFIFO, "fifo"), (stat.S_ISSOCK, "socket")),
)


@dataclass(frozen=True, slots=True)
class PathState:
    """What is at a path. `kind` is absent, file, folder, link, fifo, socket or other; `digest` is that of a file's content,
    empty if it could not be read.
    """

    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    digest: str = ""
    target: str = ""
    attributes: tuple[tuple[str, str], ...] | None = None
    """Extended ones by name, values in hexadecimal: those of users, and access lists. None if nobody looked."""
    holes: bool = False
    """Whether a file takes less room than its length says."""
    inode: str = ""
    """Which file it is: `DEVICE:INODE`."""
    links: int = 1
    """How many names the file has."""
    twins: tuple[str, ...] = ()
    """Paths of other names of it, as far as they are known."""
    around_ns: int = 0
    """When its directory was last changed."""
    home: int = 0
    """Which directory it is in: the number of its inode, which outlives a mount."""
    stamp: str = ""
    """Inode, length and time of an unreadable file: the same ones mean the same content."""

    def same_as(self, other: PathState) -> bool:
        """Whether the path looks the same to its owner: times apart, which reading programs may set."""
        known = self.attributes is not None and other.attributes is not None
        return self.essence[:-1] == other.essence[:-1] and (not known or self.attributes == other.attributes)

    def differs_from(self, other: PathState) -> bool:
        """Whether anything is different that can be restored: its time, or which file it is a name of, too."""
        if not self.same_as(other):
            return True
        another = bool(self.inode and other.inode) and self.inode != other.inode
        notable = self.links > 1 or other.links > 1 or (self.kind == "file" and self.holes != other.holes)
        return self.mtime_ns != other.mtime_ns or (another and notable)

    @property
    def essence(self) -> tuple[object, ...]:
        """What makes two states look the same."""
        return self.kind, self.mode, self.digest, self.target, self.attributes

    def to_json(self) -> str:
        """Without what has its usual value: there are two of these for each path of each call."""
        if self is ABSENT:
            return _ABSENT_JSON
        return json.dumps({name: value for name, usual in _USUAL if (value := getattr(self, name)) != usual})

    @classmethod
    def from_json(cls, text: str) -> PathState:
        values = json.loads(text)
        if values.get("attributes") is not None:
            values["attributes"] = tuple((name, value) for name, value in values["attributes"])
        values["twins"] = tuple(values.get("twins", ()))
        return cls(**values)


_USUAL = tuple((each.name, each.default) for each in fields(PathState))
_ABSENT_JSON = json.dumps({"kind": "absent"})
ABSENT = PathState("absent")


def look(path: bytes, known: PathState = ABSENT) -> PathState:
    """The present state of a real path, content digested but not kept. Raises OSError if it leads elsewhere now, or can't be
    read (PermissionError), except where it has not changed since it was `known`.
    """
    return _look(reach(path), known)


def _look(place: Resolved | None, known: PathState) -> PathState:
    if place is None:
        return ABSENT
    with place:
        try:
            return state_of(place)
        except PermissionError:
            if known.stamp and known.stamp == _stamp(place.status):
                return file_state(place, known.digest)
            raise


def look_anyhow(path: bytes, granting: Granting, known: PathState = ABSENT, nearby: Nearby | None = None) -> PathState:
    """As `look`, also where its owner may not: the state is the one without what that takes. What the way to it leads past is
    not there. Raises OSError.
    """
    return as_it_was(granting.reading(lambda: _look(reach_ours(path, nearby), known), path), path, granting)


def as_it_was(state: PathState, path: bytes, granting: Granting) -> PathState:
    """A state that was taken while the owner was permitted to, without that."""
    mode = granting.mode_of(state.inode)
    if mode is None:
        return state
    stamp = state.stamp or _stamp(os.lstat(path)) if state.kind == "file" and not mode & stat.S_IRUSR else state.stamp
    return replace(state, mode=mode, stamp=stamp)


def take(path: bytes, *, limit: int) -> tuple[PathState, bytes]:
    """The present state of a real path with its content. Raises TooLarge past `limit` bytes, OSError."""
    place = reach(path)
    if place is None:
        return ABSENT, b""
    with place:
        if not is_file(place):
            return state_of(place), b""
        if place.status.st_size > limit:
            raise TooLarge
        with readable(place) as descriptor, open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
            if len(content) > limit:
                raise TooLarge
            return file_state(place, digest(descriptor)), content


def keep(
    path: bytes,
    contents: Contents,
    *,
    limit: int | None,
    goes: bool = False,
    grows: bool = False,
    ours: bool = False,
    nearby: Nearby | None = None,
) -> tuple[PathState, Kept]:
    """The present state of a real path, with its content kept; `goes` and `grows` as in `Contents.keep`. With `ours`, what the
    way to it leads past is not there.

    Raises TooLarge past `limit` bytes, PermissionError if it can't be read, OSError.
    """
    place = reach_ours(path, nearby) if ours else reach(path, nearby)
    if place is None:
        return ABSENT, Kept()
    with place:
        if not is_file(place):
            return state_of(place), Kept()
        status = os.fstat(place.descriptor)  # before it has another name among the contents
        with readable(place) as descriptor:
            kept = contents.keep(descriptor, limit=limit, goes=goes, grows=grows)
            known_by = kept.digest if status.st_size <= PLAIN_BYTES else digest(descriptor)
        return file_state(place, known_by, status), kept


def without_content(path: bytes) -> PathState:
    """The state of a file that can't be read. Raises OSError."""
    place = reach(path)
    if place is None or not place.exists:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
    with place:
        return _unread(place)


@contextlib.contextmanager
def opened(path: bytes) -> Iterator[int]:
    """A file, open to be read. Raises OSError, also if there is something else."""
    place = reach(path)
    if place is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
    with place:
        if not is_file(place):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        with readable(place) as descriptor:
            yield descriptor


@contextlib.contextmanager
def readable(place: Resolved) -> Iterator[int]:
    """A descriptor to read the file with. Raises OSError."""
    descriptor = reopen(place.descriptor, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_file(place: Resolved) -> bool:
    return place.exists and stat.S_ISREG(place.status.st_mode)


def state_of(place: Resolved) -> PathState:
    """Raises PermissionError if it is a file that can't be read, OSError."""
    around = os.fstat(place.parent)
    if not place.exists:
        return PathState("absent", around_ns=around.st_mtime_ns, home=around.st_ino)
    if is_file(place):
        with readable(place) as descriptor:
            return file_state(place, digest(descriptor))
    status = os.fstat(place.descriptor)
    kind = _kind(status)
    return PathState(
        kind,
        *_plain(status),
        target=os.fsdecode(os.readlink(b"", dir_fd=place.descriptor)) if kind == "link" else "",
        attributes=_attributes(place.descriptor) if kind == "folder" else None,
        inode=f"{status.st_dev}:{status.st_ino}",
        around_ns=around.st_mtime_ns,
        home=around.st_ino,
    )


def file_state(place: Resolved, content: str, status: os.stat_result | None = None) -> PathState:
    """Of a file whose digest is known."""
    status, around = status or os.fstat(place.descriptor), os.fstat(place.parent)
    return PathState(
        "file",
        *_plain(status),
        digest=content,
        attributes=_attributes(place.descriptor),
        holes=status.st_blocks * 512 < status.st_size,
        inode=f"{status.st_dev}:{status.st_ino}",
        links=status.st_nlink,
        around_ns=around.st_mtime_ns,
        home=around.st_ino,
        stamp="" if status.st_mode & stat.S_IRUSR else _stamp(status),
    )


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _unread(place: Resolved) -> PathState:
    status, around = os.fstat(place.descriptor), os.fstat(place.parent)
    return PathState(
        _kind(status),
        *_plain(status),
        inode=f"{status.st_dev}:{status.st_ino}",
        links=status.st_nlink,
        around_ns=around.st_mtime_ns,
        home=around.st_ino,
        stamp=_stamp(status),
    )


def _kind(status: os.stat_result) -> str:
    return next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "other")


def _plain(status: os.stat_result) -> tuple[int, int, int, int]:
    """Mode, owner, group and time."""
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns


def _attributes(descriptor: int) -> tuple[tuple[str, str], ...] | None:
    """None if they may not be read."""
    there = f"/proc/self/fd/{descriptor}"
    try:
        names = sorted(name for name in os.listxattr(there) if name.startswith(ATTRIBUTES))
        return tuple((name, os.getxattr(there, name).hex()) for name in names)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM):
            return None
        if e.errno in NO_ATTRIBUTES:
            return ()
        raise
