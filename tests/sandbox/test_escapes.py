"""Ways out of the sandbox. Each attack works unconfined, which is its control, and must get nothing confined.

What counts: the outside is byte for byte what it was, the canary is not in the answer, nobody was signalled, no packet
came, nothing that is left in the scope reaches beyond it, and no process is left. To be killed for it is containment.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from agentd_sandbox import (
    Access,
    Job,
    Limits,
    Outcome,
    OutputTooLarge,
    PathRule,
    Sandbox,
    SandboxFailure,
    WorkerDied,
    WorkerOffence,
    WorkerTimeout,
    probe,
    sdk,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change

PROGRAM = Path(__file__).with_name("escapes.py")
QUICK = b"from agentd_sandbox.sdk import tool\n@tool('quick')\ndef quick() -> dict[str, object]:\n    return {'done': True}\n"
CANARY = "canary-" + secrets.token_hex(8)
TEXT = f"{CANARY}\n" * 100
SECONDS = 0.25  # of trying, where an attack is a race
OUTPUT_BYTES = 65536
LAYERS = {"broker alone": ("broker",), "every layer": None}
IS_ROOT = os.geteuid() == 0

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Attack:
    """One tool of escapes.py. `forbidden` is why the machine may refuse it to anybody: then there is no control.

    `execute`: which programs it may start confined. `alone`: its control needs a mount namespace of its own.
    `inherits`: its control is given descriptors of the outside.
    """

    name: str
    forbidden: str = ""
    execute: str = ""
    alone: bool = False
    inherits: bool = False
    below_a_shell: bool = False
    swapping: bool = False
    seconds: float = SECONDS


def attacks(names: str, **options: Any) -> list[Attack]:
    return [Attack(name, **options) for name in names.split()]


READS = [
    *attacks(
        """read_by_absolute_path read_by_dots read_by_dots_through_a_folder read_by_dots_and_slashes read_by_a_symlink
        read_by_an_absolute_symlink read_by_a_symlink_to_a_folder read_by_dots_behind_a_symlink read_by_a_chain_of_symlinks
        read_by_proc_self_root read_by_proc_thread_self read_by_proc_self_task read_by_proc_self_with_dots
        read_by_proc_self_cwd read_by_proc_self_fd read_by_dev_fd read_by_a_folder_descriptor
        read_by_a_descriptor_of_a_link read_after_chdir read_after_chdir_out read_after_fchdir read_after_fchdir_by_a_link
        read_by_o_path read_by_raw_openat stat_outside statx_outside list_outside read_a_link_outside watch_outside
        tell_a_hidden_folder_from_a_missing_one tell_a_hidden_folder_by_the_device_of_proc read_own_environ
        canary_in_memory"""
    ),
    *attacks("read_by_every_descriptor read_every_descriptor", inherits=True),
    Attack("read_by_openat2", "Linux 5.6"),
    Attack("read_by_open_tree", "Linux 5.2"),
    Attack("read_by_handle", "needs CAP_DAC_READ_SEARCH, and a file system with handles"),
    Attack("read_by_the_x32_abi", "this kernel has no x32"),
    Attack("read_by_int_0x80", "this kernel runs no 32-bit programs"),
    *attacks("read_by_io_uring map_a_ring", forbidden="io_uring is switched off"),
    Attack("read_an_attribute_outside", "no extended attributes on this file system"),
]
CHANGES_BY_PATH = "write append map allocate truncate truncate_by_open chmod utime fchmod futime"
CHANGES = [
    *(Attack(f"{name}_{way}") for name in CHANGES_BY_PATH.split() for way in ("outside", "by_a_hard_link", "by_a_symlink")),
    *(
        Attack(f"{name}_{way}", "no extended attributes on this file system")
        for name in ("set_attribute", "set_attribute_by_descriptor")
        for way in ("outside", "by_a_hard_link", "by_a_symlink")
    ),
    *attacks(
        """create_outside create_by_dots create_by_a_dangling_link create_by_a_link_to_a_folder
        create_by_a_folder_descriptor mkdir_outside mkdir_by_a_link rmdir_outside rmdir_by_a_link unlink_outside
        unlink_by_a_link unlink_by_dots rename_outside rename_into_the_scope rename_a_folder_into_the_scope
        rename_a_folder_out rename_out_by_a_link rename_out_by_descriptors rename_the_parent_away link_out
        link_into_the_scope link_a_symlinks_target symlink_outside mkfifo_outside bind_outside
        follow_a_made_absolute_link follow_a_made_relative_link follow_a_made_dangling_link follow_a_made_link_of_links
        enter_a_made_link append_by_a_renamed_hard_link sendfile_to_a_hard_link read_a_stolen_file
        leave_a_link_that_leads_out leave_a_folder_with_a_link_that_leads_out leave_a_link_that_will_lead_out
        set_uid_by_chmod set_gid_by_chmod set_uid_by_fchmod set_uid_by_open sticky_by_mkdir set_uid_by_rename
        make_a_fifo make_a_socket bind_in_the_scope change_the_daemons_own_files"""
    ),
    Attack("tmpfile_outside", "this file system has no O_TMPFILE"),
    *attacks("chown_outside chown_by_a_hard_link make_a_device", forbidden="needs a privileged user"),
    *attacks("chmod_outside_by_fchmodat2 set_uid_by_fchmodat2", forbidden="Linux 6.6"),
]
PROCESSES = [
    *attacks(
        """read_environ_of_a_process read_task_of_a_process read_maps_of_a_process read_status_of_a_process
        read_root_of_a_process read_cwd_of_a_process read_fd_of_a_process read_limits_of_a_process
        set_limits_of_a_process set_affinity_of_a_process set_priority_of_a_process set_scheduler_of_a_process
        open_a_process learn_an_address_of_a_process write_mem_of_itself kill_a_process kill_a_group
        kill_a_group_by_number tkill tgkill queue_a_signal queue_a_signal_to_a_thread signal_by_pidfd kill_everybody
        signal_by_ownership"""
    ),
    *attacks(
        "read_mem_of_a_process vm_read vm_write take_a_descriptor trace_a_process",
        forbidden="Yama lets nobody trace but a parent",
    ),
    Attack("take_a_descriptor_without_a_pidfd", "Yama lets nobody trace but a parent", inherits=True),
    Attack("read_map_files_of_a_process", "needs CAP_CHECKPOINT_RESTORE"),
    *attacks(
        """compare_with_a_process learn_pages_of_a_process advise_about_memory_of_a_process set_io_priority_of_a_process""",
        forbidden="a matter of how the kernel was built",
    ),
    Attack("signal_by_a_childs_end", below_a_shell=True),
    Attack("signal_by_an_orphans_end"),
]
KERNEL = [
    *attacks("unshare_files clone_untraced clone_into_a_shared_table second_filter second_filter_by_prctl ask_about_filters"),
    *attacks("second_filter_with_a_listener listener_among_descriptors", forbidden="a supervisor has the listener"),
    *attacks(
        """new_user_namespace_by_clone new_user_namespace new_network_namespace new_mount_namespace_by_clone
        new_pid_namespace_by_clone join_a_namespace""",
        forbidden="users may have no namespaces here",
    ),
    *attacks(
        "mount_something bind_the_outside change_the_root pivot_the_root",
        forbidden="users may have no namespaces here",
        alone=True,
    ),
    *attacks(
        """clone3 ring_of_aio key key_of_the_session userfaultfd bpf perf_event personality local_descriptors
        shared_memory_of_system_v messages_of_system_v semaphores_of_system_v posix_message_queue memory_file
        secret_memory_file type_into_a_terminal type_into_standard_input kernel_log file_system_context""",
        forbidden="a matter of how the kernel was built and set up",
    ),
]
NETWORK = [
    *attacks(
        """tcp_out tcp_out_to_any_address udp_out udp_out_in_bulk unix_socket_by_path unix_socket_abstract
        unix_datagram_by_a_pair unix_message_by_a_pair unix_pair_reconnected netlink pass_descriptors bind_and_listen
        listen_unbound"""
    ),
    *attacks("tcp_out_by_a_mapped_address", forbidden="no IPv6 here"),
    *attacks("tcp_out_fast tcp_out_fast_by_option", forbidden="TCP Fast Open is switched off"),
    *attacks("raw_socket packet_socket", forbidden="needs CAP_NET_RAW"),
    *attacks("mptcp_out crypto_socket vsock", forbidden="a matter of how the kernel was built"),
]
RACES = [
    *attacks(
        """flip_open flip_stat flip_readlink flip_chdir flip_unlink flip_truncate flip_mkdir flip_chmod flip_rename_from
        flip_rename_to flip_link"""
    ),
    *attacks("flip_in_shared_memory", execute="usr"),
    *attacks(
        """flip_execve flip_execve_amid_other_calls flip_execve_in_a_second_thread flip_execve_to_the_own_program
        flip_execve_to_a_program_that_makes_no_call flip_execve_in_shared_memory flip_execve_by_a_link""",
        execute="good",
        seconds=0.7,
    ),
    Attack("flip_execve_by_a_link_and_dots", execute="good", seconds=2),
    *attacks(
        """swap_read swap_stat swap_list swap_chdir swap_write swap_create swap_truncate swap_unlink swap_mkdir swap_chmod
        swap_rename_from swap_rename_to""",
        swapping=True,
    ),
]
PROGRAMS = [
    *attacks(
        """exec_a_reader exec_a_reader_by_a_link exec_a_reader_in_a_folder exec_a_reader_in_the_outside
        exec_a_program_outside exec_a_program_by_a_link exec_a_program_by_a_relative_path shell_reads shell_reads_by_proc
        shell_lists shell_reads_environ shell_writes shell_appends_by_a_link shell_writes_in_the_background shell_moves
        shell_copies_over shell_links shell_removes shell_follows_its_link shell_kills child_leaves_the_scope
        vforked_child_reads read_by_absolute_path read_environ_of_a_process kill_a_process signal_by_ownership
        signal_by_an_orphans_end canary_in_memory""",
        execute="usr",
    ),
    Attack("signal_by_a_childs_end", execute="usr", below_a_shell=True),
    Attack("exec_python", "no Python in /usr", execute="usr"),
    *attacks("exec_from_a_memory_file exec_by_descriptor", execute="usr"),
    *attacks(
        """evade_by_name evade_by_the_linker evade_by_a_copy evade_by_a_renamed_copy evade_by_a_symlink evade_by_dots
        evade_by_a_script evade_by_the_own_program evade_by_the_own_program_by_name""",
        execute="good",
    ),
    *attacks(
        "flip_execve_to_a_readable_program flip_execve_to_a_readable_program_amid_other_calls", execute="good", seconds=0.7
    ),
]
# What is checked by content only: the control prints what the dynamic linker says, which is never the canary.
UNCONTROLLED = attacks("evade_by_a_preloaded_library", execute="good")
TABLE = [*READS, *CHANGES, *PROCESSES, *KERNEL, *NETWORK, *RACES, *PROGRAMS]


def called(attack: Attack) -> str:
    return attack.name + (f"-may-start-{attack.execute}" if attack.execute else "")


# -- the ground: what lies inside and outside


@cache
def found(program: str) -> str:
    return os.path.realpath(shutil.which(program, path="/usr/bin:/bin") or "/missing/" + program)


GOOD, BAD = found("true"), found("echo")
HAS_PROGRAMS = all(os.path.exists(found(name)) for name in ("true", "echo", "cat", "sh")) and GOOD != BAD


@cache
def linker() -> str:
    """The program interpreter of this Python (elf(5), PT_INTERP), as its text stands in the file."""
    start = Path(sys.executable).read_bytes()[:8192]
    at = start.find(b"/lib")
    return start[at : start.index(b"\0", at)].decode()


# An ELF file for x86_64: write(1, "ran\\n", 4), exit(0).
STATIC = bytes.fromhex(
    "7f454c46020101000000000000000000" "02003e00010000007800400000000000" "40000000000000000000000000000000"
    "00000000400038000100000000000000" "0100000005000000" "0000000000000000" "0000400000000000" "0000400000000000"
    "a600000000000000" "a600000000000000" "0010000000000000"
    "b801000000" "bf01000000" "488d3511000000" "ba04000000" "0f05" "b83c000000" "31ff" "0f05" "90" "72616e0a" "0000000000000000"
)  # fmt: skip


@dataclass
class Ground:
    """A folder `inside` that the scopes cover, with every kind of thing in it that leads to the other, `outside`."""

    root: Path
    before: dict[str, Any] = field(default_factory=dict)
    planted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        inside, outside = self.inside, self.outside
        for folder in (inside / "folder", inside / "swap", outside / "folder", outside / "empty"):
            folder.mkdir(parents=True)
        for name in ("file", "linked", "folder/file", "only-outside"):
            (outside / name).write_text(TEXT)
            (outside / name).chmod(0o644)
        for name in ("file", "folder/file", "swap/file"):
            (inside / name).write_text("inside\n")
        (outside / "alias").symlink_to(CANARY)
        shutil.copy(BAD, outside / "program") if HAS_PROGRAMS else None
        if os.uname().machine == "x86_64":
            (outside / "static").write_bytes(STATIC)
            (outside / "static").chmod(0o755)
        with contextlib.suppress(OSError):
            os.setxattr(outside / "file", "user.note", CANARY.encode())
        os.link(outside / "linked", inside / "hard")
        os.mkfifo(inside / "fifo")
        for name, target in {
            "link": "../outside/file",
            "absolute-link": str(outside / "file"),
            "folder-link": "../outside",
            "dangling": "../outside/new",
            "program-link": "../outside/program",
            "chain": "folder-link/../inside/folder-link",
            "swap-link": "../outside",
        }.items():
            (inside / name).symlink_to(target)
        self.before = tree(outside)
        self.planted = {str(path.relative_to(inside)) for path in inside.rglob("*")}
        self.planted |= {"program", "other", "aside"}  # the names under which attacks swap what is planted

    @property
    def inside(self) -> Path:
        return self.root / "inside"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    def harm(self) -> list[str]:
        """What is outside that was not, and the other way round; what in the scope reaches beyond it."""
        after = tree(self.outside)
        names = sorted(set(after) | set(self.before))
        return [f"outside/{name}" for name in names if after.get(name) != self.before.get(name)] + self._reaching()

    def _reaching(self) -> list[str]:
        theirs = {entry[0] for name, entry in self.before.items()}
        reaching = []
        for path in self.inside.rglob("*"):
            status, name = path.lstat(), str(path.relative_to(self.inside))
            if stat.S_ISLNK(status.st_mode):
                away = not os.path.realpath(path).startswith(f"{self.inside}/") and name not in self.planted
            else:
                away = bool(status.st_mode & 0o7000)
                away |= not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) and name != "fifo"
                away |= status.st_ino in theirs and status.st_nlink < 2
            if away:
                reaching.append(f"inside/{name} {stat.filemode(status.st_mode)}")
        return reaching


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder and itself: inode, mode, number of names, owner, time, attributes, content."""
    entries: dict[str, Any] = {}
    if not folder.exists():
        return entries
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        kept: list[Any] = [status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_mtime_ns]
        if stat.S_ISREG(status.st_mode):
            kept.append(hashlib.sha256(path.read_bytes()).hexdigest())
            kept.append([(name, os.getxattr(path, name)) for name in os.listxattr(path)])
        elif stat.S_ISLNK(status.st_mode):
            kept.append(os.readlink(path))
        entries[str(path.relative_to(folder))] = kept
    return entries


