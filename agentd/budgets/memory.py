"""Memory: what our cgroup leaves, and what the engine's process takes, split into what can kill and what can only slow down.

Anonymous memory over a cgroup's limit is killed for; mapped weights are not: they are dropped and read again. Major faults
hardly show that, as the kernel reads ahead (measured: 0.1 a token where 120 of 260 MiB did not fit); what was read from disk
does (read_bytes of proc_pid_io(5)). Unmapping weights leaves them in the page cache. So there are three numbers: anonymous
(with what is in swap), mapped and resident, and cached (mincore(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.budgets.files import read_line, read_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_UNLIMITED = 1 << 50  # cgroup v1 says "no limit" with a number near 2^63
_SPLIT_S = 10.0  # between two looks at all pages of the weights: one takes 10 ms for 3 GB
_OTHER_FILES = 16 << 20  # bytes that are read for libraries, once in a while: measured with a small model and a cold cache
_FEW_PASSES, _FEW_S = 2, 5.0  # over which reading is counted at least: so many passes, or so long
_PAGE = mmap.PAGESIZE
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))  # the only one of mincore(2) that means something


@dataclass(frozen=True, slots=True)
class Split:
    """Of the engine's process, in MiB. `cached_mib` is None where only the file's owner is told (mincore(2), Linux 5.2)."""

    anonymous_mib: float
    mapped_mib: float
    weights_mib: float
    cached_mib: float | None


@dataclass(slots=True)
class Engine:
    """Looks at the engine's process, if there is one. `pid` is 0 while there is none; `passes` counts decodes."""

    proc: Path
    weights: Path
    pid: Callable[[], int]
    passes: Callable[[], int]
    clock: Callable[[], float] = time.monotonic
    _pages: tuple[float, int, float, float | None] = (0.0, 0, 0.0, None)
    """When it was looked at them, of which process, MiB mapped, MiB cached."""
    _read: tuple[int, int, int, float] = (0, 0, 0, 0.0)
    """Of which process, bytes read from disk, passes, when."""
    _reread_pct: float | None = None

    def split(self) -> Split | None:
        pid = self.pid()
        status = _fields(self.proc / str(pid) / "status") if pid else {}
        if "RssAnon" not in status:
            return None
        anonymous = (status["RssAnon"] + status.get("VmSwap", 0)) / 1024
        with contextlib.suppress(OSError):
            weights = self.weights.stat().st_size / 2**20
            mapped, cached = self._look(pid)
            return Split(anonymous, mapped, weights, cached)
        return None

    def reread_pct(self) -> float | None:
        """What of the weights was read from disk again for each pass over them, of late. None: not known."""
        pid, passes, now = self.pid(), self.passes(), self.clock()
        read = _fields(self.proc / str(pid) / "io").get("read_bytes") if pid else None
        if read is None:
            self._reread_pct = None
            return None
        known, before, counted, since = self._read
        if known != pid:  # loading reads all that is wanted: that is no sign of anything
            self._read, self._reread_pct = (pid, read, passes, now), None
        elif passes - counted >= _FEW_PASSES or now - since >= _FEW_S:
            with contextlib.suppress(OSError):
                share = max(0, read - before - _OTHER_FILES) / max(1, self.weights.stat().st_size) * 100
                self._reread_pct = share / max(1, passes - counted)
            self._read = pid, read, passes, now
        return self._reread_pct

    def _look(self, pid: int) -> tuple[float, float | None]:
        at, known, mapped, cached = self._pages
        if known != pid or self.clock() - at >= _SPLIT_S:
            mapped, cached = mapped_mib(self.proc / str(pid) / "smaps", self.weights), cached_mib(self.weights)
            self._pages = self.clock(), pid, mapped, cached
        return mapped, cached


def mapped_mib(smaps: Path, file: Path) -> float:
    """How much of a file is resident in the mappings of a process. Raises OSError."""
    resident, ours, name = 0, False, str(file.resolve())
    with smaps.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line[0] in "0123456789abcdef":
                ours = line.rstrip("\n").endswith(name)
            elif ours and line.startswith("Rss:"):
                resident += int(line.split()[1])
    return resident / 1024


def cached_mib(file: Path) -> float | None:
    """How much of a file is in the page cache. Raises OSError."""
    if not os.stat(file).st_size:
        return 0.0
    if os.stat(file).st_uid != os.geteuid() and not os.access(file, os.W_OK):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)  # nothing of it is touched
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        pages = (ctypes.c_ubyte * ((size + _PAGE - 1) // _PAGE))()
        failed = libc.mincore(address, size, pages)
    finally:
        libc.munmap(address, size)
    return None if failed else bytes(pages).translate(_LOWEST_BIT).count(1) * _PAGE / 2**20


@dataclass(frozen=True, slots=True)
class Headroom:
    """What the fullest cgroup still leaves before it kills, and the least limit of all, in MiB; where its pressure is (v2)."""

    free_mib: float
    limit_mib: float
    pressure: Path | None = None


@dataclass(slots=True)
class Cgroup:
    """Ours, by what proc says of this process, below the mounted hierarchies. The tightest of it and its ancestors counts."""

    proc: Path
    mounted: Path
    _folders: list[tuple[Path, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for line in (read_text(self.proc / "self" / "cgroup") or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                self._add(self.mounted / "memory", path, v2=False)
            elif number == "0":
                self._add(self.mounted, path, v2=True)

    def _add(self, root: Path, path: str, *, v2: bool) -> None:
        """With its ancestors. In a container the path may be the host's, which is not there: then the root is ours."""
        folder = root / path.strip("/")
        while folder != root and folder.is_relative_to(root):
            if folder.is_dir():
                self._folders.append((folder, v2))
            folder = folder.parent
        self._folders.append((root, v2))

    def headroom(self) -> Headroom | None:
        """None where there is no limit."""
        found = [each for folder, v2 in self._folders if (each := _v2(folder) if v2 else _v1(folder))]
        if not found:
            return None
        fullest = min(found, key=lambda each: each.free_mib)
        return Headroom(fullest.free_mib, min(each.limit_mib for each in found), fullest.pressure)


def _v2(folder: Path) -> Headroom | None:
    """memory.high counts as a limit, too: past it all is slowed until it is unusable (cgroup-v2.rst)."""
    limits = [limit for name in ("memory.max", "memory.high") if (limit := _whole(folder / name)) is not None]
    used, stat = _whole(folder / "memory.current"), _stat(folder / "memory.stat")
    if not limits or used is None:
        return None
    free = min(limits) - used + stat.get("file", 0) - stat.get("shmem", 0)
    pressure = folder / "memory.pressure"
    return Headroom(free / 2**20, min(limits) / 2**20, pressure if pressure.exists() else None)


def _v1(folder: Path) -> Headroom | None:
    limit, used = _whole(folder / "memory.limit_in_bytes"), _whole(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    stat = _stat(folder / "memory.stat")
    return Headroom((limit - used + stat.get("total_cache", 0) - stat.get("total_shmem", 0)) / 2**20, limit / 2**20)


def _stat(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in (read_text(file) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _fields(file: Path) -> dict[str, int]:
    """Of the kind `Name:  12 kB`, or `name: 12`."""
    found = {}
    for line in (read_text(file) or "").splitlines():
        name, _, rest = line.partition(":")
        amount = rest.split()[:1]
        if amount and amount[0].isdecimal():
            found[name] = int(amount[0])
    return found


def _whole(file: Path) -> int | None:
    said = read_line(file) or ""
    return int(said) if said.isdecimal() else None
