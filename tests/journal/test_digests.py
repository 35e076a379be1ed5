"""Digests of contents: those of everybody, and for what is too long to be read whole, of what there is of it."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from agentd.journal import digests
from agentd.journal.digests import digest

if TYPE_CHECKING:
    from pathlib import Path


def of(path: Path, **more: float) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return digest(descriptor, **more)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 5000, os.urandom(3 << 20)])
def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path, content: bytes):
    (tmp_path / "f").write_bytes(content)
    assert of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_a_long_file_is_known_by_its_blocks_whether_or_not_it_has_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And by their places, and by its length."""
    monkeypatch.setattr(digests, "PLAIN_BYTES", 10_000)
    full, holes, other, longer = (tmp_path / name for name in ("full", "holes", "other", "longer"))
    full.write_bytes(b"a" * 100 + bytes(99_900) + b"end")
    for path, size, places in (
        (holes, 100_003, (0, 100_000)),
        (other, 100_003, (8192, 100_000)),
        (longer, 200_000, (0, 100_000)),
    ):
        with path.open("wb") as file:
            file.write(b"")
            os.truncate(path, size)
            file.seek(places[0])
            file.write(b"a" * 100)
            file.seek(places[1])
            file.write(b"end")
    assert of(full) == of(holes)
    assert len({of(path) for path in (holes, other, longer)}) == 3
    assert of(full).startswith("blocks:")


def test_four_terabytes_of_holes_are_no_work(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x")
    try:
        os.truncate(tmp_path / "f", 4 << 40)
    except OSError:
        pytest.skip("this file system has no files of 4 TiB")
    begun = time.monotonic()
    assert of(tmp_path / "f").startswith("blocks:")
    assert time.monotonic() - begun < 10  # reading it would take hours


def test_reading_ends_when_it_takes_too_long(tmp_path: Path):
    (tmp_path / "f").write_bytes(bytes(5 << 20))
    with pytest.raises(TimeoutError):
        of(tmp_path / "f", patience_s=-1.0)
