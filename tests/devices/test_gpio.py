"""Lines of the header, on gpiozero's own board without a board."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import gpiozero
import pytest
from agentd_sandbox import DeviceFailure
from gpiozero.pins.mock import MockFactory

from agentd.devices import Devices, gpio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def board() -> Iterator[MockFactory]:
    before, gpiozero.Device.pin_factory = gpiozero.Device.pin_factory, MockFactory()
    yield gpiozero.Device.pin_factory
    gpiozero.Device.pin_factory.reset()
    gpiozero.Device.pin_factory = before


@pytest.fixture
def devices(board: MockFactory, tmp_path: Path) -> Iterator[Devices]:
    made = Devices(tmp_path)
    yield made
    made.close()


def until(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_set_stays_set_and_is_what_a_reading_tells(devices: Devices, board: MockFactory):
    """Between the calls of tools, each of which is a process of its own, the daemon holds the line."""
    assert devices.operate("gpio/17", {"do": "set", "on": True}) == {"line": 17, "value": "on"}
    assert (board.pin(17).function, board.pin(17).state) == ("output", 1)
    assert devices.operate("gpio/17/read", {}) == {"line": 17, "value": "on"}
    assert board.pin(17).function == "output"
    devices.operate("gpio/17", {"do": "set", "on": False})
    assert board.pin(17).state == 0


def test_an_input_is_read_as_it_is_wired(devices: Devices, board: MockFactory):
    """Pulled up or down where nothing is wired, and what comes in where something is."""
    assert devices.operate("gpio/4/read", {"pull": "up"})["value"] == "on"
    assert devices.operate("gpio/4/read", {"pull": "down"})["value"] == "off"
    pins = [board.pin(number) for number in (5,)]
    assert devices.operate("gpio/5/read", {})["value"] == "off"
    pins[0].drive_high()
    assert devices.operate("gpio/5/read", {})["value"] == "on"


def test_a_pulse_ends(devices: Devices, board: MockFactory):
    assert devices.operate("gpio/17", {"do": "pulse", "seconds": 0.01}) == {"line": 17, "value": "off"}
    assert board.pin(17).state == 0
    assert [int(state.state) for state in board.pin(17).states][-2:] == [1, 0]


@pytest.fixture
def pulse(devices: Devices, board: MockFactory) -> Iterator[list[Any]]:
    """Of a minute, at GPIO17; what it came to."""
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(devices.operate("gpio/17", {"do": "pulse", "seconds": 60})))
    thread.start()
    until(lambda: board.pin(17).function == "output")
    yield said
    devices.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_pulse_is_ended_by_whoever_switches_the_line(devices: Devices, board: MockFactory, pulse: list[Any]):
    """A pump that floods the room is to be stopped; and what was set last stays."""
    with pytest.raises(DeviceFailure, match="in the middle of a pulse"):
        devices.operate("gpio/17", {"do": "pulse"})
    assert devices.operate("gpio/17/read", {})["value"] == "on"
    devices.operate("gpio/17", {"do": "set", "on": False})
    until(lambda: pulse == [{"line": 17, "value": "off"}])
    assert board.pin(17).state == 0
    devices.operate("gpio/17", {"do": "set", "on": True})
    assert board.pin(17).state == 1


def test_pulses_leave_room_for_other_calls(devices: Devices, board: MockFactory, pulse: list[Any]):
    other = threading.Thread(target=devices.operate, args=("gpio/18", {"do": "pulse", "seconds": 60}))
    other.start()
    until(lambda: board.pin(18).function == "output")
    with pytest.raises(DeviceFailure, match="no more at a time"):
        devices.operate("gpio/19", {"do": "pulse"})
    assert board.pin(19).function == "input"
    devices.operate("gpio/18", {"do": "set", "on": False})
    other.join(5)
    assert not other.is_alive()


def test_the_end_of_the_daemon_is_the_end_of_a_pulse(devices: Devices, board: MockFactory, pulse: list[Any]):
    devices.close()
    until(lambda: len(pulse) == 1)
    assert board.pin(17).function == "input"


def test_what_a_killed_daemon_held_is_let_go_of_by_the_next(devices: Devices, board: MockFactory, tmp_path: Path):
    """A Pi's kernel leaves an output as it was: the pump would run on."""
    devices.operate("gpio/17", {"do": "set"})
    devices.operate("gpio/18", {"do": "set"})
    assert json.loads((tmp_path / "gpio.json").read_text()) == [17, 18]
    for pin in (17, 18):  # as its kernel does for one that died
        board.release_pins(devices._lines._outputs[pin], pin)
    after = Devices(tmp_path)
    after.recover()
    assert [board.pin(pin).function for pin in (17, 18)] == ["input", "input"]
    assert not (tmp_path / "gpio.json").exists()
    after.recover()
    after.close()


