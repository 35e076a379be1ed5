"""Compile the policy table with libseccomp: run at development time, its output is checked in.

    python -m agentd_sandbox.compile            write profiles/<arch>.{bpf,json}
    python -m agentd_sandbox.compile --check    exit 1 if they are not what the table says

Needs the development extra `pyseccomp` and the library libseccomp (Debian: apt-get install libseccomp2).
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox.policy import TABLE, Action

if TYPE_CHECKING:
    from agentd_sandbox.policy import Check

PROFILES = Path(__file__).parent / "profiles"
ARCHITECTURES = {"x86_64": ("X86_64", 0xC000_003E), "aarch64": ("AARCH64", 0xC000_00B7)}
HOST_CALLS = ("seccomp", "pidfd_getfd", "capset")


def compile_profile(architecture: str) -> tuple[bytes, str]:
    """The filter as raw BPF, and the numbers of every call the running code needs to know, as JSON."""
    import pyseccomp as s

    name, audit = ARCHITECTURES[architecture]
    arch = getattr(s.Arch, name)
    actions = {
        Action.ALLOW: s.ALLOW,
        Action.MEDIATE: s.NOTIFY,
        Action.ABSENT: s.ERRNO(errno.ENOSYS),
        Action.KILL: s.KILL_PROCESS,
    }
    program = s.SyscallFilter(s.ERRNO(errno.EPERM))
    if s.system_arch() != arch:
        program.add_arch(arch)
        program.remove_arch(s.system_arch())
    program.set_attr(s.Attr.ACT_BADARCH, s.KILL_PROCESS)
    program.set_attr(s.Attr.CTL_OPTIMIZE, 2)  # a binary tree instead of a linear scan
    numbers: dict[str, int] = {}
    for rule in TABLE:
        for call in rule.calls:
            number = s.resolve_syscall(arch, call)
            if number < 0:  # the legacy forms (open, stat, rename ...) do not exist on aarch64
                continue
            if rule.action is Action.MEDIATE:
                numbers[call] = number
            for checks in rule.checks or ((),):
                program.add_rule_exactly(actions[rule.action], call, *(_argument(s, check) for check in checks))
    numbers |= {call: s.resolve_syscall(arch, call) for call in HOST_CALLS}
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        bpf = file.read()
    return bpf, json.dumps({"audit_arch": audit, "numbers": dict(sorted(numbers.items()))}, indent=1) + "\n"


def _argument(s: Any, check: Check) -> Any:
    if check.mask == 0xFFFF_FFFF_FFFF_FFFF:
        return s.Arg(check.argument, s.EQ, check.value)
    return s.Arg(check.argument, s.MASKED_EQ, check.mask, check.value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check: bool = parser.parse_args().check
    stale = 0
    for architecture in ARCHITECTURES:
        bpf, numbers = compile_profile(architecture)
        for path, content in ((f"{architecture}.bpf", bpf), (f"{architecture}.json", numbers.encode())):
            target = PROFILES / path
            if check and (not target.exists() or target.read_bytes() != content):
                print(f"{target} is not what policy.py says; run: python -m agentd_sandbox.compile", file=sys.stderr)
                stale = 1
            if not check:
                target.write_bytes(content)
                print(f"wrote {target}: {len(content)} bytes")
    return stale


if __name__ == "__main__":
    sys.exit(main())
