"""Patterns over scopes: what a grant covers. Compiled when the grant is made, and not resolved again.

A path pattern is the real path that it led to then: a link that is put in its place later widens nothing. `*` stands
within one name (or one label of a host), `**` for whole branches; a path without either means it and all below it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import idna
from agentd_sandbox.network import canonical_host
from publicsuffixlist import PublicSuffixList

from agentd.errors import Reason, RequestError
from agentd.grants.scopes import KINDS, PATH_KINDS, fold

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.grants.scopes import Scope

EVERYTHING = "*"
_LONGEST = 4200


@dataclass(frozen=True, slots=True)
class Pattern:
    """`text` is its one spelling. `root` is the fixed beginning of a path, or the fixed end of a host, `port` its port."""

    text: str
    kind: str = ""
    root: str = ""
    port: str = ""
    glob: re.Pattern[str] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def value(self) -> str:
        return self.text.partition(":")[2]

    def covers(self, scope: Scope) -> bool:
        """Whether all that `scope` stands for lies within."""
        if not self.kind:
            return True
        if self.kind != scope.kind:
            return False
        if self.kind in PATH_KINDS:
            return self._covers_path(scope)
        if self.kind == "connect":
            host, _, port = scope.value.rpartition(":")
            host = host.strip("[]")
            within = host == self.root if self.glob is None else self.glob.fullmatch(host) is not None
            return within and self.port in ("*", port)
        return scope.value == self.root if self.glob is None else self.glob.fullmatch(scope.value) is not None

    def _covers_path(self, scope: Scope) -> bool:
        value = scope.folded
        if self.glob is None:
            return within(value, self.root)
        if scope.glob:  # a pattern can't be shown to lie within another, save the very same
            return value == self.value
        if self.glob.fullmatch(value) is None:
            return False
        # `*.txt` means files of that name, not what lies in a folder that happens to be called so.
        return self.value.endswith("/**") or not os.path.isdir(scope.value)

    def touches(self, scope: Scope) -> bool:
        """Whether anything that `scope` stands for lies within: what a denial must hit."""
        if self.covers(scope):
            return True
        if self.kind == scope.kind == "device":  # whoever denies `gpio` means all its lines
            parts = scope.value.split("/")
            above = ("/".join(parts[:n]) for n in range(1, len(parts)))
            return any(name == self.root if self.glob is None else self.glob.fullmatch(name) is not None for name in above)
        if self.kind != scope.kind or self.kind not in PATH_KINDS:
            return False
        value = scope.folded
        start = value.split("*", 1)[0] if scope.glob else value
        fixed = self.value.split("*", 1)[0] if self.glob else self.root
        return within(fixed.rstrip("/"), start) or (scope.glob and within(start.rstrip("/"), fixed.rstrip("/") or "/"))


def within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def parse(text: str, *, resolved: bool = False) -> Pattern:
    """`resolved` takes a path as it stands, as one that has been through this before.

    Raises RequestError (GRANT_INVALID) that says what is wrong with it.
    """
    if text == EVERYTHING:
        return Pattern(EVERYTHING)
    kind, colon, value = text.partition(":")
    if not colon or kind not in KINDS:
        raise _invalid(text, f"it must be `*` or start with one of {', '.join(sorted(KINDS))} and a colon")
    if not value.strip() or len(value) > _LONGEST or not value.isprintable():
        raise _invalid(text, "what follows the colon is empty, too long or not printable")
    if kind in PATH_KINDS:
        return _path(kind, value, text, resolved=resolved)
    if kind == "connect":
        return _peer(value, text)
    if kind == "device" and value.endswith("/"):
        raise _invalid(text, "a device has no slash at its end")
    return Pattern(text, kind, value, glob=_any(value) if "*" in value else None)


def literally(scope: Scope) -> Pattern:
    """The pattern for just this scope. Its `*`, if it has one, can't be told from a wildcard: then there is none.

    Raises RequestError (GRANT_INVALID).
    """
    if "*" in scope.value and not scope.glob:
        raise _invalid(str(scope), "a `*` in a name can't be told from a wildcard")
    return parse(str(scope))


def _path(kind: str, value: str, text: str, *, resolved: bool) -> Pattern:
    real: Callable[[str], str] = str if resolved else os.path.realpath
    if not value.startswith(("/", "~")):
        raise _invalid(text, "a path must start with / or ~")
    expanded = os.path.expanduser(value)
    if not expanded.startswith("/"):
        raise _invalid(text, f"there is no user {value.split('/', 1)[0]}")
    fixed, star, rest = expanded.partition("*")
    if not star:
        root = fold(real(fixed))
        return Pattern(f"{kind}:{root}", kind, root)
    if ".." in rest.split("/"):
        raise _invalid(text, "`..` behind a `*` leads anywhere")
    folder, name = os.path.split(fixed)
    root = fold(real(folder))
    spelled = fold(os.path.join(root, name) + star + re.sub(r"/+", "/", rest).rstrip("/"))
    return Pattern(f"{kind}:{spelled}", kind, root, glob=_expression(spelled))


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(/\*\*$|\*\*|\*)", pattern)
    wild = {"/**": r"(/.*)?", "**": r".*", "*": r"[^/]*"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts), re.DOTALL)


def _any(pattern: str) -> re.Pattern[str]:
    """In a name, `*` stands for whatever there is."""
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


def _peer(value: str, text: str) -> Pattern:
    host, colon, port = value.rpartition(":")
    if not colon or not (port == "*" or (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise _invalid(text, "it must end with a port, such as connect:example.org:443, or `:*`")
    port = port if port == "*" else str(int(port))
    if host == "*":
        return Pattern(f"connect:*:{port}", "connect", "", port, re.compile(r".*", re.DOTALL))
    wild, rest = next(((w, host[len(w) :]) for w in ("**.", "*.") if host.startswith(w)), ("", host))
    name = canonical_host(_ascii(rest, text))
    if name is None or "*" in rest or (wild and (":" in name or name[-1].isdigit())):
        raise _invalid(text, f"{host} is no host; `*.` or `**.` may stand before one")
    if not wild:
        spelled = f"[{name}]" if ":" in name else name
        return Pattern(f"connect:{spelled}:{port}", "connect", name, port)
    if _suffixes().is_public(name) or "." not in name:
        raise _invalid(text, f"anybody can have a name below {name}: name the hosts, or what is one owner's")
    label = r"[a-z0-9_-]+" if wild == "*." else r"(?:[a-z0-9_-]+\.)*[a-z0-9_-]+"
    return Pattern(f"connect:{wild}{name}:{port}", "connect", name, port, re.compile(label + re.escape("." + name)))


def _ascii(host: str, text: str) -> str:
    """The form that DNS knows of a name with other letters (RFC 5891, UTS 46)."""
    if host.isascii():
        return host
    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        raise _invalid(text, f"{host} is no name that a host can have") from None


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


def _invalid(text: str, why: str) -> RequestError:
    return RequestError(
        Reason.GRANT_INVALID,
        f"{text!r} is no scope to grant: {why}.",
        hint="docs/grants.md shows scopes of every kind.",
        field="grant.scope",
        metadata={"scope": text, "why": why},
    )
