"""The hook before every change: where whoever owns the files keeps their former state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Refusal(Exception):
    """A recorder's no: the change is not made and the worker gets `errno`."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.errno = code


@dataclass(frozen=True, slots=True)
class Change:
    """A change about to be made to a real path. `operation` is create, write or remove."""

    operation: Literal["create", "write", "remove"]
    path: bytes


class Recorder(Protocol):
    """Makes the former state of paths durable before they are changed."""

    def before_changes(self, changes: Sequence[Change]) -> None:
        """Return once the states are on disk; raise Refusal if they can't be kept."""
