"""Attacks on the broker and the daemon: whatever a worker sends, the caller gets an outcome or a named error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import (
    Access,
    Job,
    Outcome,
    OutputTooLarge,
    PathRule,
    Sandbox,
    SandboxFailure,
    WorkerCancelled,
    WorkerDied,
    WorkerOffence,
    WorkerTimeout,
    probe,
)
from agentd_sandbox.filters import profile
from agentd_sandbox.policy import TABLE, Action

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change

PROGRAM = Path(__file__).with_name("breakout.py").read_bytes()
SECRET = "agentd-breakout-canary"


class Silent:
    """A recorder that agrees to everything."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        pass


@dataclass
class Cell:
    sandbox: Sandbox
    inside: Path

    def run(
        self,
        tool: str,
        *,
        peers: frozenset[tuple[str, int]] = frozenset(),
        deadline_s: float = 10,
        cancelled: threading.Event | None = None,
        **arguments: Any,
    ) -> Outcome:
        rule = (PathRule(os.fsencode(self.inside)),)
        job = Job("breakout", tool, arguments, {}, deadline_s, 8192)
        return self.sandbox.run(job, Access(rule, rule, peers), Silent(), cancelled or threading.Event())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    level = probe()
    if not level.confines:
        pytest.skip(f"this kernel can't confine: {level.missing}")
    os.environ["AGENTD_BREAKOUT_SECRET"] = SECRET
    made = Sandbox({"breakout": PROGRAM}, tmp_path_factory.mktemp("work"))
    made.start()
    yield made
    made.stop()
    del os.environ["AGENTD_BREAKOUT_SECRET"]


@pytest.fixture
def cell(sandbox: Sandbox, tmp_path: Path) -> Cell:
    (tmp_path.resolve() / "file").write_text("inside\n")
    return Cell(sandbox, tmp_path.resolve())


