"""`agentd approvals`: being asked, and answering."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from typing import TYPE_CHECKING

import click

from agentd.cli.output import console, json_option, print_json, shown
from agentd.client import Client
from agentd.errors import AgentdError
from agentd.v1 import approval_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_Approval = approval_pb2.Approval
_DURATION = re.compile(r"([0-9]{1,5})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WORDS = {
    _Approval.EXTENT_ONCE: ("y", "once", "this call"),
    _Approval.EXTENT_RUN: ("r", "run", "all of this run"),
    _Approval.EXTENT_UNTIL: ("h", "until", "one hour"),
    _Approval.EXTENT_ALWAYS: ("a", "always", "always"),
}
_ANSWERS = ("once", "run", "always", "deny")


def until(text: str) -> int:
    """Nanoseconds since 1970 that far from now. Raises BadParameter."""
    return time.time_ns() + duration_ns(text)


def duration_ns(text: str) -> int:
    """Of 30m, 2h, 7d. Raises BadParameter."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise click.BadParameter(f"{text!r} is no duration: write 30m, 2h or 7d")
    return int(match[1]) * _UNITS[match[2]] * 10**9


@click.group(invoke_without_command=True, epilog="Example: agentd approvals")
@click.pass_context
def approvals(context: click.Context) -> None:
    """Be asked about calls that no grant covers, and answer. Without a command: wait for questions until Ctrl-C."""
    if context.invoked_subcommand is None:
        with Client(context.obj) as client, client.watching_approvals() as questions:
            console.print("[dim]waiting for questions; Ctrl-C ends it[/]")
            for question in questions:
                if question.state == _Approval.STATE_PENDING:
                    ask(client, question)


@approvals.command("list", epilog="Example: agentd approvals list --json")
@json_option
@click.pass_obj
def list_(socket: Path | None, *, as_json: bool) -> None:
    """List the questions that wait for an answer."""
    with Client(socket) as client:
        for question in client.approvals():
            if as_json:
                print_json(question)
            else:
                show(question)


@approvals.command(epilog="Example: agentd approvals answer 01kz5t3q8m0v9r6w2e4y7x1abc once")
@click.argument("approval")
@click.argument("answer", type=click.Choice(_ANSWERS))
@click.option("--for", "lasting", metavar="DURATION", help="With `always`: only for so long, such as 30m, 2h, 7d.")
@click.option("--folder", is_flag=True, help="Grant the folder that a file lies in instead of the file.")
@click.option("--comment", default="", help="Recorded, and told to whoever asked.")
@json_option
@click.pass_obj
def answer(
    socket: Path | None, approval: str, answer: str, lasting: str | None, comment: str, *, folder: bool, as_json: bool
) -> None:
    """Answer the question APPROVAL: once, for this run, always, or deny. The first answer counts."""
    name = f"approvals/{approval.removeprefix('approvals/')}"
    extents = {"once": _Approval.EXTENT_ONCE, "run": _Approval.EXTENT_RUN, "always": _Approval.EXTENT_ALWAYS}
    request = approval_pb2.ResolveApprovalRequest(name=name, allow=answer != "deny", comment=comment)
    if answer != "deny":
        request.extent = extents[answer]
    if lasting:
        request.extent = _Approval.EXTENT_UNTIL
        request.until.FromNanoseconds(until(lasting))
    with Client(socket) as client:
        if folder:
            for question in client.approvals():
                if question.name == name:
                    _widen(request, question)
        closed = client.resolve(request)
    if as_json:
        print_json(closed)
    else:
        console.print(shown(closed.outcome))


def show(question: approval_pb2.Approval) -> None:
    """All that there is to know for an answer, what matters most first."""
    arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in json.loads(question.arguments_json).items())
    console.print(f"\n[bold yellow]?[/] [bold cyan]{shown(question.tool)}[/]({shown(arguments)})")
    console.print(f"  [dim]{shown(question.description)}[/]")
    if question.sends_out:
        console.print("  [bold red]It could send private data to somebody who talked the model into it.[/]")
    lines = [
        ("touches", ", ".join(question.scopes)),
        ("asked by", f"{question.principal} {question.run}".strip()),
        ("because", question.reason),
        ("undo", f"no: {question.not_undoable}" if question.not_undoable else "yes"),
        ("the run holds", ", ".join(question.labels)),
        ("from", ", ".join(question.read)),
        ("almost", "; ".join(question.almost)),
        ("id", question.name.removeprefix("approvals/")),
    ]
    for title, text in lines:
        if text:
            console.print(f"  [dim]{title:13}[/] {shown(text)}")


def ask(client: Client, question: approval_pb2.Approval) -> None:
    """Show it, and take an answer from the terminal. Whatever came meanwhile from elsewhere is said."""
    show(question)
    letters = {_WORDS[extent][0]: extent for extent in question.extents}
    choices = "  ".join(f"[bold]{letter}[/] {_WORDS[extent][2]}" for letter, extent in letters.items())
    wide = [offer for offer in question.offers if len(offer.patterns) > 1]
    if wide and _Approval.EXTENT_ALWAYS in question.extents:
        choices += f"  [bold]f[/] always, {shown(wide[0].patterns[-1])}"
    console.print(f"  {choices}  [bold]n[/] no")
    typed = console.input("  [bold green]allow?[/] ").strip().lower()[:1]
    request = approval_pb2.ResolveApprovalRequest(name=question.name, allow=typed in letters or (typed == "f" and bool(wide)))
    if request.allow:
        request.extent = letters.get(typed, _Approval.EXTENT_ALWAYS)
        if request.extent == _Approval.EXTENT_UNTIL:
            request.until.FromNanoseconds(until("1h"))
        if typed == "f":
            _widen(request, question)
    try:
        closed = client.resolve(request)
    except AgentdError as e:  # somebody was quicker, or the call was given up
        console.print(f"  [yellow]{shown(e.message)}[/]")
    else:
        console.print(f"  [dim]{shown(closed.outcome)}[/]")


def _widen(request: approval_pb2.ResolveApprovalRequest, question: approval_pb2.Approval) -> None:
    for offer in question.offers:
        request.grant[offer.scope] = offer.patterns[-1]


@contextlib.contextmanager
def present(client: Client) -> Iterator[None]:
    """Count as somebody who can be asked, if the daemon lets us; questions are answered where the run is shown."""
    try:
        with client.watching_approvals() as questions:
            threading.Thread(target=lambda: list(questions), name="approvals", daemon=True).start()
            yield
    except AgentdError as e:
        if e.reason.name != "ROLE_REQUIRED":
            raise
        yield
