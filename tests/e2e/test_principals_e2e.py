"""Who asks, through the real doors: the socket's peers, tokens over TCP, certificates; and who may do what."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import grant_pb2, journal_pb2, run_pb2, system_pb2, system_pb2_grpc, token_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SERVICES = ("Run", "Tool", "Journal", "Audit", "Approval", "Grant", "Token", "System")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[DaemonProcess]:
    extra = f'[listen]\naddress = "127.0.0.1:{port}"\n[approvals]\nnotify = false\n'
    running = DaemonProcess(tmp_path_factory.mktemp("agentd"), extra=extra).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log, running.log


@pytest.fixture
def owner(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.socket) as made:
        yield made


@contextlib.contextmanager
def holder(owner: Client, port: int, label: str, *roles: str, scopes: tuple[str, ...] = ()) -> Iterator[Client]:
    """A client with a new token."""
    made = owner.create_token(token_pb2.Token(label=label, roles=roles, scopes=scopes))
    with Client(address=f"127.0.0.1:{port}", token=made.secret) as client:
        yield client
    owner.revoke_token(made.token.name)


def refused(work: Callable[[], object]) -> Reason:
    with pytest.raises(AgentdError) as caught:
        work()
    return caught.value.reason


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
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.reason in ("UNAUTHENTICATED", "TOO_MANY_ATTEMPTS")


def methods() -> list[tuple[str, Any, bool]]:
    """Every method of every service: path, an empty request, and whether it streams."""
    pool = descriptor_pool.Default()
    found = []
    for name in SERVICES:
        service = pool.FindServiceByName(f"agentd.v1.{name}Service")
        for method in service.methods:
            request = message_factory.GetMessageClass(method.input_type)()
            found.append((f"/{service.full_name}/{method.name}", request, method.server_streaming))
    return found


def called(client: Client, path: str, request: Any, *, streams: bool) -> str:
    """The reason that the call fails with; empty if it does not, or if it waits for news."""
    call: Any
    try:
        if streams:
            call = client._channel.unary_stream(path, request_serializer=type(request).SerializeToString)
            next(iter(call(request, timeout=1)))
        else:
            call = client._channel.unary_unary(path, request_serializer=type(request).SerializeToString)
            call(request, timeout=20)
    except (grpc.RpcError, StopIteration) as e:
        status = rpc_status.from_call(e) if isinstance(e, grpc.RpcError) else None  # type: ignore[arg-type]
        info = error_details_pb2.ErrorInfo()
        return info.reason if status and status.details and status.details[0].Unpack(info) else ""
    return ""


@pytest.mark.parametrize(
    ("role", "services"),
    [
        ("user", {"Run", "Tool", "Journal", "System"}),
        ("approver", {"Approval", "System"}),
        ("auditor", {"Audit", "System"}),
        ("admin", set(SERVICES)),
    ],
)
def test_a_role_opens_its_services_and_no_other(owner: Client, port: int, role: str, services: set[str]):
    """Every method of every service there is."""
    with holder(owner, port, f"role-{role}", role) as client:
        opened = {
            path for path, request, streams in methods() if called(client, path, request, streams=streams) != "ROLE_REQUIRED"
        }
    expected = {path for path, _, _ in methods() if path.split(".")[-1].split("Service")[0] in services}
    if role == "user":
        expected.add("/agentd.v1.GrantService/CheckCall")
    if role == "auditor":  # reads and verifies, and nothing else
        expected.remove("/agentd.v1.AuditService/PruneAuditLog")
    assert opened == expected


def test_whoever_made_a_rehearsal_needs_another_role_to_apply_it(daemon: DaemonProcess, owner: Client, port: int):
    """Or a grant that wants calls rehearsed would bind nobody. Others' rehearsals are not there for a mere user."""
    mine = owner.call("files.write", {"path": "mine.txt", "text": "x"}, rehearse=True).name
    with holder(owner, port, "rehearser", "user") as client:
        theirs = client.call("files.write", {"path": "rehearsed.txt", "text": "x"}, rehearse=True).name
        assert [each.name for each in client.rehearsals()] == [theirs]
        request = journal_pb2.PlanRollbackRequest(selection=journal_pb2.ChangeSelection(calls=[theirs], rehearsed=True))
        plan = client.plan_rollback(request)
        assert refused(lambda: client.apply_rollback(request, plan.digest)) is Reason.ROLE_REQUIRED
        assert refused(lambda: client.drop_rehearsal(mine)) is Reason.CALL_NOT_FOUND
    with holder(owner, port, "approving", "user", "approver") as client:
        assert {each.name for each in client.rehearsals()} == {mine, theirs}
        client.apply_rollback(request, client.plan_rollback(request).digest)
        client.drop_rehearsal(mine)
    assert (daemon.home / "rehearsed.txt").exists()
    assert not (daemon.home / "mine.txt").exists()


