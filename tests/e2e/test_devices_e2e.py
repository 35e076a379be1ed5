"""Devices that the daemon operates: a board without a board (gpiozero's own), and programs that stand in for Termux:API."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from google.protobuf import json_format

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import tool_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

GRANTS = """
[[grants]]
tool = "*"
scope = "*"
[[grants]]
tool = "gpio.set"
scope = "device:gpio/17"
[[grants]]
tool = "gpio.read"
scope = "device:gpio/*"
[[grants]]
tool = "gpio.pulse"
scope = "device:gpio/17"
[[grants]]
tool = "termux.location"
scope = "device:termux/location"
"""
PROGRAM = "#!/bin/sh\ncat > {input}\necho '{says}'\n"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    root = tmp_path_factory.mktemp("devices")
    for name, says in (("location", '{"latitude": 1.5, "longitude": 2.5}'), ("torch", ""), ("sms-send", "")):
        program = root / "bin" / f"termux-{name}"
        program.parent.mkdir(exist_ok=True)
        program.write_text(PROGRAM.format(input=root / f"{name}.input", says=says))
        program.chmod(0o755)
    made = DaemonProcess(root, GRANTS, 'bundled = ["files", "gpio", "termux"]\n')
    made.environment = {"GPIOZERO_PIN_FACTORY": "mock", "PATH": f"{root}/bin:/usr/bin:/bin"}
    with made.running() as running:
        yield running


def output(client: Client, tool: str, **arguments: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(client.call(tool, arguments).output_json)
    return found


def test_a_line_stays_as_a_tool_has_left_it(daemon: DaemonProcess):
    """Each call is a process of its own that is gone when it has answered; the daemon holds the line."""
    with Client(daemon.socket) as client:
        assert output(client, "gpio.read", line=17) == {"line": 17, "value": "off"}
        assert output(client, "gpio.set", line=17, value="on") == {"line": 17, "value": "on"}
        assert output(client, "gpio.read", line=17) == {"line": 17, "value": "on"}
        assert output(client, "gpio.pulse", line=17, seconds=0.05) == {"line": 17, "value": "off"}
        assert output(client, "gpio.read", line=17)["value"] == "off"
        assert "is no line" in str(output(client, "gpio.read", line=-1)["error"])


def test_what_is_physical_is_asked_for_whatever_everything_is_allowed(daemon: DaemonProcess):
    """A grant for all tools and all scopes does not mean it; the refusal says so, and names the grant that would."""
    with Client(daemon.socket) as client:
        for tool, arguments in (
            ("gpio.set", {"line": 18, "value": "on"}),
            ("termux.torch", {"value": "on"}),
            ("termux.sms", {"number": "+491701234567", "text": "x"}),
        ):
            with pytest.raises(AgentdError) as caught:
                client.call(tool, arguments)
            assert caught.value.reason is Reason.GRANT_REQUIRED
            assert f"agentd grants add {tool} 'device:" in caught.value.hint
        listed = {tool.name: tool for tool in client.tools()}
    assert listed["tools/gpio.set"].effect == tool_pb2.Tool.EFFECT_PHYSICAL
    assert [name for name, tool in listed.items() if tool.asks] == [
        *("tools/gpio.pulse", "tools/gpio.read", "tools/gpio.set"),
        *("tools/termux.location", "tools/termux.read_clipboard", "tools/termux.sms", "tools/termux.torch"),
    ]
    assert not (daemon.root / "sms-send.input").exists()
    command = [
        sys.executable,
        "-m",
        "agentd",
        "--socket",
        str(daemon.socket),
        "grants",
        "check",
        "gpio.set",
        "line:=18",
        "value=on",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "gpio.set asks unless a grant names it" in " ".join(said.split())


def test_the_log_has_which_device_and_by_which_grant(daemon: DaemonProcess):
    with Client(daemon.socket) as client:
        call = client.call("gpio.set", {"line": 17, "value": "off"})
        bodies = [dict(event.body) for event in client.audit_events(call=call.name)]
    assert list(call.scopes) == ["device:gpio/17"]
    intent = next(body for body in bodies if body["kind"] == "call.intent")
    assert list(intent["scopes"]) == ["device:gpio/17"]
    assert intent["tool"]["effect"] == "physical"
    assert "gpio.set device:gpio/17" in intent["decision"]["rules"][0]
    shown = daemon.command("audit", "show", call.name.removeprefix("calls/")).stdout
    told = {
        line.split()[0]: line.split(None, 1)[1] for line in shown.splitlines() if line.split()[0] in ("operations", "asked_0")
    }
    assert json.loads(told["operations"]) == [{"device": "gpio/17", "ended": "done"}]
    assert "set" in told["asked_0"]


def test_what_can_not_be_put_back_is_not_rehearsed(daemon: DaemonProcess):
    with Client(daemon.socket) as client, pytest.raises(AgentdError) as caught:
        client.call("gpio.set", {"line": 17, "value": "on"}, rehearse=True)
    assert caught.value.reason is Reason.NOT_UNDOABLE


def test_where_a_phone_is_is_private(daemon: DaemonProcess):
    """Whoever knows it and has read what others wrote sends nothing by himself."""
    with Client(daemon.socket) as client:
        call = client.call("termux.location", {})
        assert json.loads(call.output_json) == {"latitude": 1.5, "longitude": 2.5}
        assert list(call.labels) == ["private"]
        events = [json_format.MessageToDict(event) for event in client.audit_events(call=call.name, with_payloads=True)]
    assert "termux/location" in str(events)
    assert "1.5" not in str(events)  # what tools give back is in the log only where audit.outputs says so
