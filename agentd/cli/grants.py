"""`agentd grants`: who may do what, made, taken back, explained and learnt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from rich.table import Table

from agentd.cli.approvals import duration_ns, until
from agentd.cli.output import console, json_option, print_json, shown
from agentd.cli.tools import argument
from agentd.client import Client
from agentd.v1 import grant_pb2

if TYPE_CHECKING:
    from pathlib import Path

_COLOURS = {"allow": "green", "ask": "yellow", "deny": "red"}
_TOML = """[[grants]]
principal = "{principal}"
tool = "{tool}"
scope = '{scope}'
"""


@click.group()
def grants() -> None:
    """Who, with which tool, may touch what."""


@grants.command("list", epilog="Example: agentd grants list")
@json_option
@click.pass_obj
def list_(socket: Path | None, *, as_json: bool) -> None:
    """List the grants in force: those of agentd.toml, then those made with this command or by answers."""
    with Client(socket) as client:
        found = list(client.grants())
    if as_json:
        for grant in found:
            print_json(grant)
        return
    table = Table(box=None, header_style="bold")
    for title in ("", "who", "tool", "may touch", "limits", "grant"):
        table.add_column(title, overflow="fold")
    for grant in found:
        word = _word(grant)
        where = grant.name.removeprefix("grants/") or grant.text.rpartition("(")[2].rstrip(")")
        cells = (grant.principal, grant.tool, grant.scope, _limits(grant), where)
        table.add_row(f"[{_COLOURS[word]}]{word}[/]", *map(shown, cells))
    console.print(table)


@grants.command(epilog="Example: agentd grants add files.read 'read:~/notes' --for 2h")
@click.argument("tool")
@click.argument("scope")
@click.option("--principal", default="*", show_default=True, help="For whom, as a glob: unix:pi, token:phone.")
@click.option("--ask", "decision", flag_value="ask", help="A person is to be asked.")
@click.option("--deny", "decision", flag_value="deny", help="Never, whatever else allows it.")
@click.option("--for", "lasting", metavar="DURATION", help="Only for so long, such as 30m, 2h, 7d.")
@click.option("--uses", default=0, help="Only so many calls.")
@click.option("--hours", default="", metavar="HH:MM-HH:MM", help="Only between these hours.")
@click.option("--rehearse", is_flag=True, help="What the calls change is put back, to be looked at and applied.")
@click.option("--charging", is_flag=True, help="Only while power comes from outside.")
@json_option
@click.pass_obj
def add(
    socket: Path | None,
    tool: str,
    scope: str,
    principal: str,
    decision: str | None,
    lasting: str | None,
    uses: int,
    hours: str,
    *,
    charging: bool,
    rehearse: bool,
    as_json: bool,
) -> None:
    """Allow TOOL (a glob: files.*) to touch SCOPE: read:PATH, write:PATH, exec:PROGRAM, connect:HOST:PORT, call:TOOL ..."""
    verdict = grant_pb2.Grant.Decision.Value(f"DECISION_{(decision or 'allow').upper()}")
    wanted = grant_pb2.Grant(principal=principal, tool=tool, scope=scope, decision=verdict, max_uses=uses, hours=hours)
    wanted.while_charging, wanted.rehearse = charging, rehearse
    if lasting:
        wanted.expire_time.FromNanoseconds(until(lasting))
    with Client(socket) as client:
        made = client.grant(wanted)
    _print_made(made, as_json=as_json)


@grants.command(epilog="Example: agentd grants revoke 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("grant")
@json_option
@click.pass_obj
def revoke(socket: Path | None, grant: str, *, as_json: bool) -> None:
    """Take GRANT back. Calls that run by it are stopped, and what they changed is put back."""
    with Client(socket) as client:
        gone = client.revoke_grant(f"grants/{grant.removeprefix('grants/')}")
    if as_json:
        print_json(gone)
    else:
        console.print(f"[green]revoked[/] {shown(gone.text)}")


@grants.command(epilog="Example: agentd grants check --as token:phone files.read path=notes/todo.txt")
@click.argument("tool")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--as", "principal", default="", help="Whose call it would be.  [default: yours]")
@json_option
@click.pass_obj
def check(socket: Path | None, tool: str, arguments: tuple[str, ...], principal: str, *, as_json: bool) -> None:
    """Say what would be decided on a call of TOOL, and why. Nothing runs.

    Exit status: 0 if it may run, 1 if a person would be asked, 2 if it is denied.
    """
    with Client(socket) as client:
        found = client.check(tool, dict(map(argument, arguments)), principal=principal)
    word = grant_pb2.Grant.Decision.Name(found.decision).removeprefix("DECISION_").lower()
    if as_json:
        print_json(found)
    else:
        console.print(f"[bold {_COLOURS[word]}]{word}[/]: {shown(found.reason)}")
        for title, lines in (("touches", found.scopes), ("by", found.rules), ("almost", found.almost)):
            for line in lines:
                console.print(f"  [dim]{title:8}[/] {shown(line)}")
    raise SystemExit(list(_COLOURS).index(word))


@grants.command(epilog="Example: agentd grants learn --since 7d")
@click.option("--since", metavar="DURATION", help="Only calls of the last 2h, 7d ...  [default: all on record]")
@click.option("--apply", "apply", is_flag=True, help="Make them, after you have read them.")
@json_option
@click.pass_obj
def learn(socket: Path | None, since: str | None, *, apply: bool, as_json: bool) -> None:
    """Propose the few grants that would have allowed what was asked for and is not allowed now."""
    with Client(socket) as client:
        proposed = client.propose_grants(time.time_ns() - duration_ns(since) if since else 0)
        if as_json:
            print_json(proposed)
        else:
            console.print(f"[dim]# {len(proposed.grants)} grants, for {proposed.calls} calls that were refused[/]")
            for grant in proposed.grants:
                console.print(shown(_TOML.format(principal=grant.principal, tool=grant.tool, scope=grant.scope)))
        if apply and proposed.grants and (as_json or click.confirm("Make them?")):
            for grant in proposed.grants:
                wanted = grant_pb2.Grant(principal=grant.principal, tool=grant.tool, scope=grant.scope)
                _print_made(client.grant(wanted), as_json=as_json)


def _print_made(made: grant_pb2.Grant, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
    else:
        console.print(f"[green]made[/] {shown(made.text)}")


def _word(grant: grant_pb2.Grant) -> str:
    return grant_pb2.Grant.Decision.Name(grant.decision).removeprefix("DECISION_").lower()


def _limits(grant: grant_pb2.Grant) -> str:
    parts = (
        f"{grant.uses} of {grant.max_uses} uses" if grant.max_uses else "",
        f"until {grant.expire_time.ToDatetime():%Y-%m-%d %H:%M} UTC" if grant.HasField("expire_time") else "",
        f"between {grant.hours}" if grant.hours else "",
        "rehearsed" if grant.rehearse else "",
        "while charging" if grant.while_charging else "",
        "while budgets are nominal" if grant.while_nominal else "",
    )
    return ", ".join(filter(None, parts))