VICTIM = """
import ctypes, mmap, os, signal, sys
canary = ctypes.create_string_buffer(os.environ["AGENTD_CANARY"].encode())
scratch = ctypes.create_string_buffer(16)
held = os.open("kept", os.O_RDONLY)
mapped = mmap.mmap(held, 0, prot=mmap.PROT_READ)
for number in (signal.SIGURG, signal.SIGIO, signal.SIGUSR1, signal.SIGTERM, signal.SIGWINCH, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.write(1, b"%d " % number))
mapping = next(line.split()[0] for line in open("/proc/self/maps") if line.rstrip().endswith("/kept"))
print(held, ctypes.addressof(canary), ctypes.addressof(scratch), mapping, flush=True)
while True:
    signal.pause()
"""


@dataclass
class World:
    """All that an attack may reach for beside files: a process, servers, the daemon itself."""

    folder: Path
    signals: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "kept").write_text(TEXT)
        self.victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", VICTIM],
            cwd=self.folder,
            env={"AGENTD_CANARY": CANARY},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.victim.stdout
        held, address, scratch, self.mapping = self.victim.stdout.readline().decode().split()
        self.target = {"pid": self.victim.pid, "group": self.victim.pid, "address": int(address), "fd": int(held)}
        self.target["scratch"] = int(scratch)
        self.canary, self.scratch = ctypes.create_string_buffer(CANARY.encode()), ctypes.create_string_buffer(16)
        self.file = os.open(self.folder / "kept", os.O_RDONLY)
        self.own = {"pid": os.getpid(), "group": os.getpgid(0), "fd": self.file, "address": ctypes.addressof(self.canary)}
        self.own["scratch"] = ctypes.addressof(self.scratch)
        self.tcp, self.granted = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.unix.bind(str(self.folder / "s"))
        self.abstract.bind(f"\0agentd-escapes-{os.getpid()}")
        self.datagrams.bind(str(self.folder / "d"))
        self.unix.listen()
        self.abstract.listen()
        for server in (self.tcp, self.udp, self.unix, self.abstract, self.datagrams):
            server.setblocking(False)
        self.free = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--serve"],
            cwd=self.folder,
            env={**os.environ, "AGENTD_CANARY": CANARY},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.former = signal.signal(signal.SIGURG, lambda number, _: self.signals.append(number))

    def close(self) -> None:
        signal.signal(signal.SIGURG, self.former)
        for process in (self.victim, self.free):
            process.kill()
            process.communicate()
        os.close(self.file)
        for server in (self.tcp, self.granted, self.udp, self.unix, self.abstract, self.datagrams):
            server.close()

    def ask(self, name: str, place: dict[str, Any]) -> dict[str, Any]:
        """The answer of an attack that nothing confines."""
        assert self.free.stdin
        assert self.free.stdout
        self.free.stdin.write(json.dumps([name, place]) + "\n")
        self.free.stdin.flush()
        assert select.select([self.free.stdout], [], [], 180)[0], "the control hangs"
        return dict(json.loads(self.free.stdout.readline()))

    def place(self, ground: Ground, *, control: bool) -> dict[str, Any]:
        target, program = self.target, found("python3")
        site = next(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
        made_up = [str(ground.outside / "file"), str(ground.outside / "only-outside")]
        own = [sdk.__file__, json.__file__, f"{site}/agentd.pth", *_own_repository(), sys.executable, "/etc/ld.so.preload"]
        return {
            "control": control,
            "inside": str(ground.inside),
            "outside": str(ground.outside),
            "targets": [target] if control else [self.own, target],
            "machine_code": STATIC.hex() if os.uname().machine == "x86_64" else "",
            "victim_file": "kept",
            "mapping": self.mapping,
            "size": len(TEXT),
            "seconds": SECONDS,
            "handle": handle_of(ground.outside / "file"),
            "daemon_files": made_up if control else own,
            "linker": linker(),
            "python": os.path.realpath(sys.executable),
            "good_program": GOOD,
            "bad_program": BAD,
            "tools": {
                "cat": found("cat"),
                "sh": found("sh"),
                "sleep": found("sleep"),
                "python": program if os.path.exists(program) else "",
            },
            "tcp": self.tcp.getsockname()[1],
            "granted": self.granted.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "unix": str(self.folder / "s"),
            "datagrams": str(self.folder / "d"),
            "abstract": f"agentd-escapes-{os.getpid()}",
        }

    def reached(self) -> list[str]:
        """Who has heard of an attack since the last time: servers, the daemon, the other process."""
        heard = []
        for name in ("tcp", "unix", "abstract"):
            try:
                while True:
                    getattr(self, name).accept()[0].close()
                    heard.append(name)
            except BlockingIOError:
                continue
        for name in ("udp", "datagrams"):
            try:
                while getattr(self, name).recv(64):
                    heard.append(name)
            except BlockingIOError:
                continue
        if self.scratch.raw != bytes(16):
            heard.append("memory of the daemon")
        heard += [f"signal {number} to the daemon" for number in self.signals]
        self.signals.clear()
        return heard + self._signals_of_the_victim()

    def _signals_of_the_victim(self) -> list[str]:
        """What came before the one that we send now; Python handles them by number, and ours is above the others."""
        if self.victim.poll() is not None:
            return ["end of the process"]
        self.victim.send_signal(signal.SIGWINCH)
        assert self.victim.stdout
        text = b""
        while b"%d " % signal.SIGWINCH not in text:
            if not select.select([self.victim.stdout], [], [], 60)[0]:
                return ["the process does not answer"]
            text += os.read(self.victim.stdout.fileno(), 4096)
        return [f"signal {number} to the process" for number in map(int, text.split()) if number != signal.SIGWINCH]


def _own_repository() -> list[str]:
    hooks = Path(__file__).resolve().parents[2] / ".git" / "hooks"
    return [str(hooks / "pre-commit")] if hooks.is_dir() else []


def handle_of(path: Path) -> str:
    """`struct file_handle`, as anybody may ask for it; empty where there are none."""
    number = {"x86_64": 303, "aarch64": 264}.get(os.uname().machine) if sys.maxsize > 1 << 32 else 370
    buffer, mount = ctypes.create_string_buffer(b"\x78\0\0\0", 128), ctypes.c_int()
    if number is None or libc.syscall(ctypes.c_long(number), -100, bytes(path), buffer, ctypes.byref(mount), 0):
        return ""
    return buffer.raw[: 8 + buffer.raw[0]].hex()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("w").resolve())
    yield made
    made.close()


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path.resolve())


