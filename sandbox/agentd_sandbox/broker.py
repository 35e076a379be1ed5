"""The broker: does the path calls of one worker, from its own copies of the arguments.

Never lets the kernel re-read memory that the worker could still change: strings are read once, the path is
walked, the decision is made on the real path, and the result is a descriptor or bytes that the broker puts in
place. Before the first change of a path the recorder makes its former state durable.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from agentd_sandbox import kernel, network
from agentd_sandbox.filters import profile
from agentd_sandbox.paths import Resolved, WalkError, resolve
from agentd_sandbox.target import AT_FDCWD, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd_sandbox.access import Access
    from agentd_sandbox.target import Target

_O_TMPFILE = 0o20000000
_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECTORY | os.O_SYNC | os.O_DSYNC
_UMASK = 0o022
_DEVICES = frozenset({b"/dev/null", b"/dev/zero", b"/dev/urandom", b"/dev/random"})
_NULL = b"/dev/null"
_RECORDED_DENIALS = 32


class Refusal(Exception):
    """A recorder's no: the change is not made and the worker gets `errno`."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.errno = code


@dataclass(frozen=True, slots=True)
class Change:
    """A change about to be made to the real path `path`, named `name` in the open folder `parent`."""

    operation: str
    path: bytes
    parent: int
    name: bytes


class Recorder(Protocol):
    """Makes the former state of a path durable before it is changed."""

    def before_change(self, change: Change) -> None:
        """Return once the state is on disk; raise Refusal if it can't be kept."""


@dataclass(frozen=True, slots=True)
class Denial:
    """A call that was refused, with the path or peer it named."""

    call: str
    target: str
    why: str


class _Answered(Exception):
    """The notification has been answered by injecting a descriptor."""


