"""`agentd rehearsals`: calls that were put back as soon as they had ended, to be looked at, applied or dropped."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

import click
from rich.table import Table

from agentd.cli.output import console, json_option, print_json, shown
from agentd.cli.rollback import print_plan, print_undone
from agentd.client import Client
from agentd.v1 import journal_pb2

if TYPE_CHECKING:
    from pathlib import Path

_Path = journal_pb2.RollbackPlan.Path


@click.group()
def rehearsals() -> None:
    """Look at what rehearsed calls would change; apply or drop it.

    A call is rehearsed with --rehearse (`agentd run`, `agentd tools call`), or because a grant says so.
    """


@rehearsals.command("list", epilog="Example: agentd rehearsals list")
@json_option
@click.pass_obj
def list_(socket: Path | None, *, as_json: bool) -> None:
    """List those that wait, oldest first."""
    with Client(socket) as client:
        found = client.rehearsals()
    if as_json:
        for each in found:
            print_json(each)
        return
    if not found:
        console.print("[dim]nothing waits[/]")
        return
    table = Table(box=None, header_style="bold")
    for title in ("call", "made", "by"):
        table.add_column(title, no_wrap=True)
    table.add_column("would change", overflow="fold")
    for each in found:
        made = datetime.fromtimestamp(each.create_time.seconds).astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(f"[cyan]{each.name.removeprefix('calls/')}[/]", made, shown(each.principal), shown("\n".join(each.paths)))
    console.print(table)


@rehearsals.command(epilog="Example: agentd rehearsals show 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("calls", nargs=-1, metavar="CALL...", required=True)
@json_option
@click.pass_obj
def show(socket: Path | None, calls: tuple[str, ...], *, as_json: bool) -> None:
    """Show what applying CALL would change, and what is in the way. Exit status: 1 if something is."""
    with Client(socket) as client:
        plan = client.plan_rollback(_request(calls))
    if as_json:
        print_json(plan)
    else:
        print_plan(plan, rehearsed=True)
    sys.exit(1 if _is_blocked(plan) else 0)


@rehearsals.command(epilog="Example: agentd rehearsals apply 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("calls", nargs=-1, metavar="CALL...", required=True)
@click.option("--partial", is_flag=True, help="Apply what can be, and leave the rest.")
@click.option("--merge", is_flag=True, help="Keep both changes of a text that somebody else changed, where they don't touch.")
@click.option("--force", is_flag=True, help="Overwrite what somebody else has changed since; that can be undone, too.")
@click.option("--yes", is_flag=True, help="Do it without asking.")
@json_option
@click.pass_obj
def apply(
    socket: Path | None, calls: tuple[str, ...], *, partial: bool, merge: bool, force: bool, yes: bool, as_json: bool
) -> None:
    """Carry out what CALL has made, if nothing has changed since. Shows it first, and asks; can be undone.

    With --json and without --yes it shows the plan only. Exit status: 0; 1 if something is in the way, or you said no.
    """
    request = _request(calls, partial=partial, merge=merge, force=force)
    with Client(socket) as client:
        plan = client.plan_rollback(request)
        if as_json and not yes:
            print_json(plan)
            return
        if not as_json:
            print_plan(plan, rehearsed=True)
        if _is_blocked(plan) and not partial:
            sys.exit(1)
        if not yes and not click.confirm("Apply it?"):
            sys.exit(1)
        print_undone(client.apply_rollback(request, plan.digest), word="applied", as_json=as_json)


@rehearsals.command(epilog="Example: agentd rehearsals drop 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("calls", nargs=-1, metavar="CALL...", required=True)
@json_option
@click.pass_obj
def drop(socket: Path | None, calls: tuple[str, ...], *, as_json: bool) -> None:
    """Give up what CALL has made. Nothing on disk changes."""
    with Client(socket) as client:
        for name in map(_name, calls):
            client.drop_rehearsal(name)
            if as_json:
                print_json({"name": name, "dropped": True})
            else:
                console.print(f"[green]dropped[/] {name.removeprefix('calls/')}")


def _request(
    calls: tuple[str, ...], *, partial: bool = False, merge: bool = False, force: bool = False
) -> journal_pb2.PlanRollbackRequest:
    selection = journal_pb2.ChangeSelection(calls=map(_name, calls), rehearsed=True)
    return journal_pb2.PlanRollbackRequest(selection=selection, partial=partial, merge=merge, force=force)


def _name(call: str) -> str:
    return f"calls/{call.removeprefix('calls/')}"


def _is_blocked(plan: journal_pb2.RollbackPlan) -> bool:
    return any(not path.does and path.verdict != _Path.VERDICT_ALREADY for path in plan.paths)
