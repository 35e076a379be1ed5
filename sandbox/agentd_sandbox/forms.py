"""Every mediated system call with its form: how its six registers are laid out, and what the broker does with them.

One line for each, from its manual page. `b` is the broker, `c` the notification; paths are (folder, address) pairs.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.filters import profile
from agentd_sandbox.processes import AT_FDCWD as CWD
from agentd_sandbox.processes import signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd_sandbox.broker import Broker
    from agentd_sandbox.kernel import Notification

    Form = Callable[..., int | None]

_UTIME_NOW, _UTIME_OMIT = 0x3FFF_FFFF, 0x3FFF_FFFE
_CREAT = os.O_CREAT | os.O_WRONLY | os.O_TRUNC


def _done(_: None) -> int:
    """What gives nothing back but success."""
    return 0


def _followed(flags: int) -> bool:
    return not flags & kernel.AT_SYMLINK_NOFOLLOW


def _rename(b: Broker, c: Notification, old: tuple[int, int], new: tuple[int, int], flags: int = 0) -> int:
    flags &= 0xFFFF_FFFF
    if flags not in (0, kernel.RENAME_NOREPLACE):
        raise ValueError("flags")
    b.files.rename(b.path(c, *old), b.path(c, *new), replace=not flags)
    return 0


def _times(b: Broker, c: Notification, address: int, *, unit: int, wide: bool | None = None) -> tuple[int | None, int | None]:
    """Two times in whole seconds and `unit` nanoseconds behind `address`: now for both where it is NULL."""
    if not address:
        return time.time_ns(), time.time_ns()
    layout = struct.Struct("=qqqq" if wide or profile().architecture != "arm" else "=iiii")
    seconds = layout.unpack(b.processes.read(c.thread, address, layout.size))
    special = {_UTIME_NOW: time.time_ns(), _UTIME_OMIT: None} if unit == 1 else {}
    first, second = ((special.get(part, whole * 10**9 + part * unit)) for whole, part in (seconds[:2], seconds[2:]))
    return first, second


def _old_times(b: Broker, c: Notification, address: int) -> tuple[int, int]:
    """utime(2): two whole seconds."""
    if not address:
        return time.time_ns(), time.time_ns()
    layout = struct.Struct("=qq" if profile().architecture != "arm" else "=ii")
    first, second = layout.unpack(b.processes.read(c.thread, address, layout.size))
    return first * 10**9, second * 10**9


def _utimensat(b: Broker, c: Notification, at: tuple[int, int], address: int, flags: int, *, wide: bool | None = None) -> int:
    """With no path at all the times of an open descriptor."""
    place = b.path(c, *at) if at[1] else b.place_of(c, at[0])
    times = _times(b, c, address, unit=1, wide=wide)
    b.files.change_times(place, times, follow=_followed(flags))
    return 0


def _range(arguments: tuple[int, ...]) -> tuple[int, int]:
    """Offset and length of fallocate(2): on 32-bit arm two registers each, the lower half first (syscall(2))."""
    if profile().architecture == "arm":
        low, high = (arguments[2], arguments[4]), (arguments[3], arguments[5])
        offset, length = ((upper & 0xFFFF_FFFF) << 32 | lower & 0xFFFF_FFFF for lower, upper in zip(low, high, strict=True))
        return offset, length
    return arguments[2], arguments[3]


FORMS: dict[str, Form] = {
    "open": lambda b, c, path, flags, mode, *_: b.open(c, b.path(c, CWD, path), flags, mode),
    "openat": lambda b, c, at, path, flags, mode, *_: b.open(c, b.path(c, at, path), flags, mode),
    "creat": lambda b, c, path, mode, *_: b.open(c, b.path(c, CWD, path), _CREAT, mode),
    "stat": lambda b, c, path, buffer, *_: b.status(c, b.path(c, CWD, path), buffer, follow=True),
    "lstat": lambda b, c, path, buffer, *_: b.status(c, b.path(c, CWD, path), buffer, follow=False),
    "newfstatat": lambda b, c, at, path, buffer, flags, *_: b.status_at(c, at, path, buffer, flags),
    "access": lambda b, c, path, mode, *_: _done(b.files.may(b.path(c, CWD, path), mode & 7)),
    "faccessat": lambda b, c, at, path, mode, *_: _done(b.files.may(b.path(c, at, path), mode & 7)),
    "readlink": lambda b, c, path, buffer, size, *_: b.link_text(c, b.path(c, CWD, path), buffer, size),
    "readlinkat": lambda b, c, at, path, buffer, size, *_: b.link_text(c, b.path(c, at, path), buffer, size),
    "statfs": lambda b, c, path, buffer, *_: b.file_system(c, path, buffer),
    "statfs64": lambda b, c, path, _size, buffer, *_: b.file_system(c, path, buffer),
    "unlink": lambda b, c, path, *_: _done(b.files.remove(b.path(c, CWD, path), folder=False)),
    "rmdir": lambda b, c, path, *_: _done(b.files.remove(b.path(c, CWD, path), folder=True)),
    "unlinkat": lambda b, c, at, path, flags, *_: _done(
        b.files.remove(b.path(c, at, path), folder=bool(flags & kernel.AT_REMOVEDIR))
    ),
    "mkdir": lambda b, c, path, mode, *_: _done(b.files.make_folder(b.path(c, CWD, path), mode & ~b.umask(c))),
    "mkdirat": lambda b, c, at, path, mode, *_: _done(b.files.make_folder(b.path(c, at, path), mode & ~b.umask(c))),
    "rename": lambda b, c, old, new, *_: _rename(b, c, (CWD, old), (CWD, new)),
    "renameat": lambda b, c, old_at, old, new_at, new, *_: _rename(b, c, (old_at, old), (new_at, new)),
    "renameat2": lambda b, c, old_at, old, new_at, new, flags, *_: _rename(b, c, (old_at, old), (new_at, new), flags),
    "link": lambda b, c, old, new, *_: _done(b.files.make_name(b.path(c, CWD, old), b.path(c, CWD, new), follow=False)),
    "linkat": lambda b, c, old_at, old, new_at, new, flags, *_: _done(
        b.files.make_name(b.path(c, old_at, old), b.path(c, new_at, new), follow=bool(flags & kernel.AT_SYMLINK_FOLLOW))
    ),
    "symlink": lambda b, c, text, path, *_: _done(b.files.make_link(b.string(c, text), b.path(c, CWD, path))),
    "symlinkat": lambda b, c, text, at, path, *_: _done(b.files.make_link(b.string(c, text), b.path(c, at, path))),
    "truncate": lambda b, c, path, length, *_: _done(b.files.truncate(b.path(c, CWD, path), length)),
    # On 32-bit arm a 64-bit length takes an even pair of registers, the lower half first (syscall(2)).
    "truncate64": lambda b, c, path, _, low, high, *__: _done(
        b.files.truncate(b.path(c, CWD, path), (high & 0xFFFF_FFFF) << 32 | low & 0xFFFF_FFFF)
    ),
    "chmod": lambda b, c, path, mode, *_: _done(b.files.change_mode(b.path(c, CWD, path), mode)),
    "fchmod": lambda b, c, number, mode, *_: _done(b.files.change_mode(b.place_of(c, number), mode)),
    "fchmodat": lambda b, c, at, path, mode, *_: _done(b.files.change_mode(b.path(c, at, path), mode)),
    "chown": lambda b, c, path, owner, group, *_: _done(b.owner_at(c, CWD, path, owner, group, 0)),
    "lchown": lambda b, c, path, owner, group, *_: _done(b.owner_at(c, CWD, path, owner, group, kernel.AT_SYMLINK_NOFOLLOW)),
    "fchownat": lambda b, c, at, path, owner, group, flags, *_: _done(b.owner_at(c, at, path, owner, group, flags)),
    "fchown": lambda b, c, number, owner, group, *_: _done(
        b.files.change_owner(b.place_of(c, number), signed(owner), signed(group), follow=False)
    ),
    "utime": lambda b, c, path, times, *_: _done(
        b.files.change_times(b.path(c, CWD, path), _old_times(b, c, times), follow=True)
    ),
    "utimes": lambda b, c, path, times, *_: _done(
        b.files.change_times(b.path(c, CWD, path), _times(b, c, times, unit=1000), follow=True)
    ),
    "futimesat": lambda b, c, at, path, times, *_: _done(
        b.files.change_times(b.path(c, at, path), _times(b, c, times, unit=1000), follow=True)
    ),
    "utimensat": lambda b, c, at, path, times, flags, *_: _utimensat(b, c, (at, path), times, flags),
    "utimensat_time64": lambda b, c, at, path, times, flags, *_: _utimensat(b, c, (at, path), times, flags, wide=True),
    "getxattr": lambda b, c, path, *a: b.attribute(c, b.path(c, CWD, path), *a[:3], follow=True),
    "lgetxattr": lambda b, c, path, *a: b.attribute(c, b.path(c, CWD, path), *a[:3], follow=False),
    "fgetxattr": lambda b, c, number, *a: b.attribute(c, b.place_of(c, number), *a[:3], follow=False),
    "listxattr": lambda b, c, path, *a: b.attributes(c, b.path(c, CWD, path), *a[:2], follow=True),
    "llistxattr": lambda b, c, path, *a: b.attributes(c, b.path(c, CWD, path), *a[:2], follow=False),
    "flistxattr": lambda b, c, number, *a: b.attributes(c, b.place_of(c, number), *a[:2], follow=False),
    "setxattr": lambda b, c, path, *a: b.set_attribute(c, b.path(c, CWD, path), *a[:4], follow=True),
    "lsetxattr": lambda b, c, path, *a: b.set_attribute(c, b.path(c, CWD, path), *a[:4], follow=False),
    "fsetxattr": lambda b, c, number, *a: b.set_attribute(c, b.place_of(c, number), *a[:4], follow=False),
    "removexattr": lambda b, c, path, name, *_: _done(
        b.files.set_attribute(b.path(c, CWD, path), b.string(c, name), None, 0, follow=True)
    ),
    "lremovexattr": lambda b, c, path, name, *_: _done(
        b.files.set_attribute(b.path(c, CWD, path), b.string(c, name), None, 0, follow=False)
    ),
    "fremovexattr": lambda b, c, number, name, *_: _done(
        b.files.set_attribute(b.place_of(c, number), b.string(c, name), None, 0, follow=False)
    ),
    "ftruncate": lambda b, c, *_: b.change_otherwise(c),
    "fallocate": lambda b, c, *_: b.preallocate(c, *_range(c.arguments)),
    "fcntl": lambda b, c, *_: b.change_otherwise(c),
    "mmap": lambda b, c, *_: b.map_shared(c),
    "epoll_create": lambda b, c, *_: b.watch(c),
    "epoll_create1": lambda b, c, *_: b.watch(c),
    "flock": lambda b, c, number, how, *_: b.lock(c, number, how),
    "rt_sigaction": lambda b, c, _signal, action, *__: b.handle_signal(c, action),
    "socketpair": lambda b, c, *_: b.socket_pair(c),
    "chdir": lambda b, c, path, *_: b.starting.change_folder(c, path),
    "execve": lambda b, c, path, *_: b.starting.execute(c, path),
    "clone": lambda b, c, flags, *_: b.clone(c, flags),
    "fork": lambda b, c, *_: b.fork(c),
    "vfork": lambda b, c, *_: b.fork(c, lends=True),
    "kill": lambda b, c, process, number, *_: b.kill(c, process, number),
    "tkill": lambda b, c, thread, number, *_: b.kill_thread(c, -1, thread, number),
    "tgkill": lambda b, c, process, thread, number, *_: b.kill_thread(c, process, thread, number),
    "connect": lambda b, c, number, address, size, *_: b.connections.connect(c, number, address, size),
}
# The same forms under the names that 32-bit arm has for calls with 64-bit structures and 32-bit ids.
_SAME = "stat64:stat lstat64:lstat fstatat64:newfstatat chown32:chown lchown32:lchown fchown32:fchown "
_SAME += "ftruncate64:ftruncate fcntl64:fcntl mmap2:mmap"
FORMS |= {name: FORMS[same] for name, same in (pair.split(":") for pair in _SAME.split())}
