"""The `agentd` command: a thin client of the daemon, one file per group of commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from agentd import __version__
from agentd.cli.approvals import approvals
from agentd.cli.audit import audit
from agentd.cli.bench import bench
from agentd.cli.budget import budget, top
from agentd.cli.calibrate import calibrate
from agentd.cli.demo import demo
from agentd.cli.doctor import doctor
from agentd.cli.eval import evaluate
from agentd.cli.grants import grants
from agentd.cli.keeping import export, prune, redact, renew
from agentd.cli.models import models
from agentd.cli.output import safe
from agentd.cli.proofs import checkpoint, key, prove, verify
from agentd.cli.rehearsals import rehearsals
from agentd.cli.rollback import diff, pin, rollback, undo
from agentd.cli.run import chat, run
from agentd.cli.runs import runs
from agentd.cli.serve import serve
from agentd.cli.token import token
from agentd.cli.tools import tools
from agentd.cli.witness import witness
from agentd.errors import AgentdError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="agentd")
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="AGENTD_SOCKET",
    help="Socket of the daemon.  [default: $XDG_RUNTIME_DIR/agentd/agentd.sock]",
)
@click.pass_context
def cli(context: click.Context, socket: Path | None) -> None:
    """A small language model on this device, whose tool calls are permitted, confined, recorded and reversible.

    \b
    Examples:
      agentd demo                          see everything work, in a scratch folder
      agentd serve                         start the daemon
      agentd run "read notes/todo.txt"     give it something to do
    """
    context.obj = socket


for command in (
    serve,
    run,
    runs,
    chat,
    tools,
    approvals,
    grants,
    token,
    audit,
    diff,
    undo,
    rollback,
    rehearsals,
    pin,
    budget,
    top,
    calibrate,
    bench,
    evaluate,
    models,
    doctor,
    demo,
    witness,
):
    cli.add_command(command)
for command in (verify, checkpoint, key, prove, export, prune, redact, renew):
    audit.add_command(command)


def main() -> None:
    """Errors people see are one or two lines; `--json` anywhere makes them JSON."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except AgentdError as e:
        if "--json" in sys.argv:
            error = {"reason": e.reason.name, "message": e.message, "hint": e.hint, "metadata": dict(e.metadata)}
            click.echo(json.dumps({"error": error}))
        else:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {safe(e.message)}", err=True)
            if hint := f"{safe(e.hint)} {f'Try again in {e.retry_s:.0f} s.' if e.retry_s else ''}".strip():
                click.echo(f"       {hint}", err=True)
        sys.exit(1)
