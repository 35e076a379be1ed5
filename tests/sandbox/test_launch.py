"""`python -m agentd_sandbox`: any program under a policy given as JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agentd_sandbox import probe

ROOT = Path(__file__).parents[2] / "sandbox"


@pytest.fixture(autouse=True)
def broker() -> None:
    if "broker" not in probe().layers:
        pytest.skip("no broker in this kernel")


def run(folder: Path, *program: str, stdin: str = "", json_: bool = False, **policy: Any) -> subprocess.CompletedProcess[str]:
    document = {"read": [str(folder)], "write": [str(folder)], "execute": ["/usr", "/bin"], "folder": str(folder)} | policy
    file = folder.parent / "policy.json"
    file.write_text(json.dumps(document))
    options = ["--policy", str(file), *(["--json"] if json_ else [])]
    command = [sys.executable, "-m", "agentd_sandbox", *options, "--", *program]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path.resolve() / "home").mkdir()
    return tmp_path.resolve() / "home"


def test_a_program_reads_and_writes_as_usual(home: Path):
    """Standard input and output are the caller's; the exit status is the program's."""
    done = run(home, "sh", "-c", "tr a-z A-Z | tee loud.txt; exit 3", stdin="quiet\n")
    assert (done.returncode, done.stdout) == (3, "QUIET\n")
    assert (home / "loud.txt").read_text() == "QUIET\n"


def test_what_the_policy_does_not_name_does_not_exist(home: Path):
    """Refused as missing, and told with --json."""
    (home.parent / "outside").write_text("precious")
    done = run(home, "cat", str(home.parent / "outside"), json_=True)
    assert done.returncode == 1
    assert "precious" not in done.stdout
    told = json.loads(done.stderr.splitlines()[-1])
    assert str(home.parent / "outside") in [denial["target"] for denial in told["denials"]]


def test_a_program_that_is_not_named_is_not_started(home: Path):
    """127, as from a shell."""
    done = run(home, "sh", "-c", "echo hi", execute=["/usr/bin/env"])
    assert done.returncode == 127
    assert "sh" in done.stderr


def test_a_signal_ends_it_with_128_and_its_number(home: Path):
    """As a shell tells it."""
    assert run(home, "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


def test_the_deadline_ends_it_and_all_it_started(home: Path):
    """124, as from timeout(1)."""
    start = time.monotonic()
    done = run(home, "sh", "-c", "(sleep 50; touch late) & sleep 50", deadline_s=1)
    assert done.returncode == 124
    assert time.monotonic() - start < 20


def test_what_it_leaves_in_the_background_ends_with_it(home: Path):
    """Nothing writes on after it has come back."""
    assert run(home, "sh", "-c", "(sleep 1; touch late) >/dev/null 2>&1 & true").returncode == 0
    time.sleep(1.5)
    assert not (home / "late").exists()


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ('{"reed": []}', "reed"),
        ('{"read": ["relative"]}', "relative"),
        ('{"read": "/x"}', "list"),
        ('{"connect": ["nowhere"]}', "port"),
        ('{"connect": ["2130706433:80"]}', "host"),
        ('{"deadline_s": 0}', "deadline_s"),
        ('{"processes": true}', "processes"),
        ('{"environment": {"A=B": "x"}}', "environment"),
        ("[]", "object"),
        ("{", "wrong"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_by_name(tmp_path: Path, policy: str, says: str):
    """Status 2 and one line."""
    (tmp_path / "policy.json").write_text(policy)
    command = [sys.executable, "-m", "agentd_sandbox", "--policy", str(tmp_path / "policy.json"), "--", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_levels_are_told_as_json():
    """What `agentd doctor` shows, for programs."""
    command = [sys.executable, "-m", "agentd_sandbox", "--levels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["name"] == probe().name
    assert done.stderr == ""


def test_help_shows_the_keys_of_a_policy():
    """With the exit statuses."""
    done = subprocess.run(
        [sys.executable, "-m", "agentd_sandbox", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert '"execute"' in done.stdout
    assert "124" in done.stdout
