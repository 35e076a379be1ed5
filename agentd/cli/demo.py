"""`agentd demo`: everything works, shown with a real daemon in a scratch folder."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format

from agentd.cli.output import as_dict, console, json_option, print_call, print_json, shown
from agentd.cli.rollback import print_plan
from agentd.cli.scratch import daemon_of_its_own
from agentd.v1 import journal_pb2

if TYPE_CHECKING:
    from agentd.client import Client
    from agentd.v1 import run_pb2, tool_pb2

PROMPTS = (
    "what files are in notes?",
    'add "buy milk" to notes/shopping.txt',
    "read notes/shopping.txt",
    "delete /etc/hostname",
    "how much memory is free?",
)
_CONFIG = """
state = "{folder}/state"
socket = "{folder}/agentd.sock"
approvals.notify = false
audit.journald = false
[tools]
folder = "{folder}/home"
[[grants]]
tool = "files.*"
scope = "read:{folder}/home/notes"
[[grants]]
tool = "files.*"
scope = "write:{folder}/home/notes"
[[grants]]
tool = "system.*"
scope = "*"
"""
_SHELL_CONFIG = """
state = "{folder}/state-of-shell"
socket = "{folder}/agentd.sock"
approvals.notify = false
audit.journald = false
[tools]
folder = "{folder}/home"
bundled = ["shell"]
[[grants]]
tool = "shell.run"
scope = "write:{folder}/home/notes"
[[grants]]
tool = "shell.run"
scope = "read:{folder}/home/notes"
[[grants]]
tool = "shell.run"
scope = "exec:/usr"
"""
_COMMAND = "mv ideas.md plans.md && sed -i s/eggs/flour/ shopping.txt && rm old.txt && mkdir done"


@click.command(epilog="Example: agentd demo")
@json_option
@click.option("--keep", is_flag=True, help="Leave the scratch folder behind.")
def demo(*, as_json: bool, keep: bool) -> None:
    """Five prompts for the pocket model, in a scratch folder: calls, scopes, decisions, log; one undo; the chain verified.
    Then a shell command that renames, rewrites and deletes: rehearsed, applied, undone.

    The pocket model that comes with agentd knows only the bundled tools: it stands in for a real one.
    """
    folder = Path(tempfile.mkdtemp(prefix="agentd-demo-"))
    try:
        _prepare(folder)
        with daemon_of_its_own(folder, _CONFIG.format(folder=folder)) as client:
            ok = _Demo(client, folder, as_json=as_json).play()
        # The pocket model knows no shell.
        with daemon_of_its_own(folder, _SHELL_CONFIG.format(folder=folder)) as client:
            ok &= _ShellDemo(client, folder, as_json=as_json).play()
    finally:
        if keep:
            click.echo(f"left behind: {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if ok else 1)


def _prepare(folder: Path) -> None:
    notes = folder / "home" / "notes"
    notes.mkdir(parents=True)
    (notes / "shopping.txt").write_text("bread\neggs\n")
    (notes / "ideas.md").write_text("# Ideas\nwater the plants\n")
    (notes / "old.txt").write_text("of last year\n")


class _Demo:
    def __init__(self, client: Client, folder: Path, *, as_json: bool) -> None:
        self._client, self._folder, self._json = client, folder, as_json
        self._changing: tool_pb2.ToolCall | None = None
        self._denied = 0

    def play(self) -> bool:
        """Whether everything was as it should be."""
        answered = [self._prompt(number, prompt) for number, prompt in enumerate(PROMPTS, 1)]
        self._log()
        undone = self._undo()
        whole = self._verify()
        return all(answered) and undone and whole and self._denied == 1

    def _say(self, title: str) -> None:
        if not self._json:
            console.print(f"\n[bold]{shown(title)}[/]")

    def _prompt(self, number: int, prompt: str) -> bool:
        self._say(f"{number}. {prompt}")
        run: run_pb2.Run | None = None
        for event in self._client.run(prompt):
            if self._json:
                print_json(event)
            match event.WhichOneof("event"):
                case "call":
                    self._note(event.call)
                case "run":
                    run = event.run
        if run is not None and not self._json:
            console.print(f"  [bold green]answer[/]      {shown(run.answer or run.error.message)}")
        return run is not None and bool(run.answer)

    def _note(self, call: tool_pb2.ToolCall) -> None:
        if call.changed_paths:
            self._changing = call
        self._denied += call.decision == call.DECISION_DENY
        if not self._json:
            print_call(call)

    def _log(self) -> None:
        self._say("The audit log of it")
        for event in self._client.audit_events():
            if self._json:
                print_json(event)
                continue
            body: dict[str, Any] = json_format.MessageToDict(event.body)
            what = body.get("tool", {}).get("name", "")
            changed = body.get("files", [])
            files = "".join(f"  {f['path']} {_digest(f, 'before')} -> {_digest(f, 'after')}" for f in changed)
            console.print(
                f"  {event.sequence:3} {event.kind:12} {what:14} [dim]chain {event.chain.hex()[:12]}[/]{shown(files)}"
            )

    def _undo(self) -> bool:
        self._say("Undo of the call that changed a file")
        if self._changing is None:
            console.print("  [red]no call has changed a file[/]")
            return False
        file = self._folder / "home" / "notes" / "shopping.txt"
        before = file.read_text()
        done = self._client.undo(self._changing.name)
        after = file.read_text()
        if self._json:
            print_json(as_dict(done))
        else:
            for path in done.restored_paths:
                console.print(f"  [green]put back[/] {shown(path)}: {shown(repr(before))} -> {shown(repr(after))}")
        return after == "bread\neggs\n"

    def _verify(self) -> bool:
        self._say("The chain")
        found = self._client.verify()
        if self._json:
            print_json(found)
        elif found.first_bad_sequence:
            console.print(f"  [red]damaged:[/] {found.why}")
        else:
            console.print(f"  [green]whole:[/] {found.valid_events} events, head {found.head.hex()}")
        return found.first_bad_sequence == 0


class _ShellDemo:
    """Whatever program changes files, the broker sees it."""

    def __init__(self, client: Client, folder: Path, *, as_json: bool) -> None:
        self._client, self._notes, self._json = client, folder / "home" / "notes", as_json

    def play(self) -> bool:
        """Whether everything was as it should be."""
        before = self._tree()
        self._say(f"A shell command, rehearsed: {_COMMAND}")
        call = self._client.call("shell.run", {"command": _COMMAND, "folder": str(self._notes)}, rehearse=True)
        if not call.rehearsed:
            console.print(f"  [yellow]left out:[/] {shown(call.output_json)}")
            return not call.failed
        unchanged = self._tree() == before
        selection = journal_pb2.ChangeSelection(calls=[call.name], rehearsed=True)
        request = journal_pb2.PlanRollbackRequest(selection=selection)
        plan = self._client.plan_rollback(request)
        if self._json:
            print_json(plan)
        else:
            print_plan(plan, rehearsed=True)
        self._say("Applied")
        applied = self._client.apply_rollback(request, plan.digest)
        self._list()
        self._say("And undone")
        self._client.undo(applied.name)
        self._list()
        return unchanged and self._tree() == before

    def _say(self, title: str) -> None:
        if not self._json:
            console.print(f"\n[bold]{shown(title)}[/]")

    def _list(self) -> None:
        if not self._json:
            console.print(f"  notes: {', '.join(sorted(self._tree()))}")

    def _tree(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() if path.is_file() else b"" for path in self._notes.iterdir()}


def _digest(file: dict[str, Any], side: str) -> str:
    return str(file.get(side) or "nothing")[:8]
