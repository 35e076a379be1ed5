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
class Contact:
    """A peer, how often it was connected to, and the bytes that went there and came back; None where nobody counted."""

    host: str
    port: int
    connections: int
    sent: int | None
    received: int | None


@dataclass(frozen=True, slots=True)
class Operation:
    """What was asked of a device, and how it ended. Neither `answer` nor `error`: it went on when the call had ended."""

    device: str
    asked: dict[str, Any]
    answer: dict[str, Any] | None = None
    error: str = ""

    @property
    def ended(self) -> str:
        return "failed" if self.error else "unfinished" if self.answer is None else "done"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker ended. Exactly one of `result` and `error` is set."""

    result: dict[str, Any] | None
    error: str | None
    denials: tuple[Denial, ...]
    denied: int
    contacts: tuple[Contact, ...]
    operations: tuple[Operation, ...]
    mediated: int
    cpu_us: int
    rss_kb: int
    wall_us: int
