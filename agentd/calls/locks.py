"""Who may change which trees of paths: calls that can't touch the same path run side by side, all others one after another.

A claim is for all its trees at once and takes its place in one queue, so there is no order in which two could wait for each
other. It waits for those before it that it overlaps, whether they run or wait themselves: nobody is passed by for ever.
What overlaps goes by which directory it is, not by how its path is spelled: a bind mount or a symlink is no way around.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.errors import AgentdError, Reason, ToolError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

WAITING = 64
"""Claims that may wait at a time."""
PATIENCE_S = 600.0
"""How long one waits: as long as a call may run."""
_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tree:
    """A path and all below it: what is on the way to it, nearest first, and what names lead from each of those to it."""

    steps: tuple[tuple[_Identity, tuple[bytes, ...]], ...]
    inside: tuple[bytes, ...] = ()
    """Its file system's number, and the names that lead to it in there, wherever that is mounted."""

    @classmethod
    def of(cls, path: bytes) -> Tree:
        """Of a path that need not be there. Asks the file system."""
        here, names, steps = os.path.realpath(path), list[bytes](), list[tuple[_Identity, tuple[bytes, ...]]]()
        inside = _inside(here)
        while True:
            with contextlib.suppress(OSError):
                status = os.stat(here)
                steps.append(((status.st_dev, status.st_ino), tuple(reversed(names))))
            if here == b"/":
                return cls(tuple(steps), inside)
            here, name = os.path.split(here)
            names.append(name.lower())  # there may be file systems that don't tell the two apart

    def overlaps(self, other: Tree) -> bool:
        return self._covers(other) or other._covers(self)

    def _covers(self, other: Tree) -> bool:
        """Whether the other one is in it."""
        if not self.steps:
            return True
        if self.inside and other.inside[: len(self.inside)] == self.inside:
            return True
        place, names = self.steps[0]
        return any(step == place and rest[: len(names)] == names for step, rest in other.steps)


def _inside(path: bytes) -> tuple[bytes, ...]:
    """Where a real path lies within its file system (proc(5), mountinfo); empty where that can't be said."""
    best, found = -1, tuple[bytes, ...]()
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            _, _, device, root, at, *_rest = (_plain(field) for field in line.split(b" "))
            below = path[len(at.rstrip(b"/")) :]
            if len(at) > best and (path == at or path.startswith(at.rstrip(b"/") + b"/")):
                names = (*root.lower().split(b"/"), *below.lower().split(b"/"))
                best, found = len(at), (device, *filter(None, names))
    return found


def _plain(field: bytes) -> bytes:
    """Spaces and the like are written as octal numbers there."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


@dataclass(slots=True, eq=False)
class Claim:
    """One owner's place in the queue."""

    owner: str
    trees: tuple[Tree, ...]
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    refused: AgentdError | None = None

    def overlaps(self, other: Claim) -> bool:
        return any(mine.overlaps(its) for mine in self.trees for its in other.trees)


class Locks:
    """To be used on one event loop."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._queue: list[Claim] = []
        self._patience_s = patience_s

    @contextlib.asynccontextmanager
    async def changing(self, owner: str, paths: Iterable[bytes], *, patience_s: float | None = None) -> AsyncIterator[None]:
        """Hold the trees at `paths` for as long as this lasts. Raises what `acquire` raises."""
        claim = await self.acquire(owner, paths, patience_s=patience_s)
        try:
            yield
        finally:
            self.release(claim)

    async def acquire(
        self,
        owner: str,
        paths: Iterable[bytes],
        waits: Callable[[tuple[str, ...]], None] = lambda _owners: None,
        *,
        patience_s: float | None = None,
    ) -> Claim:
        """Wait for the trees at `paths`; `release` gives them up. `waits` is called with the owners that are waited for.

        Raises ToolError: QUEUE_FULL if too many wait, TOOL_TIMEOUT if it takes too long; and what `refuse` was given.
        """
        wanted = tuple(paths)
        trees = await asyncio.to_thread(lambda: tuple(map(Tree.of, wanted)))
        claim = Claim(owner, trees)
        if sum(not each.ready.is_set() for each in self._queue) >= WAITING:
            message = f"{WAITING} calls wait already for others that change the same files."
            raise ToolError(Reason.QUEUE_FULL, message, hint="Try again later; `agentd top` shows who waits for whom.")
        self._queue.append(claim)
        try:
            await self._wait(claim, waits, self._patience_s if patience_s is None else patience_s)
        except BaseException:
            self.release(claim)
            raise
        return claim

    def release(self, claim: Claim) -> None:
        self._queue.remove(claim)
        self._wake()

    async def _wait(self, claim: Claim, waits: Callable[[tuple[str, ...]], None], patience_s: float) -> None:
        self._wake()
        if claim.ready.is_set():
            return
        others = self.waits_for(claim.owner)
        waits(others)
        try:
            await asyncio.wait_for(claim.ready.wait(), patience_s)
        except TimeoutError:
            message = f"It waited {patience_s:.0f} s for call {others[0]}, which changes the same files."
            raise ToolError(Reason.TOOL_TIMEOUT, message, hint="Nothing was changed.", metadata={"call": others[0]}) from None
        if claim.refused:
            raise claim.refused

    def _wake(self) -> None:
        """Let those go that wait for nobody any more."""
        for n, claim in enumerate(self._queue):
            if not claim.ready.is_set() and not any(claim.overlaps(before) for before in self._queue[:n]):
                claim.ready.set()

    def waits_for(self, owner: str) -> tuple[str, ...]:
        """The owners before this one that it has to wait for, in their order; none if it does not wait."""
        for n, claim in enumerate(self._queue):
            if claim.owner == owner and not claim.ready.is_set():
                return tuple(before.owner for before in self._queue[:n] if claim.overlaps(before))
        return ()

    def refuse(self, owner: str, error: AgentdError) -> None:
        """End the wait of a claim."""
        for claim in self._queue:
            if claim.owner == owner and not claim.ready.is_set():
                claim.refused = error
                claim.ready.set()
