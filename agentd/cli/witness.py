"""`agentd witness`: cosigns the checkpoints of other agentds' logs, so that nobody can cut their ends off unseen."""

from __future__ import annotations

import contextlib
import http.server
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentd.cli.output import console, json_option, print_json, shown

if TYPE_CHECKING:
    from agentd.audit.witness import Cosigner

_PATH = "/add-checkpoint"
_TIMEOUT_S = 10


@click.command(epilog='Example: agentd witness --listen 192.168.1.7:7441 --log "$(ssh pi agentd audit key)"')
@click.option(
    "--listen", default="127.0.0.1:7441", show_default=True, metavar="HOST:PORT", help="Where to be asked, over HTTP."
)
@click.option("--log", "logs", multiple=True, metavar="KEY", help="The public key of a log: `agentd audit key` there.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default="~/.local/state/agentd-witness",
    show_default=True,
    help="Key, and what was signed last.",
)
@click.option("--key", "only_key", is_flag=True, help="Print the public key for [[audit.witness]], and do nothing else.")
@json_option
def witness(*, listen: str, logs: tuple[str, ...], state: Path, only_key: bool, as_json: bool) -> None:
    """Sign checkpoints of other logs, each only if it continues the one before. Runs until SIGTERM or Ctrl-C.

    It needs no daemon. Put it on another machine than the log; any witness of c2sp.org/tlog-witness will do instead.
    """
    from agentd.audit.notes import BadNote, Verifier, load_signer  # noqa: PLC0415 - the other commands must start fast
    from agentd.audit.witness import Cosigner  # noqa: PLC0415

    folder = state.expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        known = [Verifier.parse(log) for log in logs]
    except BadNote as e:
        raise click.BadParameter(f"--log: {e}") from None
    cosigner = Cosigner(load_signer(folder / "witness.key"), known, folder)
    if as_json:
        print_json({"key": str(cosigner.witness)})
    else:
        click.echo(str(cosigner.witness))
    if only_key:
        return
    if not known:
        raise click.UsageError("It knows no log: give the keys of some with --log.")
    _serve(cosigner, listen)


def _serve(cosigner: Cosigner, listen: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise click.BadParameter(f"--listen {listen!r} is not HOST:PORT")
    try:
        server = http.server.ThreadingHTTPServer((host.strip("[]"), int(port)), _handler(cosigner))
    except OSError as e:
        raise click.ClickException(f"{listen} can't be listened at: {e.strerror}") from None
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    console.print(f"[dim]signs at http://{listen}; Ctrl-C ends it[/]")
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever()


def _handler(cosigner: Cosigner) -> type[http.server.BaseHTTPRequestHandler]:
    from agentd.audit.witness import LONGEST_BODY  # noqa: PLC0415 - the other commands must start fast

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != _PATH or not length.isdigit() or int(length) > LONGEST_BODY:
                self._answer(404 if self.path != _PATH else 413, "")
                return
            self._answer(*cosigner.add(self.rfile.read(int(length)).decode("utf-8", "replace")))

        def _answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/x.tlog.size" if status == 409 else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, template: str, *values: object) -> None:
            console.print(f"[dim]{shown(f'{self.address_string()} {template % values}')}[/]")

    return Handler
