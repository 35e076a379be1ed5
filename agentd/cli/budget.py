"""`agentd budget` and `agentd top`: what battery, heat and memory allow now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from agentd.cli.output import as_dict, console, json_option, print_json, shown
from agentd.client import Client
from agentd.errors import DaemonError, Reason
from agentd.v1 import budget_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.v1 import system_pb2

_COLOURS = {"NOMINAL": "green", "REDUCED": "yellow", "PAUSED": "red", "SHED": "bold red", "UNSPECIFIED": "dim"}
_NAMES = {"reread_pct": "weights read again", "power_w": "power"}
_ELSEWHERE = ("anonymous_mib", "mapped_mib", "cached_mib", "weights_mib")
_UNITS = {"c": "C", "pct": "%", "mib": "MiB", "w": "W"}


@click.command(epilog="Example: agentd budget --watch")
@click.option("-w", "--watch", is_flag=True, help="Go on with each change, until Ctrl-C.")
@json_option
@click.pass_obj
def budget(socket: Path | None, *, watch: bool, as_json: bool) -> None:
    """Show what battery, heat and memory allow the model to do now, and why."""
    with Client(socket) as client:
        for budgets in client.watch_budgets() if watch else (client.budgets(),):
            if as_json:
                print_json(budgets)
            else:
                console.print(_table(budgets))
                if memory := _memory(budgets):
                    console.print(memory)
    if watch:  # the stream ends with the daemon only
        raise DaemonError(Reason.DAEMON_STOPPING, "The daemon has stopped.", hint="Start it with `agentd serve`.")


@click.command(epilog="Example: agentd top")
@click.option("--once", is_flag=True, help="Print one picture and end.")
@json_option
@click.pass_obj
def top(socket: Path | None, *, once: bool, as_json: bool) -> None:
    """Look on: state, heat, battery, memory, speed, what waits and what runs. Ctrl-C ends it."""
    with Client(socket) as client:
        if as_json:
            print_json({"budgets": as_dict(client.budgets()), "status": as_dict(client.status())})
            return
        if once or not console.is_terminal:
            console.print(_picture(client.budgets(), client.status()))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_picture(client.budgets(), client.status()), refresh=True)
                time.sleep(1)


def _picture(budgets: budget_pb2.Budgets, status: system_pb2.Status) -> Table:
    whole = Table.grid(padding=(0, 0, 1, 0))
    model = status.model
    loaded = f"{model.name}, {model.parameters / 1e6:.1f} M parameters" if model.parameters else model.error or "not loaded"
    speed = f"  [bold cyan]{status.tokens_per_second:,.1f} tokens/s[/]" if status.tokens_per_second else ""
    whole.add_row(f"[bold]agentd {status.version}[/]  {shown(loaded)}  [dim]sandbox {status.sandbox.level}[/]{speed}")
    whole.add_row(_table(budgets))
    if memory := _memory(budgets):
        whole.add_row(memory)
    if status.runs or status.calls:
        whole.add_row(_going_on(status))
    if status.leftovers:
        whole.add_row(f"[red]{status.leftovers} paths of failed calls are not restored yet[/]  [dim]agentd recover[/]")
    return whole


def _memory(budgets: budget_pb2.Budgets) -> Table | None:
    """What the engine takes, and how much of its weights is where, as bars."""
    told = {reading.name: reading.value for reading in budgets.readings}
    weights = told.get("weights_mib", 0.0)
    if not weights:
        return None
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]engine[/]", f"{told.get('anonymous_mib', 0):,.0f} MiB of its own", "")
    for name, words in (("mapped_mib", "resident"), ("cached_mib", "in the page cache")):
        if name in told:
            bar = ProgressBar(total=weights, completed=min(told[name], weights), width=30)
            table.add_row("[dim]weights[/]", f"{told[name]:,.0f} of {weights:,.0f} MiB {words}", bar)
    return table


def _going_on(status: system_pb2.Status) -> Table:
    table = Table(box=None, header_style="bold")
    for title in ("", "what", "who", "since"):
        table.add_column(title)
    for run in sorted(status.runs, key=lambda run: run.queued):
        state = "[yellow]waits[/]" if run.queued else "[cyan]runs[/]"
        what = run.name.removeprefix("runs/") + (" [dim]background[/]" if run.background else "")
        table.add_row(state, what, shown(run.principal), f"{run.seconds:.0f} s")
    for call in status.calls:
        others = ", ".join(other.removeprefix("calls/") for other in call.waits_for)
        state, what = ("[yellow]waits[/]", f"{call.tool} for {others}") if others else ("[green]calls[/]", call.tool)
        table.add_row(state, shown(what), shown(call.principal), f"{call.seconds:.1f} s")
    return table


def _table(budgets: budget_pb2.Budgets) -> Table:
    table = Table.grid(padding=(0, 2))
    pace = f"{budgets.threads or 'all'} threads, {budgets.duty:.0%} of the time"
    table.add_row("[bold]state[/]", _coloured(budgets.state), f"{shown(budgets.reason)}", f"[dim]{pace}[/]")
    for each in budgets.budgets:
        why = budgets.unenforced.get(each.name, "")
        state = "[dim]not enforced[/]" if why else _coloured(each.state)
        table.add_row(each.name, state, f"[dim]{shown(why)}[/]" if why else shown(each.reason), "")
    for reading in (each for each in budgets.readings if each.name not in _ELSEWHERE):
        name, _, unit = reading.name.rpartition("_")
        name = _NAMES.get(reading.name) or (name if unit in _UNITS else reading.name).replace("_", " ")
        table.add_row(f"[dim]{name}[/]", _value(reading.name, reading.value, unit), f"[dim]{shown(reading.source)}[/]", "")
    for name, why in sorted(budgets.faults.items()):
        table.add_row(f"[dim]{shown(name)}[/]", "[yellow]?[/]", f"[yellow]{shown(why)}[/]", "")
    return table


def _value(name: str, value: float, unit: str) -> str:
    if name in ("charging", "undervoltage"):
        return "yes" if value else "no"
    if unit not in _UNITS:
        return f"{int(value):#x}" if name == "throttled" else f"{value:g}"
    digits = 0 if value >= 10 or value == int(value) else 1
    return f"{value:,.{digits}f} {_UNITS[unit]}"


def _coloured(state: budget_pb2.Budgets.State.ValueType) -> str:
    name = budget_pb2.Budgets.State.Name(state).removeprefix("STATE_")
    return f"[{_COLOURS[name]}]{name.lower()}[/]"
