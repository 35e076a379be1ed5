"""Model files: the pocket model that comes with agentd, or a GGUF of the user's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path

POCKET = "pocket"
_CHUNK = 1 << 20


def locate(model: str) -> Path:
    """The file for `engine.model`: `pocket`, or a path (which need not exist yet)."""
    if model == POCKET:
        return Path(str(files("agentd.models") / "pocket.gguf"))
    return Path(model).expanduser().absolute()


def digest(model: Path, known: Path) -> str:
    """SHA-256 of a model file, hexadecimal; empty if it can't be read. Kept in `known`: large files are read once.

    Reading takes a minute for gigabytes on a card; what was read leaves the page cache at once, as the model needs the memory.
    """
    try:
        status = model.stat()
        name = [str(model), status.st_size, status.st_mtime_ns, status.st_ino]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(known.read_text())
            if kept["file"] == name:
                return str(kept["sha256"])
        found = hashlib.sha256()
        with model.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
    except OSError:
        return ""
    with contextlib.suppress(OSError):
        known.write_text(json.dumps({"file": name, "sha256": found.hexdigest()}))
    return found.hexdigest()
