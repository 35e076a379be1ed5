"""The sandbox alone: a call, a mediated open, programs, memory, and what 10,000 calls leave behind."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox import Access, Job, PathRule, Sandbox
from rich.progress import track

from tests.bench.figures import Figure, console, held_mb, milliseconds, percentile, resident_mb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentd_sandbox import Change

PROGRAM = b"""
import os, subprocess, time
from agentd_sandbox.sdk import tool

def timed(do, times):
    taken = []
    for _ in range(times):
        start = time.perf_counter_ns()
        do()
        taken.append(time.perf_counter_ns() - start)
    taken.sort()
    return [taken[times // 2] / 1000, taken[times * 99 // 100] / 1000]

def refused(path):
    try:
        os.open(path, os.O_RDONLY)
    except OSError:
        pass

@tool("nothing")
def nothing():
    return {}

@tool("opens")
def opens(path, hidden, times):
    return {
        "open": timed(lambda: os.close(os.open(path, os.O_RDONLY)), times),
        "denied": timed(lambda: refused(hidden), times),
    }

@tool("shell")
def shell(line, folder, times):
    os.chdir(folder)
    return {"taken": timed(lambda: subprocess.run(["sh", "-c", line], stdout=subprocess.DEVNULL, check=True), times)}
"""
LINE = "ls | sort"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_CTYPE": "C.utf8"}
MANY = 10_000


class Silent:
    """A recorder that agrees to everything: what the journal costs is measured elsewhere."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        pass


def figures(folder: Path, calls: int) -> list[Figure]:
    """All of it, in a folder of its own."""
    home = folder.resolve() / "confined"
    home.mkdir()
    (home / "file").write_text("x")
    sandbox = Sandbox({"bench": PROGRAM}, home)
    sandbox.start()
    access = Access(read=(PathRule(os.fsencode(home)),), execute=(PathRule(b"/usr"),))

    def run(tool: str, **arguments: Any) -> dict[str, Any]:
        outcome = sandbox.run(Job("bench", tool, arguments, {}, 300, 4096), access, Silent(), threading.Event())
        assert outcome.result is not None, outcome.error
        return outcome.result

    try:
        return [*_call(run, calls), *_opens(run, home), *_shell(run, home), *_memory(sandbox), *_many(run)]
    finally:
        sandbox.stop()


def _call(run: Any, calls: int) -> list[Figure]:
    taken = milliseconds(lambda: run("nothing"), calls, "call through zygote and broker", pause_s=0.01)
    forked = milliseconds(lambda: subprocess.run(["/bin/true"], check=True), calls, "/bin/true, unconfined")
    name = "/bin/true from Python, p50"
    return [
        Figure("sandbox: warm call, p50", percentile(taken, 0.5), "ms", 2, name, percentile(forked, 0.5)),
        Figure("sandbox: warm call, p99", percentile(taken, 0.99), "ms", 10, name, percentile(forked, 0.5)),
    ]


def _opens(run: Any, home: Path) -> list[Figure]:
    found = run("opens", path=str(home / "file"), hidden="/etc/shadow", times=5000)
    plain = milliseconds(lambda: os.close(os.open(home / "file", os.O_RDONLY)), 5000, "plain open and close")
    base = percentile(plain, 0.5) * 1000
    return [
        Figure("sandbox: mediated open and close, p50", found["open"][0], "us", 30, "plain open and close", base),
        Figure("sandbox: mediated open and close, p99", found["open"][1], "us"),
        Figure("sandbox: denied open, p50", found["denied"][0], "us", 20),
    ]


def _shell(run: Any, home: Path) -> list[Figure]:
    confined = run("shell", line=LINE, folder=str(home), times=50)["taken"][0] / 1000
    command = ["sh", "-c", LINE]
    plain = milliseconds(
        lambda: subprocess.run(command, cwd=home, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True), 50, LINE
    )
    base = percentile(plain, 0.5)
    return [Figure(f"sandbox: sh -c '{LINE}', p50", confined, "ms", 2.5 * base, "unconfined", base)]


def _memory(sandbox: Sandbox) -> list[Figure]:
    assert sandbox.zygote_pid is not None
    children = Path(f"/proc/{sandbox.zygote_pid}/task/{sandbox.zygote_pid}/children").read_text().split()
    held = held_mb(sandbox.zygote_pid) + sum(held_mb(int(child)) for child in children)
    return [Figure("sandbox: zygote and warm worker", held, "MB", 25)]


def _many(run: Any) -> list[Figure]:
    for _ in range(200):
        run("nothing")
    before = resident_mb(os.getpid()), len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    for _ in track(range(MANY), description=f"{MANY} calls in a row", console=console, transient=True):
        run("nothing")
    took = time.perf_counter() - start
    grown = resident_mb(os.getpid()) - before[0]
    return [
        Figure(f"sandbox: memory grown by {MANY} calls", grown, "MB", 1),
        Figure("sandbox: descriptors grown", len(os.listdir("/proc/self/fd")) - before[1], "", 2),
        Figure("sandbox: calls a second, one after another", MANY / took, "/s"),
    ]
