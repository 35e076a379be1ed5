"""Approvals: a call that a person has to decide on waits here, until somebody answers, it is given up, or time runs out.

Lives on the event loop. Nobody's answer can be given twice: the first one counts, and the second is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import time
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from agentd.audit.events import Origin, origin
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from agentd.grants.scopes import Scope

_KEPT = 200  # answered ones that can still be asked about


class State(Enum):
    PENDING = "pending"
    ALLOWED = "allowed"
    DENIED = "denied"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"
    """The call was cancelled, or the daemon stopped."""


class Extent(Enum):
    """How long an answer holds."""

    ONCE = "once"
    RUN = "run"
    UNTIL = "until"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Answer:
    """`offers` names, by scope, the pattern to grant instead of just that scope; `until_ns` is for Extent.UNTIL."""

    allow: bool
    extent: Extent = Extent.ONCE
    until_ns: int = 0
    offers: Mapping[str, str] = field(default_factory=dict)
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Approval:
    """A question and what became of it. Everything in it is from the daemon; only `arguments` are the model's.

    `offers` has, for each scope that is asked for, the patterns that an answer may grant, the narrowest first.
    `undoable` is the journal's word: empty if the call can be undone, else why not. `read` is what the run has taken
    in so far, `labels` what that makes it.
    """

    id: str
    call: str
    principal: str
    tool: str
    description: str
    arguments: Mapping[str, Any]
    effect: str
    scopes: tuple[Scope, ...]
    unmet: tuple[Scope, ...]
    reason: str
    not_undoable: str
    run: str = ""
    session: str = ""
    labels: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    sends_out: bool = False
    """The run holds private data and has taken in what others wrote: only this one call, or this run, can be allowed."""
    offers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extents: tuple[Extent, ...] = tuple(Extent)
    create_ns: int = 0
    expire_ns: int = 0
    state: State = State.PENDING
    answer: Answer | None = None
    answered_by: str = ""
    answered_from: Origin | None = None

    @property
    def said(self) -> str:
        """How it ended, as a reason for the record."""
        words = {
            State.ALLOWED: f"allowed by {self.answered_by}",
            State.DENIED: f"{self.answered_by} said no",
            State.EXPIRED: f"nobody answered in {round((self.expire_ns - self.create_ns) / 1e9)} s",
            State.WITHDRAWN: "the call was given up before anybody answered",
            State.PENDING: "nobody has answered yet",
        }
        comment = f": {self.answer.comment}" if self.answer and self.answer.comment else ""
        extent = f" ({self.answer.extent.value})" if self.answer and self.answer.allow else ""
        return words[self.state] + extent + comment


class Approvals:
    """All questions. `limit` are pending at most: the oldest is denied to make room for one more."""

    def __init__(self, timeout_s: float, limit: int) -> None:
        self._timeout_s, self._limit = timeout_s, limit
        self._pending: dict[str, tuple[Approval, asyncio.Future[Approval]]] = {}
        self._closed: dict[str, Approval] = {}
        self._queues: set[asyncio.Queue[Approval]] = set()
        self._people = 0
        self._others: list[Callable[[], bool]] = []

    @property
    def answerable(self) -> bool:
        """Whether anybody would be told of a question."""
        return self._people > 0 or any(there() for there in self._others)

    def also(self, there: Callable[[], bool]) -> None:
        """Another way to reach a person, beside watching clients; `there` says whether it works now."""
        self._others.append(there)

    def pending(self) -> list[Approval]:
        """Oldest first."""
        return [approval for approval, _ in self._pending.values()]

    def get(self, approval: str) -> Approval:
        """Raises RequestError (APPROVAL_NOT_FOUND)."""
        if approval in self._pending:
            return self._pending[approval][0]
        if approval in self._closed:
            return self._closed[approval]
        message = f"There is no approval {approval!r}."
        hint = "`agentd approvals list` shows those that wait for an answer."
        raise RequestError(Reason.APPROVAL_NOT_FOUND, message, hint=hint, field="name", metadata={"approval": approval})

    async def ask(self, approval: Approval, timeout_s: float = 0.0) -> Approval:
        """Wait for the answer; returns the approval with it, expired at the latest. Cancelling withdraws the question."""
        now, waits_s = time.time_ns(), timeout_s or self._timeout_s
        asked = replace(approval, create_ns=now, expire_ns=now + int(waits_s * 1e9))
        while len(self._pending) >= self._limit:
            oldest = next(iter(self._pending))
            self._close(oldest, State.DENIED, Answer(allow=False, comment="too many questions at a time"), "agentd")
        future: asyncio.Future[Approval] = asyncio.get_running_loop().create_future()
        self._pending[asked.id] = (asked, future)
        self._tell(asked)
        try:
            async with asyncio.timeout(waits_s):
                return await asyncio.shield(future)
        except TimeoutError:
            return self._close(asked.id, State.EXPIRED)
        except asyncio.CancelledError:
            self._close(asked.id, State.WITHDRAWN)
            raise

    def resolve(self, approval: str, answer: Answer, by: str) -> Approval:
        """Raises RequestError: APPROVAL_NOT_FOUND, APPROVAL_CLOSED if somebody was first, BAD_FIELD."""
        asked = self.get(approval)
        if asked.state is not State.PENDING:
            message = f"The approval {approval} is closed: {asked.said}."
            raise RequestError(Reason.APPROVAL_CLOSED, message, field="name", metadata={"state": asked.state.value})
        _check(asked, answer)
        return self._close(approval, State.ALLOWED if answer.allow else State.DENIED, answer, by)

    async def watch(self) -> AsyncIterator[Approval]:
        """All that are pending, then each as it comes and as it is closed. Whoever watches can be asked."""
        self._people += 1
        try:
            async for approval in self.news():
                yield approval
        finally:
            self._people -= 1

    async def news(self) -> AsyncIterator[Approval]:
        """The same for those who only look on."""
        queue: asyncio.Queue[Approval] = asyncio.Queue(self._limit * 4)
        self._queues.add(queue)
        try:
            for approval in self.pending():
                yield approval
            while True:
                yield await queue.get()
        finally:
            self._queues.discard(queue)

    def withdraw(self, principal: str) -> int:
        """What somebody has asked, who is to ask nothing more; returns how many that were."""
        asked = [approval for approval, (question, _) in self._pending.items() if question.principal == principal]
        for approval in asked:
            self._close(approval, State.WITHDRAWN)
        return len(asked)

    def stop(self) -> None:
        """Withdraw what is pending."""
        for approval in list(self._pending):
            self._close(approval, State.WITHDRAWN)

    def _close(self, approval: str, state: State, answer: Answer | None = None, by: str = "") -> Approval:
        if approval not in self._pending:
            return self._closed[approval]
        asked, future = self._pending.pop(approval)
        closed = replace(asked, state=state, answer=answer, answered_by=by, answered_from=origin.get() if by else None)
        self._closed[approval] = closed
        while len(self._closed) > _KEPT:
            self._closed.pop(next(iter(self._closed)))
        if not future.done():
            future.set_result(closed)
        self._tell(closed)
        return closed

    def _tell(self, approval: Approval) -> None:
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):  # a watcher that does not read misses news, nobody else does
                queue.put_nowait(approval)


def _check(asked: Approval, answer: Answer) -> None:
    def bad(field_name: str, why: str) -> RequestError:
        return RequestError(Reason.BAD_FIELD, f"{field_name} {why}.", field=field_name, metadata={"field": field_name})

    if not answer.allow:
        return
    if answer.extent not in asked.extents:
        words = ", ".join(extent.value for extent in asked.extents)
        raise bad("extent", f"{answer.extent.value} is not offered for this call; offered are {words}")
    if answer.extent is Extent.UNTIL and answer.until_ns <= time.time_ns():
        raise bad("until", "is not in the future")
    for scope, pattern in answer.offers.items():
        if pattern not in asked.offers.get(scope, ()):
            raise bad("offers", f"has {pattern} for {scope}, which was not offered")


def offers_for(scope: Scope) -> tuple[str, ...]:
    """What a lasting answer may grant for a scope, the narrowest first: itself, then the folder it lies in.

    Not a folder that holds next to everything: the root, those right below it, and homes.
    """
    if "*" in scope.value and not scope.glob:
        return ()
    if scope.kind not in ("read", "write"):
        return (str(scope),)
    folder = scope.value.rpartition("/")[0]
    wide = folder.count("/") < 2 or folder in _homes() or "*" in folder
    return (str(scope),) if wide else (str(scope), f"{scope.kind}:{folder}")


def _homes() -> frozenset[str]:
    return frozenset({os.path.expanduser("~")} | {entry.pw_dir for entry in pwd.getpwall()})
