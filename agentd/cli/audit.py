"""`agentd audit`: what has happened."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from google.protobuf import json_format

from agentd.cli.output import as_dict, console, json_option, print_json, shown
from agentd.client import Client

if TYPE_CHECKING:
    from agentd.v1 import audit_pb2

TAMPERED, TRUNCATED, UNATTESTED = 3, 4, 5  # exit statuses


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


@audit.command(epilog="Example: agentd audit verify --anchor /mnt/usb/agentd-anchor")
@click.option(
    "--anchor",
    "anchors",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with checkpoints that was kept elsewhere.",
)
@json_option
@click.pass_obj
def verify(socket: Path | None, anchors: tuple[Path, ...], *, as_json: bool) -> None:
    """Recompute the hash chain of the whole log, and what checkpoints have signed.

    Exit status: 0 if it is whole; 3 if something was changed; 4 if the end is missing; 5 if it is whole, but some events are
    newer than the newest checkpoint in the anchors given.
    """
    from agentd.audit.anchors import read_notes  # noqa: PLC0415 - the other commands must start fast

    notes = [note for file in anchors for note in read_notes(file.read_text(errors="replace"))]
    with Client(socket) as client:
        found = client.verify(notes)
    if as_json:
        print_json(as_dict(found) | {"head": found.head.hex()})
    else:
        _print_verification(found, with_anchors=bool(anchors))
    if found.first_bad_sequence or found.lost_events:
        sys.exit(TAMPERED if found.first_bad_sequence else TRUNCATED)
    sys.exit(UNATTESTED if anchors and found.anchored_events < found.valid_events else 0)


def _print_verification(found: audit_pb2.VerifyAuditLogResponse, *, with_anchors: bool) -> None:
    if found.first_bad_sequence:
        console.print(f"[red bold]damaged:[/] {found.why}; the {found.valid_events} events before it are as written")
    elif found.lost_events:
        console.print(f"[red bold]cut off:[/] {found.lost_events} events are missing at the end; {found.valid_events} are left")
    else:
        console.print(f"[green]whole:[/] {found.valid_events} events, head {found.head.hex()}")
    console.print(f"[dim]signed: the first {found.attested_events} events are covered by checkpoints[/]")
    if with_anchors:
        newer = found.valid_events - found.anchored_events
        console.print(f"[dim]anchored: the first {found.anchored_events}; {newer} are newer than what was kept elsewhere[/]")


@audit.command(epilog="Example: agentd audit checkpoint > /mnt/usb/agentd-anchor")
@json_option
@click.pass_obj
def checkpoint(socket: Path | None, *, as_json: bool) -> None:
    """Print the newest signed checkpoint. Kept elsewhere, it shows later whether anything before it was changed or cut off."""
    with Client(socket) as client:
        found = client.checkpoint()
    if as_json:
        print_json(found)
    else:
        click.echo(found.note, nl=False)


@audit.command(epilog="Example: agentd audit key > agentd.pub")
@json_option
@click.pass_obj
def key(socket: Path | None, *, as_json: bool) -> None:
    """Print the public key that checkpoints are signed with, as c2sp.org/signed-note writes it."""
    with Client(socket) as client:
        found = client.checkpoint().verifier_key
    if as_json:
        print_json({"verifier_key": found})
    else:
        click.echo(found)


@audit.command(epilog="Example: agentd audit prove 17")
@click.argument("sequence", type=click.IntRange(min=1))
@json_option
@click.pass_obj
def prove(socket: Path | None, sequence: int, *, as_json: bool) -> None:
    """Prove that event SEQUENCE is in the log of the newest checkpoint. The proof is checked here.

    Exit status: 0, or 3 if the proof does not hold.
    """
    from agentd.audit.notes import Verifier  # noqa: PLC0415 - the other commands must start fast
    from agentd.audit.tree import includes  # noqa: PLC0415

    with Client(socket) as client:
        newest = client.checkpoint()
        point = Verifier.parse(newest.verifier_key).open(newest.note)
        if sequence > point.size:
            raise click.ClickException(f"Event {sequence} is newer than the newest checkpoint, which covers {point.size}.")
        proof = client.prove_inclusion(sequence, point.size)
    holds = includes(proof.leaf, sequence - 1, point.size, list(proof.hashes), point.root)
    if as_json:
        hashes = [each.hex() for each in proof.hashes]
        print_json({"note": newest.note, "leaf": proof.leaf.hex(), "hashes": hashes, "holds": holds})
    else:
        console.print(f"[dim]leaf[/]  {proof.leaf.hex()}")
        for each in proof.hashes:
            console.print(f"[dim]hash[/]  {each.hex()}")
        word = "[green]proved[/]" if holds else "[red bold]not proved[/]"
        console.print(f"{word}: event {sequence} is one of {point.size}, root {point.root.hex()}")
    sys.exit(0 if holds else TAMPERED)


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
