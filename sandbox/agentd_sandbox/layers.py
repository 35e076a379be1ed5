"""Layers on top of filter and broker, entered before a worker knows its request: namespaces and Landlock.

Neither gives a worker anything: they take away what a hole in the filter would open. Namespaces are entered once, by
the zygote; Landlock by each worker, after it has forked and before it installs the filter.
"""

from __future__ import annotations

import ctypes
import os
import struct

from agentd_sandbox import kernel
from agentd_sandbox.filters import profile

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x0002_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x4000_0000
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4
_PRIVATE = 1 << 18
_MOUNT_ATTRIBUTES = struct.Struct("=QQQQ")  # set, cleared, propagation, userns_fd: mount_setattr(2)

_RULE_PATH_BENEATH = 1
_VERSION = 1
_EXECUTE, _READ_FILE = 1 << 0, 1 << 2
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NETWORK_RIGHTS = 0b11  # bind and connect of TCP, from version 4
_SCOPES = 0b11  # abstract unix sockets and signals, from version 6


def enter_namespaces() -> None:
    """User, mount, network, IPC and host name: an empty network, and nothing that can be written.

    The broker opens files in its own namespaces, so what it hands in can be written all the same. Raises OSError.
    """
    user, group = os.getuid(), os.getgid()
    kernel.check(_libc.unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS), "unshare")
    kernel.tell("/proc/self/setgroups", "deny")
    kernel.tell("/proc/self/uid_map", f"{user} {user} 1")
    kernel.tell("/proc/self/gid_map", f"{group} {group} 1")
    attributes = _MOUNT_ATTRIBUTES.pack(_READ_ONLY | _NO_SUID | _NO_DEVICES, 0, _PRIVATE, 0)
    number = ctypes.c_long(profile().numbers["mount_setattr"])
    result: int = _syscall(
        number,
        ctypes.c_long(_AT_FDCWD),
        b"/",
        ctypes.c_ulong(_AT_RECURSIVE),
        ctypes.create_string_buffer(attributes, len(attributes)),
        ctypes.c_ulong(len(attributes)),
    )
    kernel.check(result, "mount_setattr")
    kernel.drop_capabilities()


def landlock_version() -> int:
    """0 where the kernel has none. To be asked in a throw-away process: Android kills for it."""
    number = ctypes.c_long(profile().numbers["landlock_create_ruleset"])
    version: int = _syscall(number, None, ctypes.c_ulong(0), ctypes.c_ulong(_VERSION))
    return max(version, 0)


def restrict_by_landlock() -> None:
    """From here on this process can open nothing but to execute it, and connect to nothing. Raises OSError.

    Reading stays possible for the kernel's sake: it opens a program as its caller when it is executed.
    """
    numbers, version = profile().numbers, landlock_version()
    attributes = struct.pack(
        "=QQQ",
        _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))],
        _NETWORK_RIGHTS if version >= 4 else 0,
        _SCOPES if version >= 6 else 0,
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    create = ctypes.c_long(numbers["landlock_create_ruleset"])
    ruleset = kernel.check(
        int(_syscall(create, attributes, ctypes.c_ulong(size), ctypes.c_ulong(0))), "landlock_create_ruleset"
    )
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", _EXECUTE | _READ_FILE, root)
        added = _syscall(
            ctypes.c_long(numbers["landlock_add_rule"]),
            ctypes.c_long(ruleset),
            ctypes.c_long(_RULE_PATH_BENEATH),
            rule,
            ctypes.c_ulong(0),
        )
        kernel.check(added, "landlock_add_rule")
        restricted = _syscall(ctypes.c_long(numbers["landlock_restrict_self"]), ctypes.c_long(ruleset), ctypes.c_ulong(0))
        kernel.check(restricted, "landlock_restrict_self")
    finally:
        os.close(root)
        os.close(ruleset)
