"""Model files: the pocket model that comes with agentd, or a GGUF of the user's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from agentd.models import catalogue

if TYPE_CHECKING:
    from collections.abc import Callable

POCKET = "pocket"
_CHUNK = 1 << 20
_SMALL = 32 << 20
_LAST = 19
FileIdentity = tuple[int, int, int]
"""Size, time of the last change in ns, inode: another file, or another content, has another one."""


def locate(model: str) -> Path:
    """The file for `engine.model`: `pocket`, a name of the catalogue, or a path (which need not exist yet)."""
    if model == POCKET:
        return Path(str(files("agentd.models") / "pocket.gguf"))
    if (found := catalogue.named(model)) is not None:
        return found.path
    return Path(model).expanduser().absolute()


def in_no_hurry() -> None:
    """The thread that calls this goes behind all others from then on (setpriority(2): on Linux, a thread alone)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST)


def known_digest(model: Path, known: Path) -> str:
    """What `digest` has found of this very file; empty if it was never read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(known.read_text())
        if kept["file"] == _named(model):
            return str(kept["sha256"])
    return ""


def identity(model: Path) -> FileIdentity | None:
    """None where there is no file."""
    with contextlib.suppress(OSError):
        status = model.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino
    return None


def _named(model: Path) -> list[object]:
    return [str(model), *(identity(model) or ())]


class _GivenUp(Exception):
    """Nobody wants to know any more."""


def sha256_of(file: Path, tell: Callable[[int], None]) -> str:
    """Hexadecimal; `tell` gets how many bytes were read so far. Raises OSError.

    Reading takes a minute for gigabytes on a card; what was read leaves the page cache at once, as the model needs the memory.
    """
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found.update(chunk)
            # Of this piece only: from the beginning each time, it took a whole core for minutes, with 2.6 GB.
            os.posix_fadvise(opened.fileno(), opened.tell() - len(chunk), len(chunk), os.POSIX_FADV_DONTNEED)
            tell(opened.tell())
    return found.hexdigest()


def digest(model: Path, known: Path, stop: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of a model file, hexadecimal; empty if it can't be read. Kept in `known`: large files are read once.

    `stop` is asked between two pieces; what was given up is empty.
    """
    if before := known_digest(model, known):
        return before

    def go_on(_: int) -> None:
        if stop():
            raise _GivenUp

    try:
        name = _named(model)
        found = sha256_of(model, go_on)
    except (OSError, _GivenUp):
        return ""
    with contextlib.suppress(OSError):
        known.write_text(json.dumps({"file": name, "sha256": found}))
    return found


class Digests:
    """SHA-256 of what is loaded: of the file as it was then, and never of one that has taken its place. Safe to use from
    several threads.
    """

    def __init__(self, model: Path, known: Path) -> None:
        self._model, self._known = model, known
        self._found: dict[FileIdentity, str] = {}
        self._reading: set[FileIdentity] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def of(self, loaded: FileIdentity | None) -> str:
        """Empty where it is not known: a large file is read on a thread of its own then, for the next who asks."""
        if loaded and loaded not in self._found:
            if loaded[0] <= _SMALL or known_digest(self._model, self._known):
                self._read(loaded)
            else:
                threading.Thread(target=self.read, args=(loaded,), name="digest", daemon=True).start()
        return self._found.get(loaded, "") if loaded else ""

    def read(self, loaded: FileIdentity | None) -> str:
        """The same, read if it has to be and nobody does so already: for a thread of its own, which goes behind all others."""
        with self._lock:
            if loaded is None or loaded in self._reading:
                return ""
            self._reading.add(loaded)
        try:
            in_no_hurry()
            self._read(loaded)
        finally:
            self._reading.discard(loaded)
        return self._found.get(loaded, "")

    def close(self) -> None:
        self._ended.set()

    def _read(self, loaded: FileIdentity) -> None:
        if loaded not in self._found and identity(self._model) == loaded:
            found = digest(self._model, self._known, self._ended.is_set)
            if found and identity(self._model) == loaded:  # or it was replaced meanwhile
                self._found[loaded] = found
