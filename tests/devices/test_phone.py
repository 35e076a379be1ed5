"""A phone and a screen: programs that stand in for those of Termux:API and of a desktop. All else is real."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from agentd_sandbox import DeviceFailure

from agentd.devices import Devices, Screen
from agentd.devices.program import Programs

BATTERY = {"health": "GOOD", "percentage": 81, "plugged": "UNPLUGGED", "status": "DISCHARGING", "temperature": 29.299999}
PLACE = {"latitude": 52.52000659999, "longitude": 13.404954, "altitude": 34.0, "accuracy": 12.5, "provider": "network"}
EVIL = "$(touch owned) `touch owned` ; touch owned\n--help 'x' \"y\" \\"


class Stand:
    """Programs on the PATH, each of which notes its arguments and its standard input."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def add(self, name: str, says: str = "", does: str = "") -> None:
        script = f"""#!/bin/sh
for each in "$@"; do printf '%s\\0' "$each"; done > {self.folder}/{name}.arguments
cat > {self.folder}/{name}.input
{does}
cat <<'END'
{says}
END
"""
        (self.folder / name).write_text(script)
        (self.folder / name).chmod(0o755)

    def told(self, name: str) -> tuple[list[str], str]:
        arguments = (self.folder / f"{name}.arguments").read_text().split("\0")[:-1]
        return arguments, (self.folder / f"{name}.input").read_text()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    monkeypatch.chdir(tmp_path)
    return Stand(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("device", "asked", "program", "arguments", "given", "says", "answer"),
    [
        (
            *("battery", {}, "termux-battery-status", [], "", json.dumps(BATTERY)),
            {"percent": 81, "plugged": "unplugged", "status": "discharging", "celsius": 29.3},
        ),
        ("clipboard/get", {}, "termux-clipboard-get", [], "", "a b", {"text": "a b"}),
        ("clipboard/set", {"text": EVIL}, "termux-clipboard-set", [], EVIL, "", {"done": True}),
        ("sms/+491701234567", {"text": EVIL}, "termux-sms-send", ["-n", "+491701234567"], EVIL, "", {"done": True}),
        ("voice", {"text": EVIL}, "termux-tts-speak", [], EVIL, "", {"done": True}),
        ("torch", {"on": True}, "termux-torch", ["on"], "", "", {"done": True}),
        ("torch", {"on": False}, "termux-torch", ["off"], "", "", {"done": True}),
        (
            *("location", {"provider": "gps"}, "termux-location", ["-p", "gps", "-r", "once"], "", json.dumps(PLACE)),
            {"latitude": 52.520007, "longitude": 13.404954, "accuracy": 12.5},
        ),
    ],
)
def test_each_device_is_one_program_and_text_is_its_input(
    programs: Stand,
    tmp_path: Path,
    device: str,
    asked: dict[str, Any],
    program: str,
    arguments: list[str],
    given: str,
    says: str,
    answer: dict[str, Any],
):
    """No shell of ours reads a text, and no text is an option."""
    programs.add(program, says)
    assert Devices(tmp_path).operate(f"termux/{device}", asked) == answer
    assert programs.told(program) == (arguments, given)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("number", ["", "12", "+49 170", "1701234567,1701234568", "-n", "0170;ls", "x" * 20, "1" * 16, "١٢٣٤"])
def test_a_message_goes_to_one_number(programs: Stand, tmp_path: Path, number: str):
    programs.add("termux-sms-send")
    with pytest.raises(DeviceFailure, match="is no telephone number"):
        Devices(tmp_path).operate(f"termux/sms/{number}", {"text": "x"})
    assert not (tmp_path / "termux-sms-send.input").exists()


@pytest.mark.parametrize(
    ("device", "asked"),
    [
        ("torch", {"on": "on"}),
        ("torch", {}),
        ("location", {"provider": "spy"}),
        ("battery", {"command": "ls"}),
        ("sms/12345", {"text": ""}),
        ("voice", {"text": "x" * 4001}),
    ],
)
def test_what_is_asked_of_a_phone_is_checked(tmp_path: Path, device: str, asked: dict[str, Any]):
    with pytest.raises(DeviceFailure, match="can't do that"):
        Devices(tmp_path).operate(f"termux/{device}", asked)


