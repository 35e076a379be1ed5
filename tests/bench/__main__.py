"""Measurements, each beside a baseline of the same run: `make bench`. Nothing here is asserted.

python -m tests.bench [--json] [--calls 300]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from agentd.client import Client
from tests.bench import budgets, confined, engine, idle, log, permission, undo
from tests.bench.figures import Figure, console, milliseconds, percentile, resident_mb, show
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable


def bare_interpreter(file: Path) -> Callable[[], object]:
    """What a home-made agent script does: a fresh, unconfined interpreter reads the file."""
    code = f"print(open({str(file)!r}).read())"
    return lambda: subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)


def durable_write(file: Path) -> Callable[[], object]:
    """Two small appends with fdatasync: what a durable intent and a durable end cost on this disk at least."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        for _ in range(2):
            os.write(descriptor, bytes(1000))
            os.fdatasync(descriptor)

    return write


def tool_calls(daemon: DaemonProcess, client: Client, calls: int) -> list[Figure]:
    file = daemon.home / "kilobyte.txt"
    file.write_text(("x" * 63 + "\n") * 16)
    client.call("files.read", {"path": str(file)})
    taken = milliseconds(lambda: client.call("files.read", {"path": str(file)}), calls, "files.read of 1 KB")
    status = milliseconds(client.status, calls, "empty gRPC request")
    fresh = milliseconds(bare_interpreter(file), max(20, calls // 10), "fresh unconfined interpreter")
    synced = milliseconds(durable_write(daemon.root / "synced"), calls, "two fdatasync")
    change = milliseconds(
        lambda: client.call("files.write", {"path": str(file), "text": str(time.time_ns())}), calls, "files.write"
    )
    name = "fresh unconfined interpreter, p50"
    return [
        Figure("tool call files.read 1 KB, p50", percentile(taken, 0.5), "ms", 10, name, percentile(fresh, 0.5)),
        Figure("tool call files.read 1 KB, p99", percentile(taken, 0.99), "ms", None, name, percentile(fresh, 0.5)),
        Figure(
            "tool call files.write, p50", percentile(change, 0.5), "ms", None, "two fdatasync, p50", percentile(synced, 0.5)
        ),
        Figure("empty request (GetStatus), p50", percentile(status, 0.5), "ms"),
    ]


def memory(client: Client) -> list[Figure]:
    list(client.run("what time is it"))
    status = client.status()
    daemon = resident_mb(status.pid) + resident_mb(status.zygote_pid)
    bare = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(30)"])
    time.sleep(0.3)
    baseline = resident_mb(bare.pid)
    bare.kill()
    bare.wait()
    return [
        Figure("resident: daemon + zygote", daemon, "MB", 110, "bare interpreter", baseline),
        Figure("resident: engine, pocket model", resident_mb(status.engine_pid), "MB", 90, "bare interpreter", baseline),
    ]


def starts(folder: Path, times: int) -> list[Figure]:
    taken = []
    for n in track(range(times), description=f"{'agentd serve':32}", console=console, transient=True):
        root = folder / f"start{n}"
        root.mkdir()
        daemon = DaemonProcess(root)
        start = time.perf_counter()
        daemon.start()
        taken.append(time.perf_counter() - start)
        daemon.stop()
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import grpc, pydantic, apsw"], check=True)
    imports = time.perf_counter() - start
    return [
        Figure(
            "agentd serve until it answers, p50", statistics.median(taken), "s", 2, "import of grpc, pydantic, apsw", imports
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one figure a line")
    parser.add_argument("--calls", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "daemon").mkdir()
        daemon = DaemonProcess(folder / "daemon").start()
        with Client(daemon.socket) as client:
            figures = [*tool_calls(daemon, client, args.calls), *memory(client)]
            figures += permission.questions(daemon, client, 50)
        daemon.stop()
        figures += permission.decisions(5000)
        figures += undo.figures(folder)
        figures += log.figures(folder)
        figures += budgets.figures()
        figures += idle.figures()
        figures += starts(folder, 5)
        figures += confined.figures(folder, args.calls)
    figures += engine.figures()
    show(figures, as_json=args.json)


if __name__ == "__main__":
    main()
