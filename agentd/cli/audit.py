"""`agentd audit`: what has happened."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

import click
from google.protobuf import json_format

from agentd.cli.output import as_dict, console, json_option, print_json, shown
from agentd.client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.v1 import audit_pb2

TAMPERED = 3  # exit status


@click.group()
def audit() -> None:
    """Read and verify the audit log."""


@audit.command("list", epilog="Example: agentd audit list -n 20")
@click.option("-n", "--lines", default=20, show_default=True, help="How many events, counted from the newest.")
@json_option
@click.pass_obj
def list_(socket: Path | None, lines: int, *, as_json: bool) -> None:
    """List the newest events, oldest of them first."""
    with Client(socket) as client:
        events = list(itertools.islice(client.audit_events(newest_first=True), lines))
    _print_events(list(reversed(events)), as_json=as_json)


@audit.command(epilog="Example: agentd audit show 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("call")
@json_option
@click.pass_obj
def show(socket: Path | None, call: str, *, as_json: bool) -> None:
    """Show everything recorded about CALL."""
    with Client(socket) as client:
        events = list(client.audit_events(call=f"calls/{call.removeprefix('calls/')}"))
    if not events:
        raise click.ClickException(f"No event names the call {call}; `agentd audit list` shows those that there are.")
    for event in events:
        if as_json:
            print_json(event)
            continue
        console.print(f"[bold]{event.sequence} {event.kind}[/]  {_time(event)}  [dim]chain {event.chain.hex()[:16]}[/]")
        body = json_format.MessageToDict(event.body)
        for key in sorted(body.keys() - {"kind", "seq", "time_ns", "v", "boot", "call"}):
            console.print(f"  [dim]{key:14}[/] {shown(str(body[key]))}")


@audit.command(epilog="Example: agentd audit verify && echo fine")
@json_option
@click.pass_obj
def verify(socket: Path | None, *, as_json: bool) -> None:
    """Recompute the hash chain of the whole log. Exit status: 0 if it is whole, 3 if not."""
    with Client(socket) as client:
        found = client.verify()
    if as_json:
        print_json(as_dict(found) | {"head": found.head.hex()})
    elif found.first_bad_sequence:
        console.print(f"[red bold]damaged:[/] {found.why}; the {found.valid_events} events before it are as written")
    else:
        console.print(f"[green]whole:[/] {found.valid_events} events, head {found.head.hex()}")
    sys.exit(TAMPERED if found.first_bad_sequence else 0)


def _print_events(events: list[audit_pb2.AuditEvent], *, as_json: bool) -> None:
    if as_json:
        for event in events:
            print_json(event)
        return
    for event in events:
        body = json_format.MessageToDict(event.body)
        decision = body.get("decision", {})
        denied = f"{decision.get('verdict')}: {decision.get('reason')}" if event.kind == "call.deny" else ""
        what = body.get("error") or denied or ", ".join(body.get("scopes", []))
        colour = {"call.deny": "red", "call.abort": "red", "call.end": "green"}.get(event.kind, "default")
        tool = body.get("tool", {}).get("name", "")
        call = body.get("call", "")
        line = f"[bold]{event.sequence:5}[/] [dim]{_time(event)}[/] [{colour}]{event.kind:14}[/]"
        console.print(f"{line} {call:26} [cyan]{shown(tool)}[/]")
        if what:
            console.print(f"{'':20}{shown(what)}", style="dim")


def _time(event: audit_pb2.AuditEvent) -> str:
    return event.event_time.ToDatetime().strftime("%H:%M:%S")
