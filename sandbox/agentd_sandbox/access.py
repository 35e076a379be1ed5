"""What one call may touch: path rules and peers, matched on real paths only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class PathRule:
    """One path and all below it. With `glob`, `*` stands for a part of one name and `**` for whole branches.

    Paths are absolute, real (no symlinks, no `..`) and bytes: file names need not be UTF-8.
    """

    path: bytes
    glob: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        parts = re.split(rb"(\*\*|\*)", self.path)
        expressions = {b"**": rb".*", b"*": rb"[^/]*"}
        return re.compile(b"".join(expressions.get(part, re.escape(part)) for part in parts), re.DOTALL)

    def covers(self, path: bytes) -> bool:
        if self.glob:
            return self._pattern.fullmatch(path) is not None
        root = self.path.rstrip(b"/")
        return path == self.path or path.startswith(root + b"/")

    def lies_below(self, folder: bytes) -> bool:
        """Whether `folder` is on the way to this path: it may be seen to exist, nothing more."""
        fixed = self.path.split(b"*", 1)[0] if self.glob else self.path
        return folder in (b"/", fixed) or fixed.startswith(folder + b"/")


@dataclass(frozen=True, slots=True)
class Access:
    """The scopes of one call. `write` does not include `read`; `connect` holds literal (address, port) pairs."""

    read: tuple[PathRule, ...] = ()
    write: tuple[PathRule, ...] = ()
    connect: frozenset[tuple[str, int]] = field(default_factory=frozenset)

    def may_read(self, path: bytes) -> bool:
        return any(rule.covers(path) for rule in self.read)

    def may_write(self, path: bytes) -> bool:
        return any(rule.covers(path) for rule in self.write)

    def may_see(self, path: bytes) -> bool:
        """Whether the call may know if `path` exists and what kind of thing it is."""
        rules = (*self.read, *self.write)
        return any(rule.covers(path) or rule.lies_below(path) for rule in rules)
