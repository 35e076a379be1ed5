"""The state of one path: taken, compared, put back. Follows no link and leaves other paths alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from agentd_sandbox.paths import Resolved, WalkError, resolve

from agentd.errors import JournalError
from agentd.journal.contents import Kept, TooLarge, write_with_holes
from agentd.store import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agentd.journal.contents import Contents

_NO_ATTRIBUTES = (errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES)  # of the file system, or not ours to set
_ATTRIBUTES = ("user.", "system.posix_acl_")
_TEMPORARY = re.compile(rb"\.agentd-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class PathState:
    """What is at a path. `kind` is absent, file, folder, link or other; `digest` the SHA-256 of a file's content."""

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

    def same_as(self, other: PathState) -> bool:
        """Whether the path looks the same to its owner: times apart, which reading programs may set."""
        mine, its = (self.kind, self.mode, self.digest, self.target), (other.kind, other.mode, other.digest, other.target)
        known = self.attributes is not None and other.attributes is not None
        return mine == its and (not known or self.attributes == other.attributes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PathState:
        fields = json.loads(text)
        if fields.get("attributes") is not None:
            fields["attributes"] = tuple((name, value) for name, value in fields["attributes"])
        return cls(**fields)


def look(path: bytes) -> PathState:
    """The present state of a real path, content digested but not kept. Raises OSError if it leads elsewhere now."""
    place = _reach(path)
    if place is None:
        return PathState("absent")
    with place:
        return _state(place, None)


def take(path: bytes, *, limit: int) -> tuple[PathState, bytes]:
    """The present state of a real path with its content. Raises TooLarge past `limit` bytes."""
    place = _reach(path)
    if place is None:
        return PathState("absent"), b""
    with place:
        content = bytearray()
        state = _state(place, content, limit)
        return state, bytes(content)


def keep(path: bytes, contents: Contents, *, limit: int, goes: bool = False, grows: bool = False) -> tuple[PathState, Kept]:
    """The present state of a real path, with its content kept; `goes` and `grows` as in `Contents.keep`.

    Raises TooLarge past `limit` bytes, OSError.
    """
    place = _reach(path)
    if place is None:
        return PathState("absent"), Kept()
    with place:
        if not (place.exists and stat.S_ISREG(place.status.st_mode)):
            return _state(place, None), Kept()
        with _readable(place) as descriptor:
            kept = contents.keep(descriptor, limit=limit, goes=goes, grows=grows)
        return _file(place, kept.digest), kept


@contextlib.contextmanager
def opened(path: bytes) -> Iterator[int]:
    """A file, open to be read. Raises OSError, also if there is something else."""
    place = _reach(path)
    if place is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
    with place:
        if not (place.exists and stat.S_ISREG(place.status.st_mode)):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        with _readable(place) as descriptor:
            yield descriptor


@contextlib.contextmanager
def _readable(place: Resolved) -> Iterator[int]:
    descriptor = os.open(f"/proc/self/fd/{place.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def put_back(path: bytes, state: PathState, content: Iterable[bytes]) -> None:
    """Make the path what `state` says, replacing in one step what is there; durable when it returns.

    `content` comes in pieces; what it raises leaves the path as it was. Raises OSError, too.
    """
    with _at(path) as place:
        current = _state(place, None)
        match state.kind:
            case "absent":
                _remove(place, current)
            case "folder":
                if current.kind != "folder":
                    _remove(place, current)
                    os.mkdir(place.name, dir_fd=place.parent)
                _give_back(place, state)
                there = f"/proc/self/fd/{place.parent}/{os.fsdecode(place.name)}"
                os.chmod(there, state.mode)
                _set_attributes(there, state)
            case "link":
                _remove(place, current)
                os.symlink(os.fsencode(state.target), place.name, dir_fd=place.parent)
                _give_back(place, state)
            case "file":
                if current.kind == "folder":
                    _remove(place, current)
                _replace(place, state, content)
            case _:
                raise OSError(errno.EINVAL, f"a {state.kind} can't be put back", os.fsdecode(path))
        sync_folder(f"/proc/self/fd/{place.parent}")


def sweep(folder: bytes) -> None:
    """Remove what a killed `put_back`, or a killed broker, has left in a folder."""
    place = _reach(folder)
    if place is None:
        return
    with place:
        if place.is_folder:
            there = f"/proc/self/fd/{place.descriptor}"
            for name in os.listdir(os.fsencode(there)):
                if _TEMPORARY.fullmatch(name):
                    os.unlink(name, dir_fd=place.descriptor)


def make_durable(path: bytes) -> None:
    """What a call wrote is to be on disk before its end is recorded. Nothing to do if even its folder is gone."""
    try:
        place = _reach(path)
    except OSError:  # the way there leads elsewhere by now: what is there is not the call's
        return
    if place is None:
        return
    with place:
        if place.exists and stat.S_ISREG(os.fstat(place.descriptor).st_mode):
            with _readable(place) as descriptor:
                os.fsync(descriptor)
        sync_folder(f"/proc/self/fd/{place.parent}")


def _reach(path: bytes) -> Resolved | None:
    """As `_at`, or None if not even its folder is there."""
    try:
        return _at(path)
    except WalkError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _at(path: bytes) -> Resolved:
    place = resolve(path, follow=False)
    if place.real != path:
        with place:
            raise OSError(errno.ELOOP, "the way there now leads elsewhere", os.fsdecode(path))
    return place


def _state(place: Resolved, content: bytearray | None, limit: int = 0) -> PathState:
    if not place.exists:
        return PathState("absent")
    status = os.fstat(place.descriptor)
    fields = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        return PathState("folder", *fields, attributes=_attributes(place.descriptor))
    if stat.S_ISLNK(status.st_mode):
        return PathState("link", *fields, target=os.fsdecode(os.readlink(b"", dir_fd=place.descriptor)))
    if not stat.S_ISREG(status.st_mode):
        return PathState("other", *fields)
    if content is not None and status.st_size > limit:
        raise TooLarge
    digest = hashlib.sha256()
    with open(f"/proc/self/fd/{place.descriptor}", "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if content is not None:
                content += chunk
                if len(content) > limit:
                    raise TooLarge
    return _file(place, digest.hexdigest())


def _file(place: Resolved, digest: str) -> PathState:
    status = os.fstat(place.descriptor)
    fields = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
    holes = status.st_blocks * 512 < status.st_size
    return PathState("file", *fields, digest=digest, attributes=_attributes(place.descriptor), holes=holes)


def _attributes(descriptor: int) -> tuple[tuple[str, str], ...]:
    there = f"/proc/self/fd/{descriptor}"
    try:
        names = sorted(name for name in os.listxattr(there) if name.startswith(_ATTRIBUTES))
        return tuple((name, os.getxattr(there, name).hex()) for name in names)
    except OSError as e:
        if e.errno in _NO_ATTRIBUTES:
            return ()
        raise


def _set_attributes(there: str | int, state: PathState) -> None:
    """As far as the file system has such things: content and mode matter more."""
    if state.attributes is None:
        return
    wanted = dict(state.attributes)
    try:
        for name in os.listxattr(there):
            if name.startswith(_ATTRIBUTES) and name not in wanted:
                os.removexattr(there, name)
        for name, value in wanted.items():
            os.setxattr(there, name, bytes.fromhex(value))
    except OSError as e:
        if e.errno not in _NO_ATTRIBUTES:
            raise


def _remove(place: Resolved, current: PathState) -> None:
    if current.kind == "folder":
        os.rmdir(place.name, dir_fd=place.parent)
    elif current.kind != "absent":
        os.unlink(place.name, dir_fd=place.parent)


def _give_back(place: Resolved, state: PathState) -> None:
    with contextlib.suppress(PermissionError):  # another owner's: only root can
        os.chown(place.name, state.uid, state.gid, dir_fd=place.parent, follow_symlinks=False)


def _replace(place: Resolved, state: PathState, content: Iterable[bytes]) -> None:
    temporary = b".agentd-" + secrets.token_hex(8).encode()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600, dir_fd=place.parent)
    try:
        with open(descriptor, "wb", closefd=True) as file:
            if state.holes:
                write_with_holes(content, file)
            else:
                file.writelines(content)
            file.flush()
            with contextlib.suppress(PermissionError):  # another owner's file: the content matters more
                os.fchown(file.fileno(), state.uid, state.gid)
            os.fchmod(file.fileno(), state.mode)
            _set_attributes(file.fileno(), state)
            os.utime(file.fileno(), ns=(state.mtime_ns, state.mtime_ns))
            os.fsync(file.fileno())
        os.rename(temporary, place.name, src_dir_fd=place.parent, dst_dir_fd=place.parent)
    except (OSError, JournalError):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=place.parent)
        raise
