"""A principal's end: nothing of it goes on, and nobody can go on in its name."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import AgentdError

if TYPE_CHECKING:
    from agentd.api.identity import Doorkeeper
    from agentd.audit import AuditLog
    from agentd.grants import Approvals, Grants
    from agentd.principals import Tokens
    from agentd.runs import Runs


@dataclass(frozen=True, slots=True)
class Ended:
    """How many of each."""

    tokens: int = 0
    grants: int = 0
    approvals: int = 0
    runs: int = 0
    requests: int = 0


class Ending:
    """On the event loop. What keeps it from coming back is first, and on disk: then what goes on is ended."""

    def __init__(
        self, tokens: Tokens, grants: Grants, approvals: Approvals, runs: Runs, doorkeeper: Doorkeeper, audit: AuditLog
    ) -> None:
        self._tokens, self._grants, self._approvals, self._runs = tokens, grants, approvals, runs
        self._doorkeeper, self._audit = doorkeeper, audit

    async def end(self, principal: str, by: str) -> Ended:
        """Everything that this very principal has. Raises StoreError; then it can be asked for again."""
        tokens, grants = await asyncio.to_thread(self._revoke, principal, by)
        approvals = self._approvals.withdraw(principal)
        requests = self._doorkeeper.turn_out(principal)
        going = [run for run in self._runs.going_on() if run.principal == principal]
        await asyncio.gather(*(self._cancel(run.id) for run in going))
        # Once more: an answer that was on its way may have made a grant meanwhile.
        more_tokens, more_grants = await asyncio.to_thread(self._revoke, principal, by)
        ended = Ended(tokens + more_tokens, grants + more_grants, approvals, len(going), requests)
        detail = {"principal": principal, **asdict(ended)}
        await asyncio.to_thread(self._audit.record, Event(kind="principal.revoke", principal=by, detail=detail))
        return ended

    def _revoke(self, principal: str, by: str) -> tuple[int, int]:
        tokens = [token for token in self._tokens.all() if token.principal().name == principal]
        for token in tokens:
            self._tokens.revoke(token.id, by)
        grants = [
            grant for grant in self._grants.all() if grant.id and grant.principal == principal and grant.decision == "allow"
        ]
        for grant in grants:
            self._grants.revoke(grant.id, by)
        return len(tokens), len(grants)

    async def _cancel(self, run: str) -> None:
        with contextlib.suppress(AgentdError):  # it has ended by itself
            await self._runs.cancel(run)
