"""The command as a person and as a program use it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
from agentd_sandbox import probe

from agentd.cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import DaemonProcess


def commands(group: click.Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        yield (*prefix, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))


@pytest.mark.parametrize(
    ("path", "command"), list(commands(cli)), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], command: click.Command):
    """Groups explain themselves; commands show how they are used."""
    assert command.help
    if not isinstance(command, click.Group):
        assert (command.epilog or "").startswith(f"Example: agentd {' '.join(path)}") or "Example: agentd run" in (
            command.epilog or ""
        )


def test_run_shows_the_call_and_the_answer(daemon: DaemonProcess):
    """Tool, scopes, decision, sandbox and answer are all on the screen."""
    (daemon.home / "todo.txt").write_text("sleep\n")
    shown = daemon.command("run", "read todo.txt").stdout
    for part in ("files.read", f"read:{daemon.home}/todo.txt", "allow", "sandbox   L", "todo.txt says: sleep"):
        assert part in shown


def test_run_as_json_is_one_event_a_line(daemon: DaemonProcess):
    """The last event is the run as it ended."""
    events = daemon.json("run", "hello")
    assert events[-1]["run"]["state"] == "STATE_SUCCEEDED"
    assert [event["sequence"] for event in events] == [str(n) for n in range(1, len(events) + 1)]


def test_tools_are_listed_and_called(daemon: DaemonProcess):
    """As tables for people, as JSON for programs."""
    assert "files.append" in daemon.command("tools", "list").stdout
    names = {tool["name"] for tool in daemon.json("tools", "list")}
    assert {"tools/files.read", "tools/system.battery"} <= names
    (called,) = daemon.json("tools", "call", "files.write", "path=cli.txt", 'text:="from JSON"')
    assert called["changed_paths"] == [str(daemon.home / "cli.txt")]
    call = called["name"].removeprefix("calls/")
    assert "put back" in daemon.command("undo", call).stdout
    assert not (daemon.home / "cli.txt").exists()
    assert "call.intent" in daemon.command("audit", "show", call).stdout
    assert "call.end" in daemon.command("audit", "list", "-n", "50").stdout
    assert "whole" in daemon.command("audit", "verify").stdout


def test_errors_are_two_lines_or_json(daemon: DaemonProcess):
    """What happened and what to do, exit status 1, no traceback."""
    done = daemon.command("tools", "call", "files.read", "path=/etc/passwd", check=False)
    assert done.returncode == 1
    assert "no grant covers read:/etc/passwd" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    (error,) = daemon.json("tools", "call", "files.read", "path=/etc/passwd", check=False)
    assert error["error"]["reason"] == "GRANT_REQUIRED"


def test_without_a_daemon_every_command_says_so(tmp_path: Path):
    """It names the socket and the command that starts one."""
    command = [sys.executable, "-m", "agentd", "--socket", str(tmp_path / "none.sock"), "run", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "none.sock" in done.stderr
    assert "agentd serve" in done.stderr


def test_chat_goes_on_after_each_line(daemon: DaemonProcess):
    """Two lines, two answers, and a clean end at the end of input."""
    command = [sys.executable, "-m", "agentd", "--socket", str(daemon.socket), "chat"]
    done = subprocess.run(command, input="hello\nthanks\n", capture_output=True, text=True, timeout=120, check=True)
    assert "Hello! What should I do?" in done.stdout
    assert "You are welcome." in done.stdout


def test_chat_as_json_is_one_event_a_line(daemon: DaemonProcess):
    """For programs: prompts in, events out."""
    command = [sys.executable, "-m", "agentd", "--socket", str(daemon.socket), "chat", "--json"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=120, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["run"]["answer"] == "Hello! What should I do?"


def test_serve_says_as_json_when_it_is_ready(tmp_path: Path):
    """One line on standard output, with the socket."""
    (tmp_path / "agentd.toml").write_text(f'state = "{tmp_path}/state"\nsocket = "{tmp_path}/s.sock"\n')
    command = [sys.executable, "-m", "agentd", "serve", "--json", "--config", str(tmp_path / "agentd.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as serving:
        assert serving.stdout is not None
        assert json.loads(serving.stdout.readline()) == {"ready": f"{tmp_path}/s.sock", "grants": 0}
        serving.terminate()
        assert serving.wait(30) == 0


def test_every_command_has_json():
    """Programs can use whatever people can."""
    for path, command in commands(cli):
        if not isinstance(command, click.Group):
            assert any("--json" in parameter.opts for parameter in command.params), path


def test_doctor_says_what_is_there(daemon: DaemonProcess):
    """Sandbox level, model and daemon, each with its state."""
    findings = {finding["what"]: finding for finding in daemon.json("doctor", "--config", str(daemon.root / "agentd.toml"))}
    assert findings["sandbox"]["found"].startswith(probe().name)
    assert "12 tools" in findings["daemon"]["found"] or "16 tools" in findings["daemon"]["found"]
    assert all(finding["ok"] for finding in findings.values())


def test_the_demo_runs_to_its_end():
    """Five prompts, one denied, one undone, the chain whole: exit status 0."""
    done = subprocess.run([sys.executable, "-m", "agentd", "demo"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("5. how much memory is free?", "deny", "put back", "whole:"):
        assert part in done.stdout
    assert "Traceback" not in done.stderr


def test_the_demo_as_json_is_json():
    """Every line is an object."""
    done = subprocess.run(
        [sys.executable, "-m", "agentd", "demo", "--json"], capture_output=True, text=True, timeout=180, check=True
    )
    assert all(isinstance(json.loads(line), dict) for line in done.stdout.splitlines())


def test_text_of_models_and_files_cannot_take_over_the_terminal(daemon: DaemonProcess):
    """Escape sequences from a file come out spelled, not as themselves."""
    (daemon.home / "evil.txt").write_text("\x1b]0;owned\x07 \u202eabc\n")
    shown = daemon.command("tools", "call", "files.read", "path=evil.txt").stdout
    assert "\x1b]0" not in shown
    assert "\u202e" not in shown
