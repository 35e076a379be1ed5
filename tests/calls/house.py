"""All parts that a call passes through, real ones, without the daemon around them: a test can hold any of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

import pytest
from agentd_sandbox import Sandbox, probe

from agentd.audit import AuditLog
from agentd.calls import CallRequest, CallResult, Calls, Permission, Places, load
from agentd.grants import Approvals, Clock, FileLabels, Grant, Grants, Own, Taint, moment, parse
from agentd.journal import Journal, Keep
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from agentd.grants import Answer, Approval

LEVEL = probe()
DEADLINE_S = 20.0


@dataclass
class House:
    """Below `root`: home, state. `grants` are (tool, scope, decision) of the configuration."""

    root: Path
    grants: Sequence[tuple[str, str, str]] = ()
    private: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()
    timeout_s: float = 30
    bundles: tuple[Path, ...] = ()
    pending: int = 256
    questions: list[Approval] = field(default_factory=list)

    def __enter__(self) -> Self:
        if not LEVEL.confines:
            pytest.skip("this kernel confines nothing")
        self.home = (self.root / "home").resolve()
        self.home.mkdir(parents=True, exist_ok=True)
        toolbox = load(self.bundles, files("agentd.bundled_tools"), ("files", "system", "http", "shell"))
        self.store = Store(self.root / "state")
        self.audit = AuditLog(self.store)
        self.journal = Journal(self.store, self.audit, self.root / "state" / "objects", Keep(1 << 20, low_space_bytes=0))
        clock = Clock(self.audit.newest_ns())
        rules = [
            Grant("*", tool, parse(scope.format(h=self.home)), decision, "config", f"grant {n}", scope.format(h=self.home))  # type: ignore[arg-type]
            for n, (tool, scope, decision) in enumerate(self.grants, 1)
        ]
        self.book = Grants(rules, self.store, self.audit, lambda: moment(clock, "/sys"), Own([self.root / "state"]))
        self.approvals = Approvals(self.timeout_s, self.pending)
        taint = Taint([each.format(h=self.home) for each in self.trusted], [each.format(h=self.home) for each in self.private])
        self.permission = Permission(self.book, self.approvals, taint, FileLabels(self.store), self.journal, self.audit)
        self.sandbox = Sandbox(toolbox.programs, self.home, LEVEL)
        self.sandbox.start()
        places = Places(self.home, own=Own([self.root / "state"]))
        self.calls = Calls(toolbox, self.permission, self.journal, self.audit, self.sandbox, LEVEL, places)
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.close()
        self.sandbox.stop()
        self.store.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(DEADLINE_S):
                return await work

        return asyncio.run(bounded())

    async def call(self, tool: str, *, principal: str = "unix:pi", run: str = "", **arguments: Any) -> CallResult:
        return await self.calls.call(CallRequest(principal, tool, arguments, run=run))

    async def answering(self, answer: Callable[[Approval], Answer | None], by: str = "unix:owner") -> None:
        """Somebody who is asked and answers each question; to be run as a task, which is cancelled in the end."""
        async for question in self.approvals.watch():
            self.questions.append(question)
            if question.state.value == "pending" and (said := answer(question)) is not None:
                self.approvals.resolve(question.id, said, by)

    def kinds(self) -> list[str]:
        return [entry.body["kind"] for entry in self.audit.entries(limit=1000)]

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        return [entry.body for entry in self.audit.entries(limit=1000) if entry.body["kind"] == kind]
