"""Which layers of confinement this kernel has, found out in a throw-away process.

    python -m agentd_sandbox.levels      the answer as JSON

The probe really confines a child and answers one of its calls: what it reports, works.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from agentd_sandbox import kernel
from agentd_sandbox.errors import SandboxFailure
from agentd_sandbox.filters import profile

_PROBE_TIMEOUT_S = 10
_START = "import sys; sys.path.insert(0, sys.argv[1]); from agentd_sandbox.levels import main; main()"
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_VERSION = 1


@dataclass(frozen=True, slots=True)
class Level:
    """`name` is L2 (filter and broker work) or L0 (no tool may run). `missing` says why there is no more."""

    name: str
    architecture: str
    kernel: str
    missing: tuple[str, ...]

    @property
    def confines(self) -> bool:
        return self.name != "L0"


def probe() -> Level:
    """Probe in a process of its own; a kernel that kills whoever asks costs only that process."""
    root = str(Path(__file__).resolve().parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _START, root], capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
        answer = json.loads(done.stdout)
        return Level(answer["name"], answer["architecture"], answer["kernel"], tuple(answer["missing"]))
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return Level("L0", platform.machine(), platform.release(), ("the probe was killed or hung",))


def main() -> None:
    missing = [f"Landlock: {why}" for why in _landlock_missing()]
    try:
        _confine_a_child()
        name = "L2"
    except (SandboxFailure, OSError) as e:
        name, missing = "L0", [*missing, f"broker: {e}"]
    print(json.dumps(asdict(Level(name, platform.machine(), platform.release(), tuple(missing)))))


def _confine_a_child() -> None:
    """Lock a child with the real filter, then answer its open(2) of a path that is not there with /dev/null."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        code = 1
        try:
            listener = kernel.lock(profile())
            theirs.sendall(b"%d" % listener)
            theirs.recv(1)
            code = 0 if os.read(os.open("/agentd/probe", os.O_RDONLY), 1) == b"" else 1
        finally:
            os._exit(code)
    theirs.close()
    pidfd = os.pidfd_open(child)
    said = ours.recv(16)
    if not said:
        os.waitpid(child, 0)
        raise SandboxFailure("the filter with a listener cannot be installed")
    listener = kernel.take_descriptor(pidfd, int(said))
    ours.sendall(b"g")
    call = kernel.receive(listener)
    null = os.open("/dev/null", os.O_RDONLY)
    kernel.inject(listener, call.id, null, close_on_exec=True)
    _, status = os.waitpid(child, 0)
    if status:
        raise SandboxFailure("a mediated open did not come back")


def _landlock_missing() -> list[str]:
    # A second layer for later; asked for here so that `doctor` can say why it is not there.
    version: int = kernel._syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    return [] if version > 0 else ["not in this kernel"]


if __name__ == "__main__":
    main()
