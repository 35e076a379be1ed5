"""Optional parts of agentd: what each needs, and how that gets here in the way that agentd itself has come."""

from __future__ import annotations

import shlex
import sys
from importlib import metadata
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
    """The command that brings it: pipx and uv keep environments of their own, with a note in each.

    It names the packages, and not agentd: another project has that name on PyPI.
    """
    wanted = shlex.join(_packages(extra))
    environment = Path(sys.prefix)
    if (environment / "pipx_metadata.json").exists():
        return f"pipx inject agentd {wanted}"
    if (environment / "uv-receipt.toml").exists():
        return f"uv pip install --python {sys.executable} {wanted}"
    return f"{sys.executable} -m pip install {wanted}"


def _packages(extra: str) -> list[str]:
    """With the versions that pyproject.toml asks for."""
    needed = (requirement.partition(";") for requirement in metadata.requires("agentd") or ())
    return [package.strip() for package, _, marker in needed if f'extra == "{extra}"' in marker]
