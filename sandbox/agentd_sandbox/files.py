"""What path calls do, within the scopes of one call: every way to open, look at or change a file.

Paths come in absolute; `Reach` says what they lead to and whether that may be used. Before the first change of a path the
recorder makes its former state durable. Errors are those of the manual pages, as OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.limits import LARGEST_FILE
from agentd_sandbox.paths import Identity, Resolved, identity, is_called, reopen, resolve
from agentd_sandbox.reach import DEVICES, Reach
from agentd_sandbox.recorder import Change, Recorder
from agentd_sandbox.renewing import renewed
from agentd_sandbox.walks import Walks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from agentd_sandbox.recorder import Operation

_O_TMPFILE = 0o20000000
_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECTORY | os.O_SYNC | os.O_DSYNC
_NULL = b"/dev/null"
_TREE_LIMIT = 2000  # entries of a folder that is moved: each one's former state is kept


@dataclass(slots=True)
class Files(Reach):
    """The file system as one call may use it. `made_up` are files that exist for the worker only, by real path."""

    recorder: Recorder
    made_up: Mapping[bytes, bytes] = field(default_factory=dict)
    walks: Walks = field(default_factory=Walks)
    """What the kernel looks up by itself, for all calls."""
    largest: int = LARGEST_FILE
    """Bytes that a file may be made to have."""
    appends: bool = True
    """Whether what is opened to be appended to can't be changed otherwise without the broker's knowing."""
    _appended: list[bytes] = field(default_factory=list)
    _grown: dict[bytes, int] = field(default_factory=dict)
    """Files that may be written to, and how much there was of each at first."""
    _made: set[bytes] = field(default_factory=set)
    """Paths that the call has made: their content is its own, whether it may be read or not."""
    holds_device: bool = False
    """Whether the call has been given a device of its scopes."""
    unnamed: bool = False
    """Whether one of those has lost its name, and may be written to all the same."""

    def __post_init__(self) -> None:
        Reach.__post_init__(self)
        try:
            self.walks.enter(id(self), self.access.may_write)
        except BaseException:
            Reach.close(self)
            raise

    def close(self) -> None:
        """To be called when nothing is served any more."""
        Reach.close(self)
        self.walks.leave(id(self))

    def _record(self, *changes: tuple[Operation, bytes]) -> frozenset[bytes]:
        """The paths whose file is kept as it is, and must not be written to."""
        kept = [Change(operation, path) for operation, path in changes if path not in DEVICES]
        return (self.recorder.before_changes(kept) if kept else None) or frozenset()

    # -- open

    def open(self, path: bytes, flags: int, mode: int, umask: int) -> int:
        """A descriptor of ours, to be handed on and closed."""
        if flags & _O_TMPFILE & ~os.O_DIRECTORY:
            raise OSError(errno.EOPNOTSUPP, "O_TMPFILE")
        if flags & os.O_PATH:  # would let a worker hold what it may not read: it gets what it could open
            flags = os.O_RDONLY | flags & (os.O_DIRECTORY | os.O_NOFOLLOW)
        if path in self.made_up:
            return self._invent(path, flags)
        creating = bool(flags & os.O_CREAT)
        exclusive = creating and flags & os.O_EXCL
        follow = not (flags & os.O_NOFOLLOW or exclusive)
        with self._found(path, follow=follow) as target:
            if target.exists:
                return self._open_existing(target, flags)
            return self._create(target, flags, mode & ~umask)

    def _create(self, target: Resolved, flags: int, mode: int) -> int:
        if not flags & os.O_CREAT:
            self.require(target, "see")
            raise OSError(errno.ENOENT, "missing")
        self.require(target, "write")
        if target.trailing_slash:
            raise OSError(errno.EISDIR, "folder")
        self._record(("create", target.real))
        self._grown.setdefault(target.real, 0)
        exact = flags & _KEPT_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(target.name, exact, mode & 0o777, dir_fd=target.parent)
        self._made.add(target.real)
        return made

    def _open_existing(self, target: Resolved, flags: int) -> int:
        changes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if stat.S_ISCHR(target.status.st_mode) and self.access.is_device(target.real):
            self.holds_device = True
            return _open_device(target, flags)
        if flags & os.O_ACCMODE != os.O_WRONLY:
            self.require(target, "read")
        if changes and target.real != _NULL:  # to be written to, not to be removed or replaced
            self.require(target, "write")
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise OSError(errno.EEXIST, "exists")
        self._fit_to_open(target, changes=changes)
        anew = bool(flags & os.O_TRUNC) and target.real not in DEVICES
        if changes:
            self._grown.setdefault(target.real, _room(target.status))
        if changes and target.real in self._record((self._manner(target, flags, anew=anew), target.real)):
            with self._named(target.real) as place:
                return renewed(target, place, flags & _KEPT_FLAGS, self.recorder.mark)
        opened = reopen(target.descriptor, flags & _KEPT_FLAGS)
        if anew:
            os.ftruncate(opened, 0)
        return opened

    def _manner(self, target: Resolved, flags: int, *, anew: bool) -> Operation:
        if anew:
            return "replace"
        if not (self.appends and flags & os.O_APPEND and flags & os.O_ACCMODE == os.O_WRONLY):  # or mmap(2) would do
            return "write"
        self._appended.append(target.real)
        return "append"

    def stop_appending(self) -> None:
        """What was opened to be appended to is about to be open to other changes, from here to the end of the call."""
        self.appends = False
        if self._appended:
            self._record(*(("write", path) for path in self._appended))
            self._appended.clear()

    def _fit_to_open(self, target: Resolved, *, changes: bool) -> None:
        """Files and folders only: a FIFO would block the broker, a device reaches beyond files."""
        mode = target.status.st_mode
        if stat.S_ISREG(mode):
            if changes:
                self._only_name(target)
        elif stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, "link")
        elif stat.S_ISDIR(mode):
            if changes:
                raise OSError(errno.EISDIR, "folder")
        elif target.real not in DEVICES:
            self.deny(target.real, "neither a file nor a folder")
            raise OSError(errno.EACCES, "special")

    def _only_name(self, target: Resolved) -> None:
        """Another name of this file may lie outside the scopes."""
        if target.status.st_nlink > 1 and not target.is_folder:
            self.deny(target.real, "has more than one hard link")
            raise OSError(errno.EMLINK, "links")

    def _invent(self, path: bytes, flags: int = 0) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EACCES, "made up")
        descriptor = os.memfd_create("made-up", os.MFD_CLOEXEC)
        os.write(descriptor, self.made_up[path])
        try:
            return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(descriptor)

    def written(self) -> int:
        """Bytes that files have grown by, holes and what is set aside included."""
        total = 0
        for path, before in self._grown.items():
            with contextlib.suppress(OSError):  # gone again, or by another name
                total += max(0, _room(os.lstat(path)) - before)
        return total

    def _moved(self, source: Resolved, target: Resolved) -> None:
        """What was written counts by its new name."""
        old, new = source.real, target.real
        self.unnamed = self.unnamed or new in self._grown
        below = [path for path in self._grown if path.startswith(old + b"/")] if source.is_folder else []
        for path in (*below, *({old} & self._grown.keys())):
            self._grown[new + path[len(old) :]] = self._grown.pop(path)
        self._made.discard(new)
        made = [path for path in self._made if path == old or path.startswith(old + b"/")]
        self._made.difference_update(made)
        self._made.update(new + path[len(old) :] for path in made)

    def require_room(self, length: int, most: int) -> None:
        """Raises OSError (ENOSPC) if the call would have written more than it may."""
        if self.written() + length > most:
            self.deny("fallocate", f"more than {most >> 20} MiB")
            raise OSError(errno.ENOSPC, "limit of the call")

    # -- what a path is

    def status(self, path: bytes, *, follow: bool) -> bytes:
        """`struct stat`, as the kernel lays it out."""
        if path in self.made_up:
            made = self._invent(path)
            try:
                return kernel.raw_stat(made)
            finally:
                os.close(made)
        with self.existing(path, "see", follow=follow) as target:
            return kernel.raw_stat(target.descriptor)

    def may(self, path: bytes, mode: int) -> None:
        """access(2)."""
        if path in self.made_up and not mode & os.W_OK:
            return
        with self.existing(path, "see") as target:
            if mode & os.R_OK:
                self.require(target, "read")
            if mode & os.W_OK:
                self.require(target, "write")
            if mode & os.X_OK and not target.is_folder:
                self.require(target, "execute")
            if not os.access(f"/proc/self/fd/{target.descriptor}", mode):
                raise OSError(errno.EACCES, "mode")

    def link_text(self, path: bytes) -> bytes:
        with self.existing(path, "see", follow=False) as target:
            if not target.is_link:
                raise OSError(errno.EINVAL, "no link")
            self.require(target, "read")
            return os.readlink(b"", dir_fd=target.descriptor)

    def file_system(self, path: bytes, *, free: bytes) -> bytes:
        """`struct statfs`; that of the folder `free` may always be asked for."""
        descriptor = self.file_system_of(path, free=free)
        try:
            return kernel.raw_statfs(descriptor)
        finally:
            os.close(descriptor)

    def file_system_of(self, path: bytes, *, free: bytes) -> int:
        """An O_PATH descriptor to be asked for its file system, and closed."""
        is_free = os.path.normpath(path) == free
        with resolve(free, follow=True) if is_free else self.existing(path, "see") as target:
            return os.dup(target.descriptor)

    # -- changes of names

    def remove(self, path: bytes, *, folder: bool) -> None:
        if folder and path.rstrip(b"/").endswith(b"/."):  # rmdir(2): not by that name
            raise OSError(errno.EINVAL, "dot")
        with self._named(path) as target:
            self.require(target, "write")
            if not target.exists:
                raise OSError(errno.ENOENT, "missing")
            if target.is_folder != folder:
                raise OSError(errno.ENOTDIR if folder else errno.EISDIR, "kind")
            if folder and not target.is_empty:
                raise OSError(errno.ENOTEMPTY, "not empty")
            self._record(("remove", target.real))
            with self._changing(target):
                (os.rmdir if folder else os.unlink)(target.name, dir_fd=target.parent)
            self._made.discard(target.real)
            self.unnamed = self.unnamed or target.real in self._grown

    def make_folder(self, path: bytes, mode: int) -> None:
        with self._new(path) as target:
            self._record(("create", target.real))
            with self._changing(target):
                os.mkdir(target.name, mode & 0o777, dir_fd=target.parent)
            self._made.add(target.real)

    def make_link(self, text: bytes, path: bytes) -> None:
        """A symbolic link, to where this call may go itself. Every use of it is decided anew."""
        with self._new(path) as target:
            self._leads_within(target.real, text)
            self._record(("create", target.real))
            with self._changing(target):
                os.symlink(text, target.name, dir_fd=target.parent)
            self._made.add(target.real)

    def _leads_within(self, link: bytes, text: bytes) -> None:
        """Links are for others to follow too, who have no broker: they may lead only to where this call may go.

        That is read from the text alone, so that nothing put in its way later changes it: with `..` at its beginning
        only, what it goes through are folders of the scopes, or links that lead within them themselves.
        """
        if self.access.leads_later(link):
            self.deny(link, "what runs later lies below it, and no grant names it")
            raise OSError(errno.EACCES, "later")
        names = text.split(b"/")
        ups = next((n for n, name in enumerate(names) if name != b".."), len(names))
        end = os.path.normpath(os.path.join(os.path.dirname(link), text))
        if not text or b".." in names[ups:] or not self._is_inside(end):
            self.deny(link, f"a link to {os.fsdecode(text)} would lead out of the scopes")
            raise OSError(errno.EACCES, "link")

    def _is_inside(self, spelled: bytes) -> bool:
        """Whether a path lies in the scopes as it is spelled, and as it is: other people's links may be on the way."""
        try:
            with self._walk_to(spelled) as end:
                return all(self.access.may_read(path) or self.access.may_write(path) for path in (spelled, end.real))
        except OSError:
            return False

    def make_name(self, old: bytes, new: bytes, *, follow: bool) -> None:
        """A hard link: both names within what may be written. From then on the file can't be, until one is gone."""
        with self.existing(old, "write", follow=follow) as source, self._new(new) as target:
            if not stat.S_ISREG(source.status.st_mode):
                raise OSError(errno.EPERM, "no file")
            self._require_known(source.real)
            self._only_name(source)
            self._record(("create", target.real))
            with self._changing(source, target):
                os.link(f"/proc/self/fd/{source.descriptor}", target.name, dst_dir_fd=target.parent, follow_symlinks=True)

    def rename(self, old: bytes, new: bytes, *, replace: bool) -> None:
        with self._named(old) as source, self._named(new) as target:
            self.require(source, "write")
            self.require(target, "write")
            if not source.exists:
                raise OSError(errno.ENOENT, "missing")
            self._require_known(source.real)
            if target.exists and not replace:
                raise OSError(errno.EEXIST, "exists")
            if target.is_folder and not (source.is_folder and target.is_empty):
                raise OSError(errno.ENOTEMPTY if source.is_folder else errno.EISDIR, "folder")
            if source.is_folder:
                self._record_tree(source, target)
            else:
                if source.is_link:
                    self._leads_within(target.real, os.readlink(b"", dir_fd=source.descriptor))
                self._record(("move", source.real), ("replace" if target.exists else "create", target.real))
            with self._changing(source, target):
                if target.exists:
                    os.rename(source.name, target.name, src_dir_fd=source.parent, dst_dir_fd=target.parent)
                else:
                    kernel.rename_to_new((source.parent, source.name), (target.parent, target.name))
            self._moved(source, target)

    @contextlib.contextmanager
    def _changing(self, *targets: Resolved) -> Iterator[None]:
        """Names that are where they were decided on: no other call changes what they lie in meanwhile. Raises OSError."""
        with self.walks.changing(*(target.real for target in targets)):
            for target in targets:
                if target.parent >= 0 and not is_called(target.parent, os.path.dirname(target.real)):
                    raise OSError(errno.EAGAIN, "moved meanwhile")
            yield

    def _require_known(self, path: bytes) -> None:
        """By another name, it could be read where this one may not be: only what may be read, or is its own, gets one."""
        if not (self.access.may_read(path) or path in self._made):
            self.deny(path, "no scope to read it, which another name would do")
            raise OSError(errno.EACCES, "unread")

    def _record_tree(self, source: Resolved, target: Resolved) -> None:
        """Every path of a folder that is moved goes, and comes at the other place. All must be within the scopes."""
        going: list[bytes] = []
        own = self.access.absent | self.access.protected
        for path, which in _tree(source):
            going.append(path)
            inside = self.access.may_write(path) and self.access.may_write(target.real + path[len(source.real) :])
            inside = inside and which not in own
            if not inside or len(going) > _TREE_LIMIT:
                why = "something in it is outside the scopes" if not inside else f"more than {_TREE_LIMIT} entries"
                self.deny(source.real, f"can't be moved: {why}")
                raise OSError(errno.EACCES if not inside else errno.EPERM, "tree")
            self._require_known(path)
            if os.path.islink(path):
                self._leads_within(target.real + path[len(source.real) :], os.readlink(path))
        coming = [target.real + path[len(source.real) :] for path in going]
        self._record(*(("move", path) for path in going), *(("create", path) for path in coming))

    def _new(self, path: bytes) -> Resolved:
        """Something that is not there yet, and may be made."""
        target = self._named(path)
        try:
            if target.exists:
                self.require(target, "see")
                raise OSError(errno.EEXIST, "exists")
            self.require(target, "write")
        except OSError:
            target.__exit__()
            raise
        return target

    # -- changes of what is there

    def truncate(self, path: bytes, length: int) -> None:
        with self._to_change(path) as target:
            self._fit_to_open(target, changes=True)
            if length > max(self.largest, target.status.st_size):  # as RLIMIT_FSIZE has it for what the worker does itself
                raise OSError(errno.EFBIG, "length")
            self._record(("write", target.real))
            self._grown.setdefault(target.real, _room(target.status))
            os.truncate(f"/proc/self/fd/{target.descriptor}", length)

    def change_mode(self, path: bytes, mode: int) -> None:
        """Never set-uid, set-gid or sticky, but for what a directory has of those already: chmod(1) asks to leave them."""
        with self._to_change(path) as target:
            self._record(("write", target.real))
            kept = target.status.st_mode & mode & (stat.S_ISGID | stat.S_ISVTX) if target.is_folder else 0
            os.chmod(f"/proc/self/fd/{target.descriptor}", mode & 0o777 | kept)

    def change_owner(self, path: bytes, owner: int, group: int, *, follow: bool) -> None:
        """To what they are already: a worker has no privilege to give files away."""
        with self._to_change(path, follow=follow) as target:
            status = target.status
            if owner not in (-1, status.st_uid) or group not in (-1, status.st_gid):
                self.deny(target.real, "its owner can't be changed")
                raise OSError(errno.EPERM, "owner")

    def change_times(self, path: bytes, times: tuple[int | None, int | None], *, follow: bool) -> None:
        """`times` are access and modification in nanoseconds; None leaves one as it is."""
        with self._to_change(path, follow=follow) as target:
            self._record(("write", target.real))
            accessed = times[0] if times[0] is not None else target.status.st_atime_ns
            modified = times[1] if times[1] is not None else target.status.st_mtime_ns
            os.utime(f"/proc/self/fd/{target.descriptor}", ns=(accessed, modified))

    def _to_change(self, path: bytes, *, follow: bool = True) -> Resolved:
        """Something whose own state may be changed: it has no name but this one."""
        target = self.existing(path, "write", follow=follow)
        try:
            self._only_name(target)
        except OSError:
            target.__exit__()
            raise
        return target

    # -- extended attributes: those of users only, as nothing else is a tool's business

    def attribute(self, path: bytes, name: bytes, *, follow: bool) -> bytes:
        with self.existing(path, "read", follow=follow) as target:
            return os.getxattr(f"/proc/self/fd/{target.descriptor}", _user(name)) if not target.is_link else _none()

    def attributes(self, path: bytes, *, follow: bool) -> bytes:
        with self.existing(path, "read", follow=follow) as target:
            if target.is_link:
                return b""
            names = os.listxattr(f"/proc/self/fd/{target.descriptor}")
            return b"".join(os.fsencode(name) + b"\0" for name in names if name.startswith("user."))

    def set_attribute(self, path: bytes, name: bytes, value: bytes | None, flags: int, *, follow: bool) -> None:
        """`value` None removes it."""
        with self._to_change(path, follow=follow) as target:
            if target.is_link:
                raise OSError(errno.EPERM, "link")
            self._record(("write", target.real))
            place = f"/proc/self/fd/{target.descriptor}"
            if value is None:
                os.removexattr(place, _user(name))
            else:
                os.setxattr(place, _user(name), value, flags)


