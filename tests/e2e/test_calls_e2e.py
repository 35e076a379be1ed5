"""Tool calls through the real daemon, without the model."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import grant_pb2, tool_pb2

if TYPE_CHECKING:
    from tests.e2e.conftest import DaemonProcess


def refused(client: Client, tool: str, **arguments: object) -> AgentdError:
    with pytest.raises(AgentdError) as caught:
        client.call(tool, arguments)
    return caught.value


def test_every_bundled_tool_of_the_files_bundle_does_its_work(daemon: DaemonProcess, client: Client):
    """write, append, read, list, search, move, delete, one after the other on real files."""
    (daemon.home / "work").mkdir()
    file = daemon.home / "work" / "a.txt"
    client.call("files.write", {"path": "work/a.txt", "text": "one"})
    client.call("files.append", {"path": "work/a.txt", "text": "two"})
    assert file.read_text() == "one\ntwo\n"
    assert '"one\\ntwo\\n"' in client.call("files.read", {"path": str(file)}).output_json
    assert "a.txt:2: two" in client.call("files.search", {"path": "work", "text": "TWO"}).output_json
    assert '"a.txt"' in client.call("files.list", {"path": "work"}).output_json
    client.call("files.move", {"path": "work/a.txt", "to": "work/b.txt"})
    assert not file.exists()
    client.call("files.delete", {"path": "work/b.txt"})
    client.call("files.delete", {"path": "work"})
    assert not (daemon.home / "work").exists()


@pytest.mark.parametrize("tool", ["system.memory", "system.disk", "system.time"])
def test_readings_that_every_machine_has_are_given(client: Client, tool: str):
    """Their needs are covered by one grant for the bundle."""
    assert not client.call(tool, {}).failed


def test_what_no_grant_covers_is_denied_with_what_to_add(client: Client):
    """PERMISSION_DENIED with the scope and the hint, all of it also in the details."""
    error = refused(client, "files.read", path="/etc/passwd")
    assert error.reason is Reason.GRANT_REQUIRED
    assert error.metadata["scope"] == "read:/etc/passwd"
    assert "agentd grants add files.read 'read:/etc/passwd'" in error.hint
    (event,) = client.audit_events(call=f"calls/{error.metadata['call']}")
    assert event.kind == "call.deny"


@pytest.mark.parametrize("path", ["secret/key.txt", "./x/../secret/key.txt", "link/key.txt", "."])
def test_a_deny_rule_holds_however_the_path_is_spelled(daemon: DaemonProcess, client: Client, path: str):
    """Dots, links and wider folders do not get around it."""
    (daemon.home / "secret").mkdir(exist_ok=True)
    (daemon.home / "secret" / "key.txt").write_text("s3cret")
    if not (daemon.home / "link").is_symlink():
        (daemon.home / "link").symlink_to("secret")
    error = refused(client, "files.search", path=path, text="s3cret")
    assert error.reason is Reason.GRANT_REQUIRED
    os.unlink(daemon.home / "link")
    os.unlink(daemon.home / "secret" / "key.txt")
    os.rmdir(daemon.home / "secret")


@pytest.mark.parametrize(
    ("tool", "arguments", "reason"),
    [
        ("files.nothing", {}, Reason.TOOL_NOT_FOUND),
        ("files.read", {}, Reason.BAD_ARGUMENTS),
        ("files.read", {"path": 3}, Reason.BAD_ARGUMENTS),
        ("files.read", {"path": "a\0b"}, Reason.BAD_ARGUMENTS),
        ("files.read", {"path": ""}, Reason.BAD_ARGUMENTS),
        ("files.read", {"path": "x" * 5000}, Reason.BAD_ARGUMENTS),
        ("files.read", {"path": "a", "more": 1}, Reason.BAD_ARGUMENTS),
        ("probe.hang", {}, Reason.TOOL_TIMEOUT),
        ("probe.flood", {}, Reason.TOOL_FAILED),
    ],
)
def test_bad_calls_are_refused_by_name(client: Client, tool: str, arguments: dict[str, object], reason: Reason):
    """Each has its reason, and the daemon goes on."""
    assert refused(client, tool, **arguments).reason is reason
    assert not client.call("system.time", {}).failed


def test_bytes_that_are_not_utf8_are_refused_by_the_transport(daemon: DaemonProcess):
    """A request that is no protobuf string does not reach a tool, and does not harm the daemon."""
    good = tool_pb2.CallToolRequest(name="tools/files.read", arguments=struct_pb2.Struct())
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        method = channel.unary_unary("/agentd.v1.ToolService/CallTool", lambda data: data, tool_pb2.ToolCall.FromString)
        for broken in (b"\x0a\x04\xff\xfe\xfd\xfc", good.SerializeToString()[:-3] + b"\xff\xff"):
            with pytest.raises(grpc.RpcError) as caught:
                method(broken)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with Client(daemon.socket) as client:
        assert client.status().pid == daemon.process.pid  # type: ignore[union-attr]


def test_every_error_has_one_error_info_and_the_details_of_its_code(client: Client):
    """AIP-193: exactly one ErrorInfo with domain and metadata; BadRequest for a bad field."""
    with pytest.raises(grpc.RpcError) as caught:
        client._tools.CallTool(tool_pb2.CallToolRequest(name="tools/files.nothing"))
    status = rpc_status.from_call(caught.value)
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds.count("google.rpc.ErrorInfo") == 1
    assert "google.rpc.BadRequest" in kinds
    info = error_details_pb2.ErrorInfo()
    status.details[kinds.index("google.rpc.ErrorInfo")].Unpack(info)
    assert (info.reason, info.domain, info.metadata["tool"]) == ("TOOL_NOT_FOUND", "agentd.local", "files.nothing")


def test_a_call_that_fails_after_a_change_is_put_back(daemon: DaemonProcess, client: Client):
    """The tool says it failed: the file is as before, and the log says aborted."""
    file = daemon.home / "kept.txt"
    file.write_text("before\n")
    call = client.call("probe.write_then_fail", {"path": "kept.txt"})
    assert call.failed
    assert file.read_text() == "before\n"
    assert [event.kind for event in client.audit_events(call=call.name)] == ["call.intent", "call.abort"]


def test_a_client_that_gives_up_has_its_call_killed_and_put_back(daemon: DaemonProcess, client: Client):
    """Cancelling the request kills the worker; its change is undone before anyone else looks."""
    file = daemon.home / "slow.txt"
    file.write_text("before\n")
    arguments = struct_pb2.Struct()
    arguments.update({"path": "slow.txt", "seconds": 15})
    request = tool_pb2.CallToolRequest(name="tools/probe.write_then_wait", arguments=arguments)
    pending = client._tools.CallTool.future(request)
    wait_for(lambda: file.read_text() == "half done\n")
    pending.cancel()
    wait_for(lambda: file.read_text() == "before\n")
    wait_for(lambda: next(iter(client.audit_events(newest_first=True))).kind == "call.abort")


def test_calls_run_side_by_side(daemon: DaemonProcess, client: Client):
    """A slow call does not hold up a quick one."""
    slow = threading.Thread(target=client.call, args=("probe.write_then_wait", {"path": "w.txt", "seconds": 2}))
    slow.start()
    wait_for((daemon.home / "w.txt").exists)
    assert not client.call("system.time", {}).failed
    assert slow.is_alive()
    slow.join()


def test_an_undo_is_refused_if_the_file_was_changed_since(daemon: DaemonProcess, client: Client):
    """A newer edit of a person is never overwritten."""
    file = daemon.home / "mine.txt"
    call = client.call("files.write", {"path": "mine.txt", "text": "the model's"})
    file.write_text("mine\n")
    with pytest.raises(AgentdError) as caught:
        client.undo(call.name)
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert file.read_text() == "mine\n"


def test_an_undo_can_be_undone(daemon: DaemonProcess, client: Client):
    """Undo of a created file deletes it; undo of that brings it back, and then it can be undone once more."""
    file = daemon.home / "new.txt"
    call = client.call("files.write", {"path": "new.txt", "text": "hello"})
    undo = client.undo(call.name)
    assert not file.exists()
    client.undo(undo.name)
    assert file.read_text() == "hello\n"
    client.undo(call.name)
    assert not file.exists()
    with pytest.raises(AgentdError) as caught:
        client.undo(call.name)
    assert caught.value.reason is Reason.NOT_UNDOABLE


@pytest.mark.parametrize(
    ("name", "reason"), [("calls/nothing", Reason.CALL_NOT_FOUND), ("nonsense", Reason.BAD_FIELD), ("calls/", Reason.BAD_FIELD)]
)
def test_undoing_what_is_no_call_is_refused(client: Client, name: str, reason: Reason):
    """The error tells a wrong name from an unknown call."""
    with pytest.raises(AgentdError) as caught:
        client.undo(name)
    assert caught.value.reason is reason


def wait_for(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_the_daemons_own_files_are_no_calls_business(own_daemon: DaemonProcess):
    """Not even with a grant for all that is around them."""
    with Client(own_daemon.start().socket) as client:
        wide = grant_pb2.Grant(tool="*", scope=f"read:{own_daemon.root}")
        client.grant(wide)
        client.grant(grant_pb2.Grant(tool="*", scope=f"write:{own_daemon.root}"))
        for path in ("state", "state/agentd.db", "agentd.toml", "agentd.sock"):
            error = refused(client, "files.delete", path=str(own_daemon.root / path))
            assert error.reason is Reason.GRANT_REQUIRED
            assert "belongs to agentd itself" in error.message
