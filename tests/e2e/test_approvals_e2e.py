"""Being asked: in a terminal, by other programs, on a phone's and a desktop's screen; grants made and taken back."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import approval_pb2, grant_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 20
NO_GRANTS = "[approvals]\nnotify = false\n"


class Bare(DaemonProcess):
    """A daemon without any grants."""

    def write_config(self) -> Path:
        config = super().write_config()
        kept = config.read_text().split("[[grants]]")[0]
        config.write_text(kept + self.extra)
        return config


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with Bare(tmp_path_factory.mktemp("agentd"), extra=NO_GRANTS).running() as running:
        yield running


def until(there: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := there()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Its result, or the error it raised, is in the list when the thread is done."""
    ended: list[Any] = []

    def go() -> None:
        try:
            ended.append(work())
        except AgentdError as e:
            ended.append(e)

    thread = threading.Thread(target=go)
    thread.start()
    return thread, ended


def test_a_watching_client_is_told_and_its_answer_counts(client: Client, daemon: DaemonProcess):
    """The call waits for it; a second answer is told that somebody was first."""
    with client.watching_approvals() as questions, Client(daemon.socket) as other:
        thread, ended = in_background(lambda: other.call("files.write", {"path": "a.txt", "text": "x"}))
        question = next(questions)
        assert question.state == approval_pb2.Approval.STATE_PENDING
        assert question.scopes == [f"write:{daemon.home}/a.txt"]
        request = approval_pb2.ResolveApprovalRequest(name=question.name, allow=True)
        assert client.resolve(request).state == approval_pb2.Approval.STATE_ALLOWED
        with pytest.raises(AgentdError) as caught:
            client.resolve(request)
        assert caught.value.reason is Reason.APPROVAL_CLOSED
        assert next(questions).state == approval_pb2.Approval.STATE_ALLOWED
        thread.join(DEADLINE_S)
    assert not ended[0].failed
    assert (daemon.home / "a.txt").read_text() == "x\n"


def test_the_command_asks_in_a_terminal(daemon: DaemonProcess):
    """Tool, scopes and what can be undone are on the screen; `f` grants the folder for good, once it is confirmed.

    What is no answer is asked again, and allows nothing: neither words that begin like one, nor Enter alone.
    """
    (daemon.home / "notes").mkdir(exist_ok=True)
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "agentd", "--socket", str(daemon.socket), "approvals"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "dumb"})
    os.close(terminal)
    shown = b""

    def wait_for_count(text: bytes, count: int) -> None:
        nonlocal shown
        while shown.count(text) < count:
            shown += os.read(screen, 4096)

    def wait_for(text: bytes) -> None:
        wait_for_count(text, 1)

    wait_for(b"waiting for questions")
    with Client(daemon.socket) as client:
        thread, ended = in_background(lambda: client.call("files.write", {"path": "notes/n.txt", "text": "x"}))
        wait_for(b"allow?")
        for number, answer in enumerate((b"abort", b"yikes", b"folders", b"", b"a b"), 1):
            os.write(screen, answer + b"\n")
            wait_for_count(b"is no answer", number)
            wait_for_count(b"allow?", number + 1)
        os.write(screen, b"a\n")
        wait_for(b"type yes to allow that")
        os.write(screen, b"y\n")
        wait_for_count(b"allow?", 7)
        assert thread.is_alive()
        os.write(screen, b"f\n")
        wait_for_count(b"type yes to allow that", 2)
        os.write(screen, b"yes\n")
        thread.join(DEADLINE_S)
        assert not ended[0].failed
        made = [grant for grant in client.grants() if grant.source == grant_pb2.Grant.SOURCE_APPROVAL]
        assert [grant.scope for grant in made] == [f"write:{daemon.home}/notes"]
        process.terminate()
        process.wait(10)
        os.close(screen)
        text = re.sub(r"\s+", " ", shown.decode())
        assert f"write:{daemon.home}/notes/n.txt" in text
        assert "undo yes" in text
        client.revoke_grant(made[0].name)


def test_a_run_waits_for_the_answer_and_says_so(client: Client, daemon: DaemonProcess):
    """The question is an event of the run; whoever answers may be another program."""
    with client.watching_approvals() as questions, Client(daemon.socket) as other:
        thread, ended = in_background(lambda: list(other.run('add "buy milk" to notes/todo.txt')))
        question = next(questions)
        assert question.run.startswith("runs/")
        daemon.command("approvals", "answer", question.name.removeprefix("approvals/"), "once")
        thread.join(DEADLINE_S)
    notices = [event.approval for event in ended[0] if event.WhichOneof("event") == "approval"]
    states = [approval_pb2.Approval.State.Name(notice.state) for notice in notices]
    assert states == ["STATE_PENDING", "STATE_ALLOWED"]
    assert (daemon.home / "notes" / "todo.txt").exists()


