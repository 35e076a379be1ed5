"""A memory and process limit by the kernel, for all workers together, where a cgroup of version 2 is ours to divide.

That is so in a systemd unit with Delegate=yes (and DelegateSubgroup=, so that the daemon itself sits one below), and for
root of a machine. Elsewhere the broker looks at memory and counts processes by itself: cgroups(7), cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from agentd_sandbox import kernel
from agentd_sandbox.errors import SandboxFailure

_MOUNT = Path("/sys/fs/cgroup")
_EMPTY_TIMEOUT_S = 1.0
_NEEDED = {"memory", "pids"}


class Cgroup:
    """A group for the zygote and what it forks. `create` raises SandboxFailure saying why there can be none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def create(cls, memory_mib: int, processes: int) -> Cgroup:
        parent = _delegated()
        folder = parent / f"agentd-tools-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            kernel.tell(parent / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(_NEEDED)))
            folder.mkdir()
            kernel.tell(folder / "memory.max", str(memory_mib << 20))
            kernel.tell(folder / "pids.max", str(processes))
        except OSError as e:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise SandboxFailure(f"{parent} can't be divided: {e.strerror}") from None
        return cls(folder)

    def add(self, process: int) -> None:
        kernel.tell(self._folder / "cgroup.procs", str(process))

    def remove(self) -> None:
        """Once it is empty: what was killed a moment ago may still be in it."""
        deadline = time.monotonic() + _EMPTY_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.01)
            else:
                return


def _delegated() -> Path:
    """The group that may be divided: the root's own, or the parent of ours. It must have no process of its own."""
    own = _own()
    parent = own if own == _MOUNT else own.parent
    there = set((parent / "cgroup.controllers").read_text().split()) if (parent / "cgroup.controllers").exists() else set()
    if not there >= _NEEDED:
        raise SandboxFailure(f"no {' and '.join(sorted(_NEEDED - there))} controller in {parent}")
    if parent != _MOUNT and (parent / "cgroup.procs").read_text().strip():
        raise SandboxFailure(f"{parent} holds processes itself, so it can't be divided")
    if not os.access(parent / "cgroup.subtree_control", os.W_OK):
        raise SandboxFailure(f"{parent} is not ours")
    return parent


def _own() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return _MOUNT / line[3:].lstrip("/")
    raise SandboxFailure("no cgroup of version 2")
