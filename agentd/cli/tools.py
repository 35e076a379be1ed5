"""`agentd tools`: what there is, and calling one without a model."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from agentd.cli.output import console, json_option, print_call, print_json, shown
from agentd.client import Client
from agentd.v1 import tool_pb2

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def tools() -> None:
    """List the tools, or call one."""


@tools.command("list", epilog="Example: agentd tools list --json | jq -r .name")
@json_option
@click.pass_obj
def list_(socket: Path | None, *, as_json: bool) -> None:
    """List all tools with what they need and may do."""
    with Client(socket) as client:
        found = list(client.tools())
    if as_json:
        for tool in found:
            print_json(tool)
        return
    table = Table(box=None, header_style="bold")
    for title in ("tool", "parameters", "effect"):
        table.add_column(title, no_wrap=True)
    for title in ("what it does", "needs"):
        table.add_column(title, overflow="fold")
    for tool in found:
        parameters = tool.parameters.fields["properties"].struct_value.fields
        effect = tool_pb2.Tool.Effect.Name(tool.effect).removeprefix("EFFECT_").lower() + (", asks" if tool.asks else "")
        name = f"[cyan]{shown(tool.name.removeprefix('tools/'))}[/]"
        table.add_row(name, ", ".join(sorted(parameters)), effect, shown(tool.description), shown("\n".join(tool.needs)))
    console.print(table)


@tools.command(epilog="Example: agentd tools call files.read path=notes/todo.txt")
@click.argument("tool")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--rehearse", is_flag=True, help="Put back what it changes; look at it with `agentd rehearsals`.")
@json_option
@click.pass_obj
def call(socket: Path | None, tool: str, arguments: tuple[str, ...], *, rehearse: bool, as_json: bool) -> None:
    """Call TOOL as the model would: decided, confined, journalled and recorded.

    A value is text unless it is written as NAME:=JSON. Exit status: 0, or 1 if the call was refused or failed.
    """
    with Client(socket) as client:
        done = client.call(tool, dict(map(argument, arguments)), rehearse=rehearse)
    if as_json:
        print_json(done)
    else:
        print_call(done)
    sys.exit(1 if done.failed else 0)


def argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    if name.endswith(":"):
        try:
            return name[:-1], json.loads(value)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not JSON") from None
    return name, value
