"""The decision on one call: deny beats ask beats allow, and what no rule allows is denied."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from agentd.grants.scopes import Scope, pattern_covers, pattern_touches

if TYPE_CHECKING:
    from collections.abc import Sequence

Verdict = Literal["allow", "ask", "deny"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the grants: who, with which tool, may do what. Principal and tool are glob patterns."""

    principal: str
    tool: str
    scope: str
    decision: Verdict
    source: str

    def __str__(self) -> str:
        return f"{self.decision} {self.tool} {self.scope} ({self.source})"

    def concerns(self, principal: str, tool: str) -> bool:
        return fnmatchcase(principal, self.principal) and fnmatchcase(tool, self.tool)


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason` is for people; `rules` are those that decided, `scope` the one that a refusal is about."""

    verdict: Verdict
    reason: str
    rules: tuple[str, ...] = ()
    scope: str = ""


class Grants:
    """The rules in force. They come from the configuration; nothing a model or tool says can reach them."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)

    def decide(self, principal: str, tool: str, scopes: Sequence[Scope]) -> Decision:
        """Every scope must be covered. A call that touches nothing is the scope `call:TOOL`."""
        concerned = [rule for rule in self.rules if rule.concerns(principal, tool)]
        wanted = list(scopes) or [Scope("call", tool)]
        for scope in wanted:
            for rule in concerned:
                if rule.decision == "deny" and pattern_touches(rule.scope, scope):
                    return Decision("deny", f"denied by the rule for {rule.scope}", (str(rule),), str(scope))
        for scope in wanted:
            for rule in concerned:
                if rule.decision == "ask" and pattern_covers(rule.scope, scope):
                    reason = f"the rule for {rule.scope} asks a person, and nobody can be asked yet"
                    return Decision("ask", reason, (str(rule),), str(scope))
        used: list[str] = []
        for scope in wanted:
            allowing = [rule for rule in concerned if rule.decision == "allow" and pattern_covers(rule.scope, scope)]
            if not allowing:
                return Decision("deny", f"no grant covers {scope}", (), str(scope))
            used.append(str(allowing[0]))
        return Decision("allow", "every scope is covered by a grant", tuple(dict.fromkeys(used)))
