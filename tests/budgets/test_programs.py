"""Programs that are asked for readings, real processes that hang, flood and fail."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest

from agentd.budgets import Program
from agentd.budgets.programs import Teller

if TYPE_CHECKING:
    from pathlib import Path


def python(code: str, every_s: float = 0.05, timeout_s: float = 5.0) -> Program:
    return Program((sys.executable, "-I", "-S", "-c", code), every_s, timeout_s)


def until(true: object) -> None:
    deadline = time.monotonic() + 15
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_it_says_is_there_until_it_is_old():
    program = python("print('42')", every_s=0.05, timeout_s=0.5)
    program.start()
    until(program.latest)
    assert program.latest() == "42\n"
    program.stop()
    until(lambda: program.latest() is None)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(60)", "did not answer in 0.3 s"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "did not answer"),
        ("import sys; print('so far'); sys.exit(3)", "ended with status 3"),
        ("import os, time\nif os.fork(): os._exit(0)\ntime.sleep(60)", "did not answer"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
    ],
    ids=["hangs", "floods", "fails", "leaves a child that holds its output", "is killed"],
)
def test_one_that_goes_wrong_is_said_and_ended(code: str, why: str):
    """Nothing of it stays: neither it nor what it has started."""
    program = python(code, timeout_s=0.3)
    program.start()
    until(lambda: program.trouble)
    assert why in program.trouble
    assert program.latest() is None
    program.stop()


def test_one_that_hangs_is_asked_more_and_more_rarely(tmp_path: Path):
    """And there is never more than one of it (scenario 9); all it has started is gone with it."""
    file = tmp_path / "pids"
    code = f"import os, time\nos.fork()\nopen({str(file)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(60)"
    program = python(code, every_s=0.1, timeout_s=0.2)
    program.start()
    time.sleep(2)
    pids = [int(line) for line in file.read_text().split()]
    assert len(pids) <= 10  # 0.2 s each, then pauses of 0.2, 0.4, 0.8 s
    program.stop()
    until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") and _runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return b"time.sleep(60)" in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return False


def test_one_that_is_not_there_is_said():
    program = Program(("/no/such/program",), 0.05)
    program.start()
    until(lambda: program.trouble)
    assert "can't be started" in program.trouble
    program.stop()


def teller(code: str, every_s: float = 0.05, timeout_s: float = 0.3) -> Teller:
    return Teller((sys.executable, "-I", "-S", "-u", "-c", code), every_s, timeout_s)


def test_a_teller_runs_on_and_its_last_line_counts(tmp_path: Path):
    file = tmp_path / "pids"
    made = teller(f"import os, time\nopen({str(file)!r}, 'a').write('x')\nfor i in range(10**6): print(i); time.sleep(0.01)")
    made.start()
    until(lambda: made.latest() and int(made.latest() or 0) > 20)
    assert file.read_text() == "x"
    made.stop()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('once'); import time; time.sleep(60)", "says nothing"),
        ("print('once')", "has ended"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "says nothing"),
    ],
    ids=["hangs", "ends", "floods"],
)
def test_a_teller_that_falls_silent_is_ended_and_begins_anew(tmp_path: Path, code: str, why: str):
    file = tmp_path / "pids"
    made = teller(f"import os\nopen({str(file)!r}, 'a').write(f'{{os.getpid()}} ')\n{code}")
    made.start()
    until(lambda: why in made.trouble)
    until(lambda: len(file.read_text().split()) > 1)
    made.stop()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in file.read_text().split()))
