"""Learning from the log: the few grants that would have allowed what was asked for. Nothing is granted by this."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from agentd.grants.approvals import offers_for
from agentd.grants.decide import Request
from agentd.grants.grant import Grant
from agentd.grants.patterns import Pattern, parse
from agentd.grants.scopes import PATH_KINDS, Scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from agentd.grants.decide import Decision

_KINDS = ("call.intent", "call.deny")
_SIBLINGS = 2  # paths in one folder from which on the folder is proposed instead


def propose(
    bodies: Iterable[Mapping[str, Any]],
    decide: Callable[[Request], Decision],
    fixed: Callable[[str], frozenset[str]],
    asks: Callable[[str], bool],
) -> tuple[list[Grant], int]:
    """From events of the log: the grants, and how many calls they would have allowed that are not allowed now.

    `fixed(tool)` are scopes that are the tool's own, whatever its arguments: only in those a `*` is a wildcard. `asks(tool)`:
    whether only a grant that names it counts. What a rule denies can't be granted, and is left out.
    """
    needed: dict[tuple[str, str], set[Scope]] = defaultdict(set)
    calls = 0
    for body in bodies:
        if body.get("kind") not in _KINDS:
            continue
        tool = str(body.get("tool", {}).get("name", ""))
        own = fixed(tool)
        scopes = tuple(_scope(text, own) for text in body.get("scopes", ()))
        request = Request(str(body.get("principal", "")), tool, scopes, asks=asks(tool))
        decision = decide(request)
        if decision.verdict != "ask" or any("*" in s.value and not s.glob for s in decision.unmet):
            continue
        calls += 1
        needed[request.principal, tool].update(decision.unmet)
    found = {key: _few(scopes) for key, scopes in sorted(needed.items())}
    joined = _joined(found, asks)
    return [_grant(principal, tool, pattern) for (principal, tool), patterns in joined for pattern in patterns], calls


def _scope(text: str, own: frozenset[str]) -> Scope:
    kind, _, value = text.partition(":")
    return Scope(kind, value, glob="*" in value and text in own)


def _few(scopes: set[Scope]) -> tuple[Pattern, ...]:
    """The narrowest patterns, but one for a folder in which several things were asked for."""
    folders: dict[str, set[Scope]] = defaultdict(set)
    for scope in scopes:
        offers = offers_for(scope)
        folders[offers[-1] if scope.kind in PATH_KINDS else str(scope)].add(scope)
    patterns = [
        parse(text, resolved=True)
        for folder, inside in folders.items()
        for text in ([folder] if len(inside) >= _SIBLINGS else map(str, inside))
    ]
    return tuple(sorted((p for p in patterns if not any(_wider(other, p) for other in patterns)), key=str))


def _wider(one: Pattern, other: Pattern) -> bool:
    return one != other and one.covers(Scope(other.kind, other.value, glob=other.glob is not None))


def _joined(
    found: dict[tuple[str, str], tuple[Pattern, ...]], asks: Callable[[str], bool]
) -> list[tuple[tuple[str, str], tuple[Pattern, ...]]]:
    """Tools of one bundle that need the very same get it together, but for those that must be named."""
    bundles: dict[tuple[str, str, tuple[Pattern, ...]], list[str]] = defaultdict(list)
    for (principal, tool), patterns in found.items():
        bundles[principal, tool if asks(tool) else tool.partition(".")[0], patterns].append(tool)
    return [
        ((principal, tools[0] if len(tools) == 1 else f"{bundle}.*"), patterns)
        for (principal, bundle, patterns), tools in bundles.items()
    ]


def _grant(principal: str, tool: str, pattern: Pattern) -> Grant:
    return Grant(principal, tool, pattern, "allow", "cli", "proposed", pattern.text)
