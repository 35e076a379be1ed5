"""`agentd run` and `agentd chat`: give the model something to do."""

from __future__ import annotations

import contextlib
import sys
import uuid
from typing import TYPE_CHECKING

import click

from agentd.cli.approvals import ask, present
from agentd.cli.output import console, json_option, print_call, print_json, safe, shown
from agentd.client import Client
from agentd.errors import AgentdError
from agentd.v1 import approval_pb2, run_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@click.command(epilog='Example: agentd run "add milk to notes/shopping.txt"')
@click.argument("prompt")
@click.option("--session", default="", help="Go on with the conversation of this name.")
@click.option("--rehearse", is_flag=True, help="Put back what each call changes; look at it with `agentd rehearsals`.")
@json_option
@click.pass_obj
def run(socket: Path | None, prompt: str, session: str, *, rehearse: bool, as_json: bool) -> None:
    """Run PROMPT to its answer, showing every tool call on the way. Ctrl-C cancels the run.

    Exit status: 0 if the model answered, 1 if not. With --json: one event a line.
    """
    with Client(socket) as client:
        ended = follow(client, prompt, session, rehearse=rehearse, as_json=as_json)
    answered = ended is not None and ended.stop_reason == run_pb2.Run.STOP_REASON_ANSWERED
    sys.exit(0 if answered else 1)


@click.command(epilog="Example: agentd chat")
@json_option
@click.pass_obj
def chat(socket: Path | None, *, as_json: bool) -> None:
    """Talk to the model; every line sees the ones before it. End with Ctrl-D.

    With --json: lines of standard input are prompts, and every event is a line of standard output.
    """
    session = uuid.uuid4().hex
    with Client(socket) as client:
        client.status()  # say at once if there is no daemon
        while True:
            try:
                prompt = input() if as_json else console.input("[bold green]you[/]  ")
            except EOFError:
                console.print(end="" if as_json else "\n")
                return
            if prompt.strip():
                try:
                    follow(client, prompt, session, as_json=as_json)
                except AgentdError as e:  # the conversation goes on
                    if as_json:
                        print_json({"error": {"reason": e.reason.name, "message": e.message, "hint": e.hint}})
                    else:
                        console.print(f"[red]error:[/] {shown(str(e))}")


def follow(client: Client, prompt: str, session: str, *, rehearse: bool = False, as_json: bool) -> run_pb2.Run | None:
    """Show a run until it has ended; returns it as it ended."""
    with present(client) if _is_dialogue(as_json=as_json) else contextlib.nullcontext():
        return _follow(client, client.run(prompt, session=session, rehearse=rehearse), as_json=as_json)


def _is_dialogue(*, as_json: bool) -> bool:
    """Whether somebody sits there who can be asked about a call."""
    return not as_json and sys.stdin.isatty() and sys.stdout.isatty()


def _follow(client: Client, events: Iterator[run_pb2.WatchRunResponse], *, as_json: bool) -> run_pb2.Run | None:
    ended: run_pb2.Run | None = None
    open_line = False
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "run":
            ended = event.run
        if as_json:
            print_json(event)
            continue
        if open_line and kind not in ("text", "thought"):
            console.print()
            open_line = False
        match kind:
            case "text" | "thought":
                console.print(
                    safe(event.text or event.thought), style="dim" if kind == "thought" else "bold", end="", markup=False
                )
                open_line = True
            case "call":
                print_call(event.call)
            case "approval" if event.approval.state == approval_pb2.Approval.STATE_PENDING:
                _answer(client, event.approval)
            case "run":
                _print_end(event.run)
    return ended


def _answer(client: Client, notice: run_pb2.ApprovalNotice) -> None:
    """Where somebody sits here, ask; else say what is waited for."""
    if _is_dialogue(as_json=False):
        for question in client.approvals():
            if question.name == notice.name:
                ask(client, question)
                return
    console.print(f"  [yellow]waits for an approval:[/] {shown(notice.tool)}, {shown(', '.join(notice.scopes))}")


def _print_end(run: run_pb2.Run) -> None:
    if run.state == run_pb2.Run.STATE_FAILED:
        console.print(f"[red]failed:[/] {shown(run.error.message)}")
    elif run.state == run_pb2.Run.STATE_CANCELLED:
        console.print("[yellow]cancelled[/]")
    elif run.stop_reason != run_pb2.Run.STOP_REASON_ANSWERED:
        reason = run_pb2.Run.StopReason.Name(run.stop_reason).removeprefix("STOP_REASON_").lower().replace("_", " ")
        console.print(f"[yellow]stopped:[/] {reason}")
