"""What cgroups of all kinds leave, and what is read of a process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentd.budgets.memory import Cgroup, Engine, cached_mib, mapped_mib

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder: str, maximum: str, current: int, file: int = 0, high: str = "max") -> dict[str, str]:
    stat = f"anon 5\nfile {file * MIB}\nshmem {MIB}\nslab x\n"
    values = {"max": maximum, "high": high, "current": str(current * MIB), "stat": stat}
    return {f"cg/{folder}memory.{name}": value + "\n" for name, value in values.items()}


def v1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    values = {"limit_in_bytes": limit, "usage_in_bytes": used * MIB}
    stat = {f"cg/memory/{folder}memory.stat": f"cache 1\ntotal_cache {cache * MIB}\ntotal_shmem 0\n"}
    return {f"cg/memory/{folder}memory.{name}": f"{value}\n" for name, value in values.items()} | stat


@pytest.mark.parametrize(
    ("said", "files", "free"),
    [
        ("0::/a/b\n", v2("a/b/", str(100 * MIB), 60, 20), 59),
        ("0::/a/b\n", v2("a/b/", "max", 60), None),
        ("0::/a/b\n", v2("a/b/", "max", 60) | v2("a/", str(80 * MIB), 70), 9),  # the parent is tighter
        ("0::/a\n", v2("a/", str(100 * MIB), 60, high=str(70 * MIB)), 9),
        ("0::/host/path\n", v2("", str(50 * MIB), 20), 29),  # a container shows the host's path
        ("5:memory:/x\n0::/\n", v1("x/", 100 * MIB, 60, 20), 60),
        ("5:memory:/x\n0::/\n", v1("x/", 2**63 - 4096, 60, 20), None),
        ("5:cpu,memory:/x\n", v1("x/", 100 * MIB, 60) | v1("", 50 * MIB, 45), 5),
        ("0::/a\n", {}, None),
        ("0::/a\n", {"cg/a/memory.max": "junk\n", "cg/a/memory.current": "-1\n"}, None),
        ("", {}, None),
        ("nonsense\n\n", {}, None),
    ],
)
def test_what_a_cgroup_leaves(tmp_path: Path, said: str, files: dict[str, str], free: float | None):
    """Its limit less what can't be reclaimed; the tightest of it and its ancestors."""
    tree(tmp_path, {"proc/self/cgroup": said, **files})
    headroom = Cgroup(tmp_path / "proc", tmp_path / "cg").headroom()
    assert (headroom and headroom.free_mib) == free


@dataclass
class Process:
    """One made of files."""

    root: Path
    read: int = 0
    passes: int = 0
    now: float = 0.0
    pid: int = 7
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        weights = self.root / "weights"
        weights.touch()
        os.truncate(weights, 1000 * MIB)  # holes: nothing of it is on the disk
        self.engine = Engine(self.root, weights, lambda: self.pid, lambda: self.passes, lambda: self.now)

    def told(self, read: int, passes: int, after_s: float) -> float | None:
        self.read, self.passes, self.now = self.read + read * MIB, self.passes + passes, self.now + after_s
        tree(self.root, {f"{self.pid}/io": f"rchar: 1\nread_bytes: {self.read}\n"})
        return self.engine.reread_pct()


def test_reading_weights_again_shows_per_pass(tmp_path: Path):
    """From the second look on; loading is none; where nothing passes, waiting counts; another process begins anew."""
    process = Process(tmp_path)
    assert process.told(100_000, 0, 1) is None
    assert process.told(416, 4, 2) == pytest.approx(10)
    assert process.told(916, 1, 1) == pytest.approx(10)  # too few to say
    assert process.told(0, 1, 1) == pytest.approx(45)
    assert process.told(1016, 0, 6) == pytest.approx(100)  # a pass that takes very long
    assert process.told(15, 2, 2) == 0  # libraries
    process.pid = 8
    assert process.told(5000, 0, 1) is None
    process.pid = 0
    assert process.engine.reread_pct() is None
    assert process.engine.split() is None


def test_mapped_and_cached_are_what_the_kernel_says(tmp_path: Path):
    """Of a file of our own, mapped and touched in part."""
    import mmap

    file = tmp_path / "a file (with odd name)"
    file.write_bytes(os.urandom(4 * MIB))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mapping.madvise(mmap.MADV_RANDOM)  # no fault brings its neighbours
        for offset in range(0, MIB, mmap.PAGESIZE):
            mapping[offset]
        assert 0.9 <= mapped_mib(Path("/proc/self/smaps"), file) <= 4
        assert cached_mib(file) == pytest.approx(4, abs=0.1)
        os.fsync(opened.fileno())
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert (cached_mib(file) or 0) < 4
