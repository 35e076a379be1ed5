"""Who says how the battery is: real servers that answer, hang, flood and lie; a library as Android has one."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.budgets.supplies import Said, parse_json, parse_nut, parse_pisugar, supply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUT = """VAR ups battery.charge "90"
VAR ups ups.status "OB DISCHRG"
VAR ups battery.temperature "31.5"
ERR VAR-NOT-SUPPORTED
OK Goodbye
"""


class Ups:
    """Listens, and answers whoever asks with `answer`; nothing at all if that is None."""

    def __init__(self, answer: str | None) -> None:
        self.answer, self.asked = answer, b""
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self.server.getsockname()[1]}"

    def serve(self) -> None:
        held = []
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.asked += connection.recv(4096)
            if self.answer is None:
                held.append(connection)
                continue
            with connection:
                connection.sendall(self.answer.encode())


@pytest.fixture
def ups(request: pytest.FixtureRequest) -> Iterator[Ups]:
    made = Ups(request.param)
    yield made
    made.server.close()


def said_by(provider: str, address: str) -> Said:
    made = supply(provider, address, ())  # type: ignore[arg-type]
    assert made is not None
    made.asked.timeout_s = 0.5
    made.asked.start()
    deadline = time.monotonic() + 15
    while made.asked.latest() is None and not made.asked.trouble and time.monotonic() < deadline:
        time.sleep(0.01)
    made.asked.stop()
    return made.parse(made.asked.latest() or "")


@pytest.mark.parametrize("ups", [NUT], indirect=True)
def test_nut(ups: Ups):
    assert said_by("nut", f"ups@{ups.where}") == Said(90, charging=False, celsius=31.5)
    assert ups.asked.startswith(b"GET VAR ups battery.charge\nGET VAR ups ups.status\n")


@pytest.mark.parametrize("ups", ["battery: 84.31\nbattery_power_plugged: true\n"], indirect=True)
def test_pisugar(ups: Ups):
    assert said_by("pisugar", ups.where) == Said(84.31, charging=True)


@pytest.mark.parametrize("ups", [None, "", "x" * 200_000, "ERR ACCESS-DENIED\n" * 9], indirect=True)
@pytest.mark.parametrize("provider", ["nut", "pisugar"])
def test_a_server_that_hangs_floods_or_refuses_says_nothing(ups: Ups, provider: str):
    assert said_by(provider, f"{'ups@' if provider == 'nut' else ''}{ups.where}") == Said()


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    made = supply("pisugar", f"127.0.0.1:{port}", ())
    assert made is not None
    made.asked.start()
    deadline = time.monotonic() + 10
    while not made.asked.trouble and time.monotonic() < deadline:
        time.sleep(0.01)
    made.asked.stop()
    assert "can't be asked" in made.asked.trouble


def test_a_command_of_the_users(tmp_path: Path):
    program = tmp_path / "battery"
    program.write_text('#!/bin/sh\necho \'{"percentage": 55, "charging": false, "watts": 4.2}\'\n')
    program.chmod(0o755)
    made = supply("command", "", (str(program),))
    assert made is not None
    made.asked.start()
    deadline = time.monotonic() + 10
    while made.asked.latest() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    made.asked.stop()
    assert made.parse(made.asked.latest() or "") == Said(55, charging=False, watts=4.2)


@pytest.mark.parametrize(
    ("provider", "address", "command"),
    [("nut", "", ()), ("nut", "a b@host", ()), ("nut", "ups@host:x", ()), ("command", "", ()), ("pisugar", "host:x", ())],
)
def test_an_address_that_is_none_is_refused(provider: str, address: str, command: tuple[str, ...]):
    with pytest.raises(ValueError):
        supply(provider, address, command)  # type: ignore[arg-type]


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.dictionaries(st.sampled_from(["percentage", "charging", "temperature", "watts", "status"]), inner),
    ).map(json.dumps)
)
def test_whatever_is_said_only_what_can_be_true_counts(text: str):
    for parse in (parse_json, parse_nut, parse_pisugar):
        found = parse(text)
        assert found.level is None or 0 <= found.level <= 100
        assert found.charging in (None, True, False)
        assert found.celsius is None or -30 <= found.celsius <= 150
        assert found.watts is None or 0 <= found.watts <= 1000


FAKE = """
static float told = 0.70f;
void *AThermal_acquireManager(void) { return (void *)1; }
int AThermal_getCurrentThermalStatus(void *m) { return m == (void *)1 ? 2 : -1; }
float AThermal_getThermalHeadroom(void *m, int s) { (void)m; told += 0.05f; return s == 0 ? (told > 0.8f ? 0.0f / 0.0f : told) : 9; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to make the library")
def test_androids_library_is_asked_in_a_process_of_its_own(tmp_path: Path):
    """With the real calls of ctypes; NaN is told as nothing."""
    (tmp_path / "fake.c").write_text(FAKE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libandroid.so", tmp_path / "fake.c"], check=True)
    command = [sys.executable, "-I", "-m", "agentd.budgets.athermal", str(tmp_path / "libandroid.so"), "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.kill()
    assert [line["status"] for line in lines] == [2, 2, 2]
    assert [line["headroom"] for line in lines] == [pytest.approx(0.75, abs=1e-3), pytest.approx(0.8, abs=1e-3), None]
