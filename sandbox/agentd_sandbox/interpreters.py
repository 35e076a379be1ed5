"""Which further program the kernel starts with a program: the one that a script's first line names, and a dynamic loader.

The kernel looks them up by itself, so they are decided on before it does (execve(2), elf(5)).
"""

from __future__ import annotations

import os
import struct

_FIRST_BYTES = 256  # BINPRM_BUF_SIZE
_ELF = b"\x7fELF"
_PT_INTERP = 3
_LONGEST = 4096


def interpreter(descriptor: int) -> bytes | None:
    """The path that a file names; None if it names none. `descriptor` is open to be read."""
    first = os.pread(descriptor, _FIRST_BYTES, 0)
    if first.startswith(b"#!"):
        words = first[2:].split(b"\n", 1)[0].split(None, 1)
        return words[0] if words else None
    return _loader(descriptor, first) if first.startswith(_ELF) else None


def _loader(descriptor: int, first: bytes) -> bytes | None:
    """Of an executable file of this machine's byte order; None if it is no sound one, which the kernel refuses, too."""
    try:
        if first[4] == 2:
            (at,), (size, count) = struct.unpack_from("=Q", first, 32), struct.unpack_from("=HH", first, 54)
            layout, offset, length = struct.Struct("=I"), (8, "=Q"), (32, "=Q")
        else:
            (at,), (size, count) = struct.unpack_from("=I", first, 28), struct.unpack_from("=HH", first, 42)
            layout, offset, length = struct.Struct("=I"), (4, "=I"), (16, "=I")
        table = os.pread(descriptor, min(size * count, 1 << 16), at)
        for start in range(0, len(table) - size + 1, size):
            (kind,) = layout.unpack_from(table, start)
            if kind == _PT_INTERP:
                (where,) = struct.unpack_from(offset[1], table, start + offset[0])
                (long,) = struct.unpack_from(length[1], table, start + length[0])
                return os.pread(descriptor, min(long, _LONGEST), where).split(b"\0", 1)[0] or None
    except (struct.error, OSError, OverflowError, IndexError, ValueError):
        pass
    return None
