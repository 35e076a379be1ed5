"""Lines of the header, on gpiozero's own board without a board."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import gpiozero
import pytest
from agentd_sandbox import DeviceFailure
from gpiozero.pins.mock import MockFactory

from agentd.devices import Devices

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
    assert devices.operate("gpio/17", {"do": "read"}) == {"line": 17, "value": "on"}
    assert board.pin(17).function == "output"
    devices.operate("gpio/17", {"do": "set", "on": False})
    assert board.pin(17).state == 0


def test_an_input_is_read_as_it_is_wired(devices: Devices, board: MockFactory):
    """Pulled up or down where nothing is wired, and what comes in where something is."""
    assert devices.operate("gpio/4", {"do": "read", "pull": "up"})["value"] == "on"
    assert devices.operate("gpio/4", {"do": "read", "pull": "down"})["value"] == "off"
    pins = [board.pin(number) for number in (5,)]
    assert devices.operate("gpio/5", {"do": "read"})["value"] == "off"
    pins[0].drive_high()
    assert devices.operate("gpio/5", {"do": "read"})["value"] == "on"


def test_a_pulse_ends(devices: Devices, board: MockFactory):
    assert devices.operate("gpio/17", {"do": "pulse", "seconds": 0.01}) == {"line": 17, "value": "off"}
    assert board.pin(17).state == 0
    assert [int(state.state) for state in board.pin(17).states][-2:] == [1, 0]


def test_nothing_comes_between_a_pulse_and_its_end(devices: Devices, board: MockFactory):
    """Who else wants the line is refused; the end of the daemon is the end of the pulse."""
    pulse = threading.Thread(target=devices.operate, args=("gpio/17", {"do": "pulse", "seconds": 60}))
    pulse.start()
    until(lambda: board.pin(17).function == "output")
    for asked in ({"do": "set", "on": False}, {"do": "pulse"}):
        with pytest.raises(DeviceFailure, match="in the middle of a pulse"):
            devices.operate("gpio/17", asked)
    assert devices.operate("gpio/17", {"do": "read"})["value"] == "on"
    devices.close()
    pulse.join(5)
    assert not pulse.is_alive()
    assert board.pin(17).function == "input"


def test_the_lines_are_let_go_of_when_the_daemon_stops(devices: Devices, board: MockFactory):
    devices.operate("gpio/17", {"do": "set"})
    devices.close()
    assert board.pin(17).function == "input"
    with pytest.raises(DeviceFailure, match="stopping"):
        devices.operate("gpio/17", {"do": "set"})


@pytest.mark.parametrize("name", ["", "017", "-1", "1e1", "GPIO17", "17/", "../17", "100", "1\n", "๑"])
def test_names_of_lines_have_one_spelling(devices: Devices, name: str):
    """What was granted is what is switched: no two names for one line."""
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
    monkeypatch.setenv("GPIOZERO_PIN_FACTORY", "lgpio")
    with pytest.raises(DeviceFailure, match=r"agentd\[gpio\]|GPIO17 can't be used"):
        devices.operate("gpio/17", {"do": "set"})


def test_no_other_kind_is_known(devices: Devices):
    with pytest.raises(DeviceFailure, match="there is no device 'door/front'"):
        devices.operate("door/front", {})