class Swapper:
    """Another process that exchanges a folder and a link while the block runs."""

    SCRIPT = """
import ctypes, sys
libc = ctypes.CDLL(None)
first, second = (sys.argv[1] + name for name in ("/swap", "/swap-link"))
print(libc.renameat2(-100, first.encode(), -100, second.encode(), 2), flush=True)
while True:
    libc.renameat2(-100, first.encode(), -100, second.encode(), 2)
"""

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        self.folder, self.wanted = folder, wanted

    def __enter__(self) -> None:
        if self.wanted:
            command = [sys.executable, "-I", "-S", "-c", self.SCRIPT, str(self.folder)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert self.process.stdout
            if self.process.stdout.readline() != b"0\n":
                self.__exit__()
                pytest.skip("this file system can't exchange names")

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self.process.kill()
            self.process.communicate()


# -- the controls


def unconfined(attack: Attack, place: dict[str, Any], world: World, ground: Ground) -> dict[str, Any]:
    """The attack in a plain process of the same user: a child of one that does nothing else, or one of its own."""
    if not (attack.alone or attack.below_a_shell or attack.inherits):
        return world.ask(attack.name, place)
    command = [sys.executable, str(PROGRAM), attack.name, json.dumps(place)]
    inherited: list[int] = []
    if attack.alone:
        command = ["unshare", *([] if IS_ROOT else ["--user", "--map-root-user"]), "--mount", *command]
    if attack.below_a_shell:
        command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command]
    if attack.inherits:
        inherited = [os.open(ground.outside, os.O_RDONLY), os.open(ground.outside / "file", os.O_RDONLY)]
        inherited.append(os.pidfd_open(world.victim.pid))
    environment = {**os.environ, "AGENTD_CANARY": CANARY}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=environment,
            pass_fds=inherited,
            cwd=ground.root,
        )
    finally:
        for descriptor in inherited:
            os.close(descriptor)
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return {"error": f"it ended with {done.returncode}: {done.stderr[-300:]}"}


