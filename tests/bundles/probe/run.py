"""Tools for tests: they hang, fail and flood on purpose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from agentd_sandbox.sdk import ToolFailure, tool


@tool("write_then_wait")
def write_then_wait(path: str, seconds: float) -> dict[str, Any]:
    Path(path).write_text("half done\n")
    time.sleep(seconds)
    return {"waited": seconds}


@tool("write_then_fail")
def write_then_fail(path: str) -> dict[str, Any]:
    Path(path).write_text("half done\n")
    raise ToolFailure("changed my mind")


@tool("hang")
def hang() -> dict[str, Any]:
    while True:
        time.sleep(1)


@tool("flood")
def flood() -> dict[str, Any]:
    return {"text": "x" * 1_000_000}
