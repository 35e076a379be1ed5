"""States of the model's cache on disk: the beginnings of prompts, so that no start of the daemon decodes them again.

A file serves only where all that made it is the same: the model, llama.cpp and the processor's features it uses, the kind of
cache, the very tokens. It is written to a name of its own and then renamed; what a kill or a broken card leaves is known by
its digest, and deleted.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llama_cpp
import llama_cpp.llama_cpp as C

from agentd.engine.settings import NEW, PREFIX, SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_MAGIC = b"agentd-prefix-1\n"
_HEADER = struct.Struct("<II")  # bytes of the description, tokens
_LONGEST = 8192  # bytes of a description
_SAMPLES, _SAMPLE = 64, 64 << 10
_LEAST_FREE = 256 << 20
"""What a cache leaves free of a disk."""


def identity(model: Path) -> str:
    """What a state depends on beside its tokens and the kind of cache: the model file and llama.cpp.

    Of the file its size, its beginning (all metadata and the vocabulary's) and samples of its tensors: to read all of it
    would take longer than what is saved.
    """
    digest = hashlib.sha256()
    with model.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for n in range(_SAMPLES):
            file.seek(n * size // _SAMPLES)
            digest.update(file.read(_SAMPLE))
    library = f"llama-cpp-python {llama_cpp.__version__}, {C.llama_print_system_info().decode('utf-8', 'replace')}"
    return f"{digest.hexdigest()}, {library}"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    length: int  # tokens
    key: str  # of these tokens


class PrefixFiles:
    """In `folder`, of `quota` bytes in all. `identity` names all that a state depends on but its tokens.

    Use from one thread. A folder that can't be written, or a full disk, costs time later and nothing else.
    """

    def __init__(self, folder: Path, identity: str, quota: int) -> None:
        self._folder, self._identity, self._quota = folder, identity, quota
        self._files: dict[str, _File] = {}
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._scan()

    def longest(self, prompt: Sequence[int], most: int) -> int:
        """How many tokens of the beginning of `prompt`, up to `most`, there is a state of."""
        lengths = sorted({file.length for file in self._files.values() if file.length <= most}, reverse=True)
        return next((n for n in lengths if self._key(prompt[:n]) in self._files), 0)

    def load(self, tokens: Sequence[int]) -> memoryview | None:
        """The state behind exactly these tokens. What is damaged is deleted."""
        file = self._files.get(self._key(tokens))
        if file is None:
            return None
        with contextlib.suppress(OSError):
            if (size := file.path.stat().st_size) <= self._quota:
                data = bytearray(size)
                with file.path.open("rb") as source:
                    del data[source.readinto(data) :]
                if (state := self._state(data, tokens)) is not None:
                    os.utime(file.path)
                    return state
        self._delete(file)
        return None

    def refuse(self, tokens: Sequence[int]) -> None:
        """llama.cpp does not take it."""
        if file := self._files.get(self._key(tokens)):
            self._delete(file)

    def save(self, tokens: Sequence[int], state: Callable[[], memoryview], *, session: bool) -> bool:
        """Whether it is there now. `state` is asked only if there is room for it."""
        key = self._key(tokens)
        if key in self._files:
            return True
        if not self._has_room():
            return False
        made, ids = state(), array.array("i", tokens).tobytes()
        digest = hashlib.sha256(ids)
        digest.update(made)
        description = json.dumps({"identity": self._identity, "digest": digest.hexdigest()}).encode()
        parts = (_MAGIC + _HEADER.pack(len(description), len(tokens)), description, ids, made)
        if sum(map(len, parts)) > self._quota:
            return False
        file = _File(self._folder / f"{key}{SESSION if session else PREFIX}", len(tokens), key)
        temporary = file.path.with_name(f"{file.path.name}{NEW}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as out:
                out.writelines(parts)
            temporary.rename(file.path)
            self._files[key] = file
            self._keep_quota(file.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False
        return True

    def forget_sessions(self) -> None:
        """Delete what holds words of users and tools."""
        for file in [each for each in self._files.values() if each.path.suffix == SESSION]:
            self._delete(file)

    def _scan(self) -> None:
        """What is there, of this identity. What is of another model or library is deleted when room is wanted."""
        for path in self._folder.iterdir():
            if path.suffix == NEW:
                with contextlib.suppress(OSError):
                    path.unlink()
            elif path.suffix in (PREFIX, SESSION) and path.stem.startswith(self._mark()):
                with contextlib.suppress(OSError, struct.error):
                    with path.open("rb") as file:
                        head = file.read(len(_MAGIC) + _HEADER.size)
                    length = _HEADER.unpack(head[len(_MAGIC) :])[1]
                    self._files[path.stem] = _File(path, length, path.stem)

    def _state(self, data: bytearray, tokens: Sequence[int]) -> memoryview | None:
        start = len(_MAGIC) + _HEADER.size
        if not data.startswith(_MAGIC) or len(data) < start:
            return None
        described, length = _HEADER.unpack(data[len(_MAGIC) : start])
        try:
            description = json.loads(data[start : start + min(described, _LONGEST)])
            identity, digest = description["identity"], description["digest"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        rest, ids = memoryview(data)[start + described :], array.array("i", tokens).tobytes()
        if identity != self._identity or length != len(tokens) or rest[: len(ids)] != ids:
            return None
        return rest[len(ids) :] if hashlib.sha256(rest).hexdigest() == digest else None

    def _has_room(self) -> bool:
        with contextlib.suppress(OSError):
            free = os.statvfs(self._folder)
            return free.f_bavail * free.f_frsize >= _LEAST_FREE
        return False

    def _keep_quota(self, newest: Path) -> None:
        """Those of other models or libraries go first, then what was not used for longest; never the newest, whatever the
        clock said before. Raises OSError.
        """
        there, now = [], time.time_ns()
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                there.append((path == newest, path.stem in self._files, min(now, status.st_mtime_ns), path, status.st_size))
        left = sum(size for *_, size in there) - self._quota
        for is_newest, _mine, _when, path, size in sorted(there):
            if left <= 0 or is_newest:
                return
            left -= size
            self._files.pop(path.stem, None)
            with contextlib.suppress(OSError):
                path.unlink()

    def _delete(self, file: _File) -> None:
        self._files.pop(file.key, None)
        with contextlib.suppress(OSError):
            file.path.unlink()

    def _mark(self) -> str:
        return hashlib.sha256(self._identity.encode()).hexdigest()[:16]

    def _key(self, tokens: Sequence[int]) -> str:
        return f"{self._mark()}-{hashlib.sha256(array.array('i', tokens).tobytes()).hexdigest()[:32]}"
