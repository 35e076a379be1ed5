"""Scopes: one thing that one call would touch, as `kind:value`.

Values have one spelling each, so that a decision never depends on how something was written: paths are absolute and
real up to their last component (a path scope means that path and all below it), hosts are those of `canonical_host`.
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass

from agentd_sandbox import PathRule
from agentd_sandbox.paths import resolve

PATH_KINDS = frozenset({"read", "write", "exec"})
KINDS = PATH_KINDS | {"connect", "use", "call", "device"}


@dataclass(frozen=True, slots=True)
class Scope:
    """`glob` is true only for fixed needs of a manifest: an argument's `*` is an ordinary character."""

    kind: str
    value: str
    glob: bool = False

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"

    @property
    def folded(self) -> str:
        """The value as patterns are compared with it: in one Unicode form, as people can't tell two apart."""
        return fold(self.value)

    def rule(self) -> PathRule:
        return PathRule(os.fsencode(self.value), self.glob)


def fold(path: str) -> str:
    """Names that look the same are the same to a grant, whatever the file system says (Unicode TR 15, NFC)."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def normalise(path: str, folder: str) -> str:
    """An absolute path with every link resolved but the last component's; `~` and relative paths start at home
    and `folder`. The last one stays, so that deleting a link deletes the link.
    """
    full = os.path.join(folder, os.path.expanduser(path))
    parent, name = os.path.split(os.path.normpath(full) if not _climbs(full) else real(full))
    return os.path.join(real(parent), name) if name else real(full)


def real(path: str) -> str:
    """Where an absolute path leads, as far as there is something: what is not there yet is part of it as it is spelled.

    By the sandbox's own walker: what belongs to a process (`/proc/self/root`) leads nowhere; it would be the daemon's.
    """
    missing: list[str] = []
    here = path.rstrip("/") or "/"
    while True:
        try:
            with resolve(os.fsencode(here), follow=True) as found:
                full = os.path.join(os.fsdecode(found.real), *reversed(missing))
            return real(os.path.normpath(full)) if ".." in missing else full
        except OSError:
            above, name = os.path.split(here)
            if above == here:
                return os.path.normpath(path)
            missing.append(name)
            here = above.rstrip("/") or "/"


def _climbs(path: str) -> bool:
    """`a/link/..` is not `a`: with `..` in it only the file system knows where a path leads."""
    return ".." in path.split("/")
