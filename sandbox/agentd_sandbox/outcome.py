"""What is told of a call when it is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Denial:
    """A call that was refused, with the path or peer it named."""

    call: str
    target: str
    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker ended. Exactly one of `result` and `error` is set."""

    result: dict[str, Any] | None
    error: str | None
    denials: tuple[Denial, ...]
    denied: int
    peers: tuple[tuple[str, int], ...]
    mediated: int
    cpu_us: int
    rss_kb: int
    wall_us: int
