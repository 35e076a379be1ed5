"""Lines on a real kernel's GPIO chip, by lgpio: on the emulated Arm machine of scripts/emulate.sh, whose chip is wired to nothing.

gpiozero takes the machine for a Pi 4 by what /proc/cpuinfo says; that alone is made up here. Not run where a chip may be
wired to something.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gpiozero
import pytest
from agentd_sandbox import DeviceFailure

from agentd.devices import Devices

if TYPE_CHECKING:
    from collections.abc import Iterator

PI_4 = "processor\t: 0\n\nHardware\t: BCM2835\nRevision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B\n"
LINE, OTHER = 5, 6
KILLED = """
import os, sys
from pathlib import Path
from agentd.devices import Devices
devices = Devices(Path(sys.argv[1]))
print(devices.operate("gpio/5", {"do": "set", "on": True}), flush=True)
os.kill(os.getpid(), 9)
"""
SOMEBODY_ELSE = """
import lgpio
handle = lgpio.gpiochip_open(0)
print("output" if lgpio.gpio_get_mode(handle, 5) & 2 else "input")
try:
    lgpio.gpio_claim_output(handle, 5, 0)
    print("free")
except lgpio.error as e:
    print("busy" if "busy" in str(e).lower() else e)
"""

HOLDER = """
import lgpio
lgpio.gpio_claim_output(lgpio.gpiochip_open(0), 4, 0)
print("held", flush=True)
input()
"""

pytestmark = pytest.mark.skipif(
    os.environ.get("AGENTD_EMULATED") != "1" or os.geteuid() != 0 or not os.path.exists("/dev/gpiochip0"),
    reason="only on an emulated machine: what a real one is wired to nobody knows",
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What one test has claimed is not claimed in the next: gpiozero keeps what it has had in its hands."""
    yield
    if gpiozero.Device.pin_factory:
        gpiozero.Device.pin_factory.close()
        gpiozero.Device.pin_factory = None


@pytest.fixture(scope="module", autouse=True)
def _pi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    revision = tmp_path_factory.mktemp("board") / "cpuinfo"
    revision.write_text(PI_4)
    subprocess.run(["busybox", "mount", "--bind", str(revision), "/proc/cpuinfo"], check=True)
    yield
    subprocess.run(["busybox", "umount", "/proc/cpuinfo"], check=True)


def others() -> list[str]:
    """What another process sees of the line: which way it goes, and whether it could have it."""
    return subprocess.run([sys.executable, "-c", SOMEBODY_ELSE], capture_output=True, text=True, check=True).stdout.split()


def test_a_line_is_held_read_and_let_go_of(tmp_path: Path):
    devices, here = Devices(tmp_path), Path.cwd()
    assert devices.operate(f"gpio/{LINE}", {"do": "set", "on": True}) == {"line": LINE, "value": "on"}
    assert devices.operate(f"gpio/{LINE}/read", {}) == {"line": LINE, "value": "on"}
    assert others() == ["output", "busy"]
    assert json.loads((tmp_path / "gpio.json").read_text()) == [LINE]
    assert devices.operate(f"gpio/{OTHER}", {"do": "pulse", "seconds": 0.05}) == {"line": OTHER, "value": "off"}
    devices.close()
    assert others()[0] == "input"
    assert not (tmp_path / "gpio.json").exists()
    assert Path.cwd() == here
    assert not list(here.glob(".lgd-*"))  # lgpio's pipes are beside what is kept


def test_what_a_killed_process_held_is_an_input_after_the_next_start(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "'on'" in killed.stdout, killed.stderr
    before = others()[0]
    Devices(tmp_path).recover()
    assert others()[0] == "input"
    print("what the kernel left of it:", before)


def test_a_line_that_others_hold_is_a_sentence(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(DeviceFailure, match="GPIO4 can't be used: GPIO busy"):
            Devices(tmp_path).operate("gpio/4", {"do": "set"})
        assert not (tmp_path / "gpio.json").exists()
    finally:
        holder.communicate()