def skip_without_programs(attack: Attack) -> None:
    if attack.execute and not HAS_PROGRAMS:
        pytest.skip("no cat, sh, true and echo of their own on this machine")


def test_every_attack_is_in_use():
    """None is written and then forgotten."""
    listed = subprocess.run([sys.executable, str(PROGRAM), "--list"], capture_output=True, text=True, check=True).stdout.split()
    source = Path(__file__).read_text().replace(PROGRAM.name, "")
    used = {attack.name for attack in [*TABLE, *UNCONTROLLED]}
    assert [name for name in listed if name not in used and f'"{name}"' not in source] == []
    assert used - set(listed) == set()


@pytest.mark.parametrize("attack", TABLE, ids=called)
def test_unconfined_the_attack_works(attack: Attack, world: World, ground: Ground):
    """The control: the same code gets what it wants where nothing holds it."""
    skip_without_programs(attack)
    world.reached()
    with Swapper(ground.inside, wanted=attack.swapping):
        place = world.place(ground, control=True) | {"seconds": 0.5 if attack.swapping else 5}  # others end when they have won
        answer = unconfined(attack, place, world, ground)
    worked = bool(answer.get("got")) or ground.harm() or world.reached()
    if not worked and (attack.forbidden or str(answer.get("error")).startswith("no ")):
        pytest.skip(f"{attack.forbidden or 'not here'}: {answer.get('error')}")
    assert worked, answer


