"""The doors of a real daemon: the socket's peers, tokens over TCP, certificates; and doors that stay shut."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import system_pb2, system_pb2_grpc, token_pb2
from tests.e2e.conftest import DaemonProcess
from tests.ports import free_port
from tests.principals.conftest import open_to_others, refused
from tests.principals.wire import descriptors, reason, until

if TYPE_CHECKING:
    from pathlib import Path

AS_NOBODY = """
import json, os, sys
from agentd.client import Client
from agentd.errors import AgentdError
from pathlib import Path
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)  # not before: nobody may not be able to read this Python
said = {}
with Client(Path(sys.argv[1])) as client:
    for name, work in {
        "status": client.status, "grants": lambda: list(client.grants()), "audit": lambda: list(client.audit_events()),
        "call": lambda: client.call("system.time", {}), "runs": lambda: [r.name for r in client.list_runs()],
    }.items():
        try:
            work()
            said[name] = "ok"
        except AgentdError as e:
            said[name] = e.reason.name
print(json.dumps(said))
"""


def test_a_token_opens_the_door_and_nothing_else_does(owner: Client, port: int):
    """Over TCP: nobody without one; health is for everybody; a revoked one is nobody's from then on."""
    with Client(address=f"127.0.0.1:{port}") as nobody:
        assert refused(nobody.status) is Reason.UNAUTHENTICATED
        answer = health_pb2_grpc.HealthStub(nobody._channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    made = owner.create_token(token_pb2.Token(label="door"))
    with Client(address=f"127.0.0.1:{port}", token=made.secret) as client:
        client.status()
        owner.revoke_token(made.token.name)
        assert refused(client.status) is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Basic YTpi", "bearer wrong", "Bearer agentd_x_y", "Bearer " + "x" * 5000]
)
def test_a_wrong_authorization_is_a_named_error(daemon: DaemonProcess, value: str):
    """With details, whatever it looks like; also on the socket, where its owner would otherwise be known."""
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        stub = system_pb2_grpc.SystemServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetStatus(system_pb2.GetStatusRequest(), metadata=[("authorization", value)])
    assert reason(caught.value)[0] in ("UNAUTHENTICATED", "TOO_MANY_ATTEMPTS")


def test_wrong_tokens_are_in_the_log(owner: Client, port: int):
    """Where from, how many; never what was sent."""
    with Client(address=f"127.0.0.1:{port}", token="my-little-secret") as client:
        for _ in range(8):
            refused(client.status)
    deadline = time.monotonic() + 10
    while not (failed := [event for event in owner.audit_events() if event.kind == "auth.fail"]):
        assert time.monotonic() < deadline
    assert len(failed) <= 5 + 5  # those of the socket's peers in this file, and these
    assert all("my-little-secret" not in str(event) for event in failed)


def test_the_way_around_the_relay_leads_to_nobody(daemon: DaemonProcess):
    """The inner socket is in a folder of the owner's alone; there a connection shows nothing of who is there."""
    assert (daemon.state.stat().st_mode & 0o777) == 0o700
    with Client(daemon.state / "api.sock") as client:
        assert refused(client.status) is Reason.UNAUTHENTICATED


def test_rude_connections_keep_nobody_out(daemon: DaemonProcess, owner: Client):
    """Garbage, silence, hundreds at once; no descriptor stays."""
    owner.status()
    before = descriptors(daemon)
    rude = []
    for n in range(300):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.socket))
        if n % 3 == 0:
            with contextlib.suppress(BrokenPipeError):  # it has had enough already
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
        rude.append(connection)
    owner.status()
    for connection in rude:
        connection.close()
    until(lambda: descriptors(daemon) <= before + 5, lambda: (before, descriptors(daemon)))
    owner.status()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("listed", [False, True])
def test_another_user_is_who_the_kernel_says(tmp_path: Path, *, listed: bool):
    """Without a role nobody; with the role user, that and no more."""
    extra = '[[principals]]\nname = "unix:nobody"\nroles = ["user"]\n' if listed else ""
    with open_to_others(DaemonProcess(tmp_path, extra=extra)).running() as running:
        assert running.socket.stat().st_mode & 0o777 == 0o666
        command = [sys.executable, "-c", AS_NOBODY, str(running.socket)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
    allowed = {"status": "ok", "grants": "ROLE_REQUIRED", "audit": "ROLE_REQUIRED", "call": "ok", "runs": "ok"}
    assert said == (allowed if listed else dict.fromkeys(allowed, "UNAUTHENTICATED"))


def test_the_socket_is_its_owners_alone_by_default(daemon: DaemonProcess):
    """0600."""
    assert daemon.socket.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def authority(tmp_path: Path) -> Any:
    trustme = pytest.importorskip("trustme")
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = made.issue_cert("127.0.0.1", "localhost")
    server.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    server.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    return made


@pytest.mark.parametrize("mutual", [False, True])
def test_tls_with_tokens_or_with_certificates(tmp_path: Path, authority: Any, *, mutual: bool):
    """The common name of a certificate is the principal; without one the door stays shut."""
    port = free_port()
    listen = f'[listen]\naddress = "127.0.0.1:{port}"\ncertificate = "{tmp_path}/cert.pem"\nkey = "{tmp_path}/key.pem"\n'
    if mutual:
        listen += f'client_ca = "{tmp_path}/ca.pem"\n[[principals]]\nname = "tls:desk"\nroles = ["user"]\n'
    ca = (tmp_path / "ca.pem").read_bytes()
    with DaemonProcess(tmp_path / "d", extra=listen).running() as running:
        with Client(running.socket) as owner:
            secret = owner.create_token(token_pb2.Token(label="phone")).secret
        if not mutual:
            with Client(address=f"localhost:{port}", token=secret, ca=ca) as client:
                client.status()
            with Client(address=f"localhost:{port}", token=secret) as plain, pytest.raises(AgentdError):
                plain.status()
            return
        for name, expected in (("desk", "ok"), ("eve", "UNAUTHENTICATED")):
            own = authority.issue_cert(f"{name}.example", common_name=name)
            credentials = grpc.ssl_channel_credentials(ca, own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
            with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
                stub = system_pb2_grpc.SystemServiceStub(channel)
                try:
                    stub.GetStatus(system_pb2.GetStatusRequest(), timeout=10)
                    said = "ok"
                except grpc.RpcError as e:
                    said = e.code().name  # type: ignore[attr-defined]
            assert said == expected
        with Client(address=f"localhost:{port}", token=secret, ca=ca) as client, pytest.raises(AgentdError):
            client.status()


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ('address = "0.0.0.0:7433"', "loopback"),
        ('address = "127.0.0.1:7433"\ncertificate = "x.pem"', "belong together"),
        ('address = "127.0.0.1:7433"\nclient_ca = "x.pem"', "needs certificate"),
        ('address = "127.0.0.1:7433"\ncertificate = "/missing.pem"\nkey = "/missing.pem"', "can't be read"),
        ('address = "nonsense"', "address"),
        ('address = "127.0.0.1:{taken}"', "can't be listened at"),
    ],
)
def test_a_door_that_would_not_be_safe_stays_shut(tmp_path: Path, listen: str, says: str):
    """The daemon does not start, and says why in a line or two."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = listen.replace("{taken}", str(taken.getsockname()[1]))
        running = DaemonProcess(tmp_path / "d", extra=f"[listen]\n{text}\n").start(wait=False)
        assert running.ended() != 0
    assert says in running.log, running.log
    assert "Traceback" not in running.log
