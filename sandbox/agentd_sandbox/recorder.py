"""The hook before every change: where whoever owns the files keeps their former state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


Operation = Literal["create", "write", "append", "move", "remove", "replace"]


class Refusal(Exception):
    """A recorder's no: the change is not made and the worker gets `errno`."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.errno = code


@dataclass(frozen=True, slots=True)
class Change:
    """A change about to be made to a real path.

    What is there is written to or changed in place (`write`), or at its end only (`append`), gets another name (`move`), or
    goes for good: `remove`, or `replace` by something new. With `create` nothing is there. Another change of a path may
    follow: what was appended to may be written to later.
    """

    operation: Operation
    path: bytes


class Recorder(Protocol):
    """Makes the former state of paths durable before they are changed."""

    @property
    def mark(self) -> bytes:
        """Part of the names of files that are to take the place of others, so that nobody else's are taken for one."""

    def before_changes(self, changes: Sequence[Change]) -> frozenset[bytes] | None:
        """Return once the states are on disk; raise Refusal if they can't be kept.

        Returns those paths of `remove` and `replace` whose file is kept as it is, by another name: nothing is written to it
        any more, something new takes its place.
        """
