"""Level 1, inside the worker: Python's file functions ask the broker by message, as the kernel can't hand calls over.

What the filter refuses stays refused, whatever a tool does to these functions; they only make the ordinary ones work. An
answer is an errno or a descriptor (SCM_RIGHTS); what the caller wanted to know is read from that.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from agentd_sandbox import kernel
from agentd_sandbox.filters import profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

LENGTH = struct.Struct("=I")
STATUS = (
    *("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime", "st_mtime", "st_ctime"),
    *("st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)
"""The fields of os.stat_result in its order, then those that come by name."""
_DIRENT = struct.Struct("=QqHB")  # struct linux_dirent64: inode, offset, length of this entry, kind, name
_FOLDER, _FILE, _LINK = 4, 8, 10  # DT_DIR, DT_REG, DT_LNK


class _Asking:
    """One connection to the broker. Not for several threads at a time: level 1 is for simple tools."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def ask(self, call: str, path: Any = "", **arguments: Any) -> int:
        """A descriptor, or -1 where there is none to give. Raises OSError as the system call would."""
        spelled = os.fspath(path) if path != "" else ""
        text = spelled if isinstance(spelled, bytes) else os.fsencode(spelled)
        body = json.dumps({"call": call, "path": text.decode("latin-1"), **arguments}).encode()
        self._connection.sendall(LENGTH.pack(len(body)) + body)
        data, descriptors, _flags, _address = socket.recv_fds(self._connection, LENGTH.size, 1)
        (code,) = LENGTH.unpack(data)
        if code:
            raise OSError(code, os.strerror(code), path or None)
        return descriptors[0] if descriptors else -1

    def look(self, read: Callable[[int], Any], call: str, path: Any, **arguments: Any) -> Any:
        descriptor = self.ask(call, path, **arguments)
        try:
            return read(descriptor)
        finally:
            os.close(descriptor)


def install(connection: socket.socket) -> None:
    """Replace the functions of `os`, `io` and `socket` that take a path or an address. For good."""
    asking = _Asking(connection)
    _replace_opening(asking)
    _replace_looking(asking)
    _replace_listing(asking)
    _replace_changing(asking)

    def create_connection(address: tuple[str, int], timeout: Any = None, *_: Any, **__: Any) -> socket.socket:
        made = socket.socket(fileno=asking.ask("connect", host=address[0], port=address[1]))
        if isinstance(timeout, int | float):
            made.settimeout(timeout)
        return made

    _put(socket, create_connection=create_connection)


def _replace_opening(asking: _Asking) -> None:
    kept_open: Callable[..., Any] = io.open

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        _no_folder(dir_fd)
        return asking.ask("open", path, flags=flags, mode=mode)

    def open_file(file: Any, mode: str = "r", *args: Any, opener: Any = None, **kwargs: Any) -> Any:
        if isinstance(file, int):
            return kept_open(file, mode, *args, **kwargs)
        return kept_open(file, mode, *args, opener=opener or (lambda path, flags: open_(path, flags, 0o666)), **kwargs)

    _put(os, open=open_)
    _put(io, open=open_file)
    _put(builtins, open=open_file)


