"""`agentd serve`: the daemon in the foreground."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

import click

from agentd import config as configuration
from agentd import places, systemd
from agentd.cli.output import json_option, print_json


@dataclass(frozen=True)
class _Ready:
    socket: Path
    grants: int
    as_json: bool

    def __call__(self) -> None:
        if self.as_json:
            print_json({"ready": str(self.socket), "grants": self.grants})
            return
        click.echo(f"agentd is ready on {self.socket}", err=True)
        if not self.grants:
            click.echo(
                "No grants in agentd.toml: keep `agentd approvals` open to be asked, or see `agentd grants add -h`.", err=True
            )


@click.command(epilog="Example: agentd serve --config ~/.config/agentd/agentd.toml")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="Configuration.  [default: ~/.config/agentd/agentd.toml]"
)
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), show_default=True)
@json_option
@click.pass_obj
def serve(socket: Path | None, file: Path | None, log_level: str, *, as_json: bool) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C.

    It says when it is ready, on standard error or with --json on standard output; the model loads meanwhile.
    """
    from agentd.daemon import Daemon  # noqa: PLC0415 - the client commands must start fast

    handler = logging.StreamHandler()
    if systemd.is_journal():  # which knows level and time by itself
        handler.setFormatter(systemd.JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    config = configuration.load(file)
    if socket:
        config = config.model_copy(update={"socket": Path(socket).expanduser().absolute()})
    daemon = Daemon(config, file or places.default_file())
    asyncio.run(daemon.run(_Ready(config.socket, len(config.grants), as_json)))
