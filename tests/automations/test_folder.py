"""What is new in a folder and has come to rest; what a look shows of folders that are not as they should be."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.automations.automation import FileTrigger
from agentd.automations.events import Fingerprint
from agentd.automations.folder import FolderGone, Found, Settling, Sight, fits, is_remote, look

if TYPE_CHECKING:
    from collections.abc import Mapping

SHORT_S = 1.0


def seen(files: Mapping[str, tuple[int, int]]) -> Sight:
    """Files as (inode, size)."""
    return Sight(
        (1, 1),
        {name.encode(): Found(name.encode(), Fingerprint(inode, size, size), 0) for name, (inode, size) in files.items()},
    )


class Folder:
    """A folder at moments of a clock of its own."""

    def __init__(self, *, changes: bool = False, quiet_s: float = SHORT_S) -> None:
        self.settling = Settling(changes, quiet_s, {})

    def at(
        self, now: float, files: Mapping[str, tuple[int, int]], came: tuple[str, ...] = (), went: tuple[str, ...] = ()
    ) -> list[str]:
        order = {name.encode(): n for n, name in enumerate(came)}
        ready, _, _ = self.settling.step(seen(files), (now, 0), order, {name.encode() for name in went})
        self.settling.settled(ready)
        return [each.path.decode() for each in ready]


def test_a_file_is_new_once_and_when_it_has_come_to_rest():
    folder = Folder()
    assert folder.at(0, {"a": (1, 10)}) == []
    assert folder.at(0.9, {"a": (1, 20)}) == []  # still written to
    assert folder.at(1.5, {"a": (1, 20)}) == []
    assert folder.at(2.0, {"a": (1, 20)}) == ["a"]
    assert folder.at(9.0, {"a": (1, 20)}) == []
    assert folder.at(12.0, {"a": (1, 30)}) == []  # it has changed, and that was not asked for


def test_a_changed_file_counts_where_that_is_wanted():
    folder = Folder(changes=True)
    folder.at(0, {"a": (1, 10)})
    assert folder.at(1, {"a": (1, 10)}) == ["a"]
    assert folder.at(2, {"a": (1, 11)}) == []
    assert folder.at(3, {"a": (1, 11)}) == ["a"]
    assert folder.at(9, {"a": (1, 11)}) == []


@pytest.mark.parametrize("changes", [False, True])
def test_a_file_that_replaces_another_or_comes_again_is_new(changes: bool):
    folder = Folder(changes=changes, quiet_s=0)
    assert folder.at(0, {"a": (1, 10)}) == ["a"]
    assert folder.at(1, {"a": (2, 11)}) == ["a"]
    assert folder.at(2, {"a": (3, 11)}) == []  # put back as it was
    assert folder.at(3, {}) == []
    assert folder.at(4, {"a": (2, 10)}) == ["a"]
    assert folder.at(5, {"a": (2, 10)}, went=("a",)) == ["a"]  # it went and came again before anybody looked


def test_files_are_handled_in_the_order_of_their_arrival():
    folder = Folder(quiet_s=0)
    assert folder.at(0, {name: (n, 1) for n, name in enumerate("abcd")}, came=("c", "a", "d")) == ["c", "a", "d", "b"]


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=6), max_size=30
    ),
    st.booleans(),
)
def test_every_state_that_lasts_is_told_exactly_once(looks: list[dict[str, tuple[int, int]]], changes: bool):
    """Against a model: with a rest of nought, each look tells what differs from what was there at the one before."""
    folder, before = Folder(changes=changes, quiet_s=0), dict[str, tuple[int, int]]()
    told = dict[str, tuple[int, int]]()
    for n, files in enumerate(looks):
        told = {name: each for name, each in told.items() if name in files}
        expected = {
            name
            for name, each in files.items()
            if name not in told or (told[name][1] != each[1] and (changes or told[name][0] != each[0]))
        }
        assert set(folder.at(n, files)) == expected
        told |= {name: each for name, each in files.items() if name in expected or told[name][1] == each[1]}
        before = files
    assert set(folder.settling.known) == {name.encode() for name in before}


def trigger(path: Path, **more: object) -> FileTrigger:
    return FileTrigger.model_validate({"path": str(path), **more})


def names(path: Path, **more: object) -> set[str]:
    sight = look(trigger(path, **more), os.path.realpath(path))
    return {os.path.relpath(os.fsdecode(each), path) for each in sight.files}


def test_what_fits_is_files_and_no_links_nor_hidden_ones(tmp_path: Path):
    for name in ("a.txt", "b.pdf", ".hidden.txt", "sub/c.txt", "sub/deep/d.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert names(tmp_path) == {"a.txt", "b.pdf"}
    assert names(tmp_path, pattern="*.txt", recursive=True) == {"a.txt", "sub/c.txt", "sub/deep/d.txt"}
    assert names(tmp_path, pattern=".*") == {".hidden.txt"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_a_folder_of_others_says_so(tmp_path: Path):
    """This thread alone is somebody else meanwhile (setfsuid(2)): another one would stir up all threads of the tests."""
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    inbox = tmp_path / "inbox"
    inbox.mkdir(mode=0o700)
    setfsuid = ctypes.CDLL(None).setfsuid
    setfsuid(65534)
    try:
        with pytest.raises(FolderGone, match="inbox can't be read: Permission denied"):
            look(FileTrigger(path=str(inbox)), str(inbox))
    finally:
        setfsuid(0)
    assert look(FileTrigger(path=str(inbox)), str(inbox)).files == {}


def test_names_that_are_no_text_are_files_too(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.txt")).touch()
    assert len(names(tmp_path, pattern="*.txt")) == 1


def test_a_folder_that_can_not_be_looked_at_says_why(tmp_path: Path):
    folder, real = tmp_path / "inbox", str(tmp_path / "inbox")
    with pytest.raises(FolderGone, match="is not there"):
        look(trigger(folder), real)
    folder.write_text("")
    with pytest.raises(FolderGone, match="not a folder"):
        look(trigger(folder), real)
    folder.unlink()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderGone, match=f"leads to {tmp_path}/elsewhere now"):
        look(trigger(folder), real)
    assert look(trigger(folder), str(tmp_path / "elsewhere")).files == {}  # it was a link from the beginning


@pytest.mark.parametrize(
    ("name", "pattern", "fitting"),
    [("a", "*", True), (".a", "*", False), (".a", ".*", True), ("A.PDF", "*.pdf", False), ("a[1]", "a[[]1]", True)],
)
def test_patterns(name: str, pattern: str, fitting: bool):
    assert fits(name, pattern) is fitting


def test_a_network_share_is_known_by_its_mount(tmp_path: Path):
    device = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1 - {{}} server:/x rw\n"
    for kind, remote in (("ext4", False), ("nfs4", True), ("fuse.sshfs", True), ("cifs", True), ("tmpfs", False)):
        mounts.write_text("garbage\n" * 0 + line.format(kind))
        assert is_remote(str(tmp_path), str(mounts)) is remote
    mounts.write_text("garbage")
    assert not is_remote(str(tmp_path), str(mounts))
