"""`agentd audit verify`, `checkpoint`, `key`, `prove`, `export`: what an admin takes away from here."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentd.cli.audit import event_filter, selecting
from agentd.cli.output import as_dict, console, json_option, print_json
from agentd.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agentd.audit.formats import Record
    from agentd.v1 import audit_pb2

TAMPERED, TRUNCATED, UNATTESTED = 3, 4, 5  # exit statuses
_SPANS = 100  # of one line of otlp


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
    if found.absent_events:
        console.print(f"[yellow]not looked at:[/] {found.absent_events} events are in archives that are missing or damaged")
    console.print(f"[dim]signed: the first {found.attested_events} events are covered by checkpoints[/]")
    if found.witnessed_events:
        console.print(f"[dim]witnessed: the first {found.witnessed_events}[/]")
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


@click.command(epilog="Example: agentd audit prune --keep 100000")
@click.option("--keep", required=True, type=click.IntRange(min=1), help="How many of the newest events stay, at least.")
@json_option
@click.pass_obj
def prune(socket: Path | None, keep: int, *, as_json: bool) -> None:
    """Move the oldest events into a compressed file that still verifies, up to a checkpoint. The daemon does so by itself, too.

    Exit status: 1 if there was nothing to move.
    """
    with Client(socket) as client:
        moved = client.prune_audit_log(keep)
    if as_json:
        print_json(moved)
    elif moved.last_sequence:
        console.print(f"[green]moved[/] events {moved.first_sequence} to {moved.last_sequence} into archive/{moved.archive}")
    else:
        console.print("[dim]nothing to move: no checkpoint covers events that are old enough[/]")
    sys.exit(0 if moved.last_sequence else 1)


@click.command(epilog="Example: agentd audit export -o csv --since 7d > week.csv")
@selecting
@click.option(
    "-o",
    "--output",
    default="jsonl",
    show_default=True,
    type=click.Choice(["jsonl", "csv", "syslog", "cef", "ocsf", "otlp", "parquet"]),
)
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file; parquet needs one.")
@json_option
@click.pass_obj
def export(socket: Path | None, /, *, output: str, to: Path | None, as_json: bool, **chosen: Any) -> None:
    """Print events in a format that other programs read, oldest first; filters as in `agentd audit list`.

    A line of jsonl has each event exactly as it was hashed. --json is the same as -o jsonl. Parquet needs pyarrow.
    """
    if output == "parquet" and to is None:
        raise click.BadParameter("parquet is no text: give a file with --to")
    with Client(socket) as client:
        records = _records(client.audit_events(which=event_filter(**chosen)))
        if output == "parquet":
            assert to is not None
            _write_parquet(records, to)
            return
        with click.open_file(str(to) if to else "-", "w", encoding="utf-8") as file:
            for line in _lines(records, "jsonl" if as_json else output):
                file.write(f"{line}\n")


def _records(events: Iterable[audit_pb2.AuditEvent]) -> Iterator[Record]:
    from agentd.audit.formats import Record  # noqa: PLC0415 - the other commands must start fast

    return (Record(event.sequence, event.text, event.chain) for event in events)


def _lines(records: Iterator[Record], output: str) -> Iterator[str]:
    from agentd.audit.formats import COLUMNS, LINES, otlp  # noqa: PLC0415 - the other commands must start fast

    if output == "otlp":
        while batch := list(itertools.islice(records, _SPANS)):
            if line := otlp(batch):
                yield line
        return
    if output == "csv":
        yield ",".join(COLUMNS)
    yield from map(LINES[output], records)


def _write_parquet(records: Iterator[Record], to: Path) -> None:
    from agentd.audit.formats import COLUMNS, row  # noqa: PLC0415 - the other commands must start fast

    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise click.ClickException("Parquet needs pyarrow: pip install 'agentd[parquet]'.") from None
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    with parquet.ParquetWriter(to, schema) as writer:
        while batch := [row(record) for record in itertools.islice(records, 10_000)]:
            columns = [pa.array(values, pa.string()) for values in zip(*batch, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
