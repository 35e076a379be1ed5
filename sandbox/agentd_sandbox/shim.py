"""Level 1, inside the worker: Python's file functions ask the broker by message, as the kernel can't hand calls over.

What the filter refuses stays refused, whatever a tool does to these functions; they only make the ordinary ones work. An
answer is an errno or a descriptor (SCM_RIGHTS); what the caller wanted to know is read from that.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

LENGTH = struct.Struct("=I")


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
        found: os.stat_result = asking.look(os.fstat, "look", path, follow=follow_symlinks)
        return found

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


def _replace_listing(asking: _Asking) -> None:
    kept_listdir, kept_scandir, kept_statvfs = os.listdir, os.scandir, os.statvfs

    def listdir(path: Any = ".") -> list[Any]:
        if isinstance(path, int):
            return kept_listdir(path)
        names: list[str] = asking.look(kept_listdir, "open", path, flags=os.O_DIRECTORY, mode=0)
        return [os.fsencode(name) for name in names] if isinstance(os.fspath(path), bytes) else names

    def scandir(path: Any = ".") -> Any:
        return kept_scandir(path if isinstance(path, int) else asking.ask("open", path, flags=os.O_DIRECTORY, mode=0))

    def statvfs(path: Any) -> os.statvfs_result:
        if isinstance(path, int):
            return kept_statvfs(path)
        found: os.statvfs_result = asking.look(kept_statvfs, "statfs", path)
        return found

    _put(os, listdir=listdir, scandir=scandir, statvfs=statvfs)


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
