"""How things look in a terminal, and as JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from agentd.untrusted import lines, one_line
from agentd.v1 import tool_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
console = Console(highlight=False, soft_wrap=True)
COLOURS = {"ALLOW": "green", "ASK": "yellow", "DENY": "red", "UNSPECIFIED": "yellow"}


def as_dict(message: Message) -> dict[str, Any]:
    """A message as JSON values, field names as in the .proto, unset fields included."""
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return dict(fields)


def print_json(value: Message | dict[str, Any]) -> None:
    """One line, so that a stream of values is JSON Lines."""
    click.echo(json.dumps(value if isinstance(value, dict) else as_dict(value), ensure_ascii=False))


def safe(text: str) -> str:
    """Text of models, tools and files that stands alone, with its own lines."""
    return lines(text)


def shown(text: str) -> str:
    """The same within a line of ours, as markup."""
    return escape(one_line(text))


def short(text: str, width: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def decision_of(call: tool_pb2.ToolCall) -> str:
    return tool_pb2.ToolCall.Decision.Name(call.decision).removeprefix("DECISION_")


_SHOWN_PATHS = 20


def print_call(call: tool_pb2.ToolCall) -> None:
    """A call and how it ended, on a few lines."""
    arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in json.loads(call.arguments_json).items())
    decision = decision_of(call)
    console.print(f"  [bold cyan]{shown(call.tool or '?')}[/]({shown(short(arguments))})")
    if call.name:
        scopes = ", ".join(call.scopes) or f"call:{call.tool}"
        console.print(f"    [dim]scopes[/]    {shown(scopes)}")
        console.print(f"    [dim]decision[/]  [{COLOURS[decision]}]{decision.lower()}[/]: {shown(call.reason)}")
    if call.sandbox_level:
        refused = f", {call.denied_syscalls} system calls refused" if call.denied_syscalls else ""
        console.print(f"    [dim]sandbox[/]   {call.sandbox_level}, {call.wall_us / 1000:.1f} ms{refused}")
    for path in call.changed_paths[:_SHOWN_PATHS]:
        if call.rehearsed:
            word, then = "rehearsed", f"agentd rehearsals show {call.name.removeprefix('calls/')}"
        else:
            word, then = "changed  ", f"agentd undo {call.name.removeprefix('calls/')}"
        console.print(f"    [dim]{word}[/] {shown(path)}  [dim]({then})[/]")
    if (more := call.changed_count - _SHOWN_PATHS) > 0:
        console.print(f"    [dim]and {more} paths more[/]")
    colour = "red" if call.failed else "default"
    console.print(Text("    result    ", style="dim"), Text(safe(short(call.output_json)), style=colour), sep="")
