"""A real tool that opens a file to append to it, and then tries to change what is there already."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.calls.house import House

if TYPE_CHECKING:
    from pathlib import Path

ALL = (("*", "read:{h}", "allow"), ("*", "write:{h}", "allow"), ("*", "exec:/usr", "allow"))
OPEN = "import ctypes, fcntl, os, threading\nlog = os.open('log', os.O_WRONLY | os.O_APPEND)\nos.write(log, b'more')\n"
TRICKS = {
    "no trick": "",
    "F_SETFL": "fcntl.fcntl(log, fcntl.F_SETFL, 0); os.pwrite(log, b'X', 0)",
    "F_SETFL of a copy": "fcntl.fcntl(os.dup(log), fcntl.F_SETFL, os.O_NONBLOCK); os.pwrite(log, b'X', 0)",
    "F_SETFL by a child": "os.fork() or (fcntl.fcntl(log, fcntl.F_SETFL, 0), os._exit(0)); os.wait(); os.pwrite(log, b'X', 0)",
    "ftruncate": "os.ftruncate(log, 5)",
    "ftruncate by a thread": "t = threading.Thread(target=os.ftruncate, args=(log, 5)); t.start(); t.join()",
    "pwrite": "os.pwrite(log, b'X', 0)",
    "RWF_NOAPPEND": "os.pwritev(log, [b'X'], 0, 0x20)",
    "fallocate": "ctypes.CDLL(None).fallocate(log, 3, 0, 4096)",
    "sendfile": "a = os.open('other', os.O_RDONLY); os.sendfile(log, a, 0, 4)",
    "copy_file_range": "a = os.open('other', os.O_RDONLY); os.copy_file_range(a, log, 4, 0, 0)",
    "opened again": "os.pwrite(os.open('/proc/self/fd/%d' % log, os.O_WRONLY), b'X', 0)",
    "mapped": "import mmap; mmap.mmap(log, 4096)[0] = 1",
    "another one after a trick": "os.ftruncate(log, 5)\na = os.open('other', os.O_WRONLY | os.O_APPEND); os.ftruncate(a, 1)",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_whatever_it_tries_all_comes_back(tmp_path: Path, trick: str):
    """Also with several threads and processes; nothing is copied where there is no need."""
    with House(tmp_path, ALL) as house:
        before = {}
        for name in ("log", "other"):
            before[name] = os.urandom(100_000)
            (house.home / name).write_bytes(before[name])
        program = OPEN + f"try:\n  {TRICKS[trick]}\nexcept OSError: pass\n".replace("\na =", "\n  a =")
        if trick == "no trick":
            program = OPEN
        (house.home / "p.py").write_text(program)
        result = house.run(house.call("shell.run", command="python3 p.py", folder=str(house.home)))
        assert not result.failed, result.output
        assert (house.home / "log").read_bytes() != before["log"], result.output
        kept = house.store.read(lambda db: dict(db.execute("SELECT path, length FROM pre_image")))
        noticed = trick.startswith(("F_SETFL", "ftruncate", "another"))
        assert kept[os.fsencode(house.home / "log")] == (0 if noticed else 100_000)
        house.journal.undo(result.id, "unix:pi")
        assert {name: (house.home / name).read_bytes() for name in before} == before
