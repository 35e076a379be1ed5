"""`agentd audit`: what has happened."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format
from rich.table import Table

from agentd.cli.approvals import duration_ns
from agentd.cli.lazy import Lazy
from agentd.cli.output import as_dict, console, json_option, print_json, shown
from agentd.cli.rollback import absolute, print_difference
from agentd.client import Client
from agentd.errors import AgentdError
from agentd.v1 import audit_pb2, journal_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


@click.group(
    cls=Lazy,
    commands_in={
        "verify": "proofs:verify",
        "checkpoint": "proofs:checkpoint",
        "key": "proofs:key",
        "prove": "proofs:prove",
        "export": "keeping:export",
        "prune": "keeping:prune",
        "redact": "keeping:redact",
        "renew": "keeping:renew",
    },
)
def audit() -> None:
    """Read and verify the audit log."""


def selecting(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.argument("matches", nargs=-1, metavar="[FIELD=VALUE]..."),
        click.option(
            "--since", metavar="WHEN", help="Recorded then or later: 2h (ago), today, 2026-11-20, '2026-11-20 18:00'."
        ),
        click.option("--until", metavar="WHEN", help="Recorded before then."),
        click.option("--grep", "words", default="", metavar="WORDS", help="Words that all occur in the event."),
        click.option("--path", default="", metavar="PATH", help="The call changed this path."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def event_filter(
    matches: tuple[str, ...], since: str | None, until: str | None, words: str, path: str
) -> audit_pb2.AuditFilter:
    which = audit_pb2.AuditFilter(matches=matches, words=words, path=absolute(path) if path else "")
    if since:
        which.since.FromNanoseconds(_when(since))
    if until:
        which.until.FromNanoseconds(_when(until))
    return which


def _when(text: str) -> int:
    """Nanoseconds since 1970. Raises BadParameter."""
    now = datetime.now().astimezone()
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    named = {"now": now, "today": midnight, "yesterday": midnight - timedelta(days=1)}
    if text in named:
        return int(named[text].timestamp() * 1e9)
    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp() * 1e9)
    except ValueError:
        with contextlib.suppress(click.BadParameter):
            return time.time_ns() - duration_ns(text)
    raise click.BadParameter(f"{text!r} is no time: write 2h (ago), today, yesterday or '2026-11-20 18:00'")


@audit.command("list", epilog="Example: agentd audit list -f tool=files.write principal=unix:pi --since 2h")
@selecting
@click.option("-n", "--lines", type=click.IntRange(min=1), help="How many events at most.  [default: 20, or all with --after]")
@click.option("-r", "--reverse", is_flag=True, help="Newest first.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is recorded from now on, until Ctrl-C.")
@click.option(
    "--after",
    "--after-cursor",
    "after",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Only events past this number, oldest first.",
)
@click.option(
    "-o", "--output", default="short", show_default=True, type=click.Choice(["short", "json", "json-pretty", "table"])
)
@json_option
@click.pass_obj
def list_(
    socket: Path | None,
    /,
    *,
    lines: int | None,
    reverse: bool,
    follow: bool,
    after: int | None,
    output: str,
    as_json: bool,
    **chosen: Any,
) -> None:
    """List events: the newest 20, oldest of them first.

    FIELD is kind, principal, session, run, call, tool, decision or boot. Of several values of one field any may be.
    """
    which, shape = event_filter(**chosen), "json" if as_json else output
    with Client(socket) as client:
        if after is not None:
            events = list(itertools.islice(client.audit_events(after=after, which=which), lines))
        else:
            events = list(itertools.islice(client.audit_events(newest_first=True, which=which), lines or 20))[::-1]
        last = max((event.sequence for event in events), default=after or 0)
        _print_events(events[::-1] if reverse else events, shape)
        if follow:
            for event in client.follow_audit_events(after=last or _newest(client), which=which):
                _print_events([event], shape)


def _newest(client: Client) -> int:
    return next((event.sequence for event in client.audit_events(newest_first=True)), 0)


@audit.command(epilog="Example: agentd audit who ~/notes/todo.txt")
@click.argument("path")
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(min=1), help="How many calls, the newest.")
@json_option
@click.pass_obj
def who(socket: Path | None, path: str, lines: int, *, as_json: bool) -> None:
    """List the calls that changed PATH, newest first: who, with which tool, and whether it can be undone."""
    which = audit_pb2.AuditFilter(path=absolute(path))
    with Client(socket) as client:
        events = list(itertools.islice(client.audit_events(newest_first=True, which=which), lines))
    if as_json:
        _print_events(events, "json")
        return
    if not events:
        console.print(f"[dim]no call on record has changed {shown(absolute(path))}[/]")
        return
    table = Table(box=None, header_style="bold")
    for title in ("when", "who", "tool", "call", "undo"):
        table.add_column(title, no_wrap=title in ("when", "call", "undo"), overflow="fold")
    for event in events:
        body = json_format.MessageToDict(event.body)
        undoable = "[green]yes[/]" if body.get("undoable") else "[dim]no[/]"
        tool = body.get("tool", {}).get("name", event.kind)
        table.add_row(_time(event, day=True), shown(body.get("principal", "")), shown(tool), body.get("call", ""), undoable)
    console.print(table)


@audit.command(epilog="Example: agentd audit show 01kz5t3q8m0v9r6w2e4y7x1abc")
@click.argument("call")
@json_option
@click.pass_obj
def show(socket: Path | None, call: str, *, as_json: bool) -> None:
    """Show the whole story of CALL: who wanted what, who allowed it, what it did, and what became of the files.

    With it is shown what people, models and tools have written; that you have read it is recorded.
    """
    name = f"calls/{call.removeprefix('calls/')}"
    with Client(socket) as client:
        events = list(client.audit_events(call=name, with_payloads=True))
        if not events:
            raise click.ClickException(f"No event names the call {call}; `agentd audit list` shows those that there are.")
        if run := next((str(json_format.MessageToDict(event.body).get("run", "")) for event in events), ""):
            which = audit_pb2.AuditFilter(matches=["kind=run.start", f"run={run}"])
            events = [*client.audit_events(which=which, with_payloads=True), *events]
        if as_json:
            _print_events(events, "json")
            return
        for event in events:
            _print_whole(event)
        with contextlib.suppress(AgentdError):  # a call that changed nothing, or of somebody else's
            for each in client.differences(journal_pb2.ChangeSelection(calls=[name])):
                print_difference(each, stat=False)


def _print_whole(event: audit_pb2.AuditEvent) -> None:
    """With the values of its payloads in the place of what commits to them."""
    console.print(f"[bold]{event.sequence} {event.kind}[/]  {_time(event, day=True)}  [dim]chain {event.chain.hex()[:16]}[/]")
    body = json.loads(event.text)
    written = {each.field: each.value if each.HasField("value") else None for each in event.payloads}
    for key in sorted(body.keys() - {"kind", "seq", "time_ns", "v", "boot", "call"}):
        value = body[key]
        if not isinstance(value, dict) or "$commitment" in value:
            console.print(f"  [dim]{key:14}[/] {_said(key, value, written)}")
            continue
        console.print(f"  [dim]{key}[/]")
        for name in sorted(value):
            console.print(f"    [dim]{name:14}[/] {_said(f'{key}.{name}', value[name], written)}")


def _said(field: str, value: Any, written: Mapping[str, str | None]) -> str:
    if not isinstance(value, dict) or "$commitment" not in value:
        return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if field not in written:
        return "[yellow](taken out)[/]"
    text = written[field]
    if text is None:
        return f"[dim](not kept, {value['$bytes']} bytes)[/]"
    said = json.loads(text)
    return shown(said if isinstance(said, str) else text)


@audit.command(epilog="Example: agentd audit sql \"SELECT tool, count(*) FROM events WHERE kind = 'call.end' GROUP BY tool\"")
@click.argument("statement")
@json_option
@click.pass_obj
def sql(socket: Path | None, statement: str, *, as_json: bool) -> None:
    """Answer one SELECT over the views events (seq, time, time_ns, kind, principal, session, run, call, tool, decision, boot,
    body as JSON) and paths (path, seq).
    """
    with Client(socket) as client:
        answer = client.audit_sql(statement)
    rows = [[None if cell is None else cell for cell in row] for row in answer.rows]
    if as_json:
        for row in rows:
            print_json(dict(zip(answer.columns, row, strict=True)))
        return
    table = Table(box=None, header_style="bold")
    for title in answer.columns:
        table.add_column(shown(title), overflow="fold")
    for row in rows:
        table.add_row(*(shown("" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell)) for cell in row))
    console.print(table)
    if answer.more:
        console.print("[yellow]and more: give it a LIMIT, or an OFFSET[/]")


def _print_events(events: list[audit_pb2.AuditEvent], shape: str) -> None:
    if shape == "table":
        table = Table(box=None, header_style="bold")
        for title in ("no.", "when", "kind", "who", "tool", "call"):
            table.add_column(title, no_wrap=title in ("no.", "when", "call"), overflow="fold")
        for event in events:
            body = json_format.MessageToDict(event.body)
            tool, principal = body.get("tool", {}).get("name", ""), body.get("principal", "")
            table.add_row(str(event.sequence), _time(event, day=True), event.kind, shown(principal), tool, body.get("call", ""))
        console.print(table)
        return
    for event in events:
        if shape == "json":
            print_json(event)
        elif shape == "json-pretty":
            console.print_json(json.dumps(as_dict(event)))
        else:
            _print_short(event)


def _print_short(event: audit_pb2.AuditEvent) -> None:
    body = json_format.MessageToDict(event.body)
    decision = body.get("decision", {})
    denied = f"{decision.get('verdict')}: {decision.get('reason')}" if event.kind == "call.deny" else ""
    error = body.get("error")
    if isinstance(error, dict):  # a tool's words, or of somebody who asked for it
        error = f"it said why: agentd audit show {body.get('call', '')}"
    what = error or denied or ", ".join(body.get("scopes", []))
    colour = {"call.deny": "red", "call.abort": "red", "gap": "red", "call.end": "green"}.get(event.kind, "default")
    tool = body.get("tool", {}).get("name", "")
    call = body.get("call", "")
    line = f"[bold]{event.sequence:5}[/] [dim]{_time(event)}[/] [{colour}]{event.kind:14}[/]"
    console.print(f"{line} {call:26} [cyan]{shown(tool)}[/]")
    if what:
        console.print(f"{'':20}{shown(what)}", style="dim")


def _time(event: audit_pb2.AuditEvent, *, day: bool = False) -> str:
    local = datetime.fromtimestamp(event.event_time.seconds).astimezone()
    return local.strftime("%m-%d %H:%M:%S" if day else "%H:%M:%S")
