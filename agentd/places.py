"""Where things are if nobody says otherwise (XDG Base Directory Specification)."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def default_state() -> Path:
    return expanded(_xdg("XDG_STATE_HOME", "~/.local/state") / "agentd")


def default_data() -> Path:
    return expanded(_xdg("XDG_DATA_HOME", "~/.local/share") / "agentd")


def default_file() -> Path:
    return expanded(_xdg("XDG_CONFIG_HOME", "~/.config") / "agentd" / "agentd.toml")


def default_socket() -> Path:
    """Where daemon and clients meet: in the user's own runtime folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "agentd" if runtime else default_state()
    return expanded(Path(os.environ.get("AGENTD_SOCKET") or folder / "agentd.sock"))


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or default)
