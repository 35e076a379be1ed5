"""`agentd audit export`, `prune`, `redact`, `renew`: what is taken away from the log, and taken out of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentd import extras
from agentd.cli.audit import event_filter, selecting
from agentd.cli.output import console, json_option, print_json, shown
from agentd.client import Client
from agentd.v1 import audit_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentd.audit.formats import Record

_ROWS = 10_000  # of a parquet file that are held in memory


@click.command(epilog="Example: agentd audit export -o csv --since 7d > week.csv")
@selecting
@click.option(
    "-o",
    "--output",
    default="jsonl",
    show_default=True,
    type=click.Choice(["jsonl", "csv", "syslog", "cef", "ocsf", "otlp", "parquet", "sqlite"]),
)
@click.option("--payloads", is_flag=True, help="With what people, models and tools have written; jsonl only.")
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file; parquet and sqlite need one.")
@json_option
@click.pass_obj
def export(socket: Path | None, /, *, output: str, payloads: bool, to: Path | None, as_json: bool, **chosen: Any) -> None:
    """Print events in a format that other programs read, oldest first; filters as in `agentd audit list`.

    A line of jsonl has each event exactly as it was hashed; --json is the same as -o jsonl. Parquet needs pyarrow. An SQLite
    file has the tables events and paths, for datasette and others. That you did this is recorded.
    """
    files = {"parquet": _write_parquet, "sqlite": _write_sqlite}
    if output in files and (to is None or to.exists()):
        raise click.BadParameter(f"{output} is no text: give a file with --to that is not there yet")
    wanted = "jsonl" if as_json or output in files else output
    request = audit_pb2.ExportAuditEventsRequest(
        format=audit_pb2.ExportAuditEventsRequest.Format.Value(f"FORMAT_{wanted.upper()}"),
        filter=event_filter(**chosen),
        with_payloads=payloads,
    )
    with Client(socket) as client:
        lines = client.export_audit_events(request)
        if output in files and to is not None:
            files[output](lines, to)
            return
        with click.open_file(str(to) if to else "-", "w", encoding="utf-8") as file:
            for line in lines:
                file.write(f"{line}\n")


def _record(line: str) -> Record:
    """Of a line of jsonl."""
    from agentd.audit.formats import Record  # noqa: PLC0415 - the other commands must start fast

    told = json.loads(line)
    event = told.get("event", {"seq": told.get("seq"), "kind": "damaged"})
    return Record(int(event["seq"]), json.dumps(event), bytes.fromhex(told["chain"]))


def _write_parquet(lines: Iterator[str], to: Path) -> None:
    from agentd.audit.formats import COLUMNS, row  # noqa: PLC0415 - the other commands must start fast

    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise click.ClickException(f"Parquet needs pyarrow: {extras.install('parquet')}") from None
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    with parquet.ParquetWriter(to, schema) as writer:
        while batch := [_record(line) for line in itertools.islice(lines, _ROWS)]:
            rows = [row(record) for record in batch]
            columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_sqlite(lines: Iterator[str], to: Path) -> None:
    import apsw  # noqa: PLC0415 - the other commands must start fast

    from agentd.audit.formats import COLUMNS, paths, row  # noqa: PLC0415

    with contextlib.closing(apsw.Connection(str(to))) as db, db:
        columns = ", ".join(f'"{name}" TEXT' for name in COLUMNS[1:])
        db.execute(f"CREATE TABLE events (seq INTEGER PRIMARY KEY, {columns}, body TEXT)")
        db.execute("CREATE TABLE paths (path TEXT, seq INTEGER REFERENCES events (seq))")
        marks = ", ".join("?" * (len(COLUMNS) + 1))
        for line in lines:
            record = _record(line)
            db.execute(f"INSERT INTO events VALUES ({marks})", (record.seq, *row(record)[1:], record.text))  # noqa: S608
            db.executemany("INSERT INTO paths VALUES (?, ?)", ((path, record.seq) for path in paths(record.body)))


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


@click.command(epilog="Example: agentd audit redact 17.arguments.text --reason 'a password'")
@click.argument("what", metavar="SEQUENCE.FIELD")
@click.option("--reason", required=True, help="Why, for whoever asks later. It is recorded.")
@json_option
@click.pass_obj
def redact(socket: Path | None, what: str, reason: str, *, as_json: bool) -> None:
    """Take out for good what somebody has written; the log still verifies. `agentd audit show` names the fields.

    It goes wherever the log has it for the same call, and with it the transcript of the run. Files, and what the journal keeps
    to undo calls, stay as they are.
    """
    sequence, _, field = what.partition(".")
    if not sequence.isdecimal() or not field:
        raise click.BadParameter(
            "write the event's number and the field, such as 17.arguments.text", param_hint="SEQUENCE.FIELD"
        )
    with Client(socket) as client:
        done = client.redact(int(sequence), field, reason)
    if as_json:
        print_json(done)
        return
    numbers = ", ".join(map(str, done.sequences))
    console.print(f"[green]taken out:[/] {shown(field)} of {'events' if len(done.sequences) > 1 else 'event'} {numbers}")
    if done.run:
        console.print(f"[dim]and prompt, answer and transcript of {done.run}, which repeat it[/]")


@click.command(epilog="Example: agentd audit renew --reason 'the card was restored from a backup'")
@click.option("--reason", required=True, help="Why, for whoever asks later. It is recorded.")
@json_option
@click.pass_obj
def renew(socket: Path | None, reason: str, *, as_json: bool) -> None:
    """Put a log away that is not what was signed, and begin a new one that says so, with a key of its own.

    Until then no tool may change anything. All that can be read of the old log stays in the folder `archive`.
    """
    with Client(socket) as client:
        done = client.renew_audit_log(reason)
    if as_json:
        print_json(done)
        return
    console.print(
        f"[green]begun:[/] the log {shown(done.origin)}; the old one, {done.archived_events} events, is archive/{done.archive}"
    )
    console.print("[dim]tell its witnesses the new key: agentd audit key[/]")
