"""The engine through the real daemon: ready for the first prompt, past restarts, with several runs at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from agentd import models
from agentd.client import Client
from agentd.errors import AgentdError

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.v1 import run_pb2
    from tests.e2e.conftest import DaemonProcess

PROMPT = "what time is it"


def until(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def prefixes(daemon: DaemonProcess) -> list[Path]:
    return [path for path in (daemon.state / "prefixes").glob("*") if path.suffix == ".prefix"]


def end_of(client: Client, prompt: str) -> run_pb2.Run:
    """The run, when it has ended."""
    run = client.create_run(prompt)
    for _ in client.watch_run(run.name):
        pass
    return client.get_run(run.name)


def prompt_tokens(daemon: DaemonProcess, prompt: str = PROMPT) -> int:
    """How many tokens of the prompt were decoded for a run."""
    with Client(daemon.socket) as client:
        return int(end_of(client, prompt).usage.prompt_tokens)


def test_what_all_prompts_begin_with_is_ready_before_the_first_and_after_a_restart(own_daemon: DaemonProcess):
    """Tools and system text are decoded once, at the first start; a kill takes nothing of that away."""
    own_daemon.extra = "[engine]\nwarm = true\n"
    own_daemon.start()
    until(lambda: prefixes(own_daemon))
    first = prompt_tokens(own_daemon)
    own_daemon.kill()
    own_daemon.start()
    assert max(first, prompt_tokens(own_daemon)) < 300


def test_without_room_on_the_disk_the_prompt_is_decoded(own_daemon: DaemonProcess):
    own_daemon.extra = "[engine]\nprefixes_mib = 0\n"
    own_daemon.start()
    assert prompt_tokens(own_daemon) > 300
    assert not (own_daemon.state / "prefixes").exists()


def test_a_damaged_prefix_costs_time_and_nothing_else(own_daemon: DaemonProcess):
    own_daemon.start()
    prompt_tokens(own_daemon)
    (file,) = prefixes(own_daemon)
    own_daemon.kill()
    data = file.read_bytes()
    file.write_bytes(data[:-1000] + bytes(1000))
    own_daemon.start()
    assert prompt_tokens(own_daemon) > 300
    assert prompt_tokens(own_daemon) < 300


def test_what_is_taken_out_of_the_log_is_in_no_state_of_a_session_either(own_daemon: DaemonProcess):
    """A long session's state gets on the disk when the model is unloaded; with a redaction all of them go."""
    own_daemon.start()
    with Client(own_daemon.socket) as client:
        run = end_of(client, "read notes/todo.txt and tell me everything that is in it " * 30)
        own_daemon.stop()
        assert list((own_daemon.state / "prefixes").glob("*.session"))
        own_daemon.start()
        asked = next(event for event in client.audit_events() if event.kind == "run.queue")
        client.redact(asked.sequence, "detail.prompt", "private")
        assert not list((own_daemon.state / "prefixes").glob("*.session*"))
        assert client.get_run(run.name).prompt != run.prompt
    assert prefixes(own_daemon)


def test_another_tool_set_has_another_prefix(own_daemon: DaemonProcess):
    own_daemon.start()
    prompt_tokens(own_daemon)
    own_daemon.stop()
    own_daemon.tools = 'bundled = ["system"]\n'
    own_daemon.start()
    assert prompt_tokens(own_daemon) > 50
    assert len(prefixes(own_daemon)) == 2


def test_runs_at_once_give_what_each_gives_alone(own_daemon: DaemonProcess):
    """Eight clients, four places: the same answers and calls."""
    own_daemon.start()
    prompts = [f"write hello to {name}.txt" for name in "abcdefgh"]

    def outcome(prompt: str) -> tuple[str, ...]:
        with Client(own_daemon.socket) as client:
            run = end_of(client, prompt)
            return run.answer, str(run.usage.calls), str(run.usage.generated_tokens)

    alone = [outcome(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(outcome, prompts)) == alone


def test_a_model_file_that_is_cut_short_under_a_running_engine_ends_the_run_and_not_the_daemon(
    own_daemon: DaemonProcess, tmp_path: Path
):
    """The kernel kills the engine when it reads what is no longer there; with the file whole again all is well."""
    file = tmp_path / "model.gguf"
    shutil.copy(models.locate("pocket"), file)
    own_daemon.extra = f'[engine]\nmodel = "{file}"\n'
    own_daemon.start()
    prompt_tokens(own_daemon)
    os.truncate(file, 100_000)
    with Client(own_daemon.socket) as client:
        with contextlib.suppress(AgentdError):
            run = end_of(client, "write hello to a.txt")
            assert not run.HasField("error") or "engine" in run.error.message.lower() or "model" in run.error.message.lower()
        assert client.status().pid
    shutil.copy(models.locate("pocket"), file)
    assert prompt_tokens(own_daemon)


def test_the_log_names_the_model_that_was_loaded(own_daemon: DaemonProcess, tmp_path: Path):
    """Not the one that lies in its place by now; and the new one from when it is loaded."""
    file, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy(models.locate("pocket"), file)
    other.write_bytes(file.read_bytes() + bytes(32))
    digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (file, other)]
    own_daemon.extra = f'[engine]\nmodel = "{file}"\n'
    own_daemon.start()

    def named() -> str:
        with Client(own_daemon.socket) as client:
            end_of(client, "write hello to a.txt")
            started = [event for event in client.audit_events(newest_first=True) if event.kind == "run.start"]
            return str(started[0].body["detail"]["model"]["sha256"])

    assert named() == digests[0]
    other.rename(file)
    assert named() == digests[0]
    with Client(own_daemon.socket) as client:
        os.kill(client.status().engine_pid, signal.SIGKILL)
    with contextlib.suppress(AssertionError):
        named()  # the first one after a kill may fail with it
    assert named() == digests[1]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_engine_that_is_killed_in_the_middle_fails_the_runs_in_it_and_no_later_one(own_daemon: DaemonProcess, threads: int):
    own_daemon.start()
    prompt_tokens(own_daemon)

    def outcome(number: int) -> str:
        with Client(own_daemon.socket) as client:
            return str(end_of(client, f"write a poem {number} " + "red " * 100).error.message)

    with ThreadPoolExecutor(threads) as pool, Client(own_daemon.socket) as client:
        pending = [pool.submit(outcome, number) for number in range(threads)]
        until(lambda: client.status().tokens_per_second or all(each.done() for each in pending))
        os.kill(client.status().engine_pid, 9)
        reasons = {each.result() for each in pending}
    assert all(not reason or "engine process died (SIGKILL)" in reason for reason in reasons)
    assert prompt_tokens(own_daemon)
