"""What one call may reach: from a path to a thing that it may use as it wants to, or to the refusal.

What is outside the scopes does not exist (ENOENT), what may be seen but not used is refused (EACCES). Decided on is the
real path.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agentd_sandbox.errors import WorkerRevoked
from agentd_sandbox.nearby import Walker, is_crooked
from agentd_sandbox.outcome import Denial
from agentd_sandbox.paths import Absent, Resolved, Sight, WalkError
from agentd_sandbox.system import is_part_of_system

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd_sandbox.access import Access

DEVICES = frozenset({b"/dev/null", b"/dev/zero", b"/dev/full", b"/dev/urandom", b"/dev/random"})
_RECORDED_DENIALS = 32
_NOTED_DENIALS = 1000  # looked at at all

Right = Literal["see", "read", "write", "execute"]


@dataclass(slots=True)
class Reach:
    """The scopes of one call, and what it was refused. `call` is the system call being done, for the record of denials."""

    access: Access
    revoked: threading.Event = field(default_factory=threading.Event, kw_only=True)
    call: str = field(default="", kw_only=True)
    denied: int = field(default=0, kw_only=True)
    denials: list[Denial] = field(default_factory=list, kw_only=True)
    _noted: set[tuple[str, bytes | str]] = field(default_factory=set, kw_only=True)
    _walker: Walker = field(init=False)

    def __post_init__(self) -> None:
        sight = Sight(self._may_pass, self.access.absent, self.access.protected)
        self._walker = Walker(sight, self._is_steady)

    def require_granted(self) -> None:
        """Raises WorkerRevoked once the call may do nothing any more."""
        if self.revoked.is_set():
            raise WorkerRevoked("its grant was revoked")

    def close(self) -> None:
        """To be called when nothing is served any more."""
        self._walker.close()

    def deny(self, target: bytes | str, why: str) -> None:
        """Counted, and the first of them kept: but not that a program looked for parts of the system that are not there."""
        self.denied += 1
        noted = (self.call, target)
        if len(self.denials) >= _RECORDED_DENIALS or noted in self._noted or len(self._noted) >= _NOTED_DENIALS:
            return
        self._noted.add(noted)
        if not (isinstance(target, bytes) and is_part_of_system(target)):
            self.denials.append(Denial(self.call, os.fsdecode(target), why))

    def existing(self, path: bytes, right: Right, *, follow: bool = True) -> Resolved:
        """Something that is there, and may be used as `right` says."""
        return self._usable(self._found(path, follow=follow), right)

    def _found(self, path: bytes, *, follow: bool) -> Resolved:
        """What a path leads to, if anything."""
        return self._reach(path, functools.partial(self._walker.existing, follow=follow))

    def _named(self, path: bytes) -> Resolved:
        """The name itself, with the directory that it is in."""
        return self._reach(path, self._walker.named)

    def walked(self, path: bytes, right: Right) -> Resolved:
        """As `existing`, with all the ways that lead there."""
        target = self._reach(path, self._walk_to)
        return self._usable(target, right)

    def _walk_to(self, path: bytes) -> Resolved:
        return self._walker.walked(path, follow=True)

    def _usable(self, target: Resolved, right: Right) -> Resolved:
        try:
            self.require(target, right)
            if not target.exists:
                raise OSError(errno.ENOENT, "missing")
        except OSError:
            target.__exit__()
            raise
        return target

    def _reach(self, path: bytes, find: Callable[[bytes], Resolved]) -> Resolved:
        """A hidden path is not even looked up: a link out there that leads into the scopes does not exist either."""
        if not (self._may_see(path) or is_crooked(path)):
            self.deny(path, "no scope to see it")
            raise OSError(errno.ENOENT, "hidden")
        try:
            return find(path)
        except Absent as e:
            self.deny(e.reached, "it is agentd's own")
            raise
        except WalkError as e:
            if self._may_see(e.reached):
                raise
            self.deny(e.reached, "leads out of the scopes")
            raise OSError(errno.ENOENT, "hidden") from None

    def _is_steady(self, path: bytes) -> bool:
        """Whether it stays as it is while the call runs, as far as the call is concerned: it need be looked up only once."""
        return is_part_of_system(path) and not self.access.may_write(path)

    def _may_see(self, path: bytes) -> bool:
        return path in DEVICES or self.access.may_see(path)

    def _may_pass(self, path: bytes) -> bool:
        """Whether a walk may lead over it."""
        return path == b"/dev" or self._may_see(path)

    def require(self, target: Resolved, right: Right) -> None:
        """What is hidden does not exist; what is seen but not granted is refused."""
        access, real = self.access, target.real
        match right:
            case "read":
                allowed = access.may_read(real) or real in DEVICES
            case "write":
                if target.is_protected:
                    self.deny(real, "agentd runs it, or is configured by it")
                    raise OSError(errno.EACCES, "protected")
                allowed = access.may_write(real)
            case "execute":
                allowed = access.may_execute(real)
            case _:
                allowed = access.may_see(real) or real in DEVICES
        if not allowed:
            later = right == "write" and access.runs_later(real)
            self.deny(real, "it runs later, and no grant names it" if later else f"no scope to {right} it")
            raise OSError(errno.EACCES if target.exists and access.may_see(real) else errno.ENOENT, "denied")