USAGE = '"usage": {"cpu_us": 1, "rss_kb": 1}'
FORGED = {
    "no JSON": "this is no JSON",
    "cut": '{"result": {',
    "no object": "[]",
    "a number": "7",
    "no usage": '{"result": {}}',
    "usage of text": '{"result": {}, "usage": {"cpu_us": "x", "rss_kb": 1}}',
    "usage beyond numbers": '{"result": {}, "usage": {"cpu_us": Infinity, "rss_kb": 1}}',
    "usage without end": '{"result": {}, "usage": {"cpu_us": ' + "9" * 5000 + ', "rss_kb": 1}}',
    "too deep": "[" * 8000,
    "result of text": '{"result": "text", ' + USAGE + "}",
    "result a list": '{"result": [1], ' + USAGE + "}",
    "error an object": '{"error": {"a": 1}, ' + USAGE + "}",
    "both": '{"result": {}, "error": "x", ' + USAGE + "}",
    "neither": "{" + USAGE + "}",
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
def test_a_forged_answer_is_a_named_error_or_a_sound_outcome(cell: Cell, text: str):
    """A tool can write to its channel itself: callers see SandboxFailure, or exactly one of result and error, well typed."""
    try:
        outcome = cell.run("answer", text=text)
    except SandboxFailure:
        return
    assert (outcome.result is None) != (outcome.error is None)
    assert isinstance(outcome.result, dict | None)
    assert isinstance(outcome.error, str | None)


def test_a_well_formed_answer_written_by_the_tool_itself_counts(cell: Cell):
    """The control for the forged ones."""
    assert cell.run("answer", text='{"result": {"n": 1}, ' + USAGE + "}").result == {"n": 1}


@pytest.mark.parametrize("tool", ["half_answer", "close_channel"])
def test_a_channel_that_ends_early_is_a_dead_worker(cell: Cell, tool: str):
    """At once, not at the deadline."""
    start = time.monotonic()
    with pytest.raises(WorkerDied):
        cell.run(tool)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("how", ["exit", "interrupt", "recursion", "object", "deep", "crash"])
def test_a_tool_that_ends_in_an_odd_way_is_an_answer_or_a_dead_worker(cell: Cell, how: str):
    """Exits, crashes, endless recursion and results that are no JSON."""
    try:
        outcome = cell.run("leave", how=how)
    except (WorkerDied, OutputTooLarge):
        return
    assert outcome.error


@pytest.mark.parametrize("length", [-1, -(1 << 63), (1 << 63) - 1])
def test_an_odd_length_is_an_error_of_the_call(cell: Cell, length: int):
    """truncate(2) takes any number; the broker hands the error back and the file stays."""
    assert cell.run("truncate", path=str(cell.inside / "file"), length=length).error
    assert (cell.inside / "file").read_text() == "inside\n"


@pytest.mark.parametrize("length", [1, 2, 5])
def test_an_address_that_ends_in_unmapped_memory_is_an_error_of_the_call(cell: Cell, length: int):
    """connect(2) with fewer readable bytes than it says."""
    result = cell.run("short_address", length=length).result
    assert result is not None
    assert result["result"] == -1


def test_a_path_without_an_end_is_an_error_of_the_call(cell: Cell):
    """EFAULT, as from the kernel."""
    assert cell.run("unterminated").result == {"result": -1, "errno": 14}


MEDIATED = sorted({call for rule in TABLE if rule.action is Action.MEDIATE for call in rule.calls} & set(profile().numbers))
DEADLY = {"clone", "fork", "vfork", "kill", "tkill", "tgkill", "execve"}
"""What a worker may do to itself with them: signal itself, or go on twice on one stack."""


@pytest.mark.parametrize("name", MEDIATED)
def test_no_arguments_of_a_mediated_call_bring_the_broker_down(cell: Cell, name: str):
    """Pointers into nowhere, lengths and flags beyond all sense: the worker gets its errors and answers."""
    numbers = [profile().numbers[name]]
    try:
        outcome = cell.run("random_calls", numbers=numbers, seed=7, count=300, path=str(cell.inside), deadline_s=30)
    except (WorkerDied, WorkerOffence, WorkerTimeout):
        assert name in DEADLY
    else:
        assert outcome.result == {"done": 300}
    assert cell.run("random_calls", numbers=[], seed=7, count=0, path="").result == {"done": 0}


def test_ends_come_when_they_are_due(cell: Cell):
    """A deadline and a cancellation are kept to within a second."""
    start = time.monotonic()
    with pytest.raises(WorkerTimeout):
        cell.run("sleep", seconds=30, deadline_s=0.3)
    assert 0.3 <= time.monotonic() - start < 2
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    start = time.monotonic()
    with pytest.raises(WorkerCancelled):
        cell.run("sleep", seconds=30, deadline_s=30, cancelled=cancelled)
    assert time.monotonic() - start < 2


def children(pid: int | None) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_a_worker_seen_from_outside_is_locked(cell: Cell):
    """By the kernel's account: no capability, no way to new ones, one filter, and no secret in its environment."""
    runner = threading.Thread(target=lambda: cell.run("sleep", seconds=1.0))
    before = children(cell.sandbox.zygote_pid)  # the spare: it becomes the worker
    runner.start()
    time.sleep(0.5)
    (worker,) = before & children(cell.sandbox.zygote_pid)
    lines = Path(f"/proc/{worker}/status").read_text().splitlines()
    environment = Path(f"/proc/{worker}/environ").read_bytes()
    open_ones = {int(name) for name in os.listdir(f"/proc/{worker}/fd")}
    runner.join()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert SECRET.encode() not in environment
    assert open_ones >= {0, 1, 2}
    assert len(open_ones) == 4


def test_calls_of_every_end_leave_no_process_and_no_descriptor(cell: Cell):
    """Answers, deaths, deadlines and forgeries, over and over."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("sleep", {"seconds": 0}),
        ("half_answer", {}),
        ("sleep", {"seconds": 9, "deadline_s": 0.02}),
        ("leave", {"how": "crash"}),
    ]
    cell.run("sleep", seconds=0)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(48):
        tool, arguments = ways[n % len(ways)]
        try:
            cell.run(tool, **arguments)
        except SandboxFailure:
            continue
    cell.run("sleep", seconds=0)
    end = time.monotonic() + 3
    while len(children(cell.sandbox.zygote_pid)) != 1 and time.monotonic() < end:  # the spare may not be forked yet
        time.sleep(0.05)
    assert len(children(cell.sandbox.zygote_pid)) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_zygote_killed_during_a_call_ends_that_call_only(cell: Cell):
    """Its workers die with it, the call says so, and the next one works at once, also while the spare is still dying."""
    for _ in range(4):
        # Whichever it is by then: one that was killed a moment ago is replaced by the next call only.
        threading.Timer(0.7, lambda: os.kill(cell.sandbox.zygote_pid or 0, signal.SIGKILL)).start()
        with pytest.raises(WorkerDied):
            cell.run("sleep", seconds=8)
        assert cell.run("sleep", seconds=0).result == {}


DEVICES = """
import ctypes, json, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.geteuid(), os.getegid()
if libc.unshare(0x20000 | (0x10000000 if uid else 0)):
    sys.exit(77)
if uid:
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
if libc.mount(b"none", b"/", None, 0x44000, None) or libc.mount(b"none", b"/dev", b"tmpfs", 0, None) or os.listdir("/dev"):
    sys.exit(77)
open("/dev/null", "w").close()  # a plain file will do: it is the name that the broker knows
from agentd_sandbox import Access, Job, PathRule, Sandbox
class Silent:
    mark = b"test"
    def before_changes(self, changes): pass
program, tool, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
inside = "/dev/inside"  # on the same file system: what another one refuses is not the broker's merit
os.mkdir(inside)
open(inside + "/file", "w").close()
rule = (PathRule(inside.encode()),)
sandbox = Sandbox({"breakout": open(program, "rb").read()}, __import__("pathlib").Path(inside))
sandbox.start()
before = os.stat("/dev/null").st_ino
outcome = sandbox.run(Job("breakout", tool, arguments, {}, 10, 4096), Access(rule, rule), Silent(), threading.Event())
there = os.path.exists("/dev/null") and os.stat("/dev/null").st_ino == before
print(json.dumps({"there": there, "error": outcome.error, "names": sorted(os.listdir("/dev"))}))
if not os.path.exists("/dev/null"):
    open("/dev/null", "w").close()
sandbox.stop()
"""


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("remove", {"path": "/dev/null"}),
        ("rename", {"path": "/dev/null", "to": "/dev/inside/stolen"}),
        ("rename", {"path": "/dev/inside/file", "to": "/dev/null"}),
    ],
    ids=["remove", "take away", "replace"],
)
def test_a_device_that_may_be_written_to_may_not_be_removed(tool: str, arguments: dict[str, str]):
    """/dev/null needs no scope to be opened, but its name stays: tried in a mount namespace with a /dev of its own."""
    if not probe().confines:
        pytest.skip("this kernel can't confine")
    program = str(Path(__file__).with_name("breakout.py"))
    command = [sys.executable, "-c", DEVICES, program, tool, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("no mount namespace to be had here")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["there"]
    assert told["names"] == ["inside", "null"]
    assert told["error"]


def test_a_connect_that_waits_can_be_cancelled(cell: Cell):
    """A peer that does not answer must not keep a cancelled call until its deadline."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        peer = ("127.0.0.1", server.getsockname()[1])
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(peer)
        cancelled = threading.Event()
        threading.Timer(0.3, cancelled.set).start()
        start = time.monotonic()
        with pytest.raises((WorkerCancelled, WorkerTimeout)):
            cell.run("connect", host=peer[0], port=peer[1], peers=frozenset({peer}), cancelled=cancelled, deadline_s=5)
        took = time.monotonic() - start
        for filler in fillers:
            filler.close()
    assert took < 2.5
