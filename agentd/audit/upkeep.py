"""What the log needs from time to time: signed, indexed, pruned, and looked through for what does not fit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from agentd.audit.anchors import read_notes
from agentd.audit.events import Event
from agentd.errors import AgentdError, Reason, StoreError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from agentd.audit.archive import Archive
    from agentd.audit.checkpoints import Checkpoints
    from agentd.audit.index import Index
    from agentd.audit.log import AuditLog

_LOOK_S = 5.0  # whether a checkpoint is due
_PRUNE_S = 3600.0
_VERIFY_S = 24 * 3600.0
_PAUSE_S = 0.01  # between pages of a log that is looked through in the background
_log = logging.getLogger(__name__)


class Upkeep:
    """`look`, `start`, `stop`, `end`, in this order."""

    def __init__(
        self,
        log: AuditLog,
        checkpoints: Checkpoints,
        index: Index,
        archive: Archive,
        keep_events: int,
        anchor_file: Path | None,
    ) -> None:
        self._log, self._checkpoints, self._index, self._archive = log, checkpoints, index, archive
        self._keep_events, self._anchor_file = keep_events, anchor_file
        self._tasks: list[asyncio.Task[None]] = []

    def look(self) -> None:
        """Before anything is recorded: an end that was cut off, or an older store, fits together; what was signed knows better.

        Raises StoreError, unless that is for damage.
        """
        file = self._anchor_file
        notes = read_notes(file.read_text(errors="replace")) if file and file.exists() else []
        try:
            why = self._checkpoints.contradiction(notes)
            self._log.entries(limit=1, newest_first=True)
        except StoreError as e:
            if e.reason is not Reason.STORE_DAMAGED:
                raise
            why = f"it is damaged ({e.metadata.get('error', '')})"
        if why:
            self._close(why)

    def start(self) -> None:
        names = {"checkpoints": self._sign(), "pruning": self._prune(), "verification": self._verify()}
        self._tasks = [asyncio.create_task(_kept_up(each, name), name=f"audit: {name}") for name, each in names.items()]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def end(self) -> None:
        """The last event, and a checkpoint over it. A full disk must not keep the daemon from stopping."""
        with contextlib.suppress(AgentdError):
            await asyncio.to_thread(self._log.record, Event(kind="stop", principal="agentd"))
            await asyncio.to_thread(self._checkpoints.make)

    async def _sign(self) -> None:
        """At the start, and whenever there is enough new."""
        with contextlib.suppress(AgentdError):
            await asyncio.to_thread(self._checkpoints.make)
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await asyncio.to_thread(self._index.keep_up)
                if await asyncio.to_thread(self._checkpoints.is_due):
                    await asyncio.to_thread(self._checkpoints.make)
            except AgentdError as e:
                _log.warning("the log could not be indexed or signed: %s", e)

    async def _prune(self) -> None:
        while True:
            with contextlib.suppress(AgentdError, OSError):  # what can't be done now is tried again
                if moved := await asyncio.to_thread(self._archive.prune, self._keep_events, "agentd"):
                    await asyncio.to_thread(self._index.forget, moved.last)
            await asyncio.sleep(_PRUNE_S)

    async def _verify(self) -> None:
        while True:
            if not self._log.closed:
                why = await asyncio.to_thread(self._fault)
                if why and not self._log.closed:
                    await asyncio.to_thread(self._close, why)
            await asyncio.sleep(_VERIFY_S)

    def _fault(self) -> str:
        """What is wrong with the log, gone through as slowly as befits the background; empty if nothing is."""
        try:
            return self._checkpoints.verify((), lambda _: time.sleep(_PAUSE_S)).why
        except Exception as e:  # whatever makes verifying fail may be meant to
            _log.exception("the audit log can't be verified")
            return f"it can't be verified ({type(e).__name__})"

    def damaged(self, error: StoreError) -> None:
        """Somebody has found pages that can't be read."""
        if not self._log.closed:
            self._close(f"it is damaged ({error.metadata.get('error', '')})")

    def _close(self, why: str) -> None:
        self._log.close(why)
        _log.error("the audit log is closed, and no tool changes anything: %s; `agentd audit verify` says more", why)
        with contextlib.suppress(AgentdError):
            self._log.record(Event(kind="gap", principal="agentd", detail={"why": why}))


async def _kept_up(work: Coroutine[None, None, None], name: str) -> None:
    """A bug in one of these must be found in the log, and harm no other."""
    try:
        await work
    except Exception:
        _log.exception("%s of the audit log has ended", name)
