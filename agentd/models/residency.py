"""Which parts of a mapped file are resident in a process: proc_pid_pagemap(5), a word of 8 bytes for each page.

The kernel shows whose page is present to the process's own user; only where in memory it lies is kept from others.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_PAGE, _WORD = mmap.PAGESIZE, 8
_PRESENT = 0x80  # of a word's last byte


@dataclass(frozen=True, slots=True)
class Mapping:
    """Bytes `start` to `end` of a process show a file from `offset` on."""

    start: int
    end: int
    offset: int


def resident(process: Path, file: Path, spans: Iterable[tuple[int, int]]) -> int:
    """Bytes of the file's `spans` that are resident in a process (its folder in /proc); a page counts where its first byte is.

    Raises OSError where the process has ended or may not be looked at.
    """
    mappings = _mappings(process, file)
    total = 0
    with (process / "pagemap").open("rb", buffering=0) as pagemap:
        for first, last in spans:
            pages = -(-first // _PAGE) * _PAGE, -(-last // _PAGE) * _PAGE
            for mapping in mappings:
                begin = max(pages[0], mapping.offset)
                end = min(pages[1], mapping.offset + mapping.end - mapping.start)
                if begin < end:
                    pagemap.seek((mapping.start + begin - mapping.offset) // _PAGE * _WORD)
                    words = pagemap.read((end - begin) // _PAGE * _WORD)
                    total += sum(byte & _PRESENT != 0 for byte in words[_WORD - 1 :: _WORD]) * _PAGE
    return total


def _mappings(process: Path, file: Path) -> list[Mapping]:
    """Of proc_pid_maps(5): `start-end permissions offset device inode path`."""
    found, name = [], str(file.resolve())
    with (process / "maps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == name:
                start, _, end = fields[0].partition("-")
                found.append(Mapping(int(start, 16), int(end, 16), int(fields[2], 16)))
    return found
