"""Where calls happen."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.grants import Own

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Places:
    """Where calls happen: relative paths start at `folder`; `sysfs` and `proc` are where readings come from."""

    folder: Path
    sysfs: str = "/sys"
    proc: str = "/proc"
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The nodes of each device that a scope can name, as globs."""
    own: Own = field(default_factory=Own)
    """The daemon's own files: no call gets to them, whatever the grants say."""

    def variables(self) -> dict[str, str]:
        prefix = os.environ.get("PREFIX", "/usr")  # Termux keeps its programs in a folder of its own
        return {"folder": str(self.folder), "sysfs": self.sysfs, "proc": self.proc, "prefix": prefix}
