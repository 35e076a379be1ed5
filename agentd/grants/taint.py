"""Taint: what a run has taken in, and what it may therefore not do by itself.

A run that holds private data and has read what others wrote could be talked into sending the one to the other. So it
sends nothing out without a person's word, whatever the grants say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.grants.patterns import parse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentd.grants.scopes import Scope

_SOURCES = 16  # of each label are remembered: the first ones


@dataclass(frozen=True, slots=True)
class Labels:
    """Where a run's untrusted and private content came from: scopes, or a tool that is marked. Empty: it has none."""

    untrusted: tuple[str, ...] = ()
    private: tuple[str, ...] = ()

    def __or__(self, other: Labels) -> Labels:
        return Labels(_first(self.untrusted + other.untrusted), _first(self.private + other.private))

    @property
    def names(self) -> tuple[str, ...]:
        pairs = (("untrusted", self.untrusted), ("private", self.private))
        return tuple(name for name, sources in pairs if sources)

    @property
    def both(self) -> bool:
        return bool(self.untrusted and self.private)


class Taint:
    """`trusted` and `private` are path patterns of the configuration. Raises RequestError (GRANT_INVALID) for bad ones."""

    def __init__(self, trusted: Iterable[str], private: Iterable[str]) -> None:
        self._trusted = tuple(parse(f"read:{path}") for path in trusted)
        self._private = tuple(parse(f"read:{path}") for path in private)

    def labels(self, tool: str, scopes: Iterable[Scope], *, untrusted: bool, private: bool = False) -> Labels:
        """What the output of such a call makes of a run. `untrusted` and `private` are what the tool's manifest says of it."""
        found = Labels((f"call:{tool}",) if untrusted else (), (f"call:{tool}",) if private else ())
        for scope in scopes:
            if scope.kind == "connect":
                found |= Labels(untrusted=(str(scope),))
            elif scope.kind == "read":
                foreign = not any(pattern.covers(scope) for pattern in self._trusted)
                secret = any(pattern.touches(scope) for pattern in self._private)
                found |= Labels((str(scope),) if foreign else (), (str(scope),) if secret else ())
        return found


def _first(sources: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sources))[:_SOURCES]