# -- confined


class Silent:
    """A recorder that keeps nothing."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        return


@dataclass
class Prison:
    """A sandbox and what its calls may do: read and write `inside`, and start programs if an attack needs them."""

    sandbox: Sandbox

    def access(self, ground: Ground, execute: str = "", peers: frozenset[tuple[str, int]] = frozenset()) -> Access:
        rule = (PathRule(os.fsencode(ground.inside)),)
        programs = {"": (), "usr": (PathRule(b"/usr"),), "good": (PathRule(os.fsencode(GOOD)),)}[execute]
        return Access(read=rule, write=rule, execute=programs, connect=peers)

    def run(self, name: str, place: dict[str, Any], access: Access, *, deadline_s: float = 15) -> Outcome:
        job = Job("escapes", name, {"place": place}, {}, deadline_s, OUTPUT_BYTES)
        return self.sandbox.run(job, access, Silent(), threading.Event())

    def tried(self, name: str, place: dict[str, Any], access: Access, *, deadline_s: float = 15) -> tuple[Any, str]:
        """What the attack says it got, and everything it answered. To be killed is an answer too."""
        try:
            outcome = self.run(name, place, access, deadline_s=deadline_s)
        except SandboxFailure as e:
            return None, f"{type(e).__name__}: {e}"
        return (outcome.result or {}).get("got"), f"{outcome.result} {outcome.error}"

    def left(self) -> set[int]:
        """Processes below the zygote other than the spare, given a moment to be gone."""
        end = time.monotonic() + 3
        while len(below := children(self.sandbox.zygote_pid)) > 1 and time.monotonic() < end:
            time.sleep(0.01)
        return below if len(below) > 1 else set()


def children(pid: int | None) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def start(folder: Path, layers: tuple[str, ...] | None, limits: Limits | None = None) -> Sandbox:
    level = probe()
    if not level.confines or "broker" not in level.layers:
        pytest.skip(f"this kernel can't confine: {level.missing}")
    if layers is not None:
        level = dataclasses.replace(level, name="L2", layers=layers)
    made = Sandbox({"escapes": PROGRAM.read_bytes(), "quick": QUICK}, folder, level, limits=limits or Limits())
    os.environ["AGENTD_CANARY"] = CANARY
    try:
        made.start()
    finally:
        del os.environ["AGENTD_CANARY"]
    return made


@pytest.fixture(scope="module", params=LAYERS)
def prison(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prison]:
    made = Prison(start(tmp_path_factory.mktemp("work"), LAYERS[request.param]))
    yield made
    made.sandbox.stop()


@pytest.mark.parametrize("attack", [*TABLE, *UNCONTROLLED], ids=called)
def test_confined_the_attack_gets_nothing(attack: Attack, prison: Prison, world: World, ground: Ground):
    """Nothing outside is read or changed, nobody hears of it, nothing is left."""
    skip_without_programs(attack)
    world.reached()
    with Swapper(ground.inside, wanted=attack.swapping):
        place = world.place(ground, control=False) | {"seconds": attack.seconds}
        got, said = prison.tried(attack.name, place, prison.access(ground, attack.execute))
    assert not got, said
    assert CANARY not in said
    assert ground.harm() == []
    assert world.reached() == []
    assert prison.left() == set()


def test_the_scope_can_be_used_at_all(prison: Prison, ground: Ground, world: World):
    """A sandbox that refuses everything would pass every test above."""
    place = world.place(ground, control=False) | {"outside": str(ground.inside)}
    assert prison.tried("read_by_absolute_path", place, prison.access(ground))[0] == "inside\n"
    assert prison.tried("write_outside", place, prison.access(ground))[1] == "{'got': False} None"
    assert (ground.inside / "file").read_text() == "owned"
    if HAS_PROGRAMS:
        assert prison.tried("exec_a_reader", place, prison.access(ground, "usr"))[0] == "owned"
        place |= {"bad_program": GOOD, "outside": str(ground.inside)}
        assert "None" in prison.tried("evade_by_name", place, prison.access(ground, "good"))[1]


def test_unconfined_an_address_can_be_flipped(world: World, ground: Ground):
    """The control of the next test."""
    answer = unconfined(Attack("connect_to_a_flipped_address"), world.place(ground, control=True), world, ground)
    assert answer == {"got": True}
    assert "tcp" in world.reached()


def test_an_address_that_is_flipped_leads_to_granted_peers_only(prison: Prison, world: World, ground: Ground):
    """The broker connects to what it has read, and to nothing else."""
    world.reached()
    place = world.place(ground, control=False)
    access = prison.access(ground, peers=frozenset({("127.0.0.1", place["granted"])}))
    assert prison.tried("connect_to_a_flipped_address", place, access)[0] is False
    assert world.reached() == []
    world.granted.settimeout(5)
    world.granted.accept()[0].close()


# -- survivors


SURVIVORS = ["survive", "survive_by_forking_on", "survive_by_a_thread", "survive_without_the_channel"]


def grows(file: Path) -> bool:
    before = file.stat().st_size
    time.sleep(0.15)
    return file.stat().st_size > before


@pytest.mark.parametrize("name", SURVIVORS)
def test_unconfined_a_survivor_writes_on(name: str, world: World, ground: Ground):
    """The control: after the answer the file grows."""
    command = [sys.executable, str(PROGRAM), name, json.dumps(world.place(ground, control=True))]
    log = ground.inside / "log"
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 60  # an emulated machine takes seconds to start Python
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        try:
            assert grows(log)
        finally:
            log.unlink()


@pytest.mark.parametrize("name", SURVIVORS)
def test_nothing_writes_on_when_the_call_is_over(name: str, prison: Prison, world: World, ground: Ground):
    """A file that a child holds open has its last content when the answer is there."""
    prison.tried(name, world.place(ground, control=False), prison.access(ground, "usr"), deadline_s=3)
    log = ground.inside / "log"
    assert log.stat().st_size > 0
    assert not grows(log)
    assert prison.left() == set()


# -- more than its share


@pytest.mark.parametrize(
    "name", ["exceed_the_file_size", "hold_memory_of_the_kernel", "start_thousands_of_threads", "fork_from_many_threads"]
)
def test_a_call_gets_no_more_than_its_share(name: str, prison: Prison, world: World, ground: Ground):
    """Of the disk in one file, of memory, of processes and threads: refused, or ended."""
    got, said = prison.tried(name, world.place(ground, control=False), prison.access(ground, "usr"), deadline_s=8)
    assert not got, said
    assert prison.left() == set()


def test_a_call_costs_the_daemon_no_descriptor_for_good(prison: Prison, world: World, ground: Ground):
    """Connecting what is no socket, hundreds of times."""
    place = world.place(ground, control=False)
    access = prison.access(ground, peers=frozenset({("127.0.0.1", place["granted"])}))
    prison.tried("read_by_absolute_path", place, access)
    before = len(os.listdir("/proc/self/fd"))
    prison.tried("leak_descriptors_of_the_daemon", place, access)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_call_leaves_the_daemon_descriptors_to_work_with(prison: Prison, world: World, ground: Ground):
    """A path of nearly two thousand folders, where the daemon may have 1024 descriptors, as is usual."""
    refused: list[OSError] = []
    most, stop = 0, threading.Event()

    def work() -> None:
        nonlocal most
        while not stop.wait(0.0005):
            try:
                most = max(most, len(os.listdir("/proc/self/fd")))
            except OSError as e:
                refused.append(e)

    limits, before = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[0]), limits[1]))
    worker = threading.Thread(target=work)
    worker.start()
    try:
        prison.tried("exhaust_descriptors_of_the_daemon", world.place(ground, control=False), prison.access(ground))
    finally:
        stop.set()
        worker.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        remove_deep(ground.inside)
    assert refused == []
    assert most < before + 200


def remove_deep(folder: Path) -> None:
    """Without recursion: deeper than Python, or the clean-up of pytest, likes."""
    subprocess.run(["rm", "-rf", str(folder / "top"), str(folder / "next")], check=True)


def test_a_child_that_has_ended_can_be_signalled(prison: Prison, world: World, ground: Ground):
    """As programs do that end their children without having looked: an error there is a surprise to them."""
    place = world.place(ground, control=False)
    assert prison.tried("signal_a_child_that_has_ended", place, prison.access(ground, "usr"))[1] == "{'done': True} None"


# -- bad guests, and those who share the house with them


BAD_GUESTS: list[tuple[str, tuple[type[SandboxFailure], ...]]] = [
    ("hang", (WorkerTimeout,)),
    ("spin", (WorkerTimeout,)),
    ("spin_in_many_processes", (WorkerTimeout, WorkerOffence)),
    ("fork_without_end", (WorkerTimeout, WorkerOffence)),
    ("fork_and_stay", (WorkerTimeout, WorkerOffence)),
    ("flood_the_channel", (OutputTooLarge,)),
    ("flood_by_an_answer", (OutputTooLarge,)),
    ("flood_standard_output", ()),
    ("eat_memory", ()),
    ("eat_memory_together", (WorkerOffence,)),
    ("open_a_fifo", ()),
    ("close_everything", (WorkerDied,)),
    ("close_everything_and_stay", (WorkerDied,)),
    ("kill_the_parent", ()),
    ("kill_itself", (WorkerDied,)),
    ("stop_itself", (WorkerTimeout,)),
    ("make_denied_calls", (WorkerOffence,)),
    ("exit_without_an_answer", (WorkerDied,)),
    ("answer_no_text", (WorkerDied,)),
    ("answer_text_of_surrogates", ()),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prison]:
    made = Prison(start(tmp_path_factory.mktemp("work"), None, Limits(refused=20_000)))
    yield made
    made.sandbox.stop()


class Neighbour:
    """Quick calls on another thread, one after the other, while the block runs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox, self.stop = sandbox, threading.Event()
        self.took: list[float] = []
        self.failed: list[str] = []
        self.thread = threading.Thread(target=self.call)

    def call(self) -> None:
        while not self.stop.wait(0.02):
            started = time.monotonic()
            try:
                outcome = self.sandbox.run(Job("quick", "quick", {}, {}, 10, 4096), Access(), Silent(), threading.Event())
                self.failed += [] if outcome.result == {"done": True} else [str(outcome)]
            except Exception as e:
                self.failed.append(f"{type(e).__name__}: {e}")
            self.took.append(time.monotonic() - started)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


