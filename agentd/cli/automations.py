"""`agentd automations` and `agentd trigger`: what starts runs by itself."""

from __future__ import annotations

import itertools
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from agentd.cli.output import COLOURS, console, json_option, print_json, short, shown
from agentd.client import Client
from agentd.errors import ConfigError, Reason
from agentd.v1 import automation_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_STATES = {"WAITING": "yellow", "RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "DROPPED": "dim"}
_ENDED = (pb.TriggerEvent.STATE_SUCCEEDED, pb.TriggerEvent.STATE_FAILED, pb.TriggerEvent.STATE_DROPPED)
_POLL_S = 0.1


@click.group()
def automations() -> None:
    """What starts runs by itself: files that come, schedules, calls. Each is a file, automations/NAME.toml."""


@automations.command("list", epilog="Example: agentd automations list")
@json_option
@click.pass_obj
def list_(socket: Path | None, *, as_json: bool) -> None:
    """List all automations: what triggers them, how they stand, what is wrong with them."""
    with Client(socket) as client:
        _show_all(client.automations.list(), as_json=as_json)


@automations.command(epilog="Example: agentd automations reload")
@json_option
@click.pass_obj
def reload(socket: Path | None, *, as_json: bool) -> None:
    """Read all files again. What has changed begins anew, what has not goes on undisturbed."""
    with Client(socket) as client:
        found = [*client.automations.reload().automations]
    _show_all(found, as_json=as_json)
    sys.exit(1 if any(each.error for each in found) else 0)


@automations.command(epilog="Example: agentd automations check ~/.config/agentd/automations/inbox.toml")
@click.argument("automation")
@json_option
@click.pass_obj
def check(socket: Path | None, automation: str, *, as_json: bool) -> None:
    """Say what AUTOMATION (a name, or a file that is not loaded yet) would do, and what its grants allow. Nothing is run.

    Exit status: 0, or 1 if it names tools that are not there, or its call would be denied.
    """
    name, text = _text(automation)
    with Client(socket) as client:
        found = client.automations.check(name, text)
    if as_json:
        print_json(found)
    else:
        _show_check(found)
    denied = any(each.decision == "deny" for each in found.permissions)
    sys.exit(1 if denied or found.unknown_tools else 0)


def _text(automation: str) -> tuple[str, str]:
    """Name and text of a file; of a name that is loaded no text. Raises ConfigError."""
    path = Path(automation).expanduser()
    if path.suffix != ".toml" and "/" not in automation:
        return automation, ""
    try:
        return path.stem, path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "it is not UTF-8"
        hint = "Give a file, or the name of an automation that is loaded."
        raise ConfigError(Reason.AUTOMATION_INVALID, f"{path} can't be read: {why}.", hint=hint) from None


def _data(pairs: tuple[str, ...]) -> dict[str, str]:
    """Raises click.BadParameter."""
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="DATA")
    return dict(pair.split("=", 1) for pair in pairs)


@automations.command(epilog="Example: agentd automations run inbox path=~/Inbox/letter.txt")
@click.argument("name")
@click.argument("data", nargs=-1, metavar="[NAME=VALUE]...")
@json_option
@click.pass_obj
def run(socket: Path | None, name: str, data: tuple[str, ...], *, as_json: bool) -> None:
    """Trigger NAME now and wait until it is handled: what a trigger would know is given as DATA.

    Exit status: 0 if it succeeded, 1 if not.
    """
    with Client(socket) as client:
        event, told = client.automations.trigger(name, _data(data)), ""
        while event.state not in _ENDED:
            time.sleep(_POLL_S)
            event = client.automations.event(event.name)
            if event.note != told and event.state not in _ENDED:
                click.echo(f"{event.name.removeprefix('automations/')}: {event.note or 'goes on'}", err=True)
                told = event.note
    _show_events([event], as_json=as_json)
    sys.exit(0 if event.state == pb.TriggerEvent.STATE_SUCCEEDED else 1)


@click.command(epilog="Example: agentd trigger doorbell who=postman")
@click.argument("name")
@click.argument("data", nargs=-1, metavar="[NAME=VALUE]...")
@json_option
@click.pass_obj
def trigger(socket: Path | None, name: str, data: tuple[str, ...], *, as_json: bool) -> None:
    """Trigger the automation NAME and return at once; `agentd automations history` tells how it goes."""
    with Client(socket) as client:
        event = client.automations.trigger(name, _data(data))
    _show_events([event], as_json=as_json)


@automations.command(epilog="Example: agentd automations pause inbox")
@click.argument("name")
@json_option
@click.pass_obj
def pause(socket: Path | None, name: str, *, as_json: bool) -> None:
    """Let NAME begin nothing, past restarts, until it is resumed. What goes on goes on."""
    with Client(socket) as client:
        _show_all([client.automations.pause(name)], as_json=as_json)


@automations.command(epilog="Example: agentd automations resume inbox")
@click.argument("name")
@json_option
@click.pass_obj
def resume(socket: Path | None, name: str, *, as_json: bool) -> None:
    """Let NAME go on: with files that came meanwhile, without what its schedule would have done."""
    with Client(socket) as client:
        _show_all([client.automations.resume(name)], as_json=as_json)


@automations.command(epilog="Example: agentd automations history inbox -n 50")
@click.argument("name", default="", metavar="[NAME]")
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="How many of the newest.")
@json_option
@click.pass_obj
def history(socket: Path | None, name: str, limit: int, *, as_json: bool) -> None:
    """Show what has triggered NAME (or any automation), newest first: how it ended, why it waits, which run it was."""
    with Client(socket) as client:
        if name:
            client.automations.get(name)
        found = list(itertools.islice(client.automations.events(name), limit))
    if not found and not as_json:
        console.print("[dim]nothing yet[/]")
    _show_events(found, as_json=as_json)


