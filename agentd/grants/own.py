"""agentd's own files, which no grant opens: known by which files they are, not by their paths.

A bind mount, another mount of the same file system, a symlink or another spelling is no way around: device and inode decide, of
the directories on the way, too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import agentd_sandbox

import agentd
from agentd.grants.patterns import within
from agentd.grants.scopes import PATH_KINDS, Scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Identity = tuple[int, int]
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Identities:
    """By device and inode, what exists of agentd's own: what is `absent` for tools, and what they may read but not change."""

    absent: frozenset[Identity] = frozenset()
    protected: frozenset[Identity] = frozenset()


class Own:
    """`absent` are what no call gets to: state, sockets, configuration, keys. `protected` are what agentd runs, which may be
    read. Directories stand for all below them. From any thread.
    """

    def __init__(self, absent: Iterable[Path] = (), protected: Iterable[Path] = ()) -> None:
        self.absent = tuple(dict.fromkeys(path.resolve() for path in absent))
        self.protected = tuple(dict.fromkeys(path.resolve() for path in protected))
        self._known = Identities()
        self._looked = -_LOOK_AGAIN_S

    def identities(self) -> Identities:
        """Of those that exist now; looked at again after a second."""
        if time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            absent = frozenset(identity for path in self.absent for identity in _all_of(path))
            self._known = Identities(absent, frozenset(filter(None, map(_identity, self.protected))) - absent)
            self._looked = time.monotonic()
        return self._known

    def forbids(self, scope: Scope) -> str:
        """Why a call may not have this scope, in words; empty if it may."""
        if scope.kind not in PATH_KINDS:
            return ""
        if any(within(scope.value, str(path)) for path in self.absent):
            return f"{scope} belongs to agentd itself"
        changes = scope.kind == "write"
        if changes and any(within(scope.value, str(path)) for path in self.protected):
            return f"{scope} is what agentd itself runs"
        known = self.identities()
        for path in _upwards(scope.value.partition("*")[0] if scope.glob else scope.value):
            identity = _identity(path)
            if identity in known.absent:
                return f"{scope} belongs to agentd itself"
            if changes and identity in known.protected:
                return f"{scope} is what agentd itself runs"
        return ""


def programs() -> tuple[Path, ...]:
    """What this very process runs: its packages, and its virtual environment or the system's modules and interpreter."""
    paths = [Path(agentd.__file__).parent, Path(agentd_sandbox.__file__).parent, Path(sys.executable)]
    if sys.prefix != sys.base_prefix:
        paths.append(Path(sys.prefix))
    paths += [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(paths)


def _all_of(path: Path) -> Iterator[Identity]:
    """A path, and what lies right in it: another mount of that would not lead past the path itself."""
    if identity := _identity(path):
        yield identity
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                yield status.st_dev, status.st_ino


def _identity(path: str | Path) -> Identity | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _upwards(path: str) -> Iterator[str]:
    """The path and the directories that it lies in."""
    while path not in ("", "/"):
        yield path
        path = os.path.dirname(path)
