"""The compiled filter and the call numbers of the architecture this process really is.

`platform.machine()` names the kernel, not the process: 32-bit Raspberry Pi OS boots a 64-bit kernel. So the ELF
header of the running program decides (elf(5)), and an architecture without a profile is refused.
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
_ELF = struct.Struct("<4sB13xH")  # magic, class (1: 32 bits), e_machine
_MACHINES = {(2, 62): "x86_64", (2, 183): "aarch64", (1, 40): "arm"}


@dataclass(frozen=True, slots=True)
class Profile:
    """A frozen policy: raw BPF, the numbers of the calls it mediates, and the names back.

    `alone` is the same filter for kernels that can't hand a call to a broker: what is mediated gets EACCES there.
    """

    architecture: str
    bpf: bytes
    alone: bytes
    numbers: dict[str, int]
    names: dict[int, str]


def instructions(bpf: bytes) -> int:
    return len(bpf) // _INSTRUCTION


@cache
def profile() -> Profile:
    """The profile of this process. Raises Unsupported where there is none."""
    with open("/proc/self/exe", "rb") as program:
        _magic, bits, machine = _ELF.unpack(program.read(_ELF.size))
    name = _MACHINES.get((bits, machine))
    if name is None:
        raise Unsupported(
            "seccomp", errno.ENOSYS, f"no filter for {32 * bits}-bit {platform.machine()} (ELF machine {machine})"
        )
    numbers: dict[str, int] = json.loads((PROFILES / f"{name}.json").read_text())["numbers"]
    bpf, alone = ((PROFILES / f"{name}.{suffix}").read_bytes() for suffix in ("bpf", "alone.bpf"))
    return Profile(name, bpf, alone, numbers, {number: name for name, number in numbers.items()})
