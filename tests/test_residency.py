"""What of a mapped file is in memory, page by page, seen from this process's own mapping."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from agentd.models.residency import resident

PAGE = mmap.PAGESIZE
SELF = Path("/proc/self")


def test_only_touched_pages_of_the_mapped_part_count(tmp_path: Path):
    """64 pages, of which the second half is mapped. The kernel maps what lies around a touched page, too: 16 pages, aligned."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 * PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 32 * PAGE, offset=32 * PAGE) as mapping:
        mapping.madvise(mmap.MADV_RANDOM)
        assert resident(SELF, path, [(0, 64 * PAGE)]) == 0
        mapping[20 * PAGE] = 1
        whole = resident(SELF, path, [(0, 64 * PAGE)])
        assert PAGE <= whole <= 16 * PAGE
        assert resident(SELF, path, [(52 * PAGE, 53 * PAGE)]) == PAGE
        assert resident(SELF, path, [(0, 32 * PAGE)]) == 0
        for page in range(32):
            mapping[page * PAGE] = 1
        assert resident(SELF, path, [(0, 40 * PAGE), (40 * PAGE, 64 * PAGE)]) == 32 * PAGE


def test_a_page_that_two_spans_share_counts_once(tmp_path: Path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] = mapping[PAGE] = 1
        assert resident(SELF, path, [(0, 100), (100, PAGE + 7), (PAGE + 7, 2 * PAGE)]) == 2 * PAGE


def test_a_file_that_is_not_mapped_is_not_resident(tmp_path: Path):
    (tmp_path / "other").write_bytes(bytes(PAGE))
    assert resident(SELF, tmp_path / "other", [(0, PAGE)]) == 0


def test_a_process_that_has_ended_is_an_error(tmp_path: Path):
    with pytest.raises(OSError, match="No such"):
        resident(Path("/proc/999999999"), tmp_path, [(0, PAGE)])