def _room(status: os.stat_result) -> int:
    return max(status.st_size, status.st_blocks * 512)


def _open_device(target: Resolved, flags: int) -> int:
    """To be read and written, nothing else: what it is called and who may use it is no call's to change.

    A serial line may keep an open(2) waiting for its other end, and make itself the terminal of who opens it.
    """
    opened = reopen(target.descriptor, flags & (os.O_ACCMODE | os.O_APPEND) | os.O_NONBLOCK | os.O_NOCTTY)
    os.set_blocking(opened, not flags & os.O_NONBLOCK)
    return opened


def _user(name: bytes) -> bytes:
    if not name.startswith(b"user."):
        raise OSError(errno.EOPNOTSUPP, "attribute")
    return name


def _none() -> bytes:
    raise OSError(errno.ENODATA, "attribute")


def _raise(error: OSError) -> None:
    """What can't be looked through can't be recorded: moving it would lose it."""
    raise error


def _tree(top: Resolved) -> Iterator[tuple[bytes, Identity]]:
    """All paths of a folder with what is there, itself first. Follows no link."""
    yield top.real, identity(top.status)
    for folder, folders, names, here in os.fwalk(b".", onerror=_raise, follow_symlinks=False, dir_fd=top.descriptor):
        for name in (*folders, *names):
            yield top.real + folder[1:] + b"/" + name, identity(os.stat(name, dir_fd=here, follow_symlinks=False))
