"""One path made what it is to be: its contents and what it is known by."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.journal.contents import first, write_with_holes
from agentd.journal.places import at
from agentd.journal.state import ATTRIBUTES, NO_ATTRIBUTES, PathState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agentd_sandbox.paths import Resolved
    from agentd_sandbox.recorder import Operation

MEANWHILE = "it was changed while it was being restored"


@dataclass(frozen=True, slots=True)
class Target:
    """What a path is to become. `content` gives a file's in pieces; what it raises leaves the path as it is."""

    path: bytes
    state: PathState
    content: Callable[[], Iterable[bytes]] = tuple
    length: int = 0
    """Of a file that was only appended to: its content may be the first bytes of what is there."""


def require_same(place: Resolved, now: PathState) -> None:
    """Nobody has put something else there since it was looked at."""
    if not place.exists or not now.inode:
        return
    status = place.status
    same = now.inode == f"{status.st_dev}:{status.st_ino}" and (now.kind == "folder" or now.mtime_ns == status.st_mtime_ns)
    if not same:
        raise OSError(errno.EAGAIN, MEANWHILE, os.fsdecode(place.real))


def restoring_does(now: PathState, target: PathState) -> Operation:
    """What bringing a path to its target does to what is there: only what is replaced may be kept as it is."""
    return "write" if now.kind == target.kind and now.digest == target.digest else "replace"


def make_special(place: Resolved, name: bytes, state: PathState) -> None:
    if state.kind == "link":
        os.symlink(os.fsencode(state.target), name, dir_fd=place.parent)
    else:
        kind = stat.S_IFIFO if state.kind == "fifo" else stat.S_IFSOCK
        os.mknod(name, kind | 0o600, dir_fd=place.parent)


def write_file(place: Resolved, name: bytes, target: Target) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=place.parent), "wb") as file:
        _write_content(file.fileno(), target)


def cut(target: Target, now: PathState) -> bool:
    """Take off what was appended, if what is before it is what was there: needs no space, and no copy."""
    with at(target.path) as place:
        require_same(place, now)
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


def write_over(target: Target, now: PathState) -> None:
    with at(target.path) as place:
        require_same(place, now)
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


def set_owner(place: Resolved, state: PathState) -> bool:
    """Whether it has its former owner and group: only root can give away what is another one's; the content matters more."""
    if (place.status.st_uid, place.status.st_gid) != (state.uid, state.gid):
        try:
            os.chown(place.name, state.uid, state.gid, dir_fd=place.parent, follow_symlinks=False)
        except PermissionError:
            return False
    return True


def set_mode(place: Resolved, state: PathState, *, its_own: bool) -> None:
    """Attributes first: an access list is part of the mode, and some can't be set on what may not be written. What would run as
    another user than before never does.
    """
    there = f"/proc/self/fd/{place.descriptor}"
    if state.attributes is not None:
        _set_extended(there, dict(state.attributes))
    os.chmod(there, state.mode if its_own or state.kind == "folder" else state.mode & 0o1777)


def _set_extended(there: str, wanted: dict[str, str]) -> None:
    """As far as the file system has such things: content and mode matter more. The mode is set after this. Raises OSError:
    EACCES where even the owner may not, and has to be permitted to first.
    """
    try:
        present = {name: os.getxattr(there, name).hex() for name in os.listxattr(there) if name.startswith(ATTRIBUTES)}
        if present == wanted:
            return
        for name in present.keys() - wanted.keys():
            os.removexattr(there, name)
        for name, value in wanted.items():
            os.setxattr(there, name, bytes.fromhex(value))
    except OSError as e:
        status = os.stat(there)
        closed = status.st_uid == os.geteuid() and status.st_mode & 0o600 != 0o600
        if e.errno not in NO_ATTRIBUTES or (e.errno == errno.EACCES and closed):
            raise
