"""The examples: each is one that agentd takes, and those that need no model do what they say. The bundles they use."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agentd.automations.automation import parsed
from agentd.client import Client
from agentd.v1 import automation_pb2 as pb
from tests.e2e.device import QUICK, Device
from tests.e2e.test_automations_e2e import DEADLINE_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TOLD: list[tuple[str, str, dict[str, str]]] = []


class Ntfy(http.server.BaseHTTPRequestHandler):
    """Takes messages, as ntfy does."""

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        TOLD.append((self.path, text, dict(self.headers)))
        self.send_response(403 if "forbidden" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ntfy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def device(tmp_path: Path, address: str) -> Iterator[Device]:
    """With all examples that need no model, for the server of this test and files below its home."""
    TOLD.clear()
    made = Device(tmp_path, extra=QUICK)
    folder = tmp_path / "automations"
    folder.mkdir()
    (tmp_path / "home" / "Inbox").mkdir(parents=True)
    for name in ("journal", "hot", "doorbell", "watering", "charge"):
        text = (EXAMPLES / f"{name}.toml").read_text().replace("~/", f"{tmp_path}/home/").replace('"~', f'"{tmp_path}/home')
        text = text.replace("https://ntfy.sh", f"http://{address}").replace("ntfy.sh:443", address).replace('"5m"', '"10s"')
        text = (
            text.replace("seconds = 20", "seconds = 0.1")
            .replace('cron = "0 7 * * *"', 'every = "10s"')
            .replace('"10m"', '"10s"')
        )
        (folder / f"{name}.toml").write_text(text)
    made.made()
    made.tools += 'bundled = ["files", "system", "notify", "time", "gpio"]\n'
    program = tmp_path / "bin" / "termux-notification"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/shown\ncat >> {tmp_path}/shown\n')
    program.chmod(0o755)
    made.environment = {"GPIOZERO_PIN_FACTORY": "mock", "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    made.extra += f'[[grants]]\ntool = "notify.send"\nscope = "connect:{address}"\n'
    with made.running() as running:
        yield running


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_example_is_an_automation(example: Path):
    found = parsed(example.stem, example.read_text())
    assert found.description
    assert found.rules()
    assert f"({example.name})" in (EXAMPLES / "README.md").read_text()


def test_those_without_a_model_do_what_they_say(device: Device):
    with Client(device.socket) as client:
        (device.home / "Inbox" / "bill.pdf").write_text("x")
        until(lambda: client.automations.get("journal").succeeded == 1)
        assert (device.home / "journal.txt").read_text().endswith("bill.pdf\n")
        event = client.automations.trigger("doorbell", {"who": "Grüße, postman"})
        until(lambda: client.automations.event(event.name).state == pb.TriggerEvent.STATE_SUCCEEDED)
        path, text, headers = TOLD[0]
        assert (path, text) == ("/CHANGE-ME", "Grüße, postman is at the door")
        assert headers["Title"] == "=?UTF-8?B?RG9vcmJlbGw=?="
        device.heat(79)
        until(lambda: len(TOLD) == 2)
        assert "It is hot" in TOLD[1][1]
        assert TOLD[1][2]["Priority"] == "high"
        until(lambda: client.automations.get("hot").succeeded == 1, DEADLINE_S)
        until(lambda: client.automations.get("watering").succeeded >= 1, DEADLINE_S)
        assert client.automations.get("charge").succeeded == 0
        device.charge(19, "Discharging")
        until(lambda: client.automations.get("charge").succeeded == 1, DEADLINE_S)
        assert (device.root / "shown").read_text().startswith("--title Message: Battery --priority high\n")


def test_what_lands_in_the_inbox_is_filed_by_the_pocket_model(device: Device):
    """With the grants of its file alone; and undone by its run."""
    text = (EXAMPLES / "filing.toml").read_text().replace("~/", f"{device.home}/")
    (device.root / "automations" / "filing.toml").write_text(text)
    (device.root / "automations" / "journal.toml").unlink()
    (device.home / "Documents").mkdir()
    with Client(device.socket) as client:
        client.automations.reload()
        for name in ("bill", "letter", "notes-2026"):
            (device.home / "Inbox" / f"{name}.txt").write_text(name)
        until(lambda: client.automations.get("filing").succeeded == 3)
        assert {path.read_text() for path in (device.home / "Documents").iterdir()} == {"bill", "letter", "notes-2026"}
        assert [event.note for event in client.automations.events("filing")] == ["", "", ""]
        (event,) = [each for each in client.automations.events("filing") if "bill" in each.subject]
        client.automations.pause("filing")
        device.command("rollback", "--run", event.run.removeprefix("runs/"), "--yes")
        assert (device.home / "Inbox" / "bill.txt").read_text() == "bill"


def output(client: Client, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(client.call(tool, arguments).output_json)
    return found


def test_the_bundles_say_what_they_can_not_do(device: Device, address: str):
    with Client(device.socket) as client:
        assert "403" in output(client, "notify.send", {"url": f"http://{address}/forbidden", "text": "x"})["error"]
        assert "empty" in output(client, "notify.send", {"url": f"http://{address}/a", "text": " "})["error"]
        assert set(output(client, "time.now", {"zone": "Asia/Tokyo"})) == {"date", "time", "weekday"}
        assert "no time zone" in output(client, "time.now", {"zone": "../../etc/passwd"})["error"]
        assert output(client, "time.shift", {"date": "2028-02-28", "days": 2}) == {"date": "2028-03-01", "weekday": "Wednesday"}
        assert "too far" in output(client, "time.shift", {"days": 10**9})["error"]
        assert "is no date" in output(client, "time.until", {"date": "tomorrow"})["error"]
