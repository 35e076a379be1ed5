"""`agentd token`: access for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table

from agentd.cli.approvals import until
from agentd.cli.output import as_dict, console, json_option, print_json, shown
from agentd.client import Client
from agentd.v1 import token_pb2

if TYPE_CHECKING:
    from pathlib import Path

_ROLES = ("user", "approver", "auditor", "admin")


@click.group()
def token() -> None:
    """Access for programs, by a secret that they send."""


@token.command(epilog="Example: agentd token create phone --for 90d --scope 'read:~/notes'")
@click.argument("label")
@click.option("--role", "roles", multiple=True, type=click.Choice(_ROLES), help="What it may do.  [default: user]")
@click.option("--scope", "scopes", multiple=True, help="The most its calls may touch; they still need grants.")
@click.option("--for", "lasting", metavar="DURATION", help="Only for so long, such as 2h, 90d.")
@json_option
@click.pass_obj
def create(
    socket: Path | None, label: str, roles: tuple[str, ...], scopes: tuple[str, ...], lasting: str | None, *, as_json: bool
) -> None:
    """Make a token for the principal token:LABEL. The secret is shown once, here, and kept nowhere."""
    wanted = token_pb2.Token(label=label, roles=roles, scopes=scopes)
    if lasting:
        wanted.expire_time.FromNanoseconds(until(lasting))
    with Client(socket) as client:
        made = client.create_token(wanted)
    if as_json:
        print_json(as_dict(made.token) | {"secret": made.secret})
        return
    console.print(f"[green]made[/] token:{shown(made.token.label)} ({', '.join(made.token.roles)})")
    console.print("[dim]send it as `authorization: Bearer SECRET`; it is not shown again:[/]")
    click.echo(made.secret)


@token.command("list", epilog="Example: agentd token list --json")
@json_option
@click.pass_obj
def list_(socket: Path | None, *, as_json: bool) -> None:
    """List the tokens. Their secrets are not kept, and can't be shown."""
    with Client(socket) as client:
        found = client.tokens()
    if as_json:
        for each in found:
            print_json(each)
        return
    table = Table(box=None, header_style="bold")
    for title in ("principal", "roles", "at most", "until", "made by", "token"):
        table.add_column(title, overflow="fold")
    for each in found:
        end = f"{each.expire_time.ToDatetime():%Y-%m-%d %H:%M} UTC" if each.HasField("expire_time") else ""
        cells = (f"token:{each.label}", ", ".join(each.roles), "\n".join(each.scopes), end, each.created_by)
        table.add_row(*map(shown, cells), each.name.removeprefix("tokens/"))
    console.print(table)


@token.command(epilog="Example: agentd token revoke 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("token")
@json_option
@click.pass_obj
def revoke(socket: Path | None, token: str, *, as_json: bool) -> None:
    """Take TOKEN back: from its next request on its holder is nobody."""
    with Client(socket) as client:
        gone = client.revoke_token(f"tokens/{token.removeprefix('tokens/')}")
    if as_json:
        print_json(gone)
    else:
        console.print(f"[green]revoked[/] token:{shown(gone.label)}")


@click.command("revoke", epilog="Example: agentd revoke token:phone")
@click.argument("principal")
@json_option
@click.pass_obj
def revoke_principal(socket: Path | None, principal: str, *, as_json: bool) -> None:
    """End all that PRINCIPAL has: its tokens, grants, questions, runs and requests. What agentd.toml gives it stays."""
    with Client(socket) as client:
        ended = client.revoke_principal(principal)
    if as_json:
        print_json(ended)
        return
    counts = as_dict(ended)
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "it had nothing"
    console.print(f"[green]ended[/] {shown(principal)}: {said}")
    if principal.startswith("automation:"):
        console.print("[dim]It is triggered again unless it is paused (agentd automations pause NAME).[/]")
    if principal.startswith(("unix:", "tls:")):
        console.print("[dim]It may come back with the roles that agentd.toml gives it ([[principals]]).[/]")
