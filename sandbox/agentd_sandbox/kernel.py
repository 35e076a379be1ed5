"""The kernel interface: seccomp(2), its notification ioctls, and the few calls Python has no name for.

Structures and numbers are those of linux/seccomp.h; they are equal on every architecture we run on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from agentd_sandbox.errors import Unsupported
from agentd_sandbox.filters import instructions, profile

if TYPE_CHECKING:
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_prctl = _libc.prctl

_SECCOMP_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3  # Linux 5.0
_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19: a signal can't cancel a call that the broker has begun
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x2008_0522

_KCMP_VM = 1
_NOTHING = (ctypes.c_long(0), ctypes.c_long(0))
_RECV, _SEND, _ID_VALID, _ADDFD, _SET_FLAGS = 0xC050_2100, 0xC018_2101, 0x4008_2102, 0x4018_2103, 0x4008_2104
_ADDFD_SETFD = 1 << 0  # Linux 5.9
_ADDFD_SEND = 1 << 1  # Linux 5.14: inject the descriptor and answer in one step
_CONTINUE = 1 << 0
_SYNC_WAKE_UP = 1 << 0  # Linux 6.6
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_INJECTION = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")
_PROCMAP_QUERY = 0xC068_6611
_MAPPING = struct.Struct("=9Q4I2Q")  # size, flags, address; start, end, flags, page size, offset, inode, device; names
_VMA_SHARED = 1 << 3

_STAT_BYTES = {"x86_64": 144, "aarch64": 128, "arm": 104}  # sizeof(struct stat), struct stat64 on arm
_STATFS_BYTES = {"x86_64": 120, "aarch64": 120, "arm": 84}
_RENAME_EXCHANGE = 2
RENAME_NOREPLACE = 1
_AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_REMOVEDIR = 0x200


class Notification(NamedTuple):
    """A system call that waits for its answer. `arguments` are raw registers: mask what you use.

    `thread` is the caller's thread id as this process sees it.
    """

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]


def check(result: int, call: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


def lock(*, wait_killable: bool = True) -> int:
    """Give up new privileges and install the filter; returns the listener. There is no way back.

    Raises Unsupported where the kernel has no user notification (before 5.0) or a supervisor above us
    already holds the listener (EBUSY).
    """
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE_RECV, _NEW_LISTENER)[0 if wait_killable else 1 :]:
        result = _install(profile().bpf, flags)
        code = ctypes.get_errno()
        if result >= 0:
            return result
        if code != errno.EINVAL:
            break
    why = "another supervisor holds the listener" if code == errno.EBUSY else os.strerror(code)
    raise Unsupported("seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER)", code, why)


def lock_alone() -> None:
    """As `lock` for kernels without user notification: what a broker would do gets EACCES."""
    if _install(profile().alone, 0) < 0:
        code = ctypes.get_errno()
        raise Unsupported("seccomp(SECCOMP_SET_MODE_FILTER)", code, os.strerror(code))


def _install(bpf: bytes, flags: int) -> int:
    no_new_privileges()
    buffer = ctypes.create_string_buffer(bpf, len(bpf))
    program = struct.pack("@HP", instructions(bpf), ctypes.addressof(buffer))
    result: int = _syscall(
        ctypes.c_long(profile().numbers["seccomp"]),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(flags),
        ctypes.create_string_buffer(program, len(program)),
    )
    return result


def no_new_privileges() -> None:
    check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def wake_at_once(listener: int) -> None:
    """Let a caller go on on the broker's own processor (Linux 6.6; elsewhere it only costs a wake-up of another one)."""
    try:
        fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)
    except OSError:
        return


def receive(listener: int) -> Notification:
    """The next waiting call. Raises OSError (ENOENT) if it was cancelled in between."""
    buffer = bytearray(80)  # the kernel insists on zeroes
    fcntl.ioctl(listener, _RECV, buffer, True)
    fields = _NOTIFICATION.unpack(buffer)  # id, pid, flags, nr, arch, instruction pointer, args
    return Notification(fields[0], fields[1], fields[3], fields[6:])


