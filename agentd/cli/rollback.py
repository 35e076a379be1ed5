"""`agentd undo`, `agentd rollback` and `agentd diff`: what calls have changed, and putting it back."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agentd.cli.approvals import duration_ns
from agentd.cli.output import console, json_option, print_json, safe, shown
from agentd.client import Client
from agentd.v1 import journal_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_Path = journal_pb2.RollbackPlan.Path
_REHEARSED = {"restore": "change", "delete-created": "delete", "recreate-deleted": "create"}
_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def _ways(command: Callable[..., Any]) -> Callable[..., Any]:
    merge = "Keep both changes of a text that somebody else changed, where they don't touch."
    options = (
        click.option("--partial", is_flag=True, help="Undo what can be undone, and leave the rest."),
        click.option("--merge", is_flag=True, help=merge),
        click.option("--force", is_flag=True, help="Overwrite what somebody else has changed; that can be undone, too."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog="Example: agentd undo 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("call")
@_ways
@json_option
@click.pass_obj
def undo(socket: Path | None, call: str, *, partial: bool, merge: bool, force: bool, as_json: bool) -> None:
    """Undo every change of CALL; all of them or none. An undo can be undone."""
    name = f"calls/{call.removeprefix('calls/')}"
    with Client(socket) as client, _progress(as_json=as_json) as progress:
        done = client.undo(name, partial=partial, merge=merge, force=force, progress=progress)
    print_undone(done, as_json=as_json)


@contextlib.contextmanager
def _progress(*, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar, on a terminal, for what takes longer than a moment."""
    if as_json or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    columns = (TextColumn("restoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("restoring", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


@click.command(epilog="Example: agentd recover")
@click.argument("calls", nargs=-1, metavar="[CALL]...")
@click.option("--force", is_flag=True, help="Overwrite what somebody has changed since; that can be undone.")
@click.option("--list", "only_list", is_flag=True, help="Only show what is left.")
@json_option
@click.pass_obj
def recover(socket: Path | None, calls: tuple[str, ...], *, force: bool, only_list: bool, as_json: bool) -> None:
    """Restore what failed CALLs, or all, have changed and could not be restored at once.

    The daemon tries this every half minute by itself. Exit status: 0; 1 if something is left.
    """
    names = [f"calls/{call.removeprefix('calls/')}" for call in calls]
    with Client(socket) as client:
        left = client.leftovers() if only_list else client.recover(names, force=force)
    for each in left:
        if as_json:
            print_json(each)
        else:
            call = each.call.removeprefix("calls/")
            console.print(f"[red]left[/] {shown(each.path)}  [dim]{shown(each.reason)}, of call {call}[/]")
    if not left and not as_json:
        console.print("[green]nothing is left[/]")
    sys.exit(1 if left else 0)


def _selecting(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.argument("calls", nargs=-1, metavar="[CALL]..."),
        click.option("--run", default="", metavar="RUN", help="All calls of this run."),
        click.option("--session", default="", metavar="SESSION", help="All calls of the runs of this session."),
        click.option("--since", metavar="DURATION", help="All calls of the last 30m, 2h, 7d ..."),
        click.option("--path", "paths", multiple=True, metavar="PATH", help="Only this path and what is below it."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _selection(
    calls: tuple[str, ...], run: str, session: str, since: str | None, paths: tuple[str, ...]
) -> journal_pb2.ChangeSelection:
    selection = journal_pb2.ChangeSelection(
        calls=[f"calls/{call.removeprefix('calls/')}" for call in calls],
        run=f"runs/{run.removeprefix('runs/')}" if run else "",
        session=session,
        paths=[absolute(path) for path in paths],
    )
    if since:
        selection.since.FromNanoseconds(time.time_ns() - duration_ns(since))
    return selection


def absolute(path: str) -> str:
    """As the journal knows it: links on the way resolved, a link itself not."""
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    return os.path.join(os.path.realpath(folder), name)


@click.command(epilog="Example: agentd rollback --run 01kz5t3q8m0v9r6w2e4y7x1abc")
@_selecting
@_ways
@click.option("--plan", "only_plan", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--yes", is_flag=True, help="Do it without asking.")
@json_option
@click.pass_obj
def rollback(
    socket: Path | None, /, *, partial: bool, merge: bool, force: bool, only_plan: bool, yes: bool, as_json: bool, **chosen: Any
) -> None:
    """Put back what the CALLs, a run, a session, or a span of time have changed. Shows a plan first, and asks.

    Exit status: 0; 1 if something is in the way, or you said no. With --json and without --yes it shows the plan only.
    """
    request = journal_pb2.PlanRollbackRequest(selection=_selection(**chosen), partial=partial, merge=merge, force=force)
    with Client(socket) as client:
        plan = client.plan_rollback(request)
        if as_json and (only_plan or not yes):
            print_json(plan)
            return
        if not as_json:
            print_plan(plan)
        blocked = any(not path.does and path.verdict != _Path.VERDICT_ALREADY for path in plan.paths)
        if only_plan or (blocked and not partial):
            sys.exit(1 if blocked and not partial else 0)
        if not yes and not click.confirm("Put it back?"):
            sys.exit(1)
        with _progress(as_json=as_json) as progress:
            done = client.apply_rollback(request, plan.digest, progress=progress)
        print_undone(done, as_json=as_json)


@click.command(epilog="Example: agentd diff --run 01kz5t3q8m0v9r6w2e4y7x1abc")
@_selecting
@click.option("--stat", is_flag=True, help="Count lines only.")
@json_option
@click.pass_obj
def diff(socket: Path | None, /, *, stat: bool, as_json: bool, **chosen: Any) -> None:
    """Show what the CALLs, a run, a session, or a span of time have changed."""
    with Client(socket) as client:
        found = client.differences(_selection(**chosen))
    for each in found:
        if as_json:
            print_json(each)
            continue
        print_difference(each, stat=stat)
    if not as_json:
        total = f"{sum(each.added for each in found)} lines added, {sum(each.removed for each in found)} removed"
        console.print(f"[bold]{len(found)} paths[/], {total}")


@click.command(epilog="Example: agentd pin 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("call")
@click.option("--off", is_flag=True, help="No longer.")
@json_option
@click.pass_obj
def pin(socket: Path | None, call: str, *, off: bool, as_json: bool) -> None:
    """Keep what CALL needs to be undone, however old it gets and however full the journal is."""
    name = f"calls/{call.removeprefix('calls/')}"
    with Client(socket) as client:
        client.pin(name, pinned=not off)
    if as_json:
        print_json({"name": name, "pinned": not off})


def print_plan(plan: journal_pb2.RollbackPlan, *, rehearsed: bool = False) -> None:
    for path in plan.paths:
        word = _Path.Verdict.Name(path.verdict).removeprefix("VERDICT_").lower().replace("_", "-")
        word = _REHEARSED.get(word, word) if rehearsed else word
        colour = (
            "yellow" if path.forced else "green" if path.does else "dim" if path.verdict == _Path.VERDICT_ALREADY else "red"
        )
        forced = " [yellow](overwrites)[/]" if path.forced else ""
        console.print(f"[{colour}]{word:16}[/] {shown(path.difference.path)}{forced}  [dim]{shown(path.why)}[/]")
        if path.does:
            _print_diff(path.difference.diff)
    if plan.not_undoable_calls:
        console.print(f"[yellow]{len(plan.not_undoable_calls)} of the calls have reached outside; nothing takes that back[/]")
    what = "change" if rehearsed else "put back"
    calls, paths = len(plan.calls), sum(path.does for path in plan.paths)
    if more := plan.path_count - len(plan.paths):
        console.print(f"[dim]and {more} paths more[/]")
        paths += more
    console.print(f"[dim]{calls} call{'s' * (calls != 1)}, {paths} path{'s' * (paths != 1)} to {what}[/]")


def print_difference(each: journal_pb2.PathDifference, *, stat: bool) -> None:
    counts = f"  [green]+{each.added}[/] [red]-{each.removed}[/]" if each.diff else ""
    console.print(f"[bold]{shown(each.path)}[/]  [dim]{shown(each.summary)}[/]{counts}")
    if not stat:
        _print_diff(each.diff)


def _print_diff(text: str) -> None:
    for line in text.splitlines():
        colour = "bold" if line.startswith(("+++", "---")) else _COLOURS.get(line[:1], "default")
        console.print(f"  {safe(line)}", style=colour, markup=False)


def print_undone(done: journal_pb2.UndoCallResponse, *, word: str = "put back", as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    for path in done.restored_paths:
        console.print(f"[green]{word}[/] {shown(path)}")
    if more := done.restored_count - len(done.restored_paths):
        console.print(f"[green]{word}[/] {more} paths more")
    again = "it back" if word == "applied" else "the change again"
    console.print(f"[dim]recorded as {done.name.removeprefix('calls/')}; undo that to have {again}[/]")
