"""`agentd eval`: what counts as right, how sure that is, and the whole with the pocket model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.cli.eval import BASIC
from agentd.cli.suite import Call, Case, interval, judge, load
from agentd.errors import ConfigError, Reason

READ = Call(tool="files.read", arguments={"path": "a.txt"})


@pytest.mark.parametrize(
    ("wanted", "given_", "right"),
    [
        ({"path": "a.txt"}, {"path": "a.txt"}, True),
        ({"path": "a.txt"}, {"path": "a.txt", "more": 1}, True),
        ({"path": "a.txt"}, {"path": "b.txt"}, False),
        ({"path": "a.txt"}, {}, False),
        ({"text": "/buy milk\\s*/"}, {"text": "Buy milk\n"}, True),
        ({"text": "/buy milk/"}, {"text": "please buy milk"}, False),
        ({"n": 1}, {"n": 1.0}, True),
        ({"n": 1}, {"n": True}, False),
        ({"n": 1}, {"n": "1"}, False),
        ({"on": True}, {"on": True}, True),
        ({"list": [1, 2]}, {"list": [1, 2]}, True),
        ({"list": [1, 2]}, {"list": [2, 1]}, False),
        ({"path": "/"}, {"path": "/"}, True),
    ],
)
def test_arguments_that_are_named_must_be_so(wanted: dict[str, Any], given_: dict[str, Any], right: bool):
    assert Call(tool="t.do", arguments=wanted).fits("t.do", given_) is right


@pytest.mark.parametrize(
    ("case", "made", "answer", "calls", "said"),
    [
        (Case(prompt="p", calls=(READ,)), [("files.read", {"path": "a.txt"})], "", True, None),
        (Case(prompt="p", calls=(READ,)), [], "", False, None),
        (Case(prompt="p", calls=(READ,)), [("files.read", {"path": "a.txt"})] * 2, "", False, None),
        (Case(prompt="p", calls=(READ,)), [("files.write", {"path": "a.txt"})], "", False, None),
        (Case(prompt="p", calls=()), [], "", True, None),
        (Case(prompt="p", calls=()), [("files.read", {"path": "a.txt"})], "", False, None),
        (Case(prompt="p", answer="mil+k"), [("any.thing", {})], "Buy MILLK today", None, True),
        (Case(prompt="p", answer="milk"), [], "bread", None, False),
    ],
)
def test_exactly_these_calls_in_their_order(case: Case, made: list[Any], answer: str, calls: bool | None, said: bool | None):
    verdict = judge(case, made, answer, ended=True, seconds=1, tokens=1)
    assert (verdict.calls, verdict.answer) == (calls, said)
    assert verdict.passed == (calls is not False and said is not False)


def test_a_model_that_does_not_come_to_an_end_has_not_passed():
    """Whatever it said on the way."""
    assert not judge(Case(prompt="p", calls=()), [], "", ended=False, seconds=1, tokens=1).passed


@pytest.mark.parametrize(
    ("passed", "of", "low", "high"),
    [(0, 0, 0, 1), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (84, 100, 0.7558, 0.8990)],
)
def test_the_interval_is_wilsons(passed: int, of: int, low: float, high: float):
    """Against tables."""
    assert interval(passed, of) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_interval_holds_what_was_seen(passed: int, of: int):
    passed = min(passed, of)
    low, high = interval(passed, of)
    assert 0 <= low <= passed / of <= high <= 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "case"),
        ("[[case]]\nprompt = 'x'\n", "neither"),
        ("[[case]]\nprompt = ''\nanswer = 'y'\n", "prompt"),
        ("[[case]]\nprompt = 'x'\nanswer = '('\n", "unterminated"),
        ("[[case]]\nprompt = 'x'\ncall = 'files.read'\n", "call"),
        ("[[case]]\nprompt = 'x'\ncalls = [{ tool = 'nonsense' }]\n", "tool"),
        ("[[case]]\nprompt = 'x'\nanswer = 'y'\nfiles = { '../out' = 'x' }\n", "../out"),
        ("[[case]]\nprompt = 'x'\nanswer = 'y'\nfiles = { '/etc/x' = 'x' }\n", "/etc/x"),
        ("[[case]]\nprompt = 'x'\ncalls = [{ tool = 'files.read', arguments = { path = '/[/' } }]\n", "unterminated"),
        ("[[case]]\nprompt = 'x'\ncalls = [{ tool = 'files.read', arguments = { n = [1979-05-27] } }]\n", "JSON"),
        ("[[case]]\nprompt = 'x'\nanswer = 'y'\nfiles = { '' = 'x' }\n", "''"),
        ("[[case]]\nprompt = 'x'\nanswer = 'y'\nfiles = { 'a' = 'x', 'a/b' = 'x' }\n", "a/b"),
        ("nonsense", "Expected"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused_with_the_place(tmp_path: Path, text: str, why: str):
    suite = tmp_path / "suite.toml"
    suite.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(suite)
    assert raised.value.reason is Reason.CONFIG_INVALID
    assert str(suite) in raised.value.message
    assert why in raised.value.message


def test_the_basic_suite_is_one():
    assert len(load(BASIC).case) >= 10


def evaluate(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentd", "eval", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"XDG_CONFIG_HOME": str(home)},
    )


def test_the_pocket_model_does_most_of_the_basic_suite(tmp_path: Path):
    """Through the real daemon, with files made for each case; the table says how sure that is."""
    done = evaluate(tmp_path, "pocket", "--json", "--need", "0.3")
    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, done.stdout.splitlines())
    assert found["cases"] == len(load(BASIC).case)
    assert found["passed"] >= 0.7 * found["cases"], found["wrong"]
    assert found["interval"][0] < found["passed"] / found["cases"] <= found["interval"][1]


def test_what_is_wrong_is_shown_and_the_exit_status_says_so(tmp_path: Path):
    suite = tmp_path / "suite.toml"
    suite.write_text("[[case]]\nprompt = 'what time is it'\ncalls = [{ tool = 'files.delete', arguments = { path = 'x' } }]\n")
    done = evaluate(tmp_path, "pocket", "--suite", str(suite), "--show")
    assert done.returncode == 1
    assert "system.time" in done.stdout
    assert "none of them does 80%" in done.stdout


def test_a_model_that_is_not_there_is_said(tmp_path: Path):
    done = evaluate(tmp_path, "/nowhere.gguf")
    assert done.returncode == 1
    assert "There is no model file /nowhere.gguf" in done.stderr


def test_a_file_that_is_no_model_breaks_off_and_is_no_wrong_answer(tmp_path: Path):
    """The others are judged all the same."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    suite = tmp_path / "suite.toml"
    suite.write_text("[[case]]\nprompt = 'what time is it'\ncalls = [{ tool = 'system.time' }]\n")
    done = evaluate(tmp_path, str(broken), "pocket", "--suite", str(suite), "--json", "--need", "0.1")
    found = {Path(each["model"]).name: each for each in map(json.loads, done.stdout.splitlines())}
    assert "can't be loaded" in found["broken.gguf"]["broke_off"]
    assert (found["pocket.gguf"]["passed"], found["pocket.gguf"]["broke_off"]) == (1, "")


def test_a_socket_in_the_environment_is_left_alone(tmp_path: Path):
    """It is that of the user's own daemon."""
    suite = tmp_path / "suite.toml"
    suite.write_text("[[case]]\nprompt = 'what time is it'\ncalls = [{ tool = 'system.time' }]\n")
    os.environ["AGENTD_SOCKET"] = str(tmp_path / "mine.sock")
    try:
        done = evaluate(tmp_path, "pocket", "--suite", str(suite), "--need", "0.1")
    finally:
        del os.environ["AGENTD_SOCKET"]
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mine.sock").exists()
