"""Optional parts of agentd: what each needs, and how that gets here in the way that agentd itself has come."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

MODULES = {
    "gpio": "gpiozero",
    "metrics": "prometheus_client",
    "otel": "opentelemetry.exporter.otlp.proto.http",
    "parquet": "pyarrow",
    "pull": "huggingface_hub",
}
"""A module of each, by the extra's name in pyproject.toml."""


def is_there(extra: str) -> bool:
    try:
        return find_spec(MODULES[extra]) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def install(extra: str) -> str:
    """The command that brings it: pipx and uv keep environments of their own, in folders that they name so."""
    folders = Path(sys.prefix).parts
    wanted = f"'agentd[{extra}]'"
    if folders[-3:-1] == ("pipx", "venvs"):
        return f"pipx runpip agentd install {wanted}"
    if folders[-3:-1] == ("uv", "tools"):
        return f"uv tool install --with {wanted} agentd"
    return f"{sys.executable} -m pip install {wanted}"
