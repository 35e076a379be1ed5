"""Which layers of confinement this kernel has, found out in throw-away processes.

    python -m agentd_sandbox --levels      the answer as JSON

The probe really confines a child and answers one of its calls, enters the namespaces, restricts itself by Landlock: what
it reports, works. AGENTD_SANDBOX_WITHOUT (a list with commas) pretends that layers or features are missing, for tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agentd_sandbox import kernel, layers
from agentd_sandbox.cgroup import Cgroup
from agentd_sandbox.errors import SandboxFailure
from agentd_sandbox.filters import profile

if TYPE_CHECKING:
    from collections.abc import Callable

_PROBE_TIMEOUT_S = 10
_START = "import sys; sys.path.insert(0, sys.argv[1]); from agentd_sandbox.levels import main; main()"
WITHOUT = "AGENTD_SANDBOX_WITHOUT"
LEVELS = ("L0", "L1", "L2", "L3", "L4")


@dataclass(frozen=True, slots=True)
class Level:
    """`name`: L0 nothing works, L1 the filter alone, L2 with the broker, L3 and namespaces, L4 and Landlock.

    `layers` are those in use beside the filter, a cgroup among them where there is one, at any level. `missing` says of
    each other one why. `without` are features that older kernels lack and the sandbox works around.
    """

    name: str
    architecture: str
    kernel: str
    layers: tuple[str, ...]
    missing: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def confines(self) -> bool:
        return self.name != "L0"

    @property
    def filter_digest(self) -> str:
        """SHA-256 of the seccomp filter that workers are under; empty where nothing can be confined."""
        if not self.confines:
            return ""
        compiled = profile()
        return hashlib.sha256(compiled.bpf if "broker" in self.layers else compiled.alone).hexdigest()

    def reaches(self, minimum: str) -> bool:
        return LEVELS.index(self.name) >= LEVELS.index(minimum)


def probe() -> Level:
    """Probe in a process of its own; a kernel that kills whoever asks costs only that process."""
    root = str(Path(__file__).resolve().parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _START, root], capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
        answer = json.loads(done.stdout)
        lists = (tuple(answer[key]) for key in ("layers", "missing", "without"))
        return Level(answer["name"], answer["architecture"], answer["kernel"], *lists)
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return no_level("the probe was killed or hung")


def no_level(why: str) -> Level:
    return Level("L0", platform.machine(), platform.release(), (), (why,))


def main() -> None:
    pretended = set(filter(None, os.environ.get(WITHOUT, "").split(",")))
    missing: list[str] = []
    reached: list[str] = []

    def look(layer: str, check: Callable[[], None]) -> bool:
        why = f"switched off by {WITHOUT}" if layer in pretended else _in_a_child(check)
        if why:
            missing.append(f"{layer}: {why}")
        else:
            reached.append(layer)
        return not why

    confined = look("broker", _answer_a_call)
    alone = confined or look("filter", kernel.lock_alone)
    if confined:
        look("namespaces", layers.enter_namespaces)
        look("landlock", _landlock)
    look("cgroup", lambda: Cgroup.create(64, 16).remove())
    name = "L0" if not alone else "L1" if not confined else "L2"
    if "namespaces" in reached:
        name = "L4" if "landlock" in reached else "L3"
    without = tuple(sorted(pretended & {"wait_killable", "addfd_send"}))
    level = Level(name, _architecture(), platform.release(), tuple(reached), tuple(missing), without)
    print(json.dumps(asdict(level)))


def _architecture() -> str:
    """Of this process, which may have fewer bits than the kernel."""
    try:
        return profile().architecture
    except SandboxFailure:
        return platform.machine()


def _in_a_child(check: Callable[[], None]) -> str:
    """Do it where it does no harm; why it failed, or nothing."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            check()
        except (SandboxFailure, OSError) as e:
            said = (e.strerror if isinstance(e, OSError) else None) or str(e)
        finally:
            theirs.sendall(said.encode() + b".")
            os._exit(0)
    theirs.close()
    with ours:
        said = ours.recv(4096).decode()
    os.waitpid(child, 0)
    return said[:-1] if said.endswith(".") else "the kernel killed whoever asked"


def _answer_a_call() -> None:
    """Lock a child with the real filter, then answer its open(2) of a path that is not there with /dev/null."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        code = 1
        try:
            listener = kernel.lock()
            theirs.sendall(b"%d" % listener)
            theirs.recv(1)
            code = 0 if os.read(os.open("/agentd/probe", os.O_RDONLY), 1) == b"" else 1
        except SandboxFailure as e:
            theirs.sendall(str(e).encode())
        finally:
            os._exit(code)
    theirs.close()
    pidfd = os.pidfd_open(child)
    said = ours.recv(256)
    if not said.isdigit():
        os.waitpid(child, 0)
        raise SandboxFailure(said.decode() or "the filter with a listener cannot be installed")
    listener = kernel.take_descriptor(pidfd, int(said))
    ours.sendall(b"g")
    call = kernel.receive(listener)
    null = os.open("/dev/null", os.O_RDONLY)
    kernel.inject(listener, call.id, null, os.O_CLOEXEC)
    _, status = os.waitpid(child, 0)
    if status:
        raise SandboxFailure("a mediated open did not come back")


def _landlock() -> None:
    if not layers.landlock_version():
        raise SandboxFailure("not in this kernel")
    kernel.no_new_privileges()
    layers.restrict_by_landlock()
