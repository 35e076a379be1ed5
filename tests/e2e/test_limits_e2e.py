"""What ends a run that would not end by itself, and what stops the engine in the middle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.v1 import run_pb2

if TYPE_CHECKING:
    from tests.e2e.conftest import DaemonProcess


@pytest.mark.parametrize(
    ("limits", "stop"),
    [
        ("steps = 1", run_pb2.Run.STOP_REASON_STEP_LIMIT),
        ("tokens = 16", run_pb2.Run.STOP_REASON_TOKEN_LIMIT),
        ("seconds = 0.01", run_pb2.Run.STOP_REASON_TIME_LIMIT),
    ],
)
def test_a_run_ends_at_its_limit_and_says_which(own_daemon: DaemonProcess, limits: str, stop: int):
    """Steps, tokens, seconds: the run succeeds with the reason instead of an answer."""
    own_daemon.extra = f"[runs]\n{limits}\n"
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        ended = list(client.run("what can you do? what time is it?" if "tokens" in limits else "what time is it"))[-1].run
    assert ended.state == run_pb2.Run.STATE_SUCCEEDED
    assert ended.stop_reason == stop


def test_the_very_same_call_is_not_made_for_ever(own_daemon: DaemonProcess):
    """With one repetition allowed, a second run of the same session may call again: counting is per run."""
    own_daemon.extra = "[runs]\nrepeats = 1\n"
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        for _ in range(2):
            ended = list(client.run("what time is it", session="s"))[-1].run
            assert ended.stop_reason == run_pb2.Run.STOP_REASON_ANSWERED


def test_cancelling_stops_a_decode_under_way_and_keeps_the_engine(own_daemon: DaemonProcess):
    """A prompt of thousands of tokens is given up in the middle; the same process answers the next one."""
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        list(client.run("hello"))
        engine = client.status().engine_pid
        run = client.create_run("word " * 1200)
        assert client.cancel_run(run.name).state == run_pb2.Run.STATE_CANCELLED
        assert list(client.run("hello"))[-1].run.answer == "Hello! What should I do?"
        assert client.status().engine_pid == engine


def test_repacking_is_tried_in_a_process_of_its_own(own_daemon: DaemonProcess):
    """`repack = "auto"`: whatever the test finds, the model answers."""
    own_daemon.extra = '[engine]\nrepack = "auto"\n'
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        assert list(client.run("hello"))[-1].run.answer == "Hello! What should I do?"
