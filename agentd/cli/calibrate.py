"""`agentd calibrate`: measure how fast the model is here, and how hot that makes the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agentd.cli.output import console, json_option, print_json
from agentd.client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.v1 import budget_pb2


@click.command(epilog="Example: agentd calibrate --minutes 10")
@click.option("--minutes", type=click.FloatRange(0.1, 60), default=10.0, show_default=True, help="How long it may take.")
@json_option
@click.pass_obj
def calibrate(socket: Path | None, minutes: float, *, as_json: bool) -> None:
    """Measure the model's speed and the device's heat with 1, 2, ... threads. The budgets use it from then on.

    Let nothing else run meanwhile. Ctrl-C ends it, and nothing is kept then.
    """
    if math.isnan(minutes):
        raise click.BadParameter("it is no number", param_hint="--minutes")
    last: budget_pb2.CalibrateResponse | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    with Client(socket) as client, Progress(*columns, console=console, disable=as_json, transient=True) as bar:
        task = bar.add_task("begins", total=1.0)
        for told in client.calibrate(minutes * 60):
            if as_json and (last is None or len(told.points) > len(last.points) or told.saved):
                print_json(told)
            what = f"{told.threads} thread{'s' * (told.threads > 1)}" if told.threads else "cools"
            bar.update(task, completed=told.fraction, description=what)
            last = told
    if last and not as_json:
        _show(last)


def _show(found: budget_pb2.CalibrateResponse) -> None:
    table = Table(box=None, header_style="bold")
    for title in ("threads", "tokens/s", "hottest", "power"):
        table.add_column(title, justify="right")
    fastest = max(point.tokens_per_second for point in found.points)
    for point in found.points:
        speed = f"{point.tokens_per_second:,.1f}"
        hottest = f"{point.hottest_celsius:.1f} C" if point.HasField("hottest_celsius") else "[dim]not measured[/]"
        power = f"{point.watts:.1f} W" if point.HasField("watts") else "[dim]not measured[/]"
        table.add_row(str(point.threads), f"[green]{speed}[/]" if point.tokens_per_second == fastest else speed, hottest, power)
    console.print(table)
    if found.cooling_celsius_per_second:
        console.print(f"it cools by {found.cooling_celsius_per_second:.2f} C a second with nothing to do")
    console.print("[dim]kept: the budgets use it from now on[/]")
