"""Small files of the kernel: what can't be read is not said in this round (EIO, ENODATA, EAGAIN, or it has gone)."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LONGEST = 16 << 10


def folders(folder: Path, begins: str) -> Iterator[Path]:
    """Those in it whose names begin so, in order."""
    with contextlib.suppress(OSError):
        yield from sorted(path for path in folder.iterdir() if path.name.startswith(begins))


def read_text(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return opened.read(_LONGEST).decode("utf-8", "replace")
    except OSError:
        return None


def read_line(file: Path) -> str | None:
    whole = read_text(file)
    return None if whole is None else whole.strip()


def read_number(file: Path) -> float | None:
    return as_number(read_line(file) or "")


def as_number(said: str) -> float | None:
    """A number that is one."""
    try:
        value = float(said)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
