"""Ordinary programs and the web, through the bundles `shell` and `http`, a real daemon and real servers."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import json_format

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import grant_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUNDLED = 'bundled = ["files", "system", "shell", "http"]\n'
SECRET = "s3cret-of-the-test-server"
GRANTS = """
[[grants]]
tool = "shell.run"
scope = "exec:/usr"
[[grants]]
tool = "http.*"
scope = "connect:127.0.0.1:{port}"
[[grants]]
tool = "http.*"
scope = "connect:127.0.0.1:{secure}"
[[grants]]
tool = "http.*"
scope = "use:device"
[[credentials]]
name = "device"
host = "127.0.0.1"
port = {secure}
path = "/api"
"""


class Device(http.server.BaseHTTPRequestHandler):
    """Says what it was asked; /api wants the secret, /echo gives it back."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://192.0.2.7/")
            self.end_headers()
            return
        known = given == f"Bearer {SECRET}"
        body = {"path": self.path, "known": known}
        if self.path == "/api/echo":
            body["given"] = given
        self._answer(json.dumps(body).encode() if self.path != "/large" else b"x" * 3_000_000)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate for 127.0.0.1, and the file of the authority that signed it."""
    trustme = pytest.importorskip("trustme")
    made = trustme.CA()
    file = tmp_path_factory.mktemp("ca") / "ca.pem"
    made.cert_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.issue_cert("127.0.0.1").configure_cert(context)
    return context, file


@pytest.fixture(scope="module")
def servers(authority: tuple[ssl.SSLContext, Path]) -> Iterator[tuple[int, int]]:
    """Ports of a plain and a secure device."""
    plain, secure = (http.server.ThreadingHTTPServer(("127.0.0.1", 0), Device) for _ in range(2))
    secure.socket = authority[0].wrap_socket(secure.socket, server_side=True)
    for server in (plain, secure):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield plain.server_port, secure.server_port
    for server in (plain, secure):
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def daemon(
    tmp_path_factory: pytest.TempPathFactory, servers: tuple[int, int], authority: tuple[ssl.SSLContext, Path]
) -> Iterator[DaemonProcess]:
    root = tmp_path_factory.mktemp("agentd")
    (root / "state" / "credentials").mkdir(parents=True, mode=0o700)
    secret = root / "state" / "credentials" / "device"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    extra = GRANTS.format(port=servers[0], secure=servers[1])
    running = DaemonProcess(root, extra, BUNDLED, environment={"SSL_CERT_FILE": str(authority[1])}).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log, running.log
    assert SECRET not in running.log


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.socket) as connected:
        yield connected


def output(call: Any) -> dict[str, Any]:
    return dict(json.loads(call.output_json))


def work(daemon: DaemonProcess) -> Path:
    folder = daemon.home / "work"
    folder.mkdir(exist_ok=True)
    return folder


def shell(client: Client, daemon: DaemonProcess, command: str, **more: Any) -> dict[str, Any]:
    return output(client.call("shell.run", {"command": command, "folder": str(work(daemon)), **more}))


def test_a_pipeline_runs_and_what_it_wrote_can_be_undone(client: Client, daemon: DaemonProcess):
    """sh, its children, redirection: every file it changed is in the journal."""
    (work(daemon) / "list.txt").write_text("b\na\n")
    call = client.call(
        "shell.run", {"command": "sort list.txt > sorted.txt && mv sorted.txt list.txt", "folder": str(work(daemon))}
    )
    assert output(call)["exit"] == 0
    assert (work(daemon) / "list.txt").read_text() == "a\nb\n"
    client.undo(call.name)
    assert (work(daemon) / "list.txt").read_text() == "b\na\n"


PROGRAMS = [
    ("sh", "echo one two | tr a-z A-Z", "ONE TWO\n"),
    ("jq", "echo '{\"a\": 5}' | jq .a", "5\n"),
    ("git", "git init -q r && cd r && git -c user.name=n -c user.email=e commit -q --allow-empty -m first && git log --format=%s", "first\n"),
    ("python3", "python3 -I -c 'import json; print(json.dumps([1]))'", "[1]\n"),
    ("awk", "printf '1 2\\n' | awk '{print $2}'", "2\n"),
    ("tar", "mkdir t && echo x > t/f && tar cf t.tar t && rm -r t && tar xf t.tar && cat t/f", "x\n"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "command", "expected"), PROGRAMS, ids=[program for program, *_ in PROGRAMS])
def test_ordinary_programs_work(client: Client, daemon: DaemonProcess, program: str, command: str, expected: str):
    """Unchanged, as the distribution ships them. What git is configured by runs later: a grant has to name it."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    if program == "git":
        names = grant_pb2.Grant(tool="shell.run", scope=f"write:{work(daemon)}/r/.git", decision=grant_pb2.Grant.DECISION_ALLOW)
        client.grant(names)
    result = shell(client, daemon, command)
    assert (result["exit"], result["output"]) == (0, expected), result


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("false", 1), ("exit 7", 7), ("no-such-program", 127)])
def test_the_exit_status_is_told(client: Client, daemon: DaemonProcess, command: str, status: int):
    """One that was expected is a result; what it changed stays."""
    assert shell(client, daemon, command, ok=[status])["exit"] == status


