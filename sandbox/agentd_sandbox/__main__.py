"""Run a program under a policy.

    python -m agentd_sandbox --policy POLICY.json -- PROGRAM [ARGUMENT]...
    python -m agentd_sandbox --levels           what this kernel can confine, as JSON

The policy is a JSON object; every key may be left out: "read", "write" and "execute" are lists of absolute paths (each with
all below it; `*` and `**` as in PathRule), "connect" a list of "host:port", "folder" the working folder, "environment" an
object, "deadline_s" a number, "memory_mib" and "processes" limits. With --json what was refused is printed to standard
error at the end. Exit status: the program's; 128 and the signal's number if one ended it; 124 at the deadline; 125 if it
could not be confined or went past a limit; 2 for a policy that is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentd_sandbox.access import Access, PathRule
from agentd_sandbox.errors import SandboxFailure, WorkerTimeout
from agentd_sandbox.launch import Ended, launch
from agentd_sandbox.levels import probe
from agentd_sandbox.limits import Limits
from agentd_sandbox.network import split_authority

_KEYS = {"read", "write", "execute", "connect", "folder", "environment", "deadline_s", "memory_mib", "processes"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a program may do, as it stands in the JSON document."""

    access: Access
    folder: str
    environment: dict[str, str] = field(default_factory=dict)
    deadline_s: float = 3600
    limits: Limits = field(default_factory=Limits)


def parse(document: Any) -> Policy:
    """Raises ValueError naming the key that is wrong."""
    if not isinstance(document, dict) or set(document) - _KEYS:
        unknown = ", ".join(sorted(set(document) - _KEYS)) if isinstance(document, dict) else "the document is no object"
        raise ValueError(f"unknown keys: {unknown}; there are {', '.join(sorted(_KEYS))}")
    rules = {key: tuple(map(_rule, _texts(document, key))) for key in ("read", "write", "execute")}
    peers = frozenset(split_authority(text, None) for text in _texts(document, "connect"))
    environment = document.get("environment", {})
    if not isinstance(environment, dict) or not all(isinstance(v, str) and _NAME.fullmatch(k) for k, v in environment.items()):
        raise ValueError("environment: an object of names and texts")
    usual = Limits()
    limits = Limits(
        _number(document, "processes", usual.processes), memory_mib=_number(document, "memory_mib", usual.memory_mib)
    )
    access = Access(rules["read"], rules["write"], peers, rules["execute"])
    folder = os.path.realpath(document.get("folder", "/"))
    return Policy(access, folder, environment, _number(document, "deadline_s", 3600), limits)


def _texts(document: dict[str, Any], key: str) -> list[str]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key}: a list of texts")
    return value


def _rule(text: str) -> PathRule:
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"{text!r} is not an absolute path")
    fixed, star, rest = text.partition("*")
    folder, slash, name = fixed.rpartition("/")
    real = os.path.realpath(folder or "/").rstrip("/") + slash + name + star + rest if star else os.path.realpath(text)
    return PathRule(os.fsencode(real), bool(star))


def _number(document: dict[str, Any], key: str, default: int) -> int:
    value = document.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key}: a whole number above 0")
    return value


def main() -> int:
    about, _, keys = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m agentd_sandbox", description=about, epilog=keys, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, help="file with the policy as JSON, - for standard input")
    parser.add_argument("--levels", action="store_true", help="print what this kernel can confine, as JSON, and end")
    parser.add_argument("--json", action="store_true", help="print what happened as JSON to standard error")
    parser.add_argument("program", nargs="*", help="program and its arguments")
    arguments = parser.parse_args()
    if arguments.levels:
        print(json.dumps(asdict(probe())))
        return 0
    if not arguments.policy or not arguments.program:
        parser.error("--policy and a program are needed")
    try:
        text = sys.stdin.read() if str(arguments.policy) == "-" else arguments.policy.read_text()
        policy = parse(json.loads(text))
    except (OSError, ValueError) as e:
        print(f"{parser.prog}: the policy is wrong: {e}", file=sys.stderr)
        return 2
    return _run(policy, arguments.program, as_json=arguments.json)


def _run(policy: Policy, program: list[str], *, as_json: bool) -> int:
    try:
        ended = launch(program, policy.access, policy.folder, policy.environment, policy.deadline_s, policy.limits, probe())
    except WorkerTimeout as e:
        print(f"agentd_sandbox: {e}", file=sys.stderr)
        return 124
    except (SandboxFailure, OSError) as e:
        print(f"agentd_sandbox: {e}", file=sys.stderr)
        return 125
    if as_json:
        print(json.dumps(_told(ended)), file=sys.stderr)
    return ended.status


def _told(ended: Ended) -> dict[str, Any]:
    return {
        "status": ended.status,
        "denied": ended.denied,
        "denials": [asdict(denial) for denial in ended.denials],
        "contacts": [asdict(contact) for contact in ended.contacts],
        "mediated": ended.mediated,
    }


if __name__ == "__main__":
    sys.exit(main())
