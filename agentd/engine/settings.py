"""How a model is loaded, and what is remembered of its memory from one load to the next."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from agentd.engine.link import Footprint

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to load the model. `repack` "auto" tries it in a throw-away process first."""

    path: Path
    context: int
    batch: int
    threads: int
    repack: str
    load_timeout_s: float
    least_context: int = 256
    """Down to this it is halved where memory is short."""
    kept: Path | None = None
    """A file for what is found out about the model's memory."""
    parallel: int = 1
    """So many generations share the passes over the model."""
    prefixes: Path | None = None
    """A folder for states of prompts, of `prefixes_mib` in all."""
    prefixes_mib: int = 256


PREFIX, SESSION, NEW = ".prefix", ".session", ".new"
"""How files with states of prompts end: what many begin with, what somebody has said; behind both, what is being written."""


@dataclass(frozen=True, slots=True)
class Room:
    """MiB of anonymous memory that the engine may take: now, and at best. 0: not known."""

    now_mib: float = 0.0
    ever_mib: float = 0.0


def _key(settings: EngineSettings) -> list[object]:
    status = settings.path.stat()
    return [
        str(settings.path),
        status.st_size,
        status.st_mtime_ns,
        settings.context,
        settings.batch,
        settings.parallel,
        version("llama-cpp-python"),
    ]


def remembered(settings: EngineSettings) -> Footprint | None:
    """What an earlier load has found of this very file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(settings.kept.read_text()) if settings.kept else {}
        if kept and kept["file"] == _key(settings):
            return Footprint.model_validate(kept["footprint"])
    return None


def remember(settings: EngineSettings, footprint: Footprint | None) -> None:
    if settings.kept and footprint:
        with contextlib.suppress(OSError):
            settings.kept.write_text(json.dumps({"file": _key(settings), "footprint": footprint.model_dump()}))