@pytest.mark.parametrize(
    "command",
    ["cat {outside}", "cp {outside} .", "ln -s {outside} l && cat l", "cd {folder} && ls", "find / -name outside.txt -print"],
)
def test_a_shell_sees_nothing_but_its_folder(client: Client, daemon: DaemonProcess, command: str):
    """Whatever it tries: the file beside it does not exist."""
    outside = daemon.root / "outside.txt"
    outside.write_text("precious")
    result = shell(client, daemon, command.format(outside=outside, folder=daemon.root) + "; true")
    assert "precious" not in json.dumps(result)
    assert "outside.txt" not in result["output"]


def test_a_shell_without_a_grant_to_execute_is_denied(own_daemon: DaemonProcess):
    """Reading and writing the folder is not enough."""
    own_daemon.tools = BUNDLED
    own_daemon.start()
    with Client(own_daemon.socket) as client, pytest.raises(AgentdError) as caught:
        client.call("shell.run", {"command": "id", "folder": str(work(own_daemon))})
    assert caught.value.reason is Reason.GRANT_REQUIRED
    assert "exec:/usr" in caught.value.message + caught.value.hint


def test_what_a_command_leaves_in_the_background_ends_with_the_call(client: Client, daemon: DaemonProcess):
    """It could otherwise write after its call is on record."""
    shell(client, daemon, "(sleep 1; echo late > late.txt) & echo started")
    time.sleep(1.5)
    assert not (work(daemon) / "late.txt").exists()


def test_a_daemon_that_is_killed_takes_its_tools_along(own_daemon: DaemonProcess):
    """Nothing writes on while the next daemon recovers."""
    own_daemon.tools, own_daemon.extra = BUNDLED, '[[grants]]\ntool = "shell.run"\nscope = "exec:/usr"\n'
    own_daemon.start()
    loop = "while true; do date +%N > clock.txt; done & wait"
    with Client(own_daemon.socket) as client:
        arguments = {"command": loop, "folder": str(work(own_daemon))}
        threading.Thread(target=lambda: _ignore(client, arguments), daemon=True).start()
        clock = work(own_daemon) / "clock.txt"
        deadline = time.monotonic() + 20
        while not (clock.exists() and clock.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert own_daemon.process is not None
        own_daemon.process.kill()
        own_daemon.process.wait()
    own_daemon.start()
    assert not clock.exists()
    time.sleep(0.3)
    assert not clock.exists()


def _ignore(client: Client, arguments: dict[str, Any]) -> None:
    try:
        client.call("shell.run", arguments)
    except AgentdError:
        return


def test_a_page_is_fetched_posted_to_and_downloaded(client: Client, daemon: DaemonProcess, servers: tuple[int, int]):
    """Over plain HTTP to a granted address; a download is a file that can be undone."""
    url = f"http://127.0.0.1:{servers[0]}"
    assert json.loads(output(client.call("http.fetch", {"url": f"{url}/page"}))["text"])["path"] == "/page"
    assert output(client.call("http.post", {"url": url, "text": "grüße"}))["text"] == "grüße"
    call = client.call("http.download", {"url": f"{url}/large", "path": str(daemon.home / "large.bin")})
    assert (daemon.home / "large.bin").stat().st_size == 3_000_000
    client.undo(call.name)
    assert not (daemon.home / "large.bin").exists()
    assert output(client.call("http.fetch", {"url": f"{url}/large"}))["truncated"] is True


def test_a_credential_goes_where_it_belongs_and_nowhere_else(client: Client, servers: tuple[int, int]):
    """Over TLS to its host, port and path; the tool gets the answer, never the secret."""
    secure = f"https://127.0.0.1:{servers[1]}"
    known = output(client.call("http.fetch", {"url": f"{secure}/api/state", "credential": "device"}))
    assert json.loads(known["text"])["known"] is True
    for url in (f"{secure}/other", f"{secure}/api/../other", f"{secure}/apix", f"http://127.0.0.1:{servers[0]}/api"):
        refused = output(client.call("http.fetch", {"url": url, "credential": "device"}))
        assert refused["status"] == 403, (url, refused)
    echoed = output(client.call("http.fetch", {"url": f"{secure}/api/echo", "credential": "device"}))
    assert SECRET not in json.dumps(echoed)


def test_the_log_has_peers_and_refusals_but_no_secret(client: Client, daemon: DaemonProcess, servers: tuple[int, int]):
    """An admin sees where a call connected to and what was refused."""
    client.call("http.fetch", {"url": f"https://127.0.0.1:{servers[1]}/other", "credential": "device"})
    bodies = [json_format.MessageToDict(event.body) for event in client.audit_events(newest_first=True)]
    ended = next(body for body in bodies if body["kind"] == "call.end" and body["tool"]["name"] == "http.fetch")
    assert any(f"cred://device for https://127.0.0.1:{servers[1]}" in denial for denial in ended["sandbox"]["denials"])
    client.call("http.fetch", {"url": f"https://127.0.0.1:{servers[1]}/open"})
    event = next(iter(client.audit_events(newest_first=True)))
    (peer,) = json_format.MessageToDict(event.body)["sandbox"]["peers"]
    assert (peer["host"], peer["port"], peer["connections"]) == ("127.0.0.1", servers[1], 1)
    assert min(peer["sent"], peer["received"]) > 100  # of TLS, by the proxy
    assert SECRET not in json.dumps(bodies)


def test_a_redirect_to_another_host_is_told_and_not_followed(client: Client, servers: tuple[int, int]):
    """It has no grant of its own."""
    told = output(client.call("http.fetch", {"url": f"http://127.0.0.1:{servers[0]}/away"}))
    assert "another host" in told["error"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "http://127.0.0.1:99999/",
        "http://user@127.0.0.1/",
        "http://2130706433/",
        "ftp://x/",
        "http://a b/",
    ],
)
def test_an_address_that_could_be_read_in_two_ways_is_a_bad_argument(client: Client, url: str):
    """Before anything is decided."""
    with pytest.raises(AgentdError) as caught:
        client.call("http.fetch", {"url": url})
    assert caught.value.reason is Reason.BAD_ARGUMENTS


