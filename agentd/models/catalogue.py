"""The catalogue: model files that are known, where they are, what they take, and which of them fits a device."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from agentd.errors import EngineError, Reason
from agentd.places import default_data

if TYPE_CHECKING:
    from pathlib import Path

_ELSEWHERE = re.compile(
    r"hf:(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})(?:@(?P<revision>[\w.-]{1,64}))?/(?P<file>[\w.-]{1,150}\.gguf)"
)
_ROOM = 1.1  # of what the engine takes: others grow, too


class Entry(BaseModel):
    """One file. `bytes` is rounded unless `exact`; `sha256` is empty where nobody has told it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    repository: str
    file: str
    revision: str = "main"
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    bytes: int = 0
    exact: bool = False
    resident_mib: int = 0
    known_by: str = ""
    purpose: str = ""

    @property
    def path(self) -> Path:
        """Where it lies when it has been pulled: others than those of the catalogue in a folder of their own."""
        return (folder() if self.known_by else folder() / self.repository.replace("/", "--")) / self.file


@dataclass(frozen=True, slots=True)
class Advice:
    """Which file fits, if any does, and why in a sentence."""

    entry: Entry | None
    words: str


def folder() -> Path:
    return default_data() / "models"


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Larger models first."""
    found = tomllib.loads((files("agentd.models") / "catalogue.toml").read_text(encoding="utf-8"))
    return tuple(Entry.model_validate(each) for each in found["model"])


def named(name: str) -> Entry | None:
    """One of the catalogue."""
    return next((each for each in entries() if each.name == name), None)


def entry(name: str) -> Entry:
    """One of the catalogue, or `hf:OWNER/REPOSITORY[@REVISION]/FILE.gguf`. Raises EngineError (MODEL_INVALID)."""
    if (kept := named(name)) is not None:
        return kept
    if found := _ELSEWHERE.fullmatch(name):
        return Entry(name="other", repository=found["repository"], file=found["file"], revision=found["revision"] or "main")
    known = ", ".join(each.name for each in entries())
    hint = f"The catalogue has {known}; any other one is named hf:OWNER/REPOSITORY/FILE.gguf."
    raise EngineError(Reason.MODEL_INVALID, f"There is no model {name!r}.", hint=hint, metadata={"model": name})


def advice(total_mib: float, free_mib: float) -> Advice:
    """The largest file that the device's memory has room for; said with what is free by now."""
    fitting = [each for each in entries() if each.resident_mib * _ROOM <= total_mib * 0.75]
    best = next((each for each in fitting if each.resident_mib * _ROOM <= free_mib), None)
    if best is None:
        smallest = min(entries(), key=lambda each: each.resident_mib)
        need = f"{smallest.name} needs {_gib(smallest.resident_mib)}, you have {_gib(free_mib)} free"
        return Advice(None, f"{need}: use the pocket model, or free some memory")
    larger = fitting[0]
    if larger is not best:
        need = f"{larger.name} needs {_gib(larger.resident_mib)}, you have {_gib(free_mib)} free"
        return Advice(best, f"{need}: use {best.name}")
    return Advice(best, f"{best.name} needs {_gib(best.resident_mib)}, you have {_gib(free_mib)} free: use {best.name}")


def _gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"