@dataclass(slots=True)
class Broker:
    """Answers the notifications of one worker."""

    listener: int
    target: Target
    access: Access
    recorder: Recorder
    deadline: float
    """monotonic(3) time past which nothing may block any more"""
    denials: list[Denial] = field(default_factory=list)
    denied: int = 0
    calls: int = 0
    peers: list[tuple[str, int]] = field(default_factory=list)
    _handlers: dict[str, Callable[[kernel.Notification], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._handlers = {name: getattr(self, f"_{name}") for name in profile().numbers if hasattr(self, f"_{name}")}

    def serve_one(self) -> None:
        """Answer one waiting call. A call that is gone before its answer is no error."""
        try:
            call = kernel.receive(self.listener)
        except OSError:
            return
        self.calls += 1
        name = profile().names.get(call.number, str(call.number))
        try:
            value, code = self._handlers[name](call), 0
        except _Answered:
            return
        except Refusal as e:
            self._deny(name, "", str(e))
            value, code = 0, e.errno
        except OSError as e:
            value, code = 0, e.errno or errno.EIO
        except (OverflowError, struct.error):  # a number or an address that no kernel call takes
            value, code = 0, errno.EINVAL
        try:
            kernel.answer(self.listener, call.id, value, code)
        except OSError:
            return

    def _deny(self, call: str, target: str, why: str) -> None:
        self.denied += 1
        if len(self.denials) < _RECORDED_DENIALS:
            self.denials.append(Denial(call, target, why))

    def _poke(self, call: kernel.Notification, address: int, data: bytes) -> None:
        if not kernel.still_waiting(self.listener, call.id):
            raise OSError(errno.EINTR, "gone")
        self.target.write(address, data)

    # -- from a path in the worker's memory to a real path that this call may see

    def _locate(self, call: kernel.Notification, descriptor: int, address: int, *, follow: bool) -> Resolved:
        path = self.target.string(address)
        if not path:
            raise OSError(errno.ENOENT, "empty path")
        full = path if path.startswith(b"/") else self.target.base(descriptor) + b"/" + path
        try:
            return resolve(full, follow=follow)
        except WalkError as e:
            if self.access.may_see(e.reached):
                raise
            self._deny(_name(call), os.fsdecode(full), "outside the call's scopes")
            raise OSError(errno.ENOENT, "hidden") from None

    def _require(self, call: kernel.Notification, target: Resolved, right: str) -> None:
        """`right` is see, read or write. What is hidden does not exist; what is seen but not granted is refused."""
        real, access = target.real, self.access
        allowed = {"see": access.may_see, "read": access.may_read, "write": access.may_write}[right]
        if allowed(real):
            return
        if real in _DEVICES and right != "write":
            return
        self._deny(_name(call), os.fsdecode(real), f"no scope to {right} it")
        raise OSError(errno.EACCES if access.may_see(real) and target.exists else errno.ENOENT, "denied")

    def _before(self, operation: str, target: Resolved) -> None:
        if target.real not in _DEVICES:
            self.recorder.before_change(Change(operation, target.real, target.parent, target.name))

    # -- open family

    def _open_at(self, call: kernel.Notification, descriptor: int, path: int, flags: int, mode: int) -> int:
        if flags & _O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "O_TMPFILE")
        if flags & os.O_PATH:
            raise OSError(errno.EACCES, "O_PATH")
        exclusive = flags & os.O_CREAT and flags & os.O_EXCL
        with self._locate(call, descriptor, path, follow=not (flags & os.O_NOFOLLOW or exclusive)) as target:
            opened = self._open_existing(call, target, flags) if target.exists else self._create(call, target, flags, mode)
            try:
                kernel.inject(self.listener, call.id, opened, close_on_exec=bool(flags & os.O_CLOEXEC))
            finally:
                os.close(opened)
        raise _Answered

    def _create(self, call: kernel.Notification, target: Resolved, flags: int, mode: int) -> int:
        if not flags & os.O_CREAT:
            self._require(call, target, "see")
            raise OSError(errno.ENOENT, "missing")
        self._require(call, target, "write")
        if target.trailing_slash:
            raise OSError(errno.EISDIR, "folder")
        self._before("create", target)
        exact = flags & _KEPT_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(target.name, exact, mode & 0o777 & ~_UMASK, dir_fd=target.parent)

    def _open_existing(self, call: kernel.Notification, target: Resolved, flags: int) -> int:
        changes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if flags & os.O_ACCMODE != os.O_WRONLY:
            self._require(call, target, "read")
        if changes and target.real != _NULL:  # to be written to, not to be removed or replaced
            self._require(call, target, "write")
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise OSError(errno.EEXIST, "exists")
        self._fit_to_open(call, target, changes=changes)
        if changes:
            self._before("write", target)
        # Through the O_PATH descriptor: this very inode, whatever its name now leads to.
        opened = os.open(f"/proc/self/fd/{target.descriptor}", flags & _KEPT_FLAGS | os.O_CLOEXEC)
        if flags & os.O_TRUNC and target.real not in _DEVICES:
            os.ftruncate(opened, 0)
        return opened

    def _fit_to_open(self, call: kernel.Notification, target: Resolved, *, changes: bool) -> None:
        """Files and folders only: a FIFO would block the broker, a device reaches beyond files."""
        status = os.fstat(target.descriptor)
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, "link")
        if stat.S_ISDIR(status.st_mode):
            if changes:
                raise OSError(errno.EISDIR, "folder")
        elif not stat.S_ISREG(status.st_mode):
            if target.real not in _DEVICES:
                self._deny(_name(call), os.fsdecode(target.real), "neither a file nor a folder")
                raise OSError(errno.EACCES, "special")
        elif changes and status.st_nlink > 1:
            # Another name of this file may lie outside the scopes.
            self._deny(_name(call), os.fsdecode(target.real), "has more than one hard link")
            raise OSError(errno.EMLINK, "links")

    def _openat(self, call: kernel.Notification) -> int:
        descriptor, path, flags, mode, *_ = call.arguments
        return self._open_at(call, descriptor, path, flags & 0xFFFF_FFFF, mode)

    def _open(self, call: kernel.Notification) -> int:
        path, flags, mode, *_ = call.arguments
        return self._open_at(call, AT_FDCWD, path, flags & 0xFFFF_FFFF, mode)

    def _creat(self, call: kernel.Notification) -> int:
        path, mode, *_ = call.arguments
        return self._open_at(call, AT_FDCWD, path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)

    # -- what a path is

    def _stat_at(self, call: kernel.Notification, descriptor: int, path: int, buffer: int, flags: int) -> int:
        if flags & kernel.AT_EMPTY_PATH and not self.target.string(path):
            if signed(descriptor) == AT_FDCWD:
                raise OSError(errno.EINVAL, "working folder")
            own = self.target.take(descriptor)
            try:
                data = kernel.raw_stat(own)
            finally:
                os.close(own)
        else:
            with self._locate(call, descriptor, path, follow=not flags & kernel.AT_SYMLINK_NOFOLLOW) as target:
                self._seen(call, target)
                data = kernel.raw_stat(target.descriptor)
        self._poke(call, buffer, data)
        return 0

    def _seen(self, call: kernel.Notification, target: Resolved) -> None:
        self._require(call, target, "see")
        if not target.exists:
            raise OSError(errno.ENOENT, "missing")

    def _newfstatat(self, call: kernel.Notification) -> int:
        descriptor, path, buffer, flags, *_ = call.arguments
        return self._stat_at(call, descriptor, path, buffer, flags & 0xFFFF_FFFF)

    def _stat(self, call: kernel.Notification) -> int:
        return self._stat_at(call, AT_FDCWD, call.arguments[0], call.arguments[1], 0)

    def _lstat(self, call: kernel.Notification) -> int:
        return self._stat_at(call, AT_FDCWD, call.arguments[0], call.arguments[1], kernel.AT_SYMLINK_NOFOLLOW)

    def _access_at(self, call: kernel.Notification, descriptor: int, path: int, mode: int) -> int:
        with self._locate(call, descriptor, path, follow=True) as target:
            self._seen(call, target)
            if mode & os.R_OK:
                self._require(call, target, "read")
            if mode & os.W_OK:
                self._require(call, target, "write")
            if not os.access(f"/proc/self/fd/{target.descriptor}", mode):
                raise OSError(errno.EACCES, "mode")
        return 0

    def _faccessat(self, call: kernel.Notification) -> int:
        descriptor, path, mode, *_ = call.arguments
        return self._access_at(call, descriptor, path, mode & 7)

    def _access(self, call: kernel.Notification) -> int:
        return self._access_at(call, AT_FDCWD, call.arguments[0], call.arguments[1] & 7)

    def _readlink_at(self, call: kernel.Notification, descriptor: int, path: int, buffer: int, size: int) -> int:
        with self._locate(call, descriptor, path, follow=False) as target:
            self._seen(call, target)
            if not stat.S_ISLNK(os.fstat(target.descriptor).st_mode):
                raise OSError(errno.EINVAL, "no link")
            self._require(call, target, "read")
            text = os.readlink(b"", dir_fd=target.descriptor)[:size]
        self._poke(call, buffer, text)
        return len(text)

    def _readlinkat(self, call: kernel.Notification) -> int:
        descriptor, path, buffer, size, *_ = call.arguments
        return self._readlink_at(call, descriptor, path, buffer, size)

    def _readlink(self, call: kernel.Notification) -> int:
        path, buffer, size, *_ = call.arguments
        return self._readlink_at(call, AT_FDCWD, path, buffer, size)

    def _statfs(self, call: kernel.Notification) -> int:
        """Sizes of a file system; the working folder's may always be asked for."""
        path, buffer, *_ = call.arguments
        with self._locate(call, AT_FDCWD, path, follow=True) as target:
            if target.real != self.target.folder:
                self._seen(call, target)
            data = kernel.raw_statfs(target.descriptor)
        self._poke(call, buffer, data)
        return 0

    # -- changes

    def _truncate(self, call: kernel.Notification) -> int:
        path, length, *_ = call.arguments
        with self._locate(call, AT_FDCWD, path, follow=True) as target:
            self._require(call, target, "write")
            if not target.exists:
                raise OSError(errno.ENOENT, "missing")
            self._fit_to_open(call, target, changes=True)
            self._before("write", target)
            os.truncate(f"/proc/self/fd/{target.descriptor}", length)
        return 0

    def _remove(self, call: kernel.Notification, descriptor: int, path: int, *, folder: bool) -> int:
        with self._locate(call, descriptor, path, follow=False) as target:
            self._require(call, target, "write")
            if not target.exists:
                raise OSError(errno.ENOENT, "missing")
            if target.is_folder != folder:
                raise OSError(errno.ENOTDIR if folder else errno.EISDIR, "kind")
            if folder and not target.is_empty:
                raise OSError(errno.ENOTEMPTY, "not empty")
            self._before("remove", target)
            (os.rmdir if folder else os.unlink)(target.name, dir_fd=target.parent)
        return 0

    def _unlinkat(self, call: kernel.Notification) -> int:
        descriptor, path, flags, *_ = call.arguments
        return self._remove(call, descriptor, path, folder=bool(flags & kernel.AT_REMOVEDIR))

    def _unlink(self, call: kernel.Notification) -> int:
        return self._remove(call, AT_FDCWD, call.arguments[0], folder=False)

    def _rmdir(self, call: kernel.Notification) -> int:
        return self._remove(call, AT_FDCWD, call.arguments[0], folder=True)

    def _mkdir_at(self, call: kernel.Notification, descriptor: int, path: int, mode: int) -> int:
        with self._locate(call, descriptor, path, follow=False) as target:
            if target.exists:
                self._require(call, target, "see")
                raise OSError(errno.EEXIST, "exists")
            self._require(call, target, "write")
            self._before("create", target)
            os.mkdir(target.name, mode & 0o777 & ~_UMASK, dir_fd=target.parent)
        return 0

    def _mkdirat(self, call: kernel.Notification) -> int:
        descriptor, path, mode, *_ = call.arguments
        return self._mkdir_at(call, descriptor, path, mode)

    def _mkdir(self, call: kernel.Notification) -> int:
        return self._mkdir_at(call, AT_FDCWD, call.arguments[0], call.arguments[1])

    def _rename_at(self, call: kernel.Notification, old: tuple[int, int], new: tuple[int, int]) -> int:
        with self._locate(call, *old, follow=False) as source, self._locate(call, *new, follow=False) as target:
            self._require(call, source, "write")
            self._require(call, target, "write")
            if not source.exists:
                raise OSError(errno.ENOENT, "missing")
            for side in (source, target):
                if side.is_folder:
                    self._deny(_name(call), os.fsdecode(side.real), "moving a folder is not mediated")
                    raise OSError(errno.EPERM, "folder")
            self._before("remove", source)
            self._before("write" if target.exists else "create", target)
            os.rename(source.name, target.name, src_dir_fd=source.parent, dst_dir_fd=target.parent)
        return 0

    def _renameat2(self, call: kernel.Notification) -> int:
        old_folder, old, new_folder, new, flags, *_ = call.arguments
        if flags & 0xFFFF_FFFF:
            raise OSError(errno.EINVAL, "flags")
        return self._rename_at(call, (old_folder, old), (new_folder, new))

    def _renameat(self, call: kernel.Notification) -> int:
        old_folder, old, new_folder, new, *_ = call.arguments
        return self._rename_at(call, (old_folder, old), (new_folder, new))

    def _rename(self, call: kernel.Notification) -> int:
        return self._rename_at(call, (AT_FDCWD, call.arguments[0]), (AT_FDCWD, call.arguments[1]))

    # -- network

    def _connect(self, call: kernel.Notification) -> int:
        descriptor, address, size, *_ = call.arguments
        if not 2 <= size <= network.ADDRESS_BYTES:
            raise OSError(errno.EINVAL, "address")
        peer = network.peer(self.target.read(address, size))
        if peer not in self.access.connect:
            self._deny("connect", f"{peer[0]}:{peer[1]}", "no scope to connect to it")
            raise OSError(errno.EACCES, "peer")
        own = self.target.take(descriptor)
        self.peers.append(peer)
        network.connect(own, peer, self.deadline)
        return 0


def _name(call: kernel.Notification) -> str:
    return profile().names.get(call.number, str(call.number))
