"""The kernel interface: seccomp(2), its notification ioctls, and the few calls Python has no name for.

Structures and numbers are those of linux/seccomp.h; they are equal on every architecture we run on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from agentd_sandbox.errors import Unsupported
from agentd_sandbox.filters import Profile, profile

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_prctl = _libc.prctl

_SECCOMP_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3  # Linux 5.0
_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19: a signal can't cancel a call that the broker has begun
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_SET_DUMPABLE = 1, 38, 24, 4
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x2008_0522

_RECV, _SEND, _ID_VALID, _ADDFD = 0xC050_2100, 0xC018_2101, 0x4008_2102, 0x4018_2103
_ADDFD_SEND = 1 << 1  # Linux 5.14: inject the descriptor and answer in one step
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_INJECTION = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")

STAT_BYTES = {"x86_64": 144, "aarch64": 128}
"""sizeof(struct stat) as the kernel writes it."""
STATFS_BYTES = 120
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
AT_REMOVEDIR = 0x200


@dataclass(frozen=True, slots=True)
class Notification:
    """A system call that waits for its answer. `arguments` are raw registers: mask what you use."""

    id: int
    pid: int
    number: int
    arguments: tuple[int, ...]


def _check(result: int, call: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


def lock(filter_profile: Profile) -> int:
    """Give up new privileges and install the filter; returns the listener. There is no way back.

    Raises Unsupported where the kernel has no user notification (before 5.0) or a supervisor above us
    already holds the listener (EBUSY).
    """
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    buffer = ctypes.create_string_buffer(filter_profile.bpf, len(filter_profile.bpf))
    program = struct.pack("HxxxxxxP", filter_profile.instructions, ctypes.addressof(buffer))
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE_RECV, _NEW_LISTENER):
        result: int = _syscall(
            ctypes.c_long(filter_profile.numbers["seccomp"]),
            ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
            ctypes.c_ulong(flags),
            ctypes.create_string_buffer(program, len(program)),
        )
        code = ctypes.get_errno()
        if result >= 0:
            return result
        if code != errno.EINVAL:
            break
    why = "another supervisor holds the listener" if code == errno.EBUSY else os.strerror(code)
    raise Unsupported("seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER)", code, why)


def receive(listener: int) -> Notification:
    """The next waiting call. Raises OSError (ENOENT) if it was cancelled in between."""
    buffer = bytearray(_NOTIFICATION.size)  # the kernel insists on zeroes
    fcntl.ioctl(listener, _RECV, buffer, True)
    identity, pid, _flags, number, _arch, _ip, *arguments = _NOTIFICATION.unpack(buffer)
    return Notification(identity, pid, number, tuple(arguments))


def answer(listener: int, identity: int, value: int = 0, error: int = 0) -> None:
    fcntl.ioctl(listener, _SEND, _RESPONSE.pack(identity, value, -error, 0))


def still_waiting(listener: int, identity: int) -> bool:
    """Whether the caller is still the process the notification came from (ids are never reused)."""
    try:
        fcntl.ioctl(listener, _ID_VALID, _ID.pack(identity))
    except OSError:
        return False
    return True


def inject(listener: int, identity: int, descriptor: int, *, close_on_exec: bool) -> None:
    """Give the caller a copy of `descriptor` as the result of its call, in one step."""
    flags = os.O_CLOEXEC if close_on_exec else 0
    fcntl.ioctl(listener, _ADDFD, _INJECTION.pack(identity, _ADDFD_SEND, descriptor, 0, flags))


def take_descriptor(pidfd: int, descriptor: int) -> int:
    """A copy of another process's descriptor, pidfd_getfd(2)."""
    number = profile().numbers["pidfd_getfd"]
    copy: int = _syscall(ctypes.c_long(number), ctypes.c_long(pidfd), ctypes.c_long(descriptor), ctypes.c_long(0))
    return _check(copy, "pidfd_getfd")


def raw_stat(descriptor: int) -> bytes:
    """`struct stat` of an open descriptor (O_PATH too), as the kernel lays it out."""
    current = profile()
    buffer = ctypes.create_string_buffer(STAT_BYTES[current.architecture])
    result: int = _syscall(
        ctypes.c_long(current.numbers["newfstatat"]), ctypes.c_long(descriptor), b"", buffer, ctypes.c_long(AT_EMPTY_PATH)
    )
    _check(result, "newfstatat")
    return buffer.raw


def raw_statfs(descriptor: int) -> bytes:
    """`struct statfs` of the file system an open descriptor is on."""
    buffer = ctypes.create_string_buffer(STATFS_BYTES)
    path = f"/proc/self/fd/{descriptor}".encode()
    result: int = _syscall(ctypes.c_long(profile().numbers["statfs"]), path, buffer)
    _check(result, "statfs")
    return buffer.raw


def file_system(descriptor: int) -> int:
    """The magic number of the file system an open descriptor is on (`f_type`, the first word of struct statfs)."""
    (magic,) = struct.unpack_from("=q", raw_statfs(descriptor))
    return int(magic)


def die_with_parent() -> None:
    _check(_prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def stay_inspectable() -> None:
    """The broker reads the worker's memory: that needs a dumpable process (ptrace(2), access mode checks)."""
    _check(_prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def drop_capabilities() -> None:
    """Root without any capability is nobody special. For ordinary users this changes nothing."""
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # EINVAL past the last one, EPERM for users who have none to drop
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    result: int = _syscall(ctypes.c_long(profile().numbers["capset"]), header, bytes(24))
    _check(result, "capset")
