"""`agentd runs`: what was asked, what waits, how it ended."""

from __future__ import annotations

import itertools
from datetime import datetime
from typing import TYPE_CHECKING

import click
from rich.table import Table

from agentd.cli.output import console, json_option, print_json, short, shown
from agentd.cli.run import show as show_events
from agentd.client import Client
from agentd.errors import Reason, RequestError
from agentd.v1 import run_pb2

if TYPE_CHECKING:
    from pathlib import Path

_WHOLE, _LOOKED_AT = len("runs/") + 26, 500
_COLOURS = {"QUEUED": "yellow", "RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "dim"}


@click.group(invoke_without_command=True, epilog="Example: agentd runs")
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="How many of the newest.")
@json_option
@click.pass_context
def runs(context: click.Context, limit: int, *, as_json: bool) -> None:
    """Show the newest runs: what waits, what goes on, and how the others have ended."""
    if context.invoked_subcommand is not None:
        return
    with Client(context.obj) as client:
        found = list(itertools.islice(client.list_runs(), limit))
    if as_json:
        for each in found:
            print_json(each)
    elif found:
        console.print(_table(found))
    else:
        console.print('[dim]there were none yet; try: agentd run "what time is it"[/]')


@runs.command(epilog="Example: agentd runs show 01JD9Q6Z")
@click.argument("run")
@json_option
@click.pass_obj
def show(socket: Path | None, run: str, *, as_json: bool) -> None:
    """Show what has happened in RUN, and follow it to its end."""
    with Client(socket) as client:
        show_events(client, client.watch_run(_name(client, run)), as_json=as_json)


@runs.command(epilog="Example: agentd runs cancel 01JD9Q6Z")
@click.argument("run")
@json_option
@click.pass_obj
def cancel(socket: Path | None, run: str, *, as_json: bool) -> None:
    """End RUN, or keep it from beginning; a call under way is put back."""
    with Client(socket) as client:
        ended = client.cancel_run(_name(client, run))
    if as_json:
        print_json(ended)
    else:
        console.print(f"{shown(ended.name)}: {_state(ended)}")


def _name(client: Client, run: str) -> str:
    """Of a run, or of the one among the newest that begins so."""
    name = run if run.startswith("runs/") else f"runs/{run}"
    if not run or len(name) >= _WHOLE:
        return name
    found = [each.name for each in itertools.islice(client.list_runs(), _LOOKED_AT) if each.name.startswith(name)]
    if len(found) > 1:
        message, hint = f"{len(found)} runs begin with {run}.", "Write more of its name."
        raise RequestError(Reason.RUN_NOT_FOUND, message, hint=hint, metadata={"run": run})
    return found[0] if found else name


def _table(found: list[run_pb2.Run]) -> Table:
    table = Table(box=None, header_style="bold")
    for title in ("run", "asked", "state"):
        table.add_column(title, no_wrap=True)
    table.add_column("what, and who", overflow="fold")
    for run in found:
        asked = datetime.fromtimestamp(run.create_time.seconds).astimezone().strftime("%d %b %H:%M")
        name = run.name.removeprefix("runs/")
        what = f"{shown(short(run.prompt, 60))}\n[dim]{shown(run.principal)}[/]"
        table.add_row(f"[cyan]{name}[/]", asked, _state(run), what)
    return table


def _state(run: run_pb2.Run) -> str:
    name = run_pb2.Run.State.Name(run.state).removeprefix("STATE_")
    stop = run_pb2.Run.StopReason.Name(run.stop_reason).removeprefix("STOP_REASON_").lower().replace("_", " ")
    word = stop if run.state == run_pb2.Run.STATE_SUCCEEDED and stop != "answered" else name.lower()
    background = " (bg)" if run.priority == run_pb2.Run.PRIORITY_BACKGROUND else ""
    return f"[{_COLOURS.get(name, 'default')}]{word}[/]{background}"
