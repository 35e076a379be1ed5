"""The prompt the pocket model lives in: the daemon's own system text and the bundled tools, as at run time."""

from __future__ import annotations

import tomllib
from pathlib import Path

from agentd.config import SYSTEM, ToolsConfig
from agentd.engine.prompt import Conversation, ToolSpec, Turn


def tools() -> tuple[ToolSpec, ...]:
    """The tools that a daemon declares if nobody says otherwise, in its order: by name."""
    specs = []
    for bundled in ToolsConfig().bundled:
        bundle = tomllib.loads(Path("tools", bundled, "tool.toml").read_text())
        for tool in bundle["tool"]:
            name = f"{bundle['bundle']}.{tool['name']}"
            specs.append(ToolSpec(name, tool["description"], tool.get("parameters", {})))
    return tuple(sorted(specs, key=lambda spec: spec.name))


def conversation(turns: tuple[Turn, ...], *, bare: bool = False) -> Conversation:
    """A conversation in the daemon's prompt; `bare` leaves out the system turn (early training)."""
    return Conversation("", (), turns) if bare else Conversation(SYSTEM, tools(), turns)
