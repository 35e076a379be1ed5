"""Grants by what they cover, so that a decision looks at few of them: 10,000 cost what 10 do."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.grants.scopes import PATH_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agentd.grants.grant import Grant
    from agentd.grants.scopes import Scope

_NEIGHBOURS = 3


@dataclass(slots=True)
class _Kind:
    """Of one kind of scope: by the fixed part of the pattern, and all such parts in order."""

    by_root: dict[str, list[Grant]] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)


class Index:
    """Grants of one verdict. Never changed once built."""

    def __init__(self, grants: Iterable[Grant]) -> None:
        self._of_everything: list[Grant] = []
        self._kinds: dict[str, _Kind] = {}
        for grant in grants:
            pattern = grant.pattern
            if not pattern.kind:
                self._of_everything.append(grant)
                continue
            kind = self._kinds.setdefault(pattern.kind, _Kind())
            kind.by_root.setdefault(_root(pattern.kind, pattern.root), []).append(grant)
        for kind in self._kinds.values():
            kind.roots = sorted(kind.by_root)

    def covering(self, scope: Scope) -> Iterator[Grant]:
        """Whose pattern covers all of `scope`, the narrowest fixed part first."""
        if kind := self._kinds.get(scope.kind):
            for root in _ways_up(scope):
                for grant in kind.by_root.get(root, ()):
                    if grant.pattern.covers(scope):
                        yield grant
        yield from self._of_everything

    def touching(self, scope: Scope) -> Iterator[Grant]:
        """Whose pattern covers any of `scope`."""
        if kind := self._kinds.get(scope.kind):
            for root in dict.fromkeys((*_ways_up(scope), *self._below(kind, scope))):
                for grant in kind.by_root.get(root, ()):
                    if grant.pattern.touches(scope):
                        yield grant
        yield from self._of_everything

    def near(self, scope: Scope) -> Iterator[Grant]:
        """Some whose pattern is close to `scope` without covering it: beside it, above it or below it."""
        if kind := self._kinds.get(scope.kind):
            for root in _ways_up(scope):
                yield from (grant for grant in kind.by_root.get(root, ()) if not grant.pattern.covers(scope))
            at = bisect.bisect_left(kind.roots, _root(scope.kind, _fixed(scope)))
            for root in kind.roots[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]:
                yield from (grant for grant in kind.by_root[root][:_NEIGHBOURS] if not grant.pattern.covers(scope))

    def _below(self, kind: _Kind, scope: Scope) -> Iterator[str]:
        """The roots within a path scope."""
        if scope.kind in PATH_KINDS:
            start = _fixed(scope).rstrip("/") + "/"
            at = bisect.bisect_left(kind.roots, start)
            while at < len(kind.roots) and kind.roots[at].startswith(start):
                yield kind.roots[at]
                at += 1


def _root(kind: str, root: str) -> str:
    """Where a pattern is kept. Of names it may be a glob, and those are few: all in one place."""
    if kind in PATH_KINDS:
        return root.rstrip("/") or "/"
    return "" if "*" in root else root


def _fixed(scope: Scope) -> str:
    """The folder or name that a scope starts from."""
    if scope.kind in PATH_KINDS:
        return scope.folded.split("*", 1)[0].rpartition("/")[0] if scope.glob else scope.folded
    return scope.value


def _ways_up(scope: Scope) -> Iterator[str]:
    """The fixed parts that a pattern covering `scope` can have: the folders above a path, the domains above a
    host, the kinds above a device."""
    if scope.kind in PATH_KINDS:
        path = scope.folded.rstrip("/")
        while path:
            yield path
            path = path.rpartition("/")[0]
        yield "/"
        return
    if scope.kind == "connect":
        host = scope.value.rpartition(":")[0].strip("[]")
        while host:
            yield host
            host = host.partition(".")[2]
    else:
        name = scope.value
        while name:
            yield name
            name = name.rpartition("/")[0]
    yield ""
