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
ARCHITECTURES = {"x86_64": ("X86_64", 0xC000_003E), "aarch64": ("AARCH64", 0xC000_00B7), "arm": ("ARM", 0x4000_0028)}
HOST_CALLS = (
    *("seccomp", "pidfd_getfd", "capset", "mount_setattr", "getdents64", "kcmp"),
    *("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
)


def compile_profile(architecture: str) -> dict[str, bytes]:
    """By suffix: the filter (`bpf`), the same with mediated calls refused (`alone.bpf`), and call numbers (`json`)."""
    filters = {suffix: _compile(architecture, mediated=suffix == "bpf") for suffix in ("bpf", "alone.bpf")}
    import pyseccomp as s

    name, audit = ARCHITECTURES[architecture]
    mediated = [call for rule in TABLE if rule.action is Action.MEDIATE for call in rule.calls]
    resolved = {call: s.resolve_syscall(getattr(s.Arch, name), call) for call in (*mediated, *HOST_CALLS)}
    numbers = {call: number for call, number in sorted(resolved.items()) if number >= 0}
    text = json.dumps({"audit_arch": audit, "numbers": numbers}, indent=1) + "\n"
    return filters | {"json": text.encode()}


def _compile(architecture: str, *, mediated: bool) -> bytes:
    """`mediated` false is for kernels that can't hand a call to a broker: there is nobody to ask."""
    import pyseccomp as s

    arch = getattr(s.Arch, ARCHITECTURES[architecture][0])
    actions = {
        Action.ALLOW: s.ALLOW,
        Action.MEDIATE: s.NOTIFY if mediated else s.ERRNO(errno.EACCES),
        Action.ABSENT: s.ERRNO(errno.ENOSYS),
        Action.KILL: s.KILL_PROCESS,
    }
    program = s.SyscallFilter(s.ERRNO(errno.EPERM))
    if s.system_arch() != arch:
        program.add_arch(arch)
        program.remove_arch(s.system_arch())
    program.set_attr(s.Attr.ACT_BADARCH, s.KILL_PROCESS)
    program.set_attr(s.Attr.CTL_OPTIMIZE, 2)  # a binary tree instead of a linear scan
    for rule in TABLE:
        if rule.action is Action.REFUSE:
            continue  # what the filter does with whatever it does not name
        for call in rule.calls:
            if s.resolve_syscall(arch, call) < 0:  # the legacy forms (open, stat, rename ...) do not exist on aarch64
                continue
            action = s.ALLOW if rule.free_alone and not mediated else actions[rule.action]
            for checks in rule.checks or ((),):
                program.add_rule_exactly(action, call, *(_argument(s, check) for check in checks))
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def _argument(s: Any, check: Check) -> Any:
    if check.differs:  # libseccomp has no masked form of it
        return s.Arg(check.argument, s.NE, check.value)
    if check.mask == 0xFFFF_FFFF_FFFF_FFFF:
        return s.Arg(check.argument, s.EQ, check.value)
    return s.Arg(check.argument, s.MASKED_EQ, check.mask, check.value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check: bool = parser.parse_args().check
    stale = 0
    for architecture in ARCHITECTURES:
        for suffix, content in compile_profile(architecture).items():
            target = PROFILES / f"{architecture}.{suffix}"
            if check and (not target.exists() or target.read_bytes() != content):
                print(f"{target} is not what policy.py says; run: python -m agentd_sandbox.compile", file=sys.stderr)
                stale = 1
            if not check:
                target.write_bytes(content)
                print(f"wrote {target}: {len(content)} bytes")
    return stale


if __name__ == "__main__":
    sys.exit(main())
