"""`agentd completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from agentd.cli.output import json_option, print_json
from agentd.errors import ConfigError, Reason


@click.command(epilog="Example: agentd completion bash >> ~/.bashrc")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, shell: str, *, as_json: bool) -> None:
    """Print what SHELL needs to complete agentd's commands and options: for its start file, or to be sourced."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigError(Reason.CONFIG_INVALID, f"There is no completion for {shell}.", hint="Use bash, zsh or fish.")
    text = kind(context.find_root().command, {}, "agentd", "_AGENTD_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "text": text})
    else:
        click.echo(text)
