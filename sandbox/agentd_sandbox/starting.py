"""What the kernel must do itself with a path: start a program (execve), and enter a folder by its path (chdir).

It reads the path again, and walks it. What it does then is what was decided on here: nobody else has the memory that the path
is in, and no broker changes a name on the way meanwhile (`walks`).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd_sandbox import kernel
from agentd_sandbox.errors import WorkerOffence
from agentd_sandbox.interpreters import interpreter
from agentd_sandbox.paths import reopen
from agentd_sandbox.processes import AT_FDCWD
from agentd_sandbox.system import is_part_of_system

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd_sandbox.files import Files
    from agentd_sandbox.kernel import Notification
    from agentd_sandbox.paths import Resolved
    from agentd_sandbox.processes import Processes
    from agentd_sandbox.reach import Right

_DECIDING_S, _DECIDE_AGAIN_S = 2.0, 0.001
_INTERPRETERS = 6  # one after another: the kernel takes 5 scripts


@dataclass(slots=True)
class Starting:
    """Of one worker and all that it starts. `path` reads an absolute path of a call, which is not walked yet."""

    listener: int
    processes: Processes
    files: Files
    path: Callable[[Notification, int, int], bytes]
    _started: dict[int, tuple[bytes, set[bytes]]] = field(default_factory=dict)
    """By thread: what it ran before, and interpreters that it may run now."""
    _lent: set[int] = field(default_factory=set)
    """Processes whose child has their memory; they wait for it."""

    def goes_on(self, thread: int) -> None:
        """It makes another call: what it had the kernel do is over, and so is what it had lent."""
        self.files.walks.end(thread)
        self._lent.discard(thread)

    def lend(self, call: Notification) -> None:
        """At most two processes have one memory, and the one that lent it waits: then whoever asks is alone in it."""
        self.require_own_memory(call, "vfork")
        if not self.processes.is_alone(call.thread):
            self.files.deny("vfork", "it has several threads")
            raise OSError(errno.EPERM, "shared")
        self._lent.add(call.thread)

    def require_own_memory(self, call: Notification, what: str) -> None:
        """Memory that was lent goes back to the one who waits for it only once nobody else has it."""
        if self._lent and self.processes.parent(call.thread) in self._lent and self.processes.shares_memory(call.thread):
            self.files.deny(what, "its memory is its parent's, which waits for it")
            raise OSError(errno.EPERM, "shared")

    def execute(self, call: Notification, path: int) -> int | None:
        """What the kernel does then is what is decided on here; and once more when the program makes its first call."""

        may_run: set[bytes] = set()

        def require_program(target: Resolved) -> None:
            if not stat.S_ISREG(target.status.st_mode):
                raise OSError(errno.EACCES, "no program")
            may_run.update(self._interpreters(target))

        self._let_walk(call, path, "execute", require_program)
        self._started[call.thread] = self.processes.program(call.thread), may_run
        self.processes.forget_one(call.thread)
        return self._let_go(call)

    def _interpreters(self, target: Resolved) -> list[bytes]:
        """What the kernel starts with a program, or instead of it: it must be there for this call, to be started or read."""
        found_all: list[bytes] = []
        try:
            program = reopen(target.descriptor, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError:
            if is_part_of_system(target.real):  # set-uid programs may be closed; tools can't make one of those
                return found_all
            raise
        try:
            for _ in range(_INTERPRETERS):
                if (named := interpreter(program)) is None:
                    break
                if not named.startswith(b"/"):  # it would be looked up from the working folder
                    self.files.deny(named, "an interpreter without its whole path")
                    raise OSError(errno.EACCES, "interpreter")
                with self.files.walked(named, "see") as found:
                    if not (self.files.access.may_execute(found.real) or self.files.access.may_read(found.real)):
                        self.files.deny(named, "an interpreter that may not be used")
                        raise OSError(errno.EACCES, "interpreter")
                    found_all.append(found.real)
                    following = reopen(found.descriptor, os.O_RDONLY | os.O_NONBLOCK)
                os.close(program)
                program = following
        finally:
            os.close(program)
        return found_all

    def _let_go(self, call: Notification) -> int | None:
        try:
            kernel.let_through(self.listener, call.id)
        except OSError:  # it is gone
            self.files.walks.end(call.thread)
            raise
        self.files.walks.let_through(call.thread)
        return None

    def change_folder(self, call: Notification, path: int) -> int | None:
        def require_directory(target: Resolved) -> None:
            if not target.is_folder:
                raise OSError(errno.ENOTDIR, "folder")
            if not os.access(f"/proc/self/fd/{target.descriptor}", os.X_OK):
                raise OSError(errno.EACCES, "mode")

        self._let_walk(call, path, "see", require_directory)
        return self._let_go(call)

    def _let_walk(self, call: Notification, path: int, right: Right, require: Callable[[Resolved], None]) -> None:
        """Decide on a path that the kernel reads and walks once more. Nobody can change either meanwhile, from here on.

        First nobody else must have this memory, then it is opened anew, and only then is it read: what was read before, and
        whose memory the number of this thread once stood for, does not count.
        """
        if not self.processes.is_alone(call.thread):
            self.files.deny(self.files.call, "where somebody else could change the path meanwhile")
            raise OSError(errno.EPERM, "shared")
        self.processes.forget_one(call.thread)
        deadline = time.monotonic() + _DECIDING_S
        while True:
            seen = self.files.walks.changes
            place = self.path(call, AT_FDCWD, path)
            if not kernel.still_waiting(self.listener, call.id):
                raise OSError(errno.EINTR, "gone")
            lies_in: list[bytes] = []

            def may_write(file: bytes, lies_in: list[bytes] = lies_in) -> bool:
                lies_in.append(file)
                return self.files.walks.may_be_written(file)

            length = len(self.processes.string(call.thread, path)) + 1
            if not self.processes.is_private(call.thread, path, length, may_write):
                self.files.deny(place, "its path lies where somebody else could change it")
                raise OSError(errno.EPERM, "shared")
            with self.files.walked(place, right) as target:
                require(target)
                ways = target.ways
            if self.files.walks.begin(id(self.files), call.thread, call.number, ways, seen, lies_in):
                return
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "names on the way change all the time")
            time.sleep(_DECIDE_AGAIN_S)

    def check_program(self, call: Notification) -> None:
        """Whether what runs now may: by swapping the path, another program may have been started. Or none at all."""
        if (started := self._started.pop(call.thread, None)) is None:
            return
        before, may_run = started
        now = self.processes.program(call.thread)
        if now != before and now not in may_run and not self.files.access.may_execute(now):
            raise WorkerOffence(f"it started {os.fsdecode(now)} by changing a path that was being checked")
