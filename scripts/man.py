"""Write the manual page, systemd/agentd.1, from the commands' own help.    scripts/man.py [OUTPUT]"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agentd.cli import cli

PAGE = Path(__file__).parent.parent / "systemd" / "agentd.1"
_FILES = (
    ("~/.config/agentd/agentd.toml", "the configuration"),
    ("~/.config/agentd/automations/NAME.toml", "automations"),
    ("~/.local/state/agentd", "the log, the journal, the states of prompts"),
    ("~/.local/share/agentd/models", "models that were pulled"),
    ("$XDG_RUNTIME_DIR/agentd/agentd.sock", "where clients connect; AGENTD_SOCKET names another"),
)


def _text(words: str) -> str:
    """With what roff would read as its own made harmless (groff(7), "Escape sequences")."""
    lines = words.replace("\\", "\\e").replace("-", "\\-").split("\n")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in lines)


def _paragraphs(words: str) -> str:
    parts = [part for part in words.replace("\b", "").split("\n\n") if part.strip()]
    return "\n.PP\n".join(_text(" ".join(part.split())) for part in parts)


def _command(command: click.Command, path: tuple[str, ...], context: click.Context) -> list[str]:
    own = click.Context(command, parent=context, info_name=path[-1])
    if isinstance(command, click.Group):
        found = [line for name in command.list_commands(own) for line in _sub(command, name, path, own)]
        return found if len(path) == 1 or not command.params else [*_page_of(command, path, own), *found]
    return _page_of(command, path, own)


def _sub(group: click.Group, name: str, path: tuple[str, ...], context: click.Context) -> list[str]:
    command = group.get_command(context, name)
    return _command(command, (*path, name), context) if command else []


def _page_of(command: click.Command, path: tuple[str, ...], context: click.Context) -> list[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [".SS " + _text(f"{' '.join(path)} {usage}"), _paragraphs(command.help or "")]
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and record[1] and "--help" not in record[0]:
            lines += [".TP", f"\\fB{_text(record[0])}\\fR", _text(" ".join(record[1].split()))]
    if command.epilog:
        lines += [".PP", _text(command.epilog)]
    return lines


def page() -> str:
    """The page, as roff with the macros of man(7)."""
    context = click.Context(cli, info_name="agentd")
    about = (cli.help or "").split("\b")[0]
    lines = [
        '.TH AGENTD 1 "" agentd "User Commands"',
        ".SH NAME",
        "agentd \\- a small language model on this device, whose tool calls are permitted, confined, recorded and reversible",
        ".SH SYNOPSIS",
        "\\fBagentd\\fR [OPTIONS] COMMAND [ARGUMENTS]...",
        ".SH DESCRIPTION",
        _paragraphs(about),
        ".SH COMMANDS",
        *_command(cli, ("agentd",), context),
        ".SH FILES",
    ]
    for file, what in _FILES:
        lines += [".TP", f"\\fI{_text(file)}\\fR", _text(what)]
    return "\n".join(line for line in lines if line) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page())
