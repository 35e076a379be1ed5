"""The processes of one worker: their memory, descriptors and folders, who belongs to them, and their end."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from agentd_sandbox import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AT_FDCWD = -100
ALL_PROCESSORS = os.sched_getaffinity(0)
_PATH_MAX = 4096
_PAGE = os.sysconf("SC_PAGESIZE")  # 16 KiB on a Raspberry Pi 5
_KEPT_MEMORIES = 32
_PATIENCE_S, _LOOK_AGAIN_S, _LOOKS = 0.8, 0.002, 5
_DELETED = b" (deleted)"
_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ (\d+) *(.*)")


def signed(value: int) -> int:
    """An int argument as the kernel reads it: the low half of the register, signed."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value & 0x8000_0000 else value


@dataclass(slots=True)
class Processes:
    """A worker and all that it has started. `root` is its process id and that of the session they all stay in.

    They are one trust domain: a stale memory descriptor can confuse them, not the broker.
    """

    root: int
    pidfd: int
    many: bool = False
    """Whether there may be more than the worker itself."""
    _memories: dict[int, int] = field(default_factory=dict)

    def close(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop what is known of their memory."""
        for descriptor in self._memories.values():
            os.close(descriptor)
        self._memories.clear()

    def forget_one(self, thread: int) -> None:
        """It is about to become another program, while the parent of a vfork goes on in the same memory."""
        if thread in self._memories:
            os.close(self._memories.pop(thread))

    # -- memory

    def string(self, thread: int, address: int) -> bytes:
        """The string at `address`, read once. Raises OSError: EFAULT, ENAMETOOLONG."""
        data = self.read(thread, address, min(256, _PAGE - address % _PAGE))
        while (end := data.find(b"\0")) < 0 and len(data) < _PATH_MAX:
            here = address + len(data)
            data += self.read(thread, here, _PAGE - here % _PAGE)
        if not 0 <= end < _PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, "path")
        return data[:end]

    def read(self, thread: int, address: int, size: int) -> bytes:
        """At least one byte. An address space that has ended reads as nothing: then it is opened anew."""
        try:
            data = os.pread(self._memory(thread), size, address)
            if not data:
                os.close(self._memories.pop(thread))
                data = os.pread(self._memory(thread), size, address)
        except (OSError, OverflowError):
            raise OSError(errno.EFAULT, "address") from None
        if not data:
            raise OSError(errno.EFAULT, "address")
        return data

    def write(self, thread: int, address: int, data: bytes) -> None:
        """The caller has made sure that the thread still waits: the descriptor holds its memory from then on."""
        try:
            os.pwrite(self._memory(thread), data, address)
        except (OSError, OverflowError):
            raise OSError(errno.EFAULT, "buffer") from None

    def _memory(self, thread: int) -> int:
        descriptor = self._memories.get(thread)
        if descriptor is None:
            if len(self._memories) >= _KEPT_MEMORIES:
                self.forget()
            descriptor = self._memories[thread] = os.open(f"/proc/{thread}/mem", os.O_RDWR | os.O_CLOEXEC)
        return descriptor

    def is_alone(self, thread: int) -> bool:
        """Whether it is the only thread of a process of this call. While it waits, nobody can make another one."""
        for _ in range(_LOOKS):
            seen = _look(thread)  # with one thread only, that is its process
            if seen.threads == 1 or seen.session != self.root:
                break
            time.sleep(_LOOK_AGAIN_S)  # one that was joined may still be counted
        return seen.threads == 1 and seen.session == self.root

    def parent(self, process: int) -> int:
        return _look(process).parent

    def shares_memory(self, process: int) -> bool:
        """With its parent; also where that can't be found out."""
        return kernel.share_memory(process, _look(process).parent)

    def is_private(self, thread: int, address: int, length: int, may_write: Callable[[bytes], bool]) -> bool:
        """Whether memory is its process's alone, and not a file's that it may write (mmap(2): changes of the file may show)."""
        maps = os.open(f"/proc/{thread}/maps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _is_anonymous(maps, address, length):
                return True
            covered = address
            for line in _lines(maps):
                match = _MAPPING.match(line)
                if match is None or int(match[2], 16) <= covered:
                    continue
                if int(match[1], 16) > covered or match[3][3:4] != b"p":
                    return False
                file = match[5]
                if match[4] != b"0" and (b"\\" in file or file.endswith(b" (deleted)") or may_write(file)):
                    return False
                covered = int(match[2], 16)
                if covered >= address + length:
                    return True
        finally:
            os.close(maps)
        return False

    # -- descriptors and folders

    def base(self, thread: int, descriptor: int) -> bytes:
        """The folder that a relative path starts from, as a path to be walked again."""
        number = signed(descriptor)
        link = b"/proc/%d/cwd" % thread if number == AT_FDCWD else b"/proc/%d/fd/%d" % (thread, number)
        try:
            base = os.readlink(link)
        except OSError:
            raise OSError(errno.EBADF, "dirfd") from None
        if not base.startswith(b"/"):
            raise OSError(errno.ENOTDIR, "dirfd")
        if base.endswith(_DELETED) and not _is_there(link, base):  # proc(5): or there may be something of that very name
            raise OSError(errno.ENOENT, "deleted")
        return base

    def take(self, thread: int, descriptor: int) -> int:
        """A copy of one of its descriptors; the caller closes it."""
        process = self.leader(thread)
        if process == self.root:
            return kernel.take_descriptor(self.pidfd, signed(descriptor))
        pidfd = os.pidfd_open(process)
        try:
            return kernel.take_descriptor(pidfd, signed(descriptor))
        finally:
            os.close(pidfd)

    def program(self, thread: int) -> bytes:
        """The path of what it runs; empty if it is gone."""
        try:
            return os.readlink(b"/proc/%d/exe" % thread)
        except OSError:
            return b""

    def flags(self, thread: int, descriptor: int) -> int:
        """The open flags of one of its descriptors, O_CLOEXEC among them (proc(5), fdinfo)."""
        with open(f"/proc/{thread}/fdinfo/{signed(descriptor)}") as info:
            for line in info:
                if line.startswith("flags:"):
                    return int(line.split()[1], 8)
        raise OSError(errno.EBADF, "descriptor")

    def umask(self, thread: int) -> int:
        return int(_status(thread).get("Umask", "0022"), 8)

    def leader(self, thread: int) -> int:
        """The process that a thread belongs to."""
        return thread if thread == self.root else int(_status(thread).get("Tgid", thread))

    def status(self, thread: int, descriptor: int) -> bytes:
        """`struct stat` of one of its descriptors. What the number leads to after its end, whoever reads it must check."""
        return kernel.raw_stat_of(b"/proc/%d/fd/%d" % (thread, signed(descriptor)))

    # -- who belongs to them

    def members(self) -> list[int]:
        """All living processes of the session. Nobody can leave it: setsid(2) is refused."""
        seen = ((process, _look(process)) for process in _processes())
        return [process for process, look in seen if look.session == self.root and look.lives]

    def threads(self) -> int:
        """How many they have together, beside the first of each."""
        return sum(max(0, _look(process).threads - 1) for process in self.members())

    def watches(self) -> int:
        """How many different lists of watched descriptors (epoll) they hold."""
        found: set[str] = set()
        for process in self.members():
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{process}/fd"):
                    with contextlib.suppress(OSError):
                        if os.readlink(f"/proc/{process}/fd/{number}") == "anon_inode:[eventpoll]":
                            found.add(f"{process} {number}")
        return len(found)

    def contains(self, process: int) -> bool:
        return _look(process).session == self.root

    def signal(self, process: int, number: int) -> None:
        """Send a signal to a member, and to no one who may get its number later. Raises OSError (ESRCH, EPERM)."""
        try:
            pidfd = os.pidfd_open(process)
        except OSError:
            raise OSError(errno.ESRCH, "no such process") from None
        try:
            if not self.contains(process):
                raise OSError(errno.EPERM, "not a process of this call")
            signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)

    def kill(self) -> None:
        """Kill the worker, and what it has started if anything. What a killed process forked last needs another call."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        if self.many:
            for process in self.members():
                with contextlib.suppress(OSError, ProcessLookupError):
                    self.signal(process, signal.SIGKILL)

    def unnamed_bytes(self) -> int:
        """What files that they hold open take, and that have no name any more."""
        sizes: dict[tuple[int, int], int] = {}
        for process in self.members() if self.many else [self.root]:
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{process}/fd"):
                    with contextlib.suppress(OSError):
                        status = os.stat(f"/proc/{process}/fd/{number}")
                        if status.st_nlink == 0 and stat.S_ISREG(status.st_mode):
                            sizes[status.st_dev, status.st_ino] = max(status.st_size, status.st_blocks * 512)
        return sum(sizes.values())

    def memory_kb(self) -> int:
        """What they hold together, files apart. Pages that forks share are counted for each."""
        seen = (_status(process) for process in self.members())
        return sum(int(each.get(kind, "0 kB").split()[0]) for each in seen for kind in ("RssAnon", "RssShmem"))


def share_processor(processor: int) -> None:
    """Worker and broker run on the same one, so that a call and its answer need not wake another (100 us become 45)."""
    if processor >= 0:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {processor})


def share_no_processor(thread: int) -> None:
    """Many processes on one would leave their broker little of it. To be called by the broker, for itself and the first."""
    for each in (0, thread):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(each, ALL_PROCESSORS)


def kill_descendants(process: int) -> None:
    """Kill all that a subreaper has below it, until nothing is left, or only what is stuck in the kernel.

    Such a process (a file system that does not answer) has been killed as well: it will run no instruction of its own any more,
    and is not waited for. What was being started meanwhile is found by the next look.
    """
    killed: dict[int, float] = {}
    while below := _below(process):
        now = time.monotonic()
        for each in below:
            killed.setdefault(each, now)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if all(now - killed[each] > _PATIENCE_S for each in below):
            return
        time.sleep(_LOOK_AGAIN_S)


def _below(process: int) -> list[int]:
    """Its descendants, nearest first."""
    found = [process]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{each}/task/{thread}/children") as file:
                    found.extend(int(child) for child in file.read().split())
    return found[1:]


def _is_there(link: bytes, path: bytes) -> bool:
    """Whether what a link of procfs stands for has this path, which has no link in it."""
    try:
        one, other = os.stat(link), os.lstat(path)
    except OSError:
        return False
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_anonymous(maps: int, address: int, length: int) -> bool:
    """Whether all of it is private memory and no file's; False also where the kernel can't be asked about one address."""
    end = address + length
    while address < end:
        try:
            address, alone = kernel.mapping(maps, address)
        except (OSError, struct.error):
            return False
        if not alone:
            return False
    return True


def _lines(maps: int) -> Iterator[bytes]:
    """Of /proc/TID/maps, a page at a time: the kernel takes its time over long ones."""
    rest = b""
    while chunk := os.read(maps, 4096):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


class _Seen(NamedTuple):
    """Of a process, from /proc/PID/stat; all 0 if it is gone. `dead` is one that nobody has waited for yet."""

    parent: int = 0
    session: int = 0
    threads: int = 0
    dead: bool = False

    @property
    def lives(self) -> bool:
        """Also where its first thread has ended, and others go on."""
        return self.threads > 0 and not (self.dead and self.threads <= 1)


def _look(process: int) -> _Seen:
    try:
        descriptor = os.open(f"/proc/{process}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return _Seen()
    try:
        fields = os.read(descriptor, 1024).rpartition(b")")[2].split()
    except OSError:
        return _Seen()
    finally:
        os.close(descriptor)
    return _Seen(int(fields[1]), int(fields[3]), int(fields[17]), fields[0] in (b"Z", b"X")) if fields else _Seen()


def _status(process: int) -> dict[str, str]:
    try:
        with open(f"/proc/{process}/status", errors="replace") as file:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}
