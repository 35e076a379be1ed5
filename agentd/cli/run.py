"""`agentd run` and `agentd chat`: give the model something to do."""

from __future__ import annotations

import contextlib
import sys
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from agentd.cli.approvals import ask, duration_ns, present
from agentd.cli.output import console, json_option, print_call, print_json, safe, shown
from agentd.client import Client
from agentd.errors import AgentdError
from agentd.v1 import approval_pb2, budget_pb2, run_pb2, tool_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@click.command(epilog='Example: agentd run "add milk to notes/shopping.txt"')
@click.argument("prompt")
@click.option("--session", default="", help="Go on with the conversation of this name.")
@click.option("--rehearse", is_flag=True, help="Put back what each call changes; look at it with `agentd rehearsals`.")
@click.option(
    "--background", is_flag=True, help="It can wait until the device is charging and cool. Ends at once; see `agentd runs`."
)
@click.option("--within", metavar="DURATION", help="With --background: it must have begun in 8h, 2d ...  [default: 1d]")
@click.option("--tokens", type=click.IntRange(1), help="The most that the model may write.")
@json_option
@click.pass_obj
def run(
    socket: Path | None,
    prompt: str,
    session: str,
    within: str | None,
    tokens: int | None,
    *,
    rehearse: bool,
    background: bool,
    as_json: bool,
) -> None:
    """Run PROMPT to its answer, showing every tool call on the way. Ctrl-C cancels the run.

    Exit status: 0 if the model answered, 1 if not. With --json: one event a line.
    """
    if within and not background:
        raise click.UsageError("--within goes with --background")
    if within and not duration_ns(within):
        raise click.BadParameter("it has to begin at some time", param_hint="--within")
    budget = run_pb2.Run.Budget(tokens=tokens or 0)
    with Client(socket) as client:
        if background:
            start_by = datetime.now(UTC) + timedelta(microseconds=duration_ns(within) / 1000) if within else None
            priority = run_pb2.Run.PRIORITY_BACKGROUND
            begun = client.create_run(
                prompt, session=session, rehearse=rehearse, priority=priority, start_by=start_by, budget=budget
            )
            _print_begun(begun, as_json=as_json)
            return
        ended = follow(client, prompt, session, rehearse=rehearse, as_json=as_json, budget=budget)
    answered = ended is not None and ended.stop_reason == run_pb2.Run.STOP_REASON_ANSWERED
    sys.exit(0 if answered else 1)


def _print_begun(run: run_pb2.Run, *, as_json: bool) -> None:
    if as_json:
        print_json(run)
        return
    name = run.name.removeprefix("runs/")
    console.print(f"[green]waits for its turn:[/] {name}  [dim](agentd runs show {name}, agentd runs cancel {name})[/]")


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


def follow(
    client: Client,
    prompt: str,
    session: str,
    *,
    rehearse: bool = False,
    as_json: bool,
    budget: run_pb2.Run.Budget | None = None,
) -> run_pb2.Run | None:
    """Show a run until it has ended; returns it as it ended. Where a person sits here, it goes before what programs ask."""
    dialogue = _is_dialogue(as_json=as_json)
    priority = run_pb2.Run.PRIORITY_INTERACTIVE if dialogue else run_pb2.Run.PRIORITY_NORMAL
    changed: list[tool_pb2.ToolCall] = []
    with present(client) if dialogue else contextlib.nullcontext():
        running = client.run(prompt, session=session, rehearse=rehearse, priority=priority, budget=budget)
        with contextlib.closing(running) as events:  # whatever happens here, the run is not left to itself
            try:
                return show(client, events, as_json=as_json, changed=changed)
            except BaseException:  # Ctrl-C, the end of the terminal, a daemon that is gone
                if not as_json:
                    _print_changed(changed)
                raise


def _print_changed(changed: Sequence[tool_pb2.ToolCall]) -> None:
    """What a run that was broken off had done by then stays done."""
    with contextlib.suppress(OSError):  # there may be nobody left to read it
        console.print("\n[yellow]broken off, and cancelled[/]")
        for call in changed:
            name = call.name.removeprefix("calls/")
            console.print(
                f"  [dim]done already:[/] {shown(call.tool)}, {call.changed_count} paths  [dim](agentd undo {name})[/]"
            )


def _is_dialogue(*, as_json: bool) -> bool:
    """Whether somebody sits there who can be asked about a call."""
    return not as_json and sys.stdin.isatty() and sys.stdout.isatty()


def show(
    client: Client,
    events: Iterator[run_pb2.WatchRunResponse],
    *,
    as_json: bool,
    changed: list[tool_pb2.ToolCall] | None = None,
) -> run_pb2.Run | None:
    """The events of a run as they come; returns it as it ended. Calls that have changed something are added to `changed`."""
    ended: run_pb2.Run | None = None
    open_line = False
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "run":
            ended = event.run
        if changed is not None and kind == "call" and event.call.changed_count and not event.call.rehearsed:
            changed.append(event.call)
        if as_json:
            print_json(event)
            continue
        if open_line and kind not in ("text", "thought"):
            console.print()
            open_line = False
        if kind in ("text", "thought"):
            style = "dim" if kind == "thought" else "bold"
            console.print(safe(event.text or event.thought), style=style, end="", markup=False)
            open_line = True
        else:
            _print_event(client, event)
    return ended


def _print_event(client: Client, event: run_pb2.WatchRunResponse) -> None:
    match event.WhichOneof("event"):
        case "call":
            print_call(event.call)
        case "approval" if event.approval.state == approval_pb2.Approval.STATE_PENDING:
            _answer(client, event.approval)
        case "context":
            gone, left = event.context.turns_dropped, event.context.turns_left
            console.print(f"  [yellow]the context is full:[/] [dim]{gone} turns of before are left out, {left} are in it[/]")
        case "waiting":
            others = ", ".join(call.removeprefix("calls/") for call in event.waiting.calls)
            console.print(f"  [yellow]waits:[/] [dim]{shown(event.waiting.tool)}, for {shown(others)} on the same files[/]")
        case "queue":
            _print_waiting(event.queue.ahead, event.queue.reason)
        case "budget" if event.budget.reason:
            state = budget_pb2.Budgets.State.Name(event.budget.state).removeprefix("STATE_").lower()
            console.print(f"  [yellow]{state}:[/] [dim]{shown(event.budget.reason)}[/]")
        case "run":
            _print_end(event.run)


def _answer(client: Client, notice: run_pb2.ApprovalNotice) -> None:
    """Where somebody sits here, ask; else say what is waited for."""
    if _is_dialogue(as_json=False):
        for question in client.approvals():
            if question.name == notice.name:
                ask(client, question)
                return
    console.print(f"  [yellow]waits for an approval:[/] {shown(notice.tool)}, {shown(', '.join(notice.scopes))}")


def _print_waiting(ahead: int, reason: str) -> None:
    before = f"{ahead} before it" if ahead else ""
    console.print(f"  [yellow]waits:[/] [dim]{shown(', '.join(filter(None, (before, reason))))}[/]")


def _print_end(run: run_pb2.Run) -> None:
    if run.state == run_pb2.Run.STATE_FAILED:
        console.print(f"[red]failed:[/] {shown(run.error.message)}")
    elif run.state == run_pb2.Run.STATE_CANCELLED:
        console.print("[yellow]cancelled[/]")
    elif run.stop_reason != run_pb2.Run.STOP_REASON_ANSWERED:
        reason = run_pb2.Run.StopReason.Name(run.stop_reason).removeprefix("STOP_REASON_").lower().replace("_", " ")
        console.print(f"[yellow]stopped:[/] {reason}")