def answer(listener: int, identity: int, value: int = 0, error: int = 0) -> None:
    fcntl.ioctl(listener, _SEND, _RESPONSE.pack(identity, value, -error, 0))


def let_through(listener: int, identity: int) -> None:
    """The kernel runs the call after all: only for calls whose arguments are values, or can't be changed any more."""
    fcntl.ioctl(listener, _SEND, _RESPONSE.pack(identity, 0, 0, _CONTINUE))


def still_waiting(listener: int, identity: int) -> bool:
    """Whether the caller is still the process the notification came from (ids are never reused)."""
    try:
        fcntl.ioctl(listener, _ID_VALID, _ID.pack(identity))
    except OSError:
        return False
    return True


def inject(listener: int, identity: int, descriptor: int, flags: int) -> None:
    """Give the caller a copy of `descriptor` as the result of its call, in one step (Linux 5.14; before it EINVAL).

    `flags` are those of the new descriptor: O_CLOEXEC or nothing.
    """
    fcntl.ioctl(listener, _ADDFD, _INJECTION.pack(identity, _ADDFD_SEND, descriptor, 0, flags))


def install(listener: int, identity: int, descriptor: int, flags: int) -> int:
    """The first of two steps: a copy of `descriptor` in the caller. Returns its number there, which is still to be told."""
    # A buffer that may change is what makes ioctl() return the number.
    number: int = fcntl.ioctl(listener, _ADDFD, bytearray(_INJECTION.pack(identity, 0, descriptor, 0, flags)), True)
    return number


def replace(listener: int, identity: int, descriptor: int, number: int, *, close_on_exec: bool) -> None:
    """Put a copy of `descriptor` in the place of the caller's own descriptor `number`."""
    flags = os.O_CLOEXEC if close_on_exec else 0
    fcntl.ioctl(listener, _ADDFD, _INJECTION.pack(identity, _ADDFD_SETFD, descriptor, number, flags))


def take_descriptor(pidfd: int, descriptor: int) -> int:
    """A copy of another process's descriptor, pidfd_getfd(2)."""
    number = profile().numbers["pidfd_getfd"]
    copy: int = _syscall(ctypes.c_long(number), ctypes.c_long(pidfd), ctypes.c_long(descriptor), ctypes.c_long(0))
    return check(copy, "pidfd_getfd")


def share_memory(one: int, other: int) -> bool:
    """Whether two processes have one address space, by kcmp(2); where that can't be asked, they may."""
    if hasattr(sys, "getandroidapilevel"):  # its filter kills whoever asks
        return True
    number = ctypes.c_long(profile().numbers["kcmp"])
    result: int = _syscall(number, ctypes.c_long(one), ctypes.c_long(other), ctypes.c_long(_KCMP_VM), *_NOTHING)
    return result <= 0


def mapping(maps: int, address: int) -> tuple[int, bool]:
    """Of the memory at `address`: where it ends, and whether it is its process's alone and no file's.

    `maps` is /proc/PID/maps, open: PROCMAP_QUERY, Linux 6.11 (linux/fs.h). Raises OSError: ENOENT where nothing is mapped,
    ENOTTY from older kernels.
    """
    query = bytearray(_MAPPING.size)
    _MAPPING.pack_into(query, 0, _MAPPING.size, 0, address, *[0] * 12)
    fcntl.ioctl(maps, _PROCMAP_QUERY, query, True)
    fields = _MAPPING.unpack(query)
    return fields[4], not fields[5] & _VMA_SHARED and fields[8:11] == (0, 0, 0)


def raw_stat(descriptor: int) -> bytes:
    """`struct stat` of an open descriptor (O_PATH too), as the kernel lays it out (`struct stat64` on 32-bit arm)."""
    return _stat_at(descriptor, b"", AT_EMPTY_PATH)