def _show_all(found: list[pb.Automation], *, as_json: bool) -> None:
    if as_json:
        for each in found:
            print_json(each)
        return
    if not found:
        console.print("[dim]there are none; docs/automations.md shows how to write one[/]")
        return
    table = Table(box=None, header_style="bold")
    table.add_column("automation", overflow="fold", ratio=1)
    table.add_column("state", overflow="fold", ratio=1)
    for title in ("waits", "done", "failed"):
        table.add_column(title, justify="right")
    for each in found:
        name = f"[cyan]{shown(each.name.removeprefix('automations/'))}[/]\n[dim]{shown(each.trigger)}[/]"
        failed = f"[red]{each.failed}[/]" if each.failed else "0"
        table.add_row(name, _state(each), str(each.waiting), str(each.succeeded), failed)
    console.print(table)


def _state(automation: pb.Automation) -> str:
    if automation.error:
        return f"[red]broken:[/] {shown(automation.error)}"
    if automation.paused:
        return "[yellow]paused[/]"
    if automation.trouble:
        return f"[red]{shown(automation.trouble)}[/]"
    if automation.waits_for:
        return f"[yellow]{shown(automation.waits_for)}[/]"
    parts = []
    if automation.running:
        parts.append(f"[cyan]{automation.running} going on[/]")
    if automation.parked:
        parts.append(f"[yellow]{automation.parked} wait for an answer (agentd approvals)[/]")
    if automation.HasField("next_time"):
        parts.append(f"[dim]next {_time(automation.next_time)}[/]")
    if automation.polled:
        parts.append(f"[dim]looked at every few seconds: {shown(automation.polled)}[/]")
    return ", ".join(parts) or "[green]ready[/]"


def _show_events(found: list[pb.TriggerEvent], *, as_json: bool) -> None:
    if as_json:
        for each in found:
            print_json(each)
        return
    if not found:
        return
    table = Table(box=None, header_style="bold")
    for title in ("event", "came", "state"):
        table.add_column(title, no_wrap=True)
    table.add_column("what", overflow="fold")
    for each in found:
        name = shown(each.name.removeprefix("automations/").replace("/events/", " "))
        state = pb.TriggerEvent.State.Name(each.state).removeprefix("STATE_")
        table.add_row(f"[cyan]{shown(name)}[/]", _time(each.create_time), f"[{_STATES[state]}]{state.lower()}[/]", _about(each))
    console.print(table)


def _about(event: pb.TriggerEvent) -> str:
    """What it is about, then a line each for what it brought, how it ended and which run it was."""
    calls = event.triggered_by == event.subject
    lines = [" ".join(f"{key}={value}" for key, value in sorted(event.data.items()))] if calls else []
    by = f" by {event.triggered_by}" if ":" in event.triggered_by and not calls else ""
    lines += [event.note, f"run {event.run.removeprefix('runs/')}" if event.run else ""]
    told = "".join(f"\n[dim]{shown(short(line, 200))}[/]" for line in lines if line)
    return f"{shown(short(event.subject, 60))}[dim]{shown(by)}[/]{told}"


def _show_check(found: pb.CheckAutomationResponse) -> None:
    automation = found.automation
    console.print(f"[bold]{shown(automation.name.removeprefix('automations/'))}[/]  {shown(automation.description)}")
    if automation.error:
        console.print(f"  [red]{shown(automation.error)}[/]")
        return
    console.print(f"  [dim]when[/]   {shown(automation.trigger)}")
    for match in found.matches:
        console.print(f"         {shown(match)}")
    if found.matching > len(found.matches):
        console.print(f"         [dim]and {found.matching - len(found.matches)} more[/]")
    for trouble in filter(None, (automation.trouble, found.waits_for)):
        console.print(f"         [yellow]{shown(trouble)}[/]")
    console.print(f"  [dim]does[/]   {shown(short(automation.action, 400))}")
    console.print(f"  [dim]as[/]     {shown(automation.principal)}")
    for tool in found.unknown_tools:
        if tool not in automation.trouble:
            console.print(f"  [red]there is no tool {shown(tool)}[/]")
    for permission in found.permissions:
        _show_permission(permission)


def _show_permission(permission: pb.CheckAutomationResponse.Permission) -> None:
    colour = COLOURS.get(permission.decision.upper(), "default")
    decision = f"[{colour}]{permission.decision}[/]: " if permission.decision else ""
    scopes = f" [dim]{shown(', '.join(permission.scopes))}[/]" if permission.scopes else ""
    console.print(f"  [bold cyan]{shown(permission.tool)}[/]{scopes}")
    if decision or permission.reason:
        console.print(f"         {decision}{shown(permission.reason)}")
    for grant in permission.grants:
        console.print(f"         [dim]{shown(grant)}[/]")
    for scope in permission.missing_scopes:
        lines = ("[[grants]]", f"tool = {json.dumps(permission.tool)}", f"scope = {json.dumps(scope)}")
        console.print(
            "".join(f"\n           {shown(line)}" for line in ("# to allow it, in its file:", *lines)), highlight=False
        )


def _time(when: Timestamp) -> str:
    return datetime.fromtimestamp(when.seconds).astimezone().strftime("%d %b %H:%M")
