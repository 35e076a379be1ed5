"""The `agentd` command: a thin client of the daemon, one file per group of commands."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import click

from agentd import __version__
from agentd.cli.lazy import Lazy
from agentd.cli.output import safe
from agentd.errors import AgentdError

_COMMANDS = {
    "serve": "serve:serve",
    "run": "run:run",
    "runs": "runs:runs",
    "chat": "run:chat",
    "tools": "tools:tools",
    "approvals": "approvals:approvals",
    "grants": "grants:grants",
    "token": "token:token",
    "revoke": "token:revoke_principal",
    "audit": "audit:audit",
    "diff": "rollback:diff",
    "undo": "rollback:undo",
    "rollback": "rollback:rollback",
    "rehearsals": "rehearsals:rehearsals",
    "recover": "rollback:recover",
    "pin": "rollback:pin",
    "budget": "budget:budget",
    "top": "budget:top",
    "calibrate": "calibrate:calibrate",
    "bench": "bench:bench",
    "eval": "eval:evaluate",
    "models": "models:models",
    "automations": "automations:automations",
    "trigger": "automations:trigger",
    "service": "service:service",
    "doctor": "doctor:doctor",
    "completion": "completion:completion",
    "demo": "demo:demo",
    "witness": "witness:witness",
}


@click.group(cls=Lazy, commands_in=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
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


def _end(number: int, _frame: object) -> None:
    """As Ctrl-C does, with what has to be done on the way out, such as cancelling a run."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Errors people see are one or two lines; `--json` anywhere makes them JSON."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup wants it to be ignored
            signal.signal(number, _end)
    try:
        cli.main(prog_name="agentd", standalone_mode=False)
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
