"""The broker: answers the system calls of one worker, from its own copies of the arguments.

Never lets the kernel re-read memory that the worker could still change: strings are read once, `Files` and `Network`
do what is asked, and the result is a descriptor or bytes that the broker puts in place. The few calls that the kernel
must do itself (fork, chdir, execve) are let through where their arguments are values or can't be changed any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.connecting import Connections
from agentd_sandbox.errors import WorkerOffence
from agentd_sandbox.filters import profile
from agentd_sandbox.forms import FORMS
from agentd_sandbox.limits import Limits
from agentd_sandbox.processes import AT_FDCWD, share_no_processor, signed
from agentd_sandbox.recorder import Refusal
from agentd_sandbox.starting import Starting

if TYPE_CHECKING:
    from agentd_sandbox.files import Files
    from agentd_sandbox.kernel import Notification
    from agentd_sandbox.network import Network
    from agentd_sandbox.processes import Processes
    from agentd_sandbox.proxy import Proxy

_ATTRIBUTE_BYTES = 65536  # XATTR_SIZE_MAX
_CLONE_THREAD, _CLONE_VM = 0x0001_0000, 0x100
_SA_RESTART = 0x1000_0000
_WORD = struct.Struct("@L")
_SIGNALS = 65  # 0 to 64: signal(7)


@dataclass(slots=True)
class Broker:
    """Answers the notifications of one worker, on one thread."""

    listener: int
    processes: Processes
    files: Files
    network: Network
    proxy: Proxy
    folder: bytes
    """The worker's first working folder; its file system may be asked for its size."""
    limits: Limits = field(default_factory=Limits)
    one_step: bool = True
    """Whether a descriptor may be injected and the call answered in one step (Linux 5.14)."""
    calls: int = 0
    busy: str = ""
    """What is being done right now, for the message if it never ends."""
    _forks: int = 0
    _threads: int = 0
    _pairs: int = 0
    _watches: int = 0
    _alive: int = 1
    _undelivered: dict[int, tuple[int, tuple[int, ...], int, int]] = field(default_factory=dict)
    connections: Connections = field(init=False)
    starting: Starting = field(init=False)
    _names: dict[int, str] = field(default_factory=lambda: profile().names)

    def __post_init__(self) -> None:
        self.connections = Connections(
            self.listener, self.processes, self.network, self.proxy, self.files.deny, self.limits.connections
        )
        self.starting = Starting(self.listener, self.processes, self.files, self.path)

    def serve_one(self) -> None:
        """Answer one waiting call. A call that is gone before its answer is no error. Raises WorkerOffence."""
        try:
            call = kernel.receive(self.listener)
        except OSError:
            return
        self.calls += 1
        self.files.require_granted()
        name = self.busy = self.files.call = self._names[call.number]
        self.starting.goes_on(call.thread)
        if self._undelivered and self._answer_again(call):
            return
        try:
            self.starting.check_program(call)
            value, code = FORMS[name](self, call, *call.arguments), 0
        except Refusal as e:
            self.files.deny("", str(e))
            value, code = 0, e.errno
        except OSError as e:
            value, code = 0, e.errno or errno.EIO
        except (OverflowError, ValueError, struct.error):  # a number or an address that no kernel call takes
            value, code = 0, errno.EINVAL
        if value is None:  # answered already, or will be on a thread of its own
            return
        self._answer(call, value, code)
        if self.files.denied > self.limits.refused:
            raise WorkerOffence(f"it made more than {self.limits.refused} calls that were refused")

    def _answer_again(self, call: Notification) -> bool:
        """A signal took its answer away, and the kernel asks again for what is done already."""
        done = self._undelivered.pop(call.thread, None)
        if done is None or done[:2] != (call.number, call.arguments):
            return False
        self._answer(call, *done[2:])
        return True

    def _answer(self, call: Notification, value: int, code: int) -> None:
        try:
            kernel.answer(self.listener, call.id, value, code)
        except OSError:
            # Only a kernel without WAIT_KILLABLE_RECV lets a signal do this to a process that lives on.
            if not code and len(self._undelivered) < self.limits.processes:
                self._undelivered[call.thread] = (call.number, call.arguments, value, code)

    def poke(self, call: Notification, address: int, data: bytes) -> None:
        """Its memory has been read before: whoever still waits after that is the one whose memory it is."""
        if not kernel.still_waiting(self.listener, call.id):
            raise OSError(errno.EINTR, "gone")
        self.processes.write(call.thread, address, data)

    def path(self, call: Notification, folder: int, address: int) -> bytes:
        """An absolute path, not walked yet."""
        text = self.processes.string(call.thread, address)
        if text.startswith(b"/"):
            return text
        if not text:
            raise OSError(errno.ENOENT, "empty path")
        base = self.processes.base(call.thread, folder)
        return base.rstrip(b"/") + b"/" + text

    def place_of(self, call: Notification, descriptor: int) -> bytes:
        """The path of an open descriptor, if it still leads to what is open."""
        path = self.processes.base(call.thread, descriptor)
        own = self.processes.take(call.thread, descriptor)
        try:
            opened = os.fstat(own)
        finally:
            os.close(own)
        with self.files.existing(path, "see", follow=False) as target:
            if (target.status.st_dev, target.status.st_ino) != (opened.st_dev, opened.st_ino):
                raise OSError(errno.EPERM, "its path leads elsewhere")
        return path

    def string(self, call: Notification, address: int) -> bytes:
        return self.processes.string(call.thread, address)

    def umask(self, call: Notification) -> int:
        return self.processes.umask(call.thread)

    # -- files

    def open(self, call: Notification, place: bytes, flags: int, mode: int) -> int | None:
        flags &= 0xFFFF_FFFF
        umask = self.umask(call) if flags & os.O_CREAT else 0
        opened = self.files.open(place, flags, mode, umask)
        injected_flags = flags & os.O_CLOEXEC
        try:
            if self.one_step:
                kernel.inject(self.listener, call.id, opened, injected_flags)
                return None
            return kernel.install(self.listener, call.id, opened, injected_flags)
        except OSError as e:
            if e.errno == errno.ENOENT:  # the caller is gone
                return None
            if e.errno == errno.EINVAL and self.one_step:  # Linux before 5.14
                self.one_step = False
                return kernel.install(self.listener, call.id, opened, injected_flags)
            raise  # EMFILE: it holds too many
        finally:
            os.close(opened)

    def change_otherwise(self, call: Notification) -> int | None:
        """ftruncate(2), and fcntl(2) that takes O_APPEND away: of whichever descriptor has this number by then."""
        self.files.stop_appending()
        return self.let_through(call)

    def preallocate(self, call: Notification, offset: int, length: int) -> int | None:
        """fallocate(2), of whichever descriptor has this number: all of it counts before it is there."""
        if offset >= 1 << 63 or length >= 1 << 63:
            raise OSError(errno.EINVAL, "range")
        self.files.require_room(length, self.limits.written_mib << 20)
        return self.let_through(call)

    def status(self, call: Notification, place: bytes, buffer: int, *, follow: bool) -> int:
        self.poke(call, buffer, self.files.status(place, follow=follow))
        return 0

    def status_at(self, call: Notification, folder: int, path: int, buffer: int, flags: int) -> int:
        """fstatat(2), which also is fstat(2) if the path is empty."""
        if not flags & kernel.AT_EMPTY_PATH or self.string(call, path):
            return self.status(call, self.path(call, folder, path), buffer, follow=not flags & kernel.AT_SYMLINK_NOFOLLOW)
        if signed(folder) == AT_FDCWD:
            return self.status(call, self.processes.base(call.thread, folder), buffer, follow=True)
        try:
            data = self.processes.status(call.thread, folder)
        except FileNotFoundError:
            raise OSError(errno.EBADF, "descriptor") from None
        self.poke(call, buffer, data)
        return 0

    def link_text(self, call: Notification, place: bytes, buffer: int, size: int) -> int:
        if signed(size) <= 0:
            raise OSError(errno.EINVAL, "size")
        text = self.files.link_text(place)[: signed(size)]
        self.poke(call, buffer, text)
        return len(text)

    def file_system(self, call: Notification, path: int, buffer: int) -> int:
        self.poke(call, buffer, self.files.file_system(self.path(call, AT_FDCWD, path), free=self.folder))
        return 0

    def owner_at(self, call: Notification, folder: int, path: int, owner: int, group: int, flags: int) -> None:
        empty = flags & kernel.AT_EMPTY_PATH and not self.string(call, path)
        place = self.place_of(call, folder) if empty else self.path(call, folder, path)
        self.files.change_owner(place, signed(owner), signed(group), follow=not flags & kernel.AT_SYMLINK_NOFOLLOW)

    def attribute(self, call: Notification, place: bytes, name: int, buffer: int, size: int, *, follow: bool) -> int:
        return self._give(call, buffer, size, self.files.attribute(place, self.string(call, name), follow=follow))

    def attributes(self, call: Notification, place: bytes, buffer: int, size: int, *, follow: bool) -> int:
        return self._give(call, buffer, size, self.files.attributes(place, follow=follow))

    def set_attribute(
        self, call: Notification, place: bytes, name: int, address: int, size: int, flags: int, *, follow: bool
    ) -> int:
        if size > _ATTRIBUTE_BYTES:
            raise OSError(errno.E2BIG, "value")
        value = self.processes.read(call.thread, address, size) if size else b""
        self.files.set_attribute(place, self.string(call, name), value, flags & 3, follow=follow)
        return 0

    def _give(self, call: Notification, buffer: int, size: int, value: bytes) -> int:
        """Bytes into a buffer; with size 0 only how many there are."""
        if size and len(value) > size:
            raise OSError(errno.ERANGE, "buffer")
        if size and value:
            self.poke(call, buffer, value)
        return len(value)

    # -- processes

    def let_through(self, call: Notification) -> int | None:
        kernel.let_through(self.listener, call.id)
        return None

    def clone(self, call: Notification, flags: int) -> int | None:
        """A new thread or process: counted, and let through, as all there is to it are values."""
        if not flags & _CLONE_THREAD:
            return self.fork(call, lends=bool(flags & _CLONE_VM))
        self.starting.require_own_memory(call, "clone")
        self._threads += 1
        if self._threads > self.limits.threads:
            self._threads = self.processes.threads() + 1
            if self._threads > self.limits.threads:
                self.files.deny("clone", f"more than {self.limits.threads} threads at a time")
                raise OSError(errno.EAGAIN, "threads")
        return self.let_through(call)

    def handle_signal(self, call: Notification, action: int) -> int | None:
        """rt_sigaction(2) of SIGCHLD: with SA_RESTART, whatever else it is.

        A signal takes a call away that the broker has not received yet, and the kernel then says EINTR to whoever has not
        asked for restarts: programs know of no such error from fork(2), and dash gives up. The memory is only its own.
        """
        if action:  # a handler or its number, then the flags: struct sigaction of the kernel's
            flags = action + _WORD.size
            (asked,) = _WORD.unpack(self.processes.read(call.thread, flags, _WORD.size))
            self.poke(call, flags, _WORD.pack(asked | _SA_RESTART))
        return self.let_through(call)

    def map_shared(self, call: Notification) -> int | None:
        """A device was granted to be read and written, which is recorded; what happens to its memory would not be."""
        if self.files.holds_device:
            self.files.deny("mmap", "a file can't be mapped to be shared once a device is open")
            raise OSError(errno.EACCES, "device")
        return self.let_through(call)

    def watch(self, call: Notification) -> int | None:
        """All there is to it are values."""
        self._watches += 1
        if self._watches > self.limits.watches:
            self._watches = self.processes.watches() + 1
            if self._watches > self.limits.watches:
                self.files.deny("epoll_create", f"more than {self.limits.watches} at a time")
                raise OSError(errno.EMFILE, "watches")
        return self.let_through(call)

    def lock(self, call: Notification, descriptor: int, how: int) -> int | None:
        """flock(2) that keeps all others out: taken here, of the caller's own open file. Answered later if it has to wait."""
        own = self.processes.take(call.thread, descriptor)
        try:
            if fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                self.files.deny("flock", "what may only be read is not locked against others")
                raise OSError(errno.EBADF, "read only")
            return self.connections.lock(call, own, wait=not how & fcntl.LOCK_NB)
        except OSError:
            os.close(own)
            raise

    def socket_pair(self, call: Notification) -> int | None:
        """All there is to it are values; where its two ends go to, the kernel writes."""
        self._pairs += 1
        if self._pairs > self.limits.socket_pairs:
            self.files.deny("socketpair", f"more than {self.limits.socket_pairs} pairs of sockets")
            raise OSError(errno.EMFILE, "sockets")
        return self.let_through(call)

    def fork(self, call: Notification, *, lends: bool = False) -> int | None:
        """`lends`: the new process has the memory of this one, which waits until it starts a program or ends (vfork)."""
        if lends:
            self.starting.lend(call)
        self._forks += 1
        if not self.processes.many:
            self.processes.many = True
            share_no_processor(call.thread)
        if self._forks > self.limits.forks:
            raise WorkerOffence(f"it started more than {self.limits.forks} processes")
        self._alive += 1
        if self._alive > self.limits.processes:
            self._alive = len(self.processes.members()) + 1
            if self._alive > self.limits.processes:
                self.files.deny("fork", f"more than {self.limits.processes} processes at a time")
                raise OSError(errno.EAGAIN, "processes")
        return self.let_through(call)

    def kill(self, call: Notification, process: int, number: int) -> int:
        """kill(2): a process, its own group (0), a group (negative) or all (-1): of this session only."""
        process, number = signed(process), signed(number)
        if not 0 <= number < _SIGNALS:
            raise OSError(errno.EINVAL, "signal")
        if process > 0:
            self._signal(process, number)
            return 0
        own = self.processes.leader(call.thread)
        group = os.getpgid(own) if process == 0 else -process
        members = [m for m in self.processes.members() if (m != own if process == -1 else _group(m) == group)]
        if not members:
            raise OSError(errno.ESRCH, "group")
        for member in members:
            with contextlib.suppress(OSError):
                self.processes.signal(member, number)
        return 0

    def kill_thread(self, call: Notification, process: int, thread: int, number: int) -> int | None:
        """tgkill(2), and tkill(2) with process -1. A thread of its own process the kernel may signal: it checks again.

        Anybody else's number could mean another process by the time it does: those are signalled here, as a whole.
        """
        process, thread = signed(process), signed(thread)
        if thread == call.thread or (process > 0 and process == self.processes.leader(call.thread)):
            return self.let_through(call)
        self._signal(process if process > 0 else self.processes.leader(thread), signed(number))
        return 0

    def _signal(self, process: int, number: int) -> None:
        try:
            self.processes.signal(process, number)
        except OSError as e:
            if e.errno == errno.EPERM:
                self.files.deny(f"process {process}", "no process of this call")
            raise

    def check(self) -> None:
        """To be called now and then. Raises WorkerOffence."""
        unnamed = self.processes.unnamed_bytes() if self.files.unnamed else 0
        if self.files.written() + unnamed > self.limits.written_mib << 20:
            raise WorkerOffence(f"it wrote more than {self.limits.written_mib} MiB")
        if self.processes.many and self.processes.memory_kb() > self.limits.memory_mib << 10:
            raise WorkerOffence(f"its processes took more than {self.limits.memory_mib} MiB together")


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return 0