def _replace_looking(asking: _Asking) -> None:
    def stat(path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        _no_folder(dir_fd)
        if isinstance(path, int):
            return os.fstat(path)
        told = json.loads(asking.look(lambda descriptor: os.read(descriptor, 4096), "look", path, follow=follow_symlinks))
        named = dict(zip(STATUS, told, strict=True))
        return os.stat_result(told[:10], {name: value for name, value in named.items() if name.endswith("_ns")})

    def access(path: Any, mode: int, **_: Any) -> bool:
        try:
            asking.ask("access", path, mode=mode)
        except OSError:
            return False
        return True

    def readlink(path: Any, *, dir_fd: int | None = None) -> Any:
        _no_folder(dir_fd)
        text = asking.look(lambda descriptor: os.read(descriptor, 4096), "readlink", path)
        return text if isinstance(os.fspath(path), bytes) else os.fsdecode(text)

    _put(os, stat=stat, lstat=lambda path, **_: stat(path, follow_symlinks=False), access=access, readlink=readlink)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An os.DirEntry, as far as tools use one."""

    name: str
    path: str
    kind: int

    def is_symlink(self) -> bool:
        return self.kind == _LINK

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.kind == _FOLDER or (self.kind == _LINK and follow_symlinks and os.path.isdir(self.path))

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self.kind == _FILE or (self.kind == _LINK and follow_symlinks and os.path.isfile(self.path))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat(self.path, follow_symlinks=follow_symlinks)

    def __fspath__(self) -> str:
        return self.path


def _replace_listing(asking: _Asking) -> None:
    kept_statvfs = os.statvfs

    def entries(path: Any) -> Iterator[_Entry]:
        text = os.fsdecode(os.fspath(path))
        for kind, name in asking.look(_list, "open", path, flags=os.O_DIRECTORY, mode=0):
            yield _Entry(os.fsdecode(name), os.path.join(text, os.fsdecode(name)), kind)

    def listdir(path: Any = ".") -> list[Any]:
        names = [entry.name for entry in entries(path)]
        return [os.fsencode(name) for name in names] if isinstance(os.fspath(path), bytes) else names

    def scandir(path: Any = ".") -> Any:
        return _Scan(list(entries(path)))

    def statvfs(path: Any) -> os.statvfs_result:
        if isinstance(path, int):
            return kept_statvfs(path)
        found: os.statvfs_result = asking.look(kept_statvfs, "statfs", path)
        return found

    _put(os, listdir=listdir, scandir=scandir, statvfs=statvfs)


class _Scan:
    """What os.scandir gives back: to be iterated over, in a with statement or not."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[_Entry]:
        return self._entries

    def __next__(self) -> _Entry:
        return next(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries = iter(())


def _list(descriptor: int) -> list[tuple[int, bytes]]:
    """Kind and name of all that is in a folder, by getdents64(2): the C library would stat the descriptor by name."""
    found: list[tuple[int, bytes]] = []
    number = ctypes.c_long(profile().numbers["getdents64"])
    buffer = ctypes.create_string_buffer(1 << 15)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    while size := kernel.check(call(number, ctypes.c_long(descriptor), buffer, ctypes.c_long(len(buffer))), "getdents64"):
        data, at = buffer.raw[:size], 0
        while at < size:
            _inode, _offset, length, kind = _DIRENT.unpack_from(data, at)
            name = data[at + _DIRENT.size : at + length].split(b"\0", 1)[0]
            if name not in (b".", b".."):
                found.append((kind, name))
            at += length
    return found


def _replace_changing(asking: _Asking) -> None:
    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        _no_folder(dir_fd)
        asking.ask("mkdir", path, mode=mode)

    def remove(path: Any, *, dir_fd: int | None = None) -> None:
        _no_folder(dir_fd)
        asking.ask("unlink", path)

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        _no_folder(dir_fd)
        asking.ask("rmdir", path)

    def rename(src: Any, dst: Any, **_: Any) -> None:
        asking.ask("rename", src, new=os.fsencode(dst).decode("latin-1"))

    def truncate(path: Any, length: int) -> None:
        if isinstance(path, int):
            os.ftruncate(path, length)
        else:
            asking.ask("truncate", path, length=length)

    def chmod(path: Any, mode: int, **_: Any) -> None:
        asking.ask("chmod", path, mode=mode)

    _put(os, mkdir=mkdir, rmdir=rmdir, rename=rename, replace=rename)
    _put(os, unlink=remove, remove=remove, truncate=truncate, chmod=chmod)


def _put(module: ModuleType, **functions: Callable[..., Any]) -> None:
    for name, function in functions.items():
        setattr(module, name, function)


def _no_folder(descriptor: int | None) -> None:
    if descriptor is not None:
        raise OSError(errno.ENOSYS, "relative to a descriptor: not on this kernel")