@cache
def _stat_call() -> tuple[Callable[..., int], ctypes.c_long, int]:
    """The call, its number, and the size of what it writes. Typed once, as it is the one that programs make most."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long)
    call.restype = ctypes.c_long
    numbers = profile().numbers
    number = numbers.get("newfstatat") or numbers["fstatat64"]
    return call, ctypes.c_long(number), _STAT_BYTES[profile().architecture]


def _stat_at(folder: int, path: bytes, flags: int) -> bytes:
    call, number, size = _stat_call()
    buffer = ctypes.create_string_buffer(size)
    check(call(number, folder, path, buffer, flags), "newfstatat")
    return buffer.raw


def raw_stat_of(path: bytes) -> bytes:
    """As `raw_stat`, of what a path leads to: for links in procfs that stand for open descriptors."""
    return _stat_at(_AT_FDCWD, path, 0)


def raw_statfs(descriptor: int) -> bytes:
    """`struct statfs` of the file system an open descriptor is on (`struct statfs64` on 32-bit arm)."""
    current = profile()
    size = _STATFS_BYTES[current.architecture]
    buffer = ctypes.create_string_buffer(size)
    path = f"/proc/self/fd/{descriptor}".encode()
    result: int
    if current.architecture == "arm":
        result = _syscall(ctypes.c_long(current.numbers["statfs64"]), path, ctypes.c_long(size), buffer)
    else:
        result = _syscall(ctypes.c_long(current.numbers["statfs"]), path, buffer)
    check(result, "statfs")
    return buffer.raw


def file_system(descriptor: int) -> int:
    """The magic number of the file system an open descriptor is on (`f_type`, the first word of struct statfs)."""
    (magic,) = struct.unpack_from("@L", raw_statfs(descriptor))
    return int(magic) & 0xFFFF_FFFF


def rename_to_new(source: tuple[int, bytes], target: tuple[int, bytes]) -> None:
    """renameat2(2) with RENAME_NOREPLACE: whatever got the new name meanwhile is left alone (EEXIST).

    Each side is (folder descriptor, name). File systems that can't do it (EINVAL) get a plain rename.
    """
    try:
        _rename(source, target, RENAME_NOREPLACE)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        os.rename(source[1], target[1], src_dir_fd=source[0], dst_dir_fd=target[0])


def exchange(folder: int, one: bytes, other: bytes) -> None:
    """renameat2(2) with RENAME_EXCHANGE: each gets the other's name, in one step."""
    _rename((folder, one), (folder, other), _RENAME_EXCHANGE)


def _rename(source: tuple[int, bytes], target: tuple[int, bytes], flags: int) -> None:
    number = profile().numbers["renameat2"]
    arguments = (ctypes.c_long(source[0]), source[1], ctypes.c_long(target[0]), target[1], ctypes.c_ulong(flags))
    check(_syscall(ctypes.c_long(number), *arguments), "renameat2")


def flush_file_system(descriptor: int) -> None:
    """Write out all that is changed on the file system of an open descriptor, syncfs(2). Raises OSError."""
    check(_libc.syncfs(descriptor), "syncfs")


def tell(file: str | os.PathLike[str], text: str) -> None:
    """One write(2) into a file of procfs or cgroupfs: they take a value whole."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def die_with_parent() -> None:
    check(_prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """What a child leaves behind when it dies becomes a child of this process, prctl(PR_SET_CHILD_SUBREAPER)."""
    check(_prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def stay_inspectable() -> None:
    """The broker reads the worker's memory: that needs a dumpable process (ptrace(2), access mode checks)."""
    check(_prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def drop_capabilities() -> None:
    """Root without any capability is nobody special. For ordinary users this changes nothing."""
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # EINVAL past the last one, EPERM for users who have none to drop
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    result: int = _syscall(ctypes.c_long(profile().numbers["capset"]), header, bytes(24))
    check(result, "capset")