def test_grants_are_made_shown_explained_and_taken_back(daemon: DaemonProcess):
    """`check` says the same as the log does, and its exit status tells the decisions apart."""
    (daemon.home / "b.txt").write_text("b")
    asked = ("grants", "check", "files.read", "path=b.txt")
    assert daemon.command(*asked, check=False).returncode == 1
    (made,) = daemon.json("grants", "add", "files.read", f"read:{daemon.home}/b.txt", "--uses", "1", "--for", "1h")
    assert daemon.command(*asked).returncode == 0
    assert not daemon.json("tools", "call", "files.read", "path=b.txt")[0]["failed"]
    used = daemon.command(*asked, check=False)
    assert used.returncode == 1
    assert "its 1 uses are used up" in re.sub(r"\s+", " ", used.stdout)
    daemon.command("tools", "call", "files.read", "path=b.txt", check=False)
    denied = [event for event in daemon.json("audit", "list", "-n", "5") if event["kind"] == "call.deny"][-1]
    assert "its 1 uses are used up" in denied["body"]["decision"]["near"][0]
    daemon.command("grants", "add", "*", f"read:{daemon.home}/b.txt", "--deny")
    assert daemon.command(*asked, check=False).returncode == 2
    for grant in daemon.json("grants", "list"):
        daemon.command("grants", "revoke", grant["name"].removeprefix("grants/"))
    assert daemon.json("grants", "list") == []
    error = daemon.json("grants", "revoke", made["name"].removeprefix("grants/"), check=False)[0]["error"]
    assert error["reason"] == "GRANT_NOT_FOUND"


def test_grants_are_learnt_from_what_was_refused(daemon: DaemonProcess):
    """Two files of one folder: one grant for the folder; applied, both calls are allowed."""
    folder = daemon.home / "learn"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(name)
        daemon.command("tools", "call", "files.read", f"path=learn/{name}", check=False)
    (proposed,) = daemon.json("grants", "learn", "--since", "1h", "--apply")[:1]
    assert {"files.read", f"read:{folder}"} <= {v for g in proposed["grants"] for v in (g["tool"], g["scope"])}
    for name in ("one", "two"):
        assert not daemon.json("tools", "call", "files.read", f"path=learn/{name}")[0]["failed"]
    assert daemon.json("grants", "learn", "--since", "1h")[0]["grants"] == []


def test_grants_outlive_the_daemon(tmp_path: Path):
    """Killed and started again: what was made is there, what was revoked is not."""
    running = Bare(tmp_path / "d", extra=NO_GRANTS).start()
    running.command("grants", "add", "files.list", f"read:{running.home}")
    (gone,) = running.json("grants", "add", "files.read", f"read:{running.home}")
    running.command("grants", "revoke", gone["name"].removeprefix("grants/"))
    running.kill()
    running.start()
    assert [grant["tool"] for grant in running.json("grants", "list")] == ["files.list"]
    assert running.stop() == 0


FAKE = """#!/bin/sh
printf '%s\\n' "$0" "$@" >> {log}
case "$0" in *notify-send) echo once ;; esac
"""


@pytest.mark.parametrize("program", ["notify-send", "termux-notification"])
def test_a_question_is_shown_on_the_screen(tmp_path: Path, program: str):
    """With nobody watching: the desktop's button answers; Android's runs the command for this very question."""
    programs, log = tmp_path / "bin", tmp_path / "shown"
    programs.mkdir()
    for name in (program, f"{program}-remove"):
        (programs / name).write_text(FAKE.format(log=log))
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere"}
    with Bare(tmp_path / "d", environment=environment).running() as running:
        with Client(running.socket) as client:
            thread, ended = in_background(lambda: client.call("files.write", {"path": "a.txt", "text": "$(id)`id`;id"}))
            if program == "termux-notification":
                action = until(
                    lambda: re.search(
                        r"-m agentd --socket \S+ (approvals answer \S+ once)", log.read_text() if log.exists() else ""
                    )
                )
                running.command(*action[1].split())
            thread.join(DEADLINE_S)
            assert not ended[0].failed
        shown = until(log.read_text)
        assert "agentd: files.write?" in shown
        assert f"write:{running.home}/a.txt" in shown
        assert "can be undone" in shown
        if program == "termux-notification":
            until(lambda: "termux-notification-remove" in log.read_text())
