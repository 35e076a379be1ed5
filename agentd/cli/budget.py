"""`agentd budget` and `agentd top`: what battery, heat and memory allow now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from rich.live import Live
from rich.table import Table

from agentd.cli.output import console, json_option, print_json, shown
from agentd.client import Client
from agentd.v1 import budget_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.v1 import system_pb2

_COLOURS = {"NOMINAL": "green", "REDUCED": "yellow", "PAUSED": "red", "SHED": "bold red", "UNSPECIFIED": "dim"}
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


@click.command(epilog="Example: agentd top")
@click.option("--once", is_flag=True, help="Print one picture and end.")
@json_option
@click.pass_obj
def top(socket: Path | None, *, once: bool, as_json: bool) -> None:
    """Look on: state, heat, battery, memory, and what runs. Ctrl-C ends it."""
    with Client(socket) as client:
        if as_json:
            print_json(client.budgets())
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
    whole.add_row(f"[bold]agentd {status.version}[/]  {shown(loaded)}  [dim]sandbox {status.sandbox.level}[/]")
    whole.add_row(_table(budgets))
    if status.runs:
        runs = Table(box=None, header_style="bold")
        for title in ("run", "who", "since"):
            runs.add_column(title)
        for run in status.runs:
            runs.add_row(run.name.removeprefix("runs/"), shown(run.principal), f"{run.seconds:.0f} s")
        whole.add_row(runs)
    return whole


def _table(budgets: budget_pb2.Budgets) -> Table:
    table = Table.grid(padding=(0, 2))
    pace = f"{budgets.threads or 'all'} threads, {budgets.duty:.0%} of the time"
    table.add_row("[bold]state[/]", _coloured(budgets.state), f"{shown(budgets.reason)}", f"[dim]{pace}[/]")
    for each in budgets.budgets:
        table.add_row(each.name, _coloured(each.state), shown(each.reason), "")
    for reading in budgets.readings:
        name, _, unit = reading.name.rpartition("_")
        value = f"{reading.value:,.0f} {_UNITS[unit]}" if unit in _UNITS else "yes" if reading.value else "no"
        name = name if unit in _UNITS else reading.name
        table.add_row(f"[dim]{name.replace('_', ' ')}[/]", value, f"[dim]{shown(reading.source)}[/]", "")
    for name, why in sorted(budgets.faults.items()):
        table.add_row(f"[dim]{shown(name)}[/]", "[yellow]?[/]", f"[yellow]{shown(why)}[/]", "")
    return table


def _coloured(state: budget_pb2.Budgets.State.ValueType) -> str:
    name = budget_pb2.Budgets.State.Name(state).removeprefix("STATE_")
    return f"[{_COLOURS[name]}]{name.lower()}[/]"