def test_an_address_without_a_grant_is_denied_and_not_connected_to(client: Client):
    """The grant is for host and port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        with pytest.raises(AgentdError) as caught:
            client.call("http.fetch", {"url": f"http://127.0.0.1:{server.getsockname()[1]}/"})
        assert caught.value.reason is Reason.GRANT_REQUIRED
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    ("mode", "text", "says"),
    [(0o644, SECRET, "others"), (0o600, "short", "printable"), (0o600, "two\nlines of it", "printable"), (None, "", "no file")],
)
def test_a_secret_that_is_not_kept_well_stops_the_start(own_daemon: DaemonProcess, mode: int | None, text: str, says: str):
    """The message names the file and not what is in it."""
    own_daemon.extra = '[[credentials]]\nname = "device"\nhost = "example.org"\n'
    file = own_daemon.state / "credentials" / "device"
    file.parent.mkdir(parents=True)
    if mode is not None:
        file.write_text(text)
        file.chmod(mode)
    own_daemon.start(wait=False)
    assert own_daemon.process is not None
    assert own_daemon.process.wait(30) != 0
    assert says in own_daemon.log
    assert SECRET not in own_daemon.log


def test_a_machine_below_the_minimum_is_refused(own_daemon: DaemonProcess):
    """With what is missing, instead of a silent step down."""
    own_daemon.extra = '[sandbox]\nminimum = "L4"\n'
    own_daemon.environment = {"AGENTD_SANDBOX_WITHOUT": "landlock"}
    own_daemon.start(wait=False)
    assert own_daemon.process is not None
    assert own_daemon.process.wait(30) != 0
    assert "L4" in own_daemon.log
    assert "landlock" in own_daemon.log


def test_one_call_changes_files_at_a_time(client: Client, daemon: DaemonProcess):
    """One that fails is put back, and must not take another's change with it: intents and ends do not interleave."""
    before = sum(1 for _ in client.audit_events())
    arguments = {"command": "sleep 0.4; echo x >> turns.txt", "folder": str(work(daemon))}
    callers = [threading.Thread(target=_ignore, args=(client, arguments)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    told = [event.kind for event in client.audit_events()][before:]
    assert [kind for kind in told if kind in ("call.intent", "call.end")] == ["call.intent", "call.end"] * 3
    assert (work(daemon) / "turns.txt").read_text() == "x\n" * 3
