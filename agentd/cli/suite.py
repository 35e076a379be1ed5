"""A suite: prompts with what a model should make of them."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agentd.errors import ConfigError, Reason, first_mistake

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LARGEST = 4 << 20
_Z = 1.96  # standard deviations of a 95 % interval


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Call(_Strict):
    """A call that must be made. Of `arguments` those that are named must be so; what stands between slashes, `/like this/`, is
    a regular expression for a text.
    """

    tool: str = Field(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")
    arguments: dict[str, Any] = {}

    @field_validator("arguments")
    @classmethod
    def _can_be_compared(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(arguments)
        except TypeError as e:
            raise ValueError(f"an argument of a call is JSON: {e}") from None
        for each in arguments.values():
            if (pattern := _pattern(each)) is not None:
                re.compile(pattern)
        return arguments

    def fits(self, tool: str, arguments: dict[str, Any]) -> bool:
        missing = object()
        return tool == self.tool and all(_fits(wanted, arguments.get(name, missing)) for name, wanted in self.arguments.items())


class Case(_Strict):
    """`files` are there before the prompt, by paths in the folder of the tools. With `calls` exactly these are to be made, in
    their order; an empty list: none at all. `answer` is a regular expression that must be found in the answer.
    """

    prompt: str = Field(min_length=1)
    files: dict[str, str] = {}
    calls: tuple[Call, ...] | None = None
    answer: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.calls is None and self.answer is None:
            raise ValueError("says neither which calls nor which answer is right")
        if self.answer is not None:
            re.compile(self.answer)
        paths = {PurePosixPath(path) for path in self.files}
        for path in self.files:
            parts = PurePosixPath(path).parts
            if path.startswith("/") or ".." in parts or not parts:
                raise ValueError(f"the file {path!r} is not below the folder of the tools")
            if paths & set(PurePosixPath(path).parents):
                raise ValueError(f"the file {path!r} is below another file")
        return self


class Suite(_Strict):
    """`bundled` are the bundles of agentd that the model is told of."""

    bundled: tuple[str, ...] = ("files", "system")
    case: tuple[Case, ...] = Field(min_length=1)


def load(path: Path) -> Suite:
    """Raises ConfigError (CONFIG_INVALID) naming what is wrong."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(
                Reason.CONFIG_INVALID, f"{path} is too large for a suite.", hint="Is it a model? Those come first."
            )
        return Suite.model_validate(tomllib.loads(path.read_text()))
    except OSError as e:
        why = f"can't be read: {e.strerror}"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, re.error) as e:
        why = str(e)
    except ValidationError as e:
        why = ": ".join(filter(None, first_mistake(e)))
    raise ConfigError(Reason.CONFIG_INVALID, f"{path}: {why}.", hint="docs/engine.md shows a suite.") from None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a case. `ended` is whether the model came to an end by itself; None: the case does not say."""

    calls: bool | None
    answer: bool | None
    ended: bool
    seconds: float
    tokens: int

    @property
    def passed(self) -> bool:
        return self.calls is not False and self.answer is not False and self.ended


def judge(
    case: Case, made: Sequence[tuple[str, dict[str, Any]]], answer: str, *, ended: bool, seconds: float, tokens: int
) -> Verdict:
    """`made` are the calls in their order, each with the arguments that the model gave."""
    calls: bool | None = None
    if case.calls is not None:
        pairs = zip(case.calls, made, strict=False)
        calls = len(made) == len(case.calls) and all(wanted.fits(*call) for wanted, call in pairs)
    said = None if case.answer is None else re.search(case.answer, answer, re.IGNORECASE) is not None
    return Verdict(calls, said, ended, seconds, tokens)


def interval(passed: int, of: int) -> tuple[float, float]:
    """Between which shares the true one lies, with 95 % confidence (Wilson, 1927): right for few cases and for all or none."""
    if not of:
        return 0.0, 1.0
    share, square = passed / of, _Z * _Z
    middle = (share + square / (2 * of)) / (1 + square / of)
    half = _Z * math.sqrt(share * (1 - share) / of + square / (4 * of * of)) / (1 + square / of)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _pattern(wanted: Any) -> str | None:
    """What stands between slashes."""
    marked = isinstance(wanted, str) and len(wanted) > 1 and wanted.startswith("/") and wanted.endswith("/")
    return wanted[1:-1] if marked else None


def _fits(wanted: Any, given: Any) -> bool:
    if isinstance(wanted, str) and isinstance(given, str):
        pattern = _pattern(wanted)
        return wanted == given if pattern is None else bool(re.fullmatch(pattern, given, re.DOTALL | re.IGNORECASE))
    if isinstance(wanted, int | float) and isinstance(given, int | float):
        return isinstance(wanted, bool) == isinstance(given, bool) and wanted == given
    return type(wanted) is type(given) and json.dumps(wanted, sort_keys=True) == json.dumps(given, sort_keys=True)
