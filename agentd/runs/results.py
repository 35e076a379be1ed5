"""How much of a tool's result the model gets to see: a small model's context is soon full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LONGEST = 3000
"""Characters of strings in one result. The whole result is in the run's events all the same."""


@dataclass(slots=True)
class _Room:
    left: int


def for_the_model(output: dict[str, Any]) -> dict[str, Any]:
    """The result with long strings and lists cut, each cut said in words."""
    return _fit_mapping(output, _Room(LONGEST))


def _fit_mapping(mapping: dict[str, Any], room: _Room) -> dict[str, Any]:
    return {key: _fit(value, room) for key, value in mapping.items()}


def _fit(value: Any, room: _Room) -> Any:
    match value:
        case str():
            kept = value[: max(0, room.left)]
            room.left -= len(kept)
            more = len(value) - len(kept)
            return f"{kept} ... ({more} more characters)" if more else value
        case list():
            return _fit_list(value, room)
        case dict():
            return _fit_mapping(value, room)
        case _:
            return value


def _fit_list(items: list[Any], room: _Room) -> list[Any]:
    kept: list[Any] = []
    for n, item in enumerate(items):
        if room.left <= 0:
            kept.append(f"({len(items) - n} more)")
            break
        kept.append(_fit(item, room))
    return kept
