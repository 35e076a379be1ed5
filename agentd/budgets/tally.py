"""Things that are counted as they happen, by name and labels, for the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Tally:
    """Lives on the event loop."""

    counts: dict[str, dict[Labels, float]] = field(default_factory=dict)

    def add(self, name: str, labels: Mapping[str, str] = MappingProxyType({}), amount: float = 1.0) -> None:
        each = self.counts.setdefault(name, {})
        key = tuple(sorted(labels.items()))
        each[key] = each.get(key, 0.0) + amount
