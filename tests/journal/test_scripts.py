"""Random shell scripts, however they end: what they did is put back to the last bit, or the last nanosecond.

The scripts and what is done with them are in scripts.py; its command line has one seed again, or made smaller. AGENTD_SCRIPTS
says how many are run, AGENTD_SCRIPTS_FIRST which seed is the first.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from agentd_sandbox import probe

from tests.journal.scripts import ROOT
from tests.journal.trees import Node, clear, compare, look, plant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCRIPTS = int(os.environ.get("AGENTD_SCRIPTS", "50"))
FIRST = os.environ.get("AGENTD_SCRIPTS_FIRST", "0")
OLD_NS = 1_111_111_111_111_111_111
NODES = (
    Node(b"", "directory", 0o755, OLD_NS),
    Node(b"d", "directory", 0o755, OLD_NS),
    Node(b"shut", "directory", 0o000, OLD_NS),
    Node(b"shut/unreadable", "file", 0o000, OLD_NS, b"", 100),
    Node(b"unreadable", "file", 0o000, OLD_NS, b"", 100),
    Node(b"a", "file", 0o644, OLD_NS, b"", 100),
    Node(b"same", "link", 0o644, OLD_NS, b"a"),
    Node(b"d/same", "link", 0o644, OLD_NS, b"a"),
    Node(b"sparse", "file", 0o644, OLD_NS, b"", 400_000, "sparse"),
    Node(b"l", "symlink", 0o777, OLD_NS, b"nowhere"),
    Node(b"fifo", "fifo", 0o600, OLD_NS),
    Node(b"socket", "socket", 0o600, OLD_NS),
)


def test_scripts_leave_nothing_behind(capfd: pytest.CaptureFixture[str]):
    """Done and undone, rehearsed, killed and recovered, cancelled and put back; by an ordinary user."""
    if not probe().confines:
        pytest.skip("this kernel confines nothing")
    line = [sys.executable, "-m", "tests.journal.scripts", "--count", str(SCRIPTS), "--first", FIRST]
    places = [str(ROOT), str(ROOT / "sandbox"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    with capfd.disabled():  # its progress is seen
        done = subprocess.run(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=False)
    told = done.stdout.decode(errors="replace")
    if "did not run" in told:
        pytest.skip(told)
    assert done.returncode == 0, told


def _drop_holes(path: bytes) -> None:
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def _part(path: bytes) -> None:
    """A copy takes the place of one of several names."""
    with open(path, "rb") as file:
        content = file.read()
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(content)


def _shorten(path: bytes) -> None:
    """One that can't even be read."""
    os.chmod(path, 0o600)
    os.truncate(path, 99)
    os.chmod(path, 0)


def _lead_elsewhere(path: bytes) -> None:
    os.unlink(path)
    os.symlink("elsewhere", path)


def _make_directory(path: bytes) -> None:
    os.unlink(path)
    os.mkdir(path)


CHANGES: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "mode of file": (b"a", lambda path: os.chmod(path, 0o600)),
    "mode of directory": (b"d", lambda path: os.chmod(path, 0o2755)),
    "mode of socket": (b"socket", lambda path: os.chmod(path, 0o644)),
    "mtime of file": (b"unreadable", lambda path: os.utime(path, ns=(0, OLD_NS + 1))),
    "mtime of directory": (b"d", lambda path: os.utime(path, ns=(0, OLD_NS + 1))),
    "mtime of symlink": (b"l", lambda path: os.utime(path, ns=(0, OLD_NS + 1), follow_symlinks=False)),
    "links of file": (b"d/same", _part),
    "holes of file": (b"sparse", _drop_holes),
    "content of file": (b"unreadable", _shorten),
    "target of symlink": (b"l", _lead_elsewhere),
    "kind of fifo": (b"fifo", _make_directory),
    "missing of fifo": (b"fifo", os.unlink),
    "extra of directory": (b"d/new", os.mkdir),
    "attributes of file": (b"a", lambda path: os.setxattr(path, "user.note", b"new")),
}


@pytest.fixture
def top(tmp_path: Path) -> Iterator[bytes]:
    home = os.fsencode(tmp_path / "home")
    plant(home, NODES)
    yield home
    clear(home)


def test_looking_leaves_no_trace(top: bytes):
    """Shut directories included; and what is planted is what is seen."""
    seen = look(top)
    assert look(top) == seen
    assert seen.entries.keys() == {node.path for node in NODES}
    assert all(seen.entries[node.path].mode == node.mode for node in NODES)
    assert all(seen.entries[node.path].mtime_ns == node.mtime_ns for node in NODES)
    assert seen.entries[b"shut/unreadable"].content == NODES[3].content
    assert seen.entries[b"sparse"].has_holes
    assert seen.links[b"a"] == {b"a", b"same", b"d/same"}


@pytest.mark.parametrize("what", CHANGES)
def test_the_comparison_sees_a_change(top: bytes, what: str):
    """One of a kind each: otherwise nothing could ever be wrong."""
    path, change = CHANGES[what]
    path = os.path.join(top, path)
    before = look(top)
    try:
        change(path)
    except OSError as e:
        if e.errno != errno.ENOTSUP:
            raise
        pytest.skip("this file system has no attributes")
    assert what in {f"{difference.what} of {difference.kind}" for difference in compare(before, look(top))}
