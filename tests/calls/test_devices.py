"""Devices: nodes that a scope names may be read and written, and nothing else is done to them."""

from __future__ import annotations

import contextlib
import os
import pty
from typing import TYPE_CHECKING

import pytest

from agentd.calls import Denied, Places
from tests.calls.house import House

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MANIFEST = """
bundle = "meter"
version = "1"
description = "A meter on a serial line"
program = "run.py"
[[tool]]
name = "ask"
description = "Ask the meter"
effect = "external"
[tool.parameters]
required = ["node"]
[tool.parameters.properties.node]
type = "string"
[tool.needs]
device = ["meter"]
"""
PROGRAM = """
import os
from agentd_sandbox.sdk import tool

def attempt(do, *args):
    try:
        do(*args)
    except OSError as e:
        return e.strerror
    return "done"

@tool("ask")
def ask(node):
    line = os.open(node, os.O_RDWR)
    os.write(line, b"watts?\\n")
    return {
        "answer": os.read(line, 100).decode(),
        "unlink": attempt(os.unlink, node),
        "chmod": attempt(os.chmod, node, 0o666),
        "rename": attempt(os.rename, node, node + "x"),
        "other": attempt(os.open, "/dev/tty", os.O_RDWR),
    }
"""


@pytest.fixture
def line() -> Iterator[tuple[int, str]]:
    """A serial line: our end, and the node of the other one."""
    ours, theirs = pty.openpty()
    yield ours, os.ttyname(theirs)
    for end in (ours, theirs):
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.mark.parametrize("granted", [True, False])
def test_a_device_of_the_scopes_is_read_and_written(tmp_path: Path, line: tuple[int, str], *, granted: bool):
    """Not without a grant for it; never removed, renamed or made another's; no other node."""
    ours, node = line
    (tmp_path / "bundles" / "meter").mkdir(parents=True)
    (tmp_path / "bundles" / "meter" / "tool.toml").write_text(MANIFEST)
    (tmp_path / "bundles" / "meter" / "run.py").write_text(PROGRAM)
    grants = [("meter.*", "device:meter", "allow")] if granted else []
    with House(tmp_path, grants, bundles=(tmp_path / "bundles",)) as house:
        house.calls._places = Places(house.home, devices={"meter": (node,)})
        os.write(ours, b"230 W\n")
        if not granted:
            with pytest.raises(Denied, match="device:meter"):
                house.run(house.call("meter.ask", node=node))
            return
        result = house.run(house.call("meter.ask", node=node))
    assert "230 W" in result.output["answer"]
    assert {result.output[key] for key in ("unlink", "chmod", "rename", "other")} <= {
        "Permission denied",
        "No such file or directory",
        "Operation not permitted",
    }
    assert os.path.exists(node)
    assert b"watts?" in os.read(ours, 100)
