"""A daemon that has nothing to do, with 50 automations: how much of a core it takes, and how often it wakes up."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from agentd.client import Client
from tests.bench.figures import Figure
from tests.e2e.conftest import DaemonProcess

AUTOMATIONS, SECONDS = 50, 60.0
_LIBRARY = ("event_engine", "grpc_", "lifeguard")  # gRPC's names of its threads


def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def measure(root: Path) -> list[Figure]:
    """30 folders that are watched, 15 schedules, 5 calls."""
    for n in range(AUTOMATIONS):
        (root / "home" / f"in{n}").mkdir(parents=True)
        trigger = f'[on.file]\npath = "{root}/home/in{n}"\n'
        if n >= 30:
            trigger = '[on.schedule]\ncron = "0 4 * * *"\n' if n < 45 else "[on.call]\n"
        (root / "automations").mkdir(exist_ok=True)
        (root / "automations" / f"a{n}.toml").write_text('prompt = "hello"\n' + trigger)
    with DaemonProcess(root).running() as daemon:
        time.sleep(10)  # what follows a start is over
        with Client(daemon.socket) as client:
            assert len(client.automations.list()) == AUTOMATIONS
            status = client.status()
        processes = [status.pid, status.engine_pid, status.zygote_pid]
        before, begun = [_used(each) for each in processes], time.monotonic()
        time.sleep(SECONDS)
        passed = time.monotonic() - begun
        after = [_used(each) for each in processes]
    cpu_s = sum(late[0] - early[0] for early, late in zip(before, after, strict=True))
    loop, others, library = (
        sum(late[kind] - early[kind] for early, late in zip(before, after, strict=True)) / passed for kind in (1, 2, 3)
    )
    return [
        Figure(f"idle with {AUTOMATIONS} automations: of one core", cpu_s / passed * 100, "%", 0.5),
        Figure("the same: wake-ups of the event loop", loop, "/s"),
        Figure("of the threads that read sensors for it", others, "/s"),
        Figure("of gRPC's own threads", library, "/s"),
    ]


def _used(pid: int) -> tuple[float, int, int, int]:
    """Seconds of CPU, and voluntary switches of the first thread, of the others, of those of gRPC."""
    seconds, switches = 0.0, [0, 0, 0]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        name, status = (thread / "comm").read_text().strip(), (thread / "status").read_text()
        kind = 2 if name.startswith(_LIBRARY) else 0 if thread.name == str(pid) else 1
        switches[kind] += int(status.partition("voluntary_ctxt_switches:")[2].split()[0])
    return seconds, *switches
