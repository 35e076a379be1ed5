"""Whether a valid call may run: the grants decide, taint may object, and a person is asked where they must be."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from agentd_sandbox import PathRule

from agentd.audit import Event
from agentd.calls.wanted import Prepared, Wanted, event
from agentd.errors import Reason, RequestError
from agentd.grants import Approval, Decision, Extent, Grant, Labels, Request, Scope, State, offers_for, parse
from agentd.journal import Permit
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agentd.audit import AuditLog
    from agentd.calls.manifest import Tool
    from agentd.grants import Approvals, FileLabels, Grants, Pattern, Taint
    from agentd.journal import Journal

_READ = 12  # of what a run has read, shown with a question: what gave it its labels, then the newest
_ATTEMPTS = 3  # to take a use of a grant before another call does


class Denied(RequestError):
    """The grants or a person said no (GRANT_REQUIRED). The refusal is on record as call `call`."""

    def __init__(self, wanted: Wanted, decision: Decision) -> None:
        super().__init__(
            Reason.GRANT_REQUIRED,
            f"{wanted.tool.name} was denied: {decision.reason}{_asked(decision)}.",
            hint=_way_out(wanted, decision),
            metadata={"tool": wanted.tool.name, "scope": decision.scope, "call": wanted.id},
        )
        self.call, self.decision = wanted.id, decision
        self.scopes = [str(scope) for scope in wanted.scopes]


def _asked(decision: Decision) -> str:
    return f"; {decision.asked}" if decision.asked not in ("", decision.reason) else ""


def _way_out(wanted: Wanted, decision: Decision) -> str:
    if decision.rules and not decision.asked:
        return f"It stands in {decision.rules[0]}; no grant can overrule it."
    add = f"agentd grants add {wanted.tool.name} '{decision.scope}'"
    return f"To allow it: `{add}`, or keep `agentd approvals` open to be asked."


class Permission:
    """Decides on calls, asking where that must be. What is decided is on record before this returns."""

    def __init__(
        self, grants: Grants, approvals: Approvals, taint: Taint, files: FileLabels, journal: Journal, audit: AuditLog
    ) -> None:
        self.grants, self.approvals, self._taint, self._files = grants, approvals, taint, files
        self._journal, self._audit = journal, audit
        self._may_send: set[tuple[str, str, str]] = set()

    def gives(self, tool: Tool, scopes: tuple[Scope, ...]) -> Labels:
        manifest = tool.manifest
        given = self._taint.labels(tool.name, scopes, untrusted=manifest.untrusted, private=manifest.gives_private)
        return given | self._files.of(scopes)

    def over_files(self, principal: str, within: tuple[Pattern, ...], *, looks: bool = False) -> Permit:
        """What a principal may see and change of what calls have changed, as if tools read and wrote it. Content is shown to
        whoever may read it unasked; what its calls have done may be taken back unless that is denied; to overwrite what others
        have changed since needs a grant. `looks`: all that is not denied is shown, to decide on it.
        """

        def decided(kind: str, path: bytes) -> Decision:
            tool = "files.read" if kind == "read" else "files.write"
            return self.grants.decide(Request(principal, tool, (Scope(kind, os.fsdecode(path)),), within=within))

        def reads(path: bytes) -> bool:
            verdict = decided("read", path).verdict
            return verdict == "allow" or (looks and verdict == "ask")

        def refuses(path: bytes, overwrites: bool) -> str:  # noqa: FBT001
            decision = decided("write", path)
            denied = decision.verdict == "deny" or (decision.verdict == "ask" and overwrites)
            return decision.reason if denied else ""

        return Permit(reads, refuses)

    def label(self, prepared: Prepared, paths: Iterable[bytes]) -> None:
        """What a call has written is as tainted as what it may have had it from. Raises StoreError."""
        self._files.note(paths, prepared.request.labels | prepared.gives)

    async def obtain(self, wanted: Wanted, again: Callable[[], tuple[Scope, ...]]) -> Prepared:
        """`again` says what the scopes are now: a link may have been changed while a person was thinking.

        Raises Denied, with the refusal on record; StoreError.
        """
        for _ in range(_ATTEMPTS):
            decision = await asyncio.to_thread(self._decide, wanted)
            if decision.verdict == "ask":
                decision = await self._ask(wanted, decision, again)
                return _prepared(wanted, decision)
            if decision.verdict == "deny":
                raise await self._denied(wanted, decision)
            if await asyncio.to_thread(self.grants.use, decision):
                return _prepared(wanted, decision)
        raise await self._denied(wanted, replace(decision, verdict="deny", reason="others used up the grant for it"))

    def named(self, prepared: Prepared) -> tuple[PathRule, ...]:
        """What runs later and the call may change: as a scope of its own says, or a grant."""
        wanted = (scope.rule() for scope in prepared.scopes if self.grants.later.is_touched(scope))
        granted = (pattern.value for pattern in self.grants.named(prepared.asked()))
        return (*wanted, *(PathRule(os.fsencode(value), "*" in value) for value in granted))

    def still(self, prepared: Prepared) -> bool:
        """Whether what allowed a running call still does."""
        verdict = self._decide(prepared).verdict
        return verdict == "allow" or (verdict == "ask" and self.grants.has(prepared.decision.grants))

    def _decide(self, wanted: Wanted) -> Decision:
        decision = self.grants.decide(wanted.asked())
        if decision.verdict != "deny" and _sends_out(wanted):
            labels = wanted.request.labels | wanted.gives
            held = Labels(wanted.request.labels.untrusted, labels.private)
            if held.both and not self._sending_was_allowed(wanted):
                reason = f"the run holds private data ({held.private[0]}) and has read what others wrote ({held.untrusted[0]})"
                return replace(decision, verdict="ask", reason=f"{reason}, so sending needs a person's word", sends_out=True)
        return decision

    def _sending_was_allowed(self, wanted: Wanted) -> bool:
        """Whether a person has said so for this run, knowing what it holds."""
        return bool(wanted.request.run) and _sending(wanted) <= self._may_send

    def end_run(self, run: str) -> None:
        """What was allowed for this run alone is over. Not for the event loop."""
        self._may_send = {sending for sending in self._may_send if sending[0] != run}
        self.grants.end_run(run)

    async def _denied(self, wanted: Wanted, decision: Decision) -> Denied:
        await asyncio.to_thread(self._audit.record, event("call.deny", wanted, decision))
        return Denied(wanted, decision)

    # -- asking

    async def _ask(self, wanted: Wanted, decision: Decision, again: Callable[[], tuple[Scope, ...]]) -> Decision:
        patient = wanted.request.approval_s
        if not patient and not self.approvals.answerable:
            raise await self._denied(wanted, replace(decision, verdict="deny", asked="nobody is there to be asked"))
        question = await asyncio.to_thread(self._question, wanted, decision)
        detail = {"approval": question.id, "labels": list(wanted.request.labels.names), "sends_out": question.sends_out}
        await asyncio.to_thread(self._audit.record, event("approval.request", wanted, decision, detail=detail))
        wanted.request.tell(question)
        closed = question
        try:
            closed = await self.approvals.ask(question, patient)
        finally:
            if closed.state is State.PENDING:
                closed = self.approvals.get(question.id)
            await asyncio.shield(asyncio.to_thread(self._audit.record, _answered(wanted, closed)))
            wanted.request.tell(closed)
        if closed.state is not State.ALLOWED:
            raise await self._denied(wanted, replace(decision, verdict="deny", reason=closed.said, rules=(), asked=closed.said))
        return await asyncio.to_thread(self._allowed, wanted, decision, closed, again)

    def _question(self, wanted: Wanted, decision: Decision) -> Approval:
        request, manifest = wanted.request, wanted.tool.manifest
        offers = {str(scope): offers_for(scope) for scope in decision.unmet}
        extents = [Extent.ONCE]
        if all(offers.values()):
            extents += [Extent.RUN] if request.run else []
            extents += [] if decision.sends_out else [Extent.UNTIL, Extent.ALWAYS]
        held = request.labels.untrusted + request.labels.private
        return Approval(
            id=new_id(),
            call=wanted.id,
            principal=request.principal,
            tool=wanted.tool.name,
            description=manifest.description,
            arguments=wanted.arguments,
            effect=manifest.effect,
            scopes=wanted.asked().wanted,
            unmet=decision.unmet,
            reason=decision.reason,
            not_undoable=self._not_undoable(wanted),
            run=request.run,
            session=request.session,
            labels=request.labels.names,
            read=tuple(dict.fromkeys(held + request.read[::-1]))[:_READ],
            near=decision.near,
            sends_out=decision.sends_out,
            offers=offers,
            extents=tuple(extents),
        )

    def _not_undoable(self, wanted: Wanted) -> str:
        if wanted.tool.manifest.effect == "physical":
            return "it does something in the world, which can't be taken back"
        if wanted.tool.manifest.effect == "external":
            return "it reaches outside: what is sent can't be taken back"
        return self._journal.foresee(os.fsencode(scope.value) for scope in wanted.scopes if scope.kind == "write")

    def _allowed(
        self, wanted: Wanted, decision: Decision, closed: Approval, again: Callable[[], tuple[Scope, ...]]
    ) -> Decision:
        """What a yes has come to: grants for what it was to last for, and a look at whether it still is the same call."""
        now = self.grants.decide(wanted.asked())
        if again() != wanted.scopes:
            now = replace(decision, verdict="deny", reason="its paths lead elsewhere since it was asked for", rules=())
        elif now.verdict != "deny" and not self.grants.use(decision):
            now = replace(decision, verdict="deny", reason="others used up the grant for it meanwhile", rules=())
        if now.verdict == "deny":
            self._audit.record(event("call.deny", wanted, now))
            raise Denied(wanted, now)
        grants = tuple(self.grants.add(grant, closed.answered_by, closed.id) for grant in _lasting(wanted, closed))
        if decision.sends_out and closed.answer and closed.answer.extent is Extent.RUN:
            self._may_send |= _sending(wanted)
        rules = (f"approvals/{closed.id} ({closed.said})", *map(str, grants))
        used = tuple(grant.id for grant in grants)
        said = closed.said
        return Decision(
            "allow", said, rules, decision.scope, decision.near, grants=used, asked=said, rehearse=decision.rehearse
        )


def _prepared(wanted: Wanted, decision: Decision) -> Prepared:
    return Prepared(wanted.id, wanted.request, wanted.tool, wanted.arguments, wanted.scopes, wanted.gives, decision)


def _sends_out(wanted: Wanted) -> bool:
    return wanted.tool.manifest.sends or any(scope.kind == "connect" for scope in wanted.scopes)


def _sending(wanted: Wanted) -> set[tuple[str, str, str]]:
    """Run, tool and peer of what it would send; a tool that reaches outside by other means has no peer."""
    peers = [str(scope) for scope in wanted.scopes if scope.kind == "connect"] or [""]
    return {(wanted.request.run, wanted.tool.name, peer) for peer in peers}


def _lasting(wanted: Wanted, closed: Approval) -> list[Grant]:
    """The grants of an answer that lasts longer than this call: for the one who asked, this tool and what was offered."""
    answer = closed.answer
    if answer is None or answer.extent is Extent.ONCE:
        return []
    who = f"run:{wanted.request.run}" if answer.extent is Extent.RUN else wanted.request.principal
    expire = answer.until_ns if answer.extent is Extent.UNTIL else 0
    texts = (answer.offers.get(scope, offered[0]) for scope, offered in closed.offers.items())
    return [
        Grant(who, wanted.tool.name, parse(text, resolved=True), "allow", "approval", "", text, expire_ns=expire)
        for text in texts
    ]


def _answered(wanted: Wanted, closed: Approval) -> Event:
    detail = {"approval": closed.id, "state": closed.state.value, "said": closed.said, "by": closed.answered_by}
    who = closed.answered_by or "agentd"
    whence = closed.answered_from  # not that of the call
    return Event(kind="approval.answer", principal=who, origin=whence, call=wanted.id, run=wanted.request.run, detail=detail)
