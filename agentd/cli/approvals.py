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
    _Approval.EXTENT_ONCE: (("y", "yes", "once"), "this call"),
    _Approval.EXTENT_RUN: (("r", "run"), "all of this run"),
    _Approval.EXTENT_UNTIL: (("h", "hour"), "one hour"),
    _Approval.EXTENT_ALWAYS: (("a", "always"), "always"),
}
_FOLDER, _NO = ("f", "folder"), ("n", "no", "deny")
_LASTS = frozenset({_Approval.EXTENT_UNTIL, _Approval.EXTENT_ALWAYS})
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
    console.print(f"\n[bold yellow]?[/] [bold cyan]{shown(question.tool)}[/] [dim]would touch[/]")
    for scope in question.scopes:
        console.print(f"  [bold]{shown(scope)}[/]")
    console.print(f"  [dim]{'with':13}[/] {shown(arguments)}")
    console.print(f"  [dim]{'which is':13}[/] {shown(question.description)}")
    if question.sends_out:
        console.print("  [bold red]It could send private data to somebody who talked the model into it.[/]")
    lines = [
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
    """Show it, and take an answer from the terminal. Whatever came meanwhile from elsewhere is said.

    Only a whole word or its letter counts: whatever else is typed, Enter alone too, is asked again. What lasts is confirmed.
    """
    show(question)
    request = None
    while request is None:
        request = _typed(question)
    try:
        closed = client.resolve(request)
    except AgentdError as e:  # somebody was quicker, or the call was given up
        console.print(f"  [yellow]{shown(e.message)}[/]")
    else:
        console.print(f"  [dim]{shown(closed.outcome)}[/]")


def _typed(question: approval_pb2.Approval) -> approval_pb2.ResolveApprovalRequest | None:
    """One answer; None if it was none, or was not confirmed."""
    offered = {extent: _WORDS[extent] for extent in question.extents}
    wide = [offer for offer in question.offers if len(offer.patterns) > 1]
    choices = [f"[bold]{words[0]}[/] {meaning}" for words, meaning in offered.values()]
    folders = bool(wide) and _Approval.EXTENT_ALWAYS in question.extents
    if folders:
        choices.append(f"[bold]{_FOLDER[0]}[/] always, {', '.join(shown(offer.patterns[-1]) for offer in wide)}")
    console.print(f"  {'  '.join(choices)}  [bold]{_NO[0]}[/] no")
    typed = console.input("  [bold green]allow?[/] ").strip().lower()
    request = approval_pb2.ResolveApprovalRequest(name=question.name)
    if typed in _NO:
        return request
    request.allow = True
    if folders and typed in _FOLDER:
        request.extent = _Approval.EXTENT_ALWAYS
        _widen(request, question)
    elif extent := next((extent for extent, (words, _) in offered.items() if typed in words), None):
        request.extent = extent
    else:
        known = [words[0] for words, _ in offered.values()] + ([_FOLDER[0]] if folders else []) + [_NO[0]]
        console.print(f"  [yellow]{shown(typed) or 'nothing'} is no answer:[/] type {', '.join(known[:-1])} or {known[-1]}")
        return None
    if request.extent == _Approval.EXTENT_UNTIL:
        request.until.FromNanoseconds(until("1h"))
    return request if request.extent not in _LASTS or _confirmed(question, request) else None


def _confirmed(question: approval_pb2.Approval, request: approval_pb2.ResolveApprovalRequest) -> bool:
    """Whether a person means what will not be asked again."""
    lasts = "for one hour" if request.extent == _Approval.EXTENT_UNTIL else "always, until it is revoked"
    granted = [request.grant.get(offer.scope) or offer.patterns[0] for offer in question.offers]
    console.print(f"  [bold yellow]{shown(question.tool)} may then use, {lasts}:[/]")
    for pattern in granted:
        console.print(f"    [bold]{shown(pattern)}[/]")
    return console.input("  [bold green]type yes to allow that:[/] ").strip().lower() == "yes"


def _widen(request: approval_pb2.ResolveApprovalRequest, question: approval_pb2.Approval) -> None:
    for offer in question.offers:
        request.grant[offer.scope] = offer.patterns[-1]


@contextlib.contextmanager
def present(client: Client) -> Iterator[None]:
    """Count as somebody who can be asked, if the daemon lets us; questions are answered where the run is shown."""
    try:
        with client.watching_approvals() as questions:
            threading.Thread(target=_read, args=(questions,), name="approvals", daemon=True).start()
            yield
    except AgentdError as e:
        if e.reason.name != "ROLE_REQUIRED":
            raise
        yield


def _read(questions: Iterator[approval_pb2.Approval]) -> None:
    """They are shown elsewhere. A daemon that is gone is said there, too."""
    with contextlib.suppress(AgentdError):
        for _ in questions:
            pass
