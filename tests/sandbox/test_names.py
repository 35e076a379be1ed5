"""What gets another name: only what the call may read, or has made itself; and nothing that is agentd's own, whatever it is called."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from agentd_sandbox import Access, PathRule
from agentd_sandbox.files import Files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from agentd_sandbox import Change

WRITE = os.O_WRONLY | os.O_CREAT


class Unrecorded:
    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> frozenset[bytes]:
        return frozenset()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    root = tmp_path.resolve()
    for name in ("known", "unknown", "target"):
        (root / name / "folder").mkdir(parents=True)
        (root / name / "file").write_text(name)
        (root / name / "folder" / "file").write_text(name)
    return root


@pytest.fixture
def files(home: Path) -> Iterator[Files]:
    """May write to all of it, and read but one folder."""
    rules = [PathRule(os.fsencode(home / name)) for name in ("known", "unknown", "target")]
    made = Files(Access(read=(rules[0], rules[2]), write=tuple(rules)), Unrecorded())
    with contextlib.closing(made):
        yield made


def refused(act: Callable[[], object]) -> int:
    try:
        act()
    except OSError as e:
        return e.errno or 0
    return 0


@pytest.mark.parametrize("name", ["file", "folder"])
@pytest.mark.parametrize("how", ["rename", "link"])
def test_what_may_not_be_read_gets_no_other_name(home: Path, files: Files, name: str, how: str):
    """The same with what may be read is done: the control."""

    def move(folder: str) -> None:
        old, new = os.fsencode(home / folder / name), os.fsencode(home / "target" / f"from {folder}")
        if how == "rename":
            files.rename(old, new, replace=False)
        else:
            files.make_name(old, new, follow=False)

    folders_have_one = name == "folder" and how == "link"
    assert refused(lambda: move("unknown")) == (errno.EPERM if folders_have_one else errno.EACCES)
    assert (home / "unknown" / name).exists()
    assert refused(lambda: move("known")) == (errno.EPERM if folders_have_one else 0)


def test_what_the_call_has_made_may_be_renamed_unread(home: Path, files: Files):
    """Programs write under another name first, and give what is finished its own; in folders of their own, too."""
    unknown = os.fsencode(home / "unknown")
    os.close(files.open(unknown + b"/new", WRITE, 0o644, 0o022))
    files.rename(unknown + b"/new", unknown + b"/newer", replace=False)
    files.rename(unknown + b"/newer", unknown + b"/file", replace=True)
    files.make_folder(unknown + b"/made", 0o755)
    os.close(files.open(unknown + b"/made/file", WRITE, 0o644, 0o022))
    files.rename(unknown + b"/made", unknown + b"/moved", replace=False)
    files.rename(unknown + b"/moved/file", unknown + b"/out", replace=False)
    files.remove(unknown + b"/out", folder=False)
    (home / "unknown" / "out").write_text("somebody else's")
    assert refused(lambda: files.rename(unknown + b"/out", os.fsencode(home / "target" / "out"), replace=False)) == errno.EACCES


def test_a_folder_with_something_unread_in_it_is_not_moved(home: Path):
    """A denial of what lies in it is not undone by moving what it lies in."""
    whole = PathRule(os.fsencode(home))
    hidden = PathRule(os.fsencode(home / "unknown" / "folder"))
    with contextlib.closing(Files(Access(read=(whole,), write=(whole,), hidden=(hidden,)), Unrecorded())) as files:
        old, new = os.fsencode(home / "unknown"), os.fsencode(home / "moved")
        assert refused(lambda: files.rename(old, new, replace=False)) == errno.EACCES
        assert refused(lambda: files.rename(os.fsencode(home / "known"), new, replace=False)) == 0


# -- what is agentd's own


@pytest.fixture
def alias(home: Path) -> Iterator[Path]:
    """Another way to `unknown`."""
    there = home / "target" / "alias"
    there.mkdir()
    done = subprocess.run(["mount", "--bind", home / "unknown", there], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield there
    finally:
        subprocess.run(["umount", "-l", there], check=False)


def everything(home: Path, *, absent: bool) -> Files:
    whole = (PathRule(os.fsencode(home)),)
    status = (home / "unknown").stat()
    own = frozenset({(status.st_dev, status.st_ino)})
    access = Access(read=whole, write=whole, absent=own) if absent else Access(read=whole, write=whole, protected=own)
    return Files(access, Unrecorded())


WAYS: dict[str, Callable[[Files, bytes], object]] = {
    "read": lambda files, path: os.close(files.open(path + b"/file", os.O_RDONLY, 0, 0)),
    "look": lambda files, path: files.status(path, follow=False),
    "look at what is missing": lambda files, path: files.status(path + b"/missing", follow=True),
    "by dots": lambda files, path: files.status(path + b"/folder/../file", follow=True),
    "write": lambda files, path: os.close(files.open(path + b"/file", os.O_WRONLY, 0, 0)),
    "make": lambda files, path: os.close(files.open(path + b"/new", WRITE, 0o644, 0)),
    "make a folder": lambda files, path: files.make_folder(path + b"/new folder", 0o755),
    "remove": lambda files, path: files.remove(path + b"/file", folder=False),
    "rename": lambda files, path: files.rename(path + b"/file", path + b"/renamed", replace=False),
    "rename itself": lambda files, path: files.rename(path, b"%s-moved" % path, replace=False),
    "change its mode": lambda files, path: files.change_mode(path, 0o700),
    "shorten": lambda files, path: files.truncate(path + b"/folder/file", 0),
}
CHANGES = frozenset(WAYS) - {"read", "look", "look at what is missing", "by dots"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("called", ["its name", "an alias"])
def test_what_is_absent_is_not_there_whatever_it_is_called(home: Path, way: str, called: str, request: pytest.FixtureRequest):
    path = os.fsencode(home / "unknown" if called == "its name" else request.getfixturevalue("alias"))
    with contextlib.closing(everything(home, absent=True)) as files:
        assert refused(lambda: WAYS[way](files, path)) == errno.ENOENT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("called", ["its name", "an alias"])
def test_what_is_protected_can_be_read_and_not_changed(home: Path, way: str, called: str, request: pytest.FixtureRequest):
    path = os.fsencode(home / "unknown" if called == "its name" else request.getfixturevalue("alias"))
    with contextlib.closing(everything(home, absent=False)) as files:
        code = refused(lambda: WAYS[way](files, path))
        assert code == (errno.EACCES if way in CHANGES else errno.ENOENT if "missing" in way else 0)


@pytest.mark.parametrize("absent", [True, False])
def test_what_agentds_own_lies_in_is_not_moved(home: Path, alias: Path, *, absent: bool):
    old, new = os.fsencode(alias.parent), os.fsencode(home / "moved")
    with contextlib.closing(everything(home, absent=absent)) as files:
        assert refused(lambda: files.rename(old, new, replace=False)) == errno.EACCES
        assert refused(lambda: files.rename(os.fsencode(home / "known"), new, replace=False)) == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_ways_lead_to_what_is_nobodys(home: Path, way: str):
    """The control: the same is done to a folder that is not agentd's."""
    with contextlib.closing(everything(home, absent=True)) as files:
        code = refused(lambda: WAYS[way](files, os.fsencode(home / "target")))
        assert code == (errno.ENOENT if "missing" in way else 0)
