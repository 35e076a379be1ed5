"""The compiled filter and the call numbers of the architecture this process really is.

`platform.machine()` names the kernel, not the process: 32-bit Raspberry Pi OS boots a 64-bit kernel. So the
pointer size has a say, and an architecture without a profile is refused.
"""

from __future__ import annotations

import errno
import json
import platform
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agentd_sandbox.errors import Unsupported

PROFILES = Path(__file__).parent / "profiles"
_INSTRUCTION = 8  # sizeof(struct sock_filter)


@dataclass(frozen=True, slots=True)
class Profile:
    """A frozen policy: raw BPF, the numbers of the calls it mediates, and the names back."""

    architecture: str
    bpf: bytes
    numbers: dict[str, int]
    names: dict[int, str]

    @property
    def instructions(self) -> int:
        return len(self.bpf) // _INSTRUCTION


@cache
def profile() -> Profile:
    """The profile of this process. Raises Unsupported where there is none."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    file = PROFILES / f"{machine}.bpf"
    if struct.calcsize("P") != 8 or not file.exists():
        raise Unsupported("seccomp", errno.ENOSYS, f"no filter for {struct.calcsize('P') * 8}-bit {machine}")
    numbers: dict[str, int] = json.loads(file.with_suffix(".json").read_text())["numbers"]
    return Profile(machine, file.read_bytes(), numbers, {number: name for name, number in numbers.items()})