@pytest.mark.parametrize(
    ("says", "does", "why"),
    [
        ("not JSON", "", "has Termux:API the permission"),
        ("[1]", "", "has Termux:API the permission"),
        ("[" * 100_000, "", "has Termux:API the permission"),
        ('{"error": "no permission"}', "", "no permission"),
        ("", "echo boom >&2; exit 3", "ended with status 3: boom"),
    ],
)
@pytest.mark.parametrize(("device", "asked"), [("location", {}), ("sms/12345", {"text": "x"}), ("torch", {"on": True})])
def test_a_program_that_fails_is_a_sentence(
    programs: Stand, tmp_path: Path, device: str, asked: dict[str, Any], says: str, does: str, why: str
):
    """Also of those that say nothing if all is well: Android's refusal comes with status 0."""
    programs.add({"location": "termux-location", "torch": "termux-torch"}.get(device, "termux-sms-send"), says, does)
    with pytest.raises(DeviceFailure, match=why):
        Devices(tmp_path).operate(f"termux/{device}", asked)


def test_what_is_missing_is_told_with_what_mends_it(programs: Stand, tmp_path: Path):
    with pytest.raises(DeviceFailure, match="pkg install termux-api"):
        Devices(tmp_path).operate("termux/torch", {"on": True})
    with pytest.raises(DeviceFailure, match="a phone has no 'camera'"):
        Devices(tmp_path).operate("termux/camera", {})


def test_a_program_that_hangs_is_killed_with_all_it_has_started(tmp_path: Path):
    """Programs of Termux:API do: each would count against Android's limit of 32."""
    script = tmp_path / "hangs"
    script.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    with pytest.raises(DeviceFailure, match=r"hangs did not answer in 0.5 s"):
        Programs().run([str(script)], patience_s=0.5)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}/stat") and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_message_is_shown_on_the_screen_there_is(programs: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Android's first, as a phone has no other; a desktop's only within a session; else it is said."""
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    with pytest.raises(DeviceFailure, match="there is no screen"):
        Devices(tmp_path).operate("screen/message", {"text": "x"})
    programs.add("notify-send")
    assert not Screen(Programs()).there
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere")
    message = {"text": EVIL, "title": "--help", "priority": "high"}
    assert Devices(tmp_path).operate("screen/message", message) == {"shown": True}
    assert programs.told("notify-send") == (["--app-name=agentd", "--urgency=critical", "--", "Message: --help", EVIL], "")
    programs.add("termux-notification")
    assert Devices(tmp_path).operate("screen/message", message) == {"shown": True}
    assert programs.told("termux-notification") == (["--title", "Message: --help", "--priority", "high"], EVIL)
    with pytest.raises(DeviceFailure, match="it has screen/message"):
        Devices(tmp_path).operate("screen/brightness", message)


def test_programs_see_nothing_of_the_daemons_own_environment(programs: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("NOTIFY_SOCKET", "AGENTD_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    programs.add("termux-torch", does=f"env > {tmp_path}/environment")
    Devices(tmp_path).operate("termux/torch", {"on": True})
    seen = (tmp_path / "environment").read_text()
    assert "secret" not in seen
    assert "ANDROID_ROOT=/system" in seen


def test_the_end_of_the_daemon_is_the_end_of_its_programs(programs: Stand, tmp_path: Path):
    """On a phone nobody else would end them."""
    programs.add("termux-torch", does=f"touch {tmp_path}/began; sleep 300")
    devices, said = Devices(tmp_path), list[str]()

    def switch() -> None:
        try:
            devices.operate("termux/torch", {"on": True})
        except DeviceFailure as e:
            said.append(str(e))

    thread = threading.Thread(target=switch)
    thread.start()
    deadline = time.monotonic() + 10
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    devices.close()
    thread.join(5)
    assert said == ["termux-torch ended with status -9"]
    switch()
    assert said[1:] == ["agentd is stopping"]
