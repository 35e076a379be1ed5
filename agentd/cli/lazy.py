"""Groups of commands that are loaded one by one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping


class Lazy(click.Group):
    """A group whose commands are loaded when they are wanted: on a Pi importing all of them takes seconds.

    `commands_in` names each as MODULE:ATTRIBUTE, a module here (click's "Lazily Loading Subcommands").
    """

    def __init__(self, *arguments: Any, commands_in: Mapping[str, str], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._commands_in = commands_in

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._commands_in})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._commands_in:
            module, _, name = self._commands_in[cmd_name].partition(":")
            command: click.Command = getattr(importlib.import_module(f"agentd.cli.{module}"), name)
            return command
        return super().get_command(ctx, cmd_name)
