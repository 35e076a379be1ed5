"""The decision on one call, and why: deny, a person's answer, ask, rehearse, allow, in this order; else it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from agentd.grants.index import Index
from agentd.grants.later import Later
from agentd.grants.scopes import Scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from agentd.grants.conditions import Moment
    from agentd.grants.grant import Grant, Verdict
    from agentd.grants.patterns import Pattern

_NEAR = 4
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason` is for people; `rules` are those that decided, `near` those that almost did and why they did not.

    `scope` is the one that a refusal or question is about; `unmet` are all that nothing allows, `grants` the ids used.
    """

    verdict: Verdict
    reason: str
    rules: tuple[str, ...] = ()
    scope: str = ""
    near: tuple[str, ...] = ()
    unmet: tuple[Scope, ...] = ()
    grants: tuple[str, ...] = ()
    asked: str = ""
    """What asking a person has come to, if one was to be asked."""
    sends_out: bool = False
    """Whether it is asked because of what the run has taken in, whatever the grants say."""
    rehearse: bool = False
    """Whether a grant that it goes by wants the call rehearsed."""
    policy: str = ""
    """SHA-256 over all the grants that were in force."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is decided on. `run` is the id of the run that asks, for grants that are for this run alone."""

    principal: str
    tool: str
    scopes: tuple[Scope, ...]
    run: str = ""
    within: tuple[Pattern, ...] = ()
    """The most that this principal's calls may touch, whatever the grants say; no such limit if there is none."""
    asks: bool = False
    """Whether only a grant that names this very tool, and more than everything, lets it go unasked."""

    @property
    def principals(self) -> tuple[str, ...]:
        return (self.principal, f"run:{self.run}") if self.run else (self.principal,)

    @property
    def wanted(self) -> tuple[Scope, ...]:
        """A call that touches nothing is the scope `call:TOOL`."""
        return self.scopes or (Scope("call", self.tool),)


@dataclass(slots=True)
class Book:
    """The grants in force at one time, indexed. `used` counts the uses of those that have a limit, by id."""

    deny: Index
    answered: Index
    ask: Index
    rehearsed: Index
    allow: Index
    used: Mapping[str, int] = field(default_factory=dict)
    later: Later = field(default_factory=Later)
    naming: tuple[Grant, ...] = ()
    """Those that allow to change what runs later."""

    @classmethod
    def of(cls, grants: Iterable[Grant], used: Mapping[str, int], later: Later | None = None) -> Book:
        later = later or Later()
        grants = tuple(grants)
        sorted_out: dict[str, list[Grant]] = {name: [] for name in ("deny", "answered", "ask", "rehearsed", "allow")}
        for grant in grants:
            rehearsed = grant.rehearse and grant.decision == "allow"
            sorted_out["answered" if grant.answers else "rehearsed" if rehearsed else grant.decision].append(grant)
        naming = tuple(grant for grant in grants if grant.decision == "allow" and later.is_named(grant.pattern))
        return cls(**{name: Index(found) for name, found in sorted_out.items()}, used=used, later=later, naming=naming)

    def decide(self, request: Request, moment: Moment) -> Decision:
        """A pure function of book, request and moment."""
        for scope in request.wanted:
            if request.within and not any(pattern.covers(scope) for pattern in request.within):
                return Decision("deny", f"{request.principal} may not touch {scope}, whatever the grants say", (), str(scope))
            if rule := self._first(self.deny.touching(scope), request, moment):
                return Decision("deny", f"denied by the rule for {rule.pattern}", (str(rule),), str(scope))
        used: list[Grant] = []
        asking: list[tuple[Scope, Grant]] = []
        unmet: list[Scope] = []
        for scope in request.wanted:
            if rule := self._first(self._meant(self.answered.covering(scope), scope), request, moment):
                used.append(rule)
            elif rule := self._first(self.ask.covering(scope), request, moment):
                asking.append((scope, rule))
            elif rule := self._first(self._allowing(scope, request), request, moment):
                used.append(rule)
            else:
                unmet.append(scope)
        ids = tuple(dict.fromkeys(grant.id for grant in used if grant.id))
        rehearse = any(grant.rehearse for grant in used)
        if asking or unmet:
            return replace(self._question(request, moment, asking, unmet), grants=ids, rehearse=rehearse)
        rules = tuple(dict.fromkeys(str(grant) for grant in used))
        return Decision("allow", "every scope is covered by a grant", rules, grants=ids, rehearse=rehearse)

    def _question(
        self, request: Request, moment: Moment, asking: Sequence[tuple[Scope, Grant]], unmet: Sequence[Scope]
    ) -> Decision:
        open_ones = (*(scope for scope, _ in asking), *unmet)
        if asking:
            scope, rule = asking[0]
            reason = f"the rule for {rule.pattern} wants a person to be asked"
        else:
            scope, reason = unmet[0], f"no grant covers {unmet[0]}"
            if self.later.is_touched(unmet[0]):
                reason = f"what {unmet[0]} is runs later, unconfined, and no grant names it"
            elif request.asks:
                reason = f"no grant for {request.tool} itself covers {unmet[0]}, and it asks unless one does"
        rules = tuple(dict.fromkeys(str(rule) for _, rule in asking))
        return Decision("ask", reason, rules, str(scope), self.near(request, scope, moment), open_ones)

    def _allowing(self, scope: Scope, request: Request) -> Iterable[Grant]:
        found = chain(self.rehearsed.covering(scope), self.allow.covering(scope))
        return self._meant((grant for grant in found if grant.is_specific) if request.asks else found, scope)

    def _meant(self, grants: Iterable[Grant], scope: Scope) -> Iterable[Grant]:
        """What runs later is covered only by who has named it."""
        return (grant for grant in grants if self.later.is_named(grant.pattern)) if self.later.is_touched(scope) else grants

    def named(self, request: Request, moment: Moment) -> tuple[Pattern, ...]:
        """What runs later and a call may change, as grants for it name it."""
        concerned = (grant for grant in self.naming if grant.concerns(request.principals, request.tool))
        return tuple(grant.pattern for grant in concerned if not grant.asleep(moment, self.used.get(grant.id, 0)))

    def _first(self, grants: Iterable[Grant], request: Request, moment: Moment) -> Grant | None:
        for grant in grants:
            if grant.concerns(request.principals, request.tool) and not grant.asleep(moment, self.used.get(grant.id, 0)):
                return grant
        return None

    def near(self, request: Request, scope: Scope, moment: Moment) -> tuple[str, ...]:
        """Rules that almost allowed it, each with what kept it from doing so."""
        found: dict[str, None] = {}
        for index in (self.answered, self.rehearsed, self.allow):
            for looked_at, grant in enumerate(index.covering(scope)):
                if looked_at >= _LOOKED_AT:
                    break
                why = grant.idle(request.principals, request.tool, moment, self.used.get(grant.id, 0))
                if not why and request.asks and not grant.is_specific:
                    why = f"{request.tool} asks unless a grant names it"
                if not why and self.later.is_touched(scope) and not self.later.is_named(grant.pattern):
                    why = "it does not name what runs later"
                if why:
                    found[f"{grant}: {why}"] = None
        for grant in self.allow.near(scope):
            if len(found) >= _NEAR:
                break
            if grant.concerns(request.principals, request.tool):
                found[f"{grant}: it does not cover {scope}"] = None
        return tuple(found)[:_NEAR]
