"""What a file's content is known by: its SHA-256, taken within a time that is bounded whatever its length says.

A file can claim to be terabytes long and be all holes. Past a length its digest is that of its blocks that are not zero,
with their places: the same content has the same digest, with or without holes, and what is not there is not read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 20.0
"""For one file: at 100 MB/s two gigabytes, more than any call may write."""
PLAIN_BYTES = 1 << 30
_CHUNK = 1 << 20
_BLOCK = 4096
_ZEROES = bytes(_BLOCK)


def digest(descriptor: int, patience_s: float = PATIENCE_S) -> str:
    """Of a file that is open to be read. Raises OSError: ETIMEDOUT if it takes longer than `patience_s`."""
    deadline = time.monotonic() + patience_s
    size = os.fstat(descriptor).st_size
    found = hashlib.sha256()
    if size <= PLAIN_BYTES:
        for _, chunk in _read(descriptor, 0, None, deadline):
            found.update(chunk)
        return found.hexdigest()
    found.update(b"%d" % size)
    for start, end in _extents(descriptor, size):
        for offset, chunk in _read(descriptor, start, end, deadline):
            _add_blocks(found, offset, chunk)
    return "blocks:" + found.hexdigest()


def _add_blocks(found: hashlib._Hash, offset: int, chunk: bytes) -> None:
    for at in range(0, len(chunk), _BLOCK):
        block = chunk[at : at + _BLOCK]
        if block.ljust(_BLOCK, b"\0") != _ZEROES:
            found.update(b"%d:" % (offset + at) + block)


def _read(descriptor: int, start: int, end: int | None, deadline: float) -> Iterator[tuple[int, bytes]]:
    while end is None or start < end:
        chunk = os.pread(descriptor, _CHUNK if end is None else min(_CHUNK, end - start), start)
        if not chunk:
            return
        yield start, chunk
        start += len(chunk)
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, "reading it takes too long")


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole, on whole blocks."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            found = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole from here
                return
            if e.errno != errno.EINVAL:
                raise
            start, found = end, size  # a file system that can't say where its holes are
        start, end = max(end, start - start % _BLOCK), min(size, found + -found % _BLOCK)
        yield start, end