@pytest.mark.parametrize(("name", "ends"), BAD_GUESTS, ids=[name for name, _ in BAD_GUESTS])
def test_a_bad_guest_ends_and_others_are_served_meanwhile(
    name: str, ends: tuple[type[SandboxFailure], ...], house: Prison, world: World, ground: Ground
):
    """By a named failure or an error of its own; the time that others waited is printed, and only bounded."""
    zygote, deadline_s = house.sandbox.zygote_pid, 1.0 if WorkerTimeout in ends else 8.0
    with Neighbour(house.sandbox) as neighbour:
        time.sleep(0.05)
        try:
            outcome = house.run(name, world.place(ground, control=False), house.access(ground, "usr"), deadline_s=deadline_s)
            ending = outcome.error
        except SandboxFailure as e:
            ending = type(e)
        time.sleep(0.03)
    took = sorted(neighbour.took)
    print(
        f"\n{name}: {ending}; {len(took)} quick calls, median {took[len(took) // 2] * 1e3:.1f} ms, longest {took[-1] * 1e3:.1f} ms"
    )
    assert ending in ends if ends else isinstance(ending, str)
    assert neighbour.failed == []
    assert took[-1] < 2
    assert house.left() == set()
    assert house.sandbox.zygote_pid == zygote


def test_forged_numbers_fit_into_what_keeps_them(prison: Prison, world: World, ground: Ground):
    """Audit and protocol hold 64 bits."""
    try:
        outcome = prison.run("answer_numbers_that_fit_nowhere", world.place(ground, control=False), prison.access(ground))
    except SandboxFailure:
        return
    assert 0 <= outcome.cpu_us < 1 << 63
    assert 0 <= outcome.rss_kb < 1 << 63


def test_a_result_is_json_and_nothing_else(prison: Prison, world: World, ground: Ground):
    """NaN and Infinity are Python's own."""
    try:
        outcome = prison.run("answer_what_is_no_json", world.place(ground, control=False), prison.access(ground))
    except SandboxFailure:
        return
    assert outcome.error or all(math.isfinite(value) for value in (outcome.result or {}).values())


def test_two_workers_draw_different_numbers(prison: Prison, world: World, ground: Ground):
    """They are forks of one process, whose generators they would share."""
    place, access = world.place(ground, control=False), prison.access(ground, "usr")
    draws = [prison.run("draw", place, access).result or {} for _ in range(3)]
    assert set(draws[0]) >= {"random", "bits", "uuid", "urandom", "system"}
    for name in draws[0]:
        assert len({draw[name] for draw in draws}) == 3, name
