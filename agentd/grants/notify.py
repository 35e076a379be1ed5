"""Questions on this device's own screen: Android's notifications through Termux, a desktop's through notify-send.

What is shown comes from the daemon, and is handed over as arguments: no shell reads it. Buttons say once or no; whatever
lasts longer is decided where all of it can be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
import shlex
import sys
from typing import TYPE_CHECKING

from agentd.errors import AgentdError
from agentd.grants.approvals import Answer, State
from agentd.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from agentd.devices import Screen
    from agentd.grants.approvals import Approval, Approvals

_log = logging.getLogger(__name__)
_TIMEOUT_S = 20.0
_LONGEST, _LONGEST_SCOPES = 400, 300
_ONCE, _NO = "once", "deny"


class Notifier:
    """Shows each question for as long as it is open. What is chosen there is `owner`'s answer; `socket` is the daemon's."""

    def __init__(self, approvals: Approvals, owner: str, socket: Path, screen: Screen) -> None:
        self._approvals, self._owner, self._socket = approvals, owner, socket
        self._shown: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._screen = screen
        self._termux, self._desktop = screen.termux, screen.desktop

    @property
    def there(self) -> bool:
        return self._screen.there

    def start(self) -> None:
        if self._termux or self._desktop:
            self._task = asyncio.create_task(self._follow(), name="notifier")
            self._approvals.also(lambda: self.there)

    async def stop(self) -> None:
        tasks = [task for task in (self._task, *self._shown.values()) if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_TIMEOUT_S)

    async def _follow(self) -> None:
        async for approval in self._approvals.news():
            if approval.state is State.PENDING and self.there:
                self._shown[approval.id] = asyncio.create_task(self._show(approval), name=f"notify {approval.id}")
            elif task := self._shown.pop(approval.id, None):
                task.cancel()
                if self._termux:
                    await _run([f"{self._termux}-remove", f"agentd-{approval.id}"])

    async def _show(self, approval: Approval) -> None:
        title, (text, whole) = f"agentd: {one_line(approval.tool)}?", _text(approval)
        if self._termux:
            agentd = shlex.join(
                [sys.executable, "-I", "-m", "agentd", "--socket", str(self._socket), "approvals", "answer", approval.id]
            )
            buttons = ["--button1", "Allow once", "--button1-action", f"{agentd} once"] if whole else []
            buttons += ["--button2", "Deny", "--button2-action", f"{agentd} deny"]
            sort = ["--priority", "high", "--ongoing", "--id", f"agentd-{approval.id}"]
            await _run([self._termux, *sort, "--title", title, "--content", text, *buttons])
        elif self._desktop:
            actions = [*([f"--action={_ONCE}=Allow once"] if whole else []), f"--action={_NO}=Deny"]
            body = html.escape(text, quote=False)  # desktops read markup there
            chosen = await _run([self._desktop, "--app-name=agentd", "--wait", *actions, "--", title, body], wait=True)
            if chosen == _NO or (chosen == _ONCE and whole):
                with contextlib.suppress(AgentdError):  # somebody else was quicker
                    self._approvals.resolve(approval.id, Answer(allow=chosen == _ONCE), self._owner)


def _text(approval: Approval) -> tuple[str, bool]:
    """Short, and what it would touch first; whether that is there whole. If it is not, it can't be allowed here."""
    scopes = one_line(", ".join(str(scope) for scope in approval.scopes))
    if len(scopes) > _LONGEST_SCOPES:
        return f"{scopes[:_LONGEST_SCOPES]}\u2026\nThis is more than fits here: see all of it with `agentd approvals`.", False
    undo = f"can't be undone: {approval.not_undoable}" if approval.not_undoable else "can be undone"
    return f"{scopes}\n{one_line(f'{approval.principal} asks; {approval.reason}; {undo}')[:_LONGEST]}", True


async def _run(command: Sequence[str], *, wait: bool = False) -> str:
    """What it prints, if it is waited for; empty if it can't be run."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError as e:
        _log.warning("%s can't be run: %s", command[0], e.strerror)
        return ""
    try:
        async with asyncio.timeout(None if wait else _TIMEOUT_S):
            output, _ = await process.communicate()
    except (TimeoutError, asyncio.CancelledError) as e:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(e, asyncio.CancelledError):
            raise
        return ""
    return output.decode(errors="replace").strip()
