"""The bundle `gpio`. The daemon holds the lines: what is set stays so after this program has ended."""

from __future__ import annotations

from typing import Any

from agentd_sandbox.sdk import operate, tool


@tool("read")
def read(line: int, pull: str | None = None) -> dict[str, Any]:
    return operate(f"gpio/{line}/read", pull=pull or "none")


@tool("set")
def set_(line: int, value: str) -> dict[str, Any]:
    return operate(f"gpio/{line}", do="set", on=value == "on")


@tool("pulse")
def pulse(line: int, seconds: float) -> dict[str, Any]:
    return operate(f"gpio/{line}", do="pulse", seconds=seconds)
