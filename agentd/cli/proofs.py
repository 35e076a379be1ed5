"""`agentd audit verify`, `checkpoint`, `key`, `prove`: is it what was written, and how to show that to others."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress

from agentd.cli.output import as_dict, console, json_option, print_json, shown
from agentd.client import Client
from agentd.v1 import audit_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.timestamp_pb2 import Timestamp

TAMPERED, TRUNCATED, UNATTESTED, ABSENT = 3, 4, 5, 6  # exit statuses


@click.command(epilog="Example: agentd audit verify --anchor /mnt/usb/agentd-anchor")
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
    newer than the newest checkpoint in the anchors given; 6 if an archive is missing, or is not the file that was written.
    """
    from agentd.audit.anchors import read_notes  # noqa: PLC0415 - the other commands must start fast

    notes = [note for file in anchors for note in read_notes(file.read_text(errors="replace"))]
    with Client(socket) as client:
        found = _watched(client.verifying(notes))
    if as_json:
        print_json(as_dict(found) | {"head": found.head.hex()})
    else:
        _print_verification(found, with_anchors=bool(anchors))
    if found.first_bad_sequence or found.lost_events:
        sys.exit(TAMPERED if found.first_bad_sequence else TRUNCATED)
    if found.absent_events:
        sys.exit(ABSENT)
    sys.exit(UNATTESTED if anchors and found.anchored_events < found.valid_events else 0)


def _watched(steps: Iterator[audit_pb2.VerifyAuditLogResponse]) -> audit_pb2.Verification:
    """With a bar on the terminal while it takes long."""
    found = audit_pb2.Verification()
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        bar = progress.add_task("events", total=None)
        for step in steps:
            progress.update(bar, completed=step.checked_events, total=step.total_events)
            found = step.verification
    return found


def _print_verification(found: audit_pb2.Verification, *, with_anchors: bool) -> None:
    if found.first_bad_sequence:
        console.print(f"[red bold]damaged:[/] {found.why}; the {found.valid_events} events before it are as written")
    elif found.lost_events:
        console.print(f"[red bold]cut off:[/] {found.lost_events} events are missing at the end; {found.valid_events} are left")
    else:
        console.print(f"[green]whole:[/] {found.valid_events} events, head {found.head.hex()}")
    if found.absent_events:
        console.print(f"[yellow]not all there:[/] {found.absent_events} events are in archives that are missing or damaged")
    if found.attested_events:
        upto = f"up to {_moment(found.attested_time)}"
        console.print(f"[dim]signed by {shown(found.attested_by)}: the first {found.attested_events} events, {upto}[/]")
    for each in found.witnesses:
        signed = f"the first {each.events} events, at {_moment(each.time)}" if each.events else "[yellow]nothing of it[/]"
        console.print(f"[dim]witnessed by {shown(each.witness)}: {signed}[/]")
    if with_anchors:
        newer = found.valid_events - found.anchored_events
        console.print(f"[dim]anchored: the first {found.anchored_events}; {newer} are newer than what was kept elsewhere[/]")


@click.command(epilog="Example: agentd audit checkpoint > /mnt/usb/agentd-anchor")
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


@click.command(epilog="Example: agentd audit key > agentd.pub")
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


@click.command(epilog="Example: agentd audit prove 17")
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


def _moment(time: Timestamp) -> str:
    return f"{datetime.fromtimestamp(time.seconds).astimezone():%Y-%m-%d %H:%M:%S}"