def test_a_line_that_can_not_be_let_go_of_is_tried_again(devices: Devices, board: MockFactory, tmp_path: Path):
    """Whatever another one does meanwhile: the others are let go of, and this one stays known."""
    (tmp_path / "gpio.json").write_text("[17, 99]")
    board.pin(17).function = "output"
    devices.recover()
    assert board.pin(17).function == "input"
    assert json.loads((tmp_path / "gpio.json").read_text()) == [99]
    devices.operate("gpio/18", {"do": "set"})
    assert json.loads((tmp_path / "gpio.json").read_text()) == [18, 99]
    devices.close()
    assert json.loads((tmp_path / "gpio.json").read_text()) == [99]


def test_a_line_that_others_hold_is_not_taken_for_ours(devices: Devices, board: MockFactory, tmp_path: Path):
    """Or the next daemon would make an input of it."""
    with gpiozero.OutputDevice(17, initial_value=True), pytest.raises(DeviceFailure, match="GPIO17 can't be used"):
        devices.operate("gpio/17", {"do": "set"})
    assert not (tmp_path / "gpio.json").exists()


@pytest.mark.parametrize("kept", ["", "{", "null", '["x"]', '{"17": 1}', "[99]", "[Infinity]", "[" * 5000])
def test_junk_where_the_lines_are_kept_keeps_nobody_from_starting(board: MockFactory, tmp_path: Path, kept: str):
    (tmp_path / "gpio.json").write_text(kept)
    Devices(tmp_path).recover()


def test_the_lines_are_let_go_of_when_the_daemon_stops(devices: Devices, board: MockFactory):
    devices.operate("gpio/17", {"do": "set"})
    devices.close()
    assert board.pin(17).function == "input"
    with pytest.raises(DeviceFailure, match="stopping"):
        devices.operate("gpio/17", {"do": "set"})


def test_the_working_folder_stays_where_it_is(board: MockFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """lgpio goes to its own when it is loaded, here as often as four threads ask for the first line at once."""
    here, load = os.getcwd(), gpio._load

    def loaded() -> Any:
        os.chdir(tmp_path)
        time.sleep(0.02)
        return load()

    monkeypatch.setattr(gpio, "_load", loaded)
    devices = Devices(tmp_path)
    threads = [threading.Thread(target=devices.operate, args=(f"gpio/{n}/read", {})) for n in (4, 5, 6, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    devices.close()
    assert os.getcwd() == here


@pytest.mark.parametrize("name", ["", "017", "-1", "1e1", "GPIO17", "17/", "../17", "100", "1\n", "๑", "17/reads", "/read"])
def test_names_of_lines_have_one_spelling(devices: Devices, name: str):
    """What was granted is what is switched: no two names for one line. Who may read it may not switch it."""
    with pytest.raises(DeviceFailure, match="is no line"):
        devices.operate(f"gpio/{name}", {"do": "set"})


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "do: Field required"),
        ({"do": "burn"}, "do: Input should be"),
        ({"do": "set", "on": "yes"}, "on: Input should be a valid boolean"),
        ({"do": "pulse", "seconds": 61}, "seconds: Input should be less than or equal to 60"),
        ({"do": "pulse", "seconds": 0}, "seconds: Input should be greater than 0"),
        ({"do": "pulse", "seconds": float("nan")}, "seconds: "),
        ({"do": "read"}, "do: Input should be"),
        ({"do": "set", "more": 1}, "more: is unknown"),
    ],
)
def test_what_is_asked_is_checked(devices: Devices, board: MockFactory, asked: dict[str, Any], why: str):
    with pytest.raises(DeviceFailure, match=why):
        devices.operate("gpio/17", asked)
    assert board.pin(17).function == "input"


def test_a_line_that_the_board_has_not_is_a_sentence(devices: Devices):
    with pytest.raises(DeviceFailure, match="GPIO99 can't be used"):
        devices.operate("gpio/99", {"do": "set"})


def test_without_a_board_it_says_so(devices: Devices, monkeypatch: pytest.MonkeyPatch):
    """As on this machine: gpiozero finds no way to a header."""
    monkeypatch.setattr(gpiozero.Device, "pin_factory", None)
    monkeypatch.delenv("GPIOZERO_PIN_FACTORY", raising=False)
    with pytest.raises(DeviceFailure, match=r"is not installed|GPIO can't be used"):
        devices.operate("gpio/17", {"do": "set"})


def test_no_other_kind_is_known(devices: Devices):
    with pytest.raises(DeviceFailure, match="there is no device 'door/front'"):
        devices.operate("door/front", {})
