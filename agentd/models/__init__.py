"""Model files: the pocket model that comes with agentd, or a GGUF of the user's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

POCKET = "pocket"


def locate(model: str) -> Path:
    """The file for `engine.model`: `pocket`, or a path (which need not exist yet)."""
    if model == POCKET:
        return Path(str(files("agentd.models") / "pocket.gguf"))
    return Path(model).expanduser().absolute()