def test_a_user_sees_and_undoes_only_what_is_its_own(daemon: DaemonProcess, owner: Client, port: int):
    """Others' runs are not there, and neither are their sessions' words."""
    list(owner.run("what time is it", session="shared"))
    mine = owner.create_run("what time is it")
    with holder(owner, port, "reader", "user") as client:
        assert list(client.list_runs()) == []
        for work in (
            lambda: client.get_run(mine.name),
            lambda: client.cancel_run(mine.name),
            lambda: list(client.watch_run(mine.name)),
        ):
            assert refused(work) is Reason.RUN_NOT_FOUND
        own = client.create_run("what time is it", session="shared")
        assert [run.name for run in client.list_runs()] == [own.name]
        list(client.watch_run(own.name))
        call = owner.call("files.write", {"path": "owned.txt", "text": "x"})
        assert refused(lambda: client.undo(call.name)) is Reason.CALL_NOT_FOUND
        theirs = client.call("files.write", {"path": "theirs.txt", "text": "x"})
        client.undo(theirs.name)
    assert (daemon.home / "owned.txt").exists()
    assert not (daemon.home / "theirs.txt").exists()
    owner.cancel_run(mine.name)


def test_a_tokens_bounds_hold_against_grants(daemon: DaemonProcess, owner: Client, port: int):
    """In calls, in what is said of calls, and in runs."""
    (daemon.home / "inside").mkdir()
    for name in ("inside/a.txt", "outside.txt"):
        (daemon.home / name).write_text("x")
    with holder(owner, port, "bound", "user", scopes=(f"read:{daemon.home}/inside",)) as client:
        assert not client.call("files.read", {"path": "inside/a.txt"}).failed
        assert refused(lambda: client.call("files.read", {"path": "outside.txt"})) is Reason.GRANT_REQUIRED
        assert client.check("files.read", {"path": "outside.txt"}).decision == grant_pb2.Grant.DECISION_DENY
        assert client.check("files.read", {"path": "inside/a.txt"}).decision == grant_pb2.Grant.DECISION_ALLOW
        assert refused(lambda: client.check("files.read", {"path": "x"}, principal="unix:root")) is Reason.ROLE_REQUIRED
        events = list(client.run("read outside.txt"))
        assert any("may not touch" in event.call.reason for event in events if event.WhichOneof("event") == "call")
    assert not owner.call("files.read", {"path": "outside.txt"}).failed


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
    assert daemon.process is not None
    descriptors = f"/proc/{daemon.process.pid}/fd"
    owner.status()
    before = len(os.listdir(descriptors))
    rude = []
    for n in range(300):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.socket))
        if n % 3 == 0:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
        rude.append(connection)
    owner.status()
    for connection in rude:
        connection.close()
    deadline = time.monotonic() + 15
    while len(os.listdir(descriptors)) > before + 5:
        assert time.monotonic() < deadline, (before, len(os.listdir(descriptors)))
        time.sleep(0.05)
    owner.status()


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("listed", [False, True])
def test_another_user_is_who_the_kernel_says(tmp_path: Path, *, listed: bool):
    """Without a role nobody; with the role user, that and no more."""
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    extra = '[[principals]]\nname = "unix:nobody"\nroles = ["user"]\n' if listed else ""
    running = DaemonProcess(tmp_path / "d", extra=extra)
    config = running.write_config
    running.write_config = lambda: _open_to_others(config())  # type: ignore[method-assign]
    running.start()
    try:
        (tmp_path / "d").chmod(0o755)
        assert running.socket.stat().st_mode & 0o777 == 0o666
        command = [sys.executable, "-c", AS_NOBODY, str(running.socket)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
    finally:
        assert running.stop() == 0
    allowed = {"status": "ok", "grants": "ROLE_REQUIRED", "audit": "ROLE_REQUIRED", "call": "ok", "runs": "ok"}
    assert said == (allowed if listed else dict.fromkeys(allowed, "UNAUTHENTICATED"))


def _open_to_others(config: Path) -> Path:
    config.write_text('socket_mode = "0666"\n' + config.read_text())
    return config


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
    running = DaemonProcess(tmp_path / "d", extra=listen).start()
    ca = (tmp_path / "ca.pem").read_bytes()
    try:
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
    finally:
        assert running.stop() == 0
    assert "Traceback" not in running.log


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


def test_many_clients_at_once_are_told_apart(daemon: DaemonProcess, owner: Client, port: int):
    """Each request is its own sender's, on connections that are shared and on those that are not."""
    seen: list[tuple[str, str]] = []

    def work(label: str, client: Client) -> None:
        for _ in range(10):
            run = client._call(client._runs.CreateRun, run_pb2.CreateRunRequest(run=run_pb2.Run(prompt="x")))
            client.cancel_run(run.name)
            seen.append((label, run.principal))

    with contextlib.ExitStack() as stack:
        clients = {f"token:t{n}": stack.enter_context(holder(owner, port, f"t{n}", "user")) for n in range(3)}
        own = client_name(daemon)
        threads = [threading.Thread(target=work, args=pair) for pair in [*clients.items(), (own, owner)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 40
    assert all(label == principal for label, principal in seen)


def client_name(daemon: DaemonProcess) -> str:
    with Client(daemon.socket) as client:
        run = client.create_run("x")
        client.cancel_run(run.name)
        return run.principal
