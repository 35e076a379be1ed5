"""Calls beside each other: what one worker does, or waits for, is no other call's business."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, BrokerStuck, Job, Limits, Outcome, PathRule, Sandbox, WorkerOffence, WorkerTimeout, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change

PROGRAM = b'''
import os, random, signal, ssl, subprocess, time, uuid
from pathlib import Path
from agentd_sandbox.sdk import tool

@tool("write")
def write(path):
    Path(path).write_text("new")
    return {}

@tool("quick")
def quick(path):
    return {"text": Path(path).read_text()}

@tool("refused")
def refused(count):
    for _ in range(count):
        try:
            os.open("/etc/shadow", os.O_RDONLY)
        except OSError:
            pass
    return {}

@tool("forks")
def forks(count):
    for _ in range(count):
        if os.fork() == 0:
            time.sleep(60)
    return {}

@tool("forks_and_ends")
def forks_and_ends(count):
    for _ in range(count):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    return {}

@tool("forks_while_children_end")
def forks_while_children_end(count):
    """With a handler that asks for no restarts, as dash has one."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.siginterrupt(signal.SIGCHLD, True)
    interrupted = 0
    for _ in range(count):
        try:
            if os.fork() == 0:
                os._exit(0)
        except InterruptedError:
            interrupted += 1
        except BlockingIOError:  # on a slow machine too many are still ending
            os.wait()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return {"interrupted": interrupted}

@tool("memory_of_many")
def memory_of_many(count, mib):
    for _ in range(count):
        if os.fork() == 0:
            held = bytearray(os.urandom(1 << 20) * mib)
            time.sleep(60)
    time.sleep(60)

@tool("leaves")
def leaves(path):
    """Two forks away, with a descriptor that stays open."""
    descriptor = os.open(path, os.O_WRONLY)
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.5)
            os.write(descriptor, b"late")
            time.sleep(60)
        os._exit(0)
    return {}

@tool("draw")
def draw():
    return {"drawn": [random.random(), str(uuid.uuid4()), os.urandom(8).hex(), ssl.RAND_bytes(8).hex()]}

@tool("nothing")
def nothing():
    return {}
'''


@dataclass
class Slow:
    """A recorder on a disk that does not answer until it is told to, for paths that say so."""

    waiting: threading.Event = field(default_factory=threading.Event)
    answers: threading.Event = field(default_factory=threading.Event)

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        if any(b"slow" in change.path for change in changes):
            self.waiting.set()
            self.answers.wait(60)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    made = Sandbox({"tool": PROGRAM}, tmp_path_factory.mktemp("work"), limits=Limits(16, 800, 3000, 192))
    made.start()
    assert made.level is not None
    if "broker" not in made.level.layers:
        pytest.skip("no broker in this kernel")
    yield made
    made.stop()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("slow", "quick"):
        (tmp_path.resolve() / name).write_text("old")
    return tmp_path.resolve()


def run(sandbox: Sandbox, home: Path, tool: str, recorder: Any = None, deadline_s: float = 20, **arguments: Any) -> Outcome:
    rule = (PathRule(os.fsencode(home)),)
    job = Job("tool", tool, arguments, {}, deadline_s, 4096)
    return sandbox.run(job, Access(rule, rule), recorder or Slow(), threading.Event())


def test_a_slow_disk_holds_up_its_own_call_only(sandbox: Sandbox, home: Path):
    """While one broker waits for a pre-image, other calls come and go."""
    slow = Slow()
    waiting = threading.Thread(target=run, args=(sandbox, home, "write", slow), kwargs={"path": str(home / "slow")})
    waiting.start()
    assert slow.waiting.wait(20)
    for _ in range(10):
        assert run(sandbox, home, "quick", path=str(home / "quick")).result == {"text": "old"}
    assert waiting.is_alive()
    slow.answers.set()
    waiting.join()


def test_a_disk_that_never_answers_ends_the_call_with_a_named_error(
    sandbox: Sandbox, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """At its deadline and a little more; the thread that waits is left to wait, and other calls go on."""
    monkeypatch.setattr(serving, "_GONE_TIMEOUT_S", 0.3)
    with pytest.raises(BrokerStuck, match="openat"):
        run(sandbox, home, "write", slow := Slow(), 0.5, path=str(home / "slow"))
    assert run(sandbox, home, "quick", path=str(home / "quick")).result == {"text": "old"}
    slow.answers.set()


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("refused", {"count": 1_000_000}, "refused"),
        ("forks_and_ends", {"count": 1000}, "more than 800 processes"),
        ("memory_of_many", {"count": 6, "mib": 48}, "192 MiB"),
    ],
)
def test_a_worker_past_a_limit_is_ended_by_name(sandbox: Sandbox, home: Path, tool: str, arguments: dict[str, Any], says: str):
    """All its processes together; the record of the call says what it did."""
    with pytest.raises(WorkerOffence, match=says) as caught:
        run(sandbox, home, tool, **arguments)
    assert caught.value.outcome is not None
    assert caught.value.outcome.mediated > 0
    assert run(sandbox, home, "quick", path=str(home / "quick")).result


def test_no_more_processes_at_a_time_than_allowed(sandbox: Sandbox, home: Path):
    """EAGAIN, as from RLIMIT_NPROC, and the call is told."""
    outcome = run(sandbox, home, "forks", count=40)
    assert outcome.error is not None
    assert any("16 processes" in denial.why for denial in outcome.denials)


def test_a_child_that_ends_interrupts_no_fork(sandbox: Sandbox, home: Path):
    """Outside fork(2) never says EINTR, and programs don't expect it: dash gave up with "Cannot fork"."""
    outcome = run(sandbox, home, "forks_while_children_end", count=400)
    assert outcome.result == {"interrupted": 0}


def test_what_a_worker_leaves_behind_writes_no_more_once_the_call_is_over(sandbox: Sandbox, home: Path):
    """Also an orphan that got its descriptor before."""
    run(sandbox, home, "leaves", path=str(home / "quick"))
    before = (home / "quick").read_bytes()
    time.sleep(0.8)
    assert (home / "quick").read_bytes() == before == b"old"


def test_workers_draw_different_random_numbers(sandbox: Sandbox, home: Path):
    """All are forks of one process."""
    drawn = [run(sandbox, home, "draw").result for _ in range(3)]
    values = [value for each in drawn if each for value in each["drawn"]]
    assert len(set(values)) == len(values) == 12


def test_a_deadline_ends_all_processes_of_a_call(sandbox: Sandbox, home: Path):
    """And the daemon knows of none of them any more."""
    with pytest.raises(WorkerTimeout):
        run(sandbox, home, "memory_of_many", None, 0.5, count=3, mib=1)
    assert sandbox.zygote_pid is not None
    children = Path(f"/proc/{sandbox.zygote_pid}/task/{sandbox.zygote_pid}/children")
    end = time.monotonic() + 5
    while len(children.read_text().split()) > 1 and time.monotonic() < end:  # dead, and about to be reaped
        time.sleep(0.02)
    assert len(children.read_text().split()) <= 1  # the spare


def test_many_calls_leave_nothing_behind(sandbox: Sandbox, home: Path):
    """No descriptor, no process, no thread; the figure for 10,000 is in docs/measurements.md."""
    for _ in range(20):
        run(sandbox, home, "nothing")
    held = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(300):
        run(sandbox, home, "nothing")
    assert len(os.listdir("/proc/self/fd")) <= held[0] + 1
    assert threading.active_count() <= held[1] + 1
