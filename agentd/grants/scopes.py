"""Scopes: one thing that one call would touch, and patterns over them.

A scope is `kind:value`. Paths in scopes are absolute and real up to their last component; a path scope means
that path and all below it. In patterns `*` stands within one name and `**` for whole branches; a pattern without
either means the path and all below it, as a scope does.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from agentd_sandbox import PathRule

PATH_KINDS = frozenset({"read", "write", "exec"})
KINDS = PATH_KINDS | {"connect", "use", "call"}


@dataclass(frozen=True, slots=True)
class Scope:
    """`glob` is true only for fixed needs of a manifest: an argument's `*` is an ordinary character."""

    kind: str
    value: str
    glob: bool = False

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"

    def rule(self) -> PathRule:
        return PathRule(os.fsencode(self.value), self.glob)


def normalise(path: str, folder: str) -> str:
    """An absolute path with every link resolved but the last component's; `~` and relative paths start at home
    and `folder`. The last one stays, so that deleting a link deletes the link.
    """
    full = os.path.join(folder, os.path.expanduser(path))
    parent, name = os.path.split(os.path.normpath(full) if not _climbs(full) else os.path.realpath(full))
    return os.path.join(os.path.realpath(parent), name) if name else os.path.realpath(full)


def _climbs(path: str) -> bool:
    """`a/link/..` is not `a`: with `..` in it only the file system knows where a path leads."""
    return ".." in path.split("/")


def pattern_covers(pattern: str, scope: Scope) -> bool:
    """Whether all that `scope` stands for lies within `pattern`."""
    if pattern == "*":
        return True
    kind, _, wanted = pattern.partition(":")
    if kind != scope.kind:
        return False
    if kind not in PATH_KINDS:
        return fnmatchcase(scope.value.rstrip(".").lower(), wanted.rstrip(".").lower())
    wanted = _real_pattern(wanted)
    if "*" not in wanted:
        return _within(scope.value, wanted)
    if scope.glob:  # a pattern can't be shown to lie within another, save the very same
        return scope.value == wanted
    if _expression(wanted).fullmatch(scope.value) is None:
        return False
    # `*.txt` means files of that name, not what lies in a folder that happens to be called so.
    return wanted.endswith("/**") or not os.path.isdir(scope.value)


def pattern_touches(pattern: str, scope: Scope) -> bool:
    """Whether anything that `scope` stands for lies within `pattern`: what a deny rule must hit."""
    if pattern_covers(pattern, scope):
        return True
    kind, _, wanted = pattern.partition(":")
    if kind != scope.kind or kind not in PATH_KINDS:
        return False
    fixed = _real_pattern(wanted).split("*", 1)[0]
    start = scope.value.split("*", 1)[0] if scope.glob else scope.value
    return _within(fixed.rstrip("/"), start) or (scope.glob and _within(start.rstrip("/"), fixed.rstrip("/") or "/"))


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _real_pattern(pattern: str) -> str:
    """The pattern with `~` filled in and its fixed beginning resolved, as the paths it is matched against are."""
    fixed, star, rest = os.path.expanduser(pattern).partition("*")
    folder, name = os.path.split(fixed)
    real = os.path.join(os.path.realpath(folder), name) if star else os.path.realpath(fixed)
    return real + star + rest


@lru_cache(maxsize=256)
def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(/\*\*$|\*\*|\*)", pattern)
    wild = {"/**": r"(/.*)?", "**": r".*", "*": r"[^/]*"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts), re.DOTALL)
