"""A file that is rewritten, removed or replaced through the broker: kept as it is, and the new one is like it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, Change, PathRule, Refusal
from agentd_sandbox.files import Files

from agentd.audit import AuditLog, Event
from agentd.errors import JournalError, Reason
from agentd.journal import Journal, Keep, Selection, Ways
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from agentd.journal import Transaction

SIZE = 200_000
REWRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


class Desk:
    def __init__(self, root: Path, home: Path | None = None) -> None:
        self.home, self.objects = home or root / "home", root / "state" / "objects"
        self.home.mkdir()
        self.store = Store(root / "state")
        self.audit = AuditLog(self.store)
        self.journal = Journal(self.store, self.audit, self.objects, Keep(1 << 30, low_space_bytes=0))
        self.file = self.home / "large"
        self.file.write_bytes(os.urandom(SIZE))

    def begin(self) -> tuple[Transaction, Files]:
        call = new_id()
        transaction = self.journal.begin(call, Event(kind="call.intent", call=call), [os.fsencode(self.file)])
        scope = (PathRule(os.fsencode(self.home)),)
        return transaction, Files(Access(scope, scope), transaction)

    def call(self, change: Callable[[Files], object]) -> str:
        transaction, files = self.begin()
        change(files)
        transaction.finish(Event(kind="call.end", call=transaction.call))
        return transaction.call

    def rewrite(self, files: Files, content: bytes = b"new", flags: int = REWRITE) -> None:
        descriptor = files.open(os.fsencode(self.file), flags, 0o666, 0o022)
        os.write(descriptor, content)
        os.close(descriptor)

    def inodes(self) -> set[int]:
        return {path.stat().st_ino for path in self.objects.glob("??/*")}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path.resolve())
    yield made
    made.store.close()


WAYS: dict[str, Callable[[Desk, Files], Any]] = {
    "rewritten": lambda desk, files: desk.rewrite(files),
    "removed": lambda desk, files: files.remove(os.fsencode(desk.file), folder=False),
    "replaced": lambda desk, files: files.rename(os.fsencode(desk.home / "other"), os.fsencode(desk.file), replace=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_copied_and_all_comes_back(desk: Desk, way: str):
    """What is kept is the very inode that was there, known by no other name any more."""
    (desk.home / "other").write_bytes(b"other")
    before, inode = desk.file.read_bytes(), desk.file.stat().st_ino
    call = desk.call(lambda files: WAYS[way](desk, files))
    assert inode in desk.inodes()
    assert all(path.stat().st_nlink == 1 for path in desk.objects.glob("??/*"))
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before
    assert desk.file.stat().st_nlink == 1


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_what_is_written_to_in_place_stays_the_same_file(desk: Desk, flags: int):
    before, inode = desk.file.read_bytes(), desk.file.stat().st_ino
    call = desk.call(lambda files: desk.rewrite(files, flags=flags))
    assert desk.file.stat().st_ino == inode
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before


def test_a_moved_file_is_still_in_use_and_copied(desk: Desk):
    """What happens to it by its new name does not happen to what is kept."""
    before = desk.file.read_bytes()

    def change(files: Files) -> None:
        files.rename(os.fsencode(desk.file), os.fsencode(desk.home / "moved"), replace=False)
        descriptor = files.open(os.fsencode(desk.home / "moved"), os.O_WRONLY, 0, 0)
        os.write(descriptor, b"overwritten")
        os.close(descriptor)

    call = desk.call(change)
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before
    assert not (desk.home / "moved").exists()


def test_the_new_file_is_like_the_old_one(desk: Desk):
    """Mode, owner and attributes; as after O_TRUNC, but never set-uid."""
    desk.file.chmod(0o4640)
    os.setxattr(desk.file, "user.mark", b"x")
    owner = desk.file.stat().st_uid, desk.file.stat().st_gid
    desk.call(desk.rewrite)
    status = desk.file.stat()
    assert (status.st_mode & 0o7777, (status.st_uid, status.st_gid)) == (0o640, owner)
    assert os.getxattr(desk.file, "user.mark") == b"x"
    assert sorted(path.name for path in desk.home.iterdir()) == ["large"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_owners_file_is_emptied_in_its_place(desk: Desk):
    """A new one could not be theirs for a daemon that is not root's."""
    os.chown(desk.file, 12345, 12345)
    inode = desk.file.stat().st_ino
    desk.call(desk.rewrite)
    assert (desk.file.stat().st_ino, desk.file.stat().st_uid) == (inode, 12345)


def test_it_is_rewritten_twice_in_a_call_and_kept_once(desk: Desk):
    before = desk.file.read_bytes()

    def change(files: Files) -> None:
        desk.rewrite(files, b"one")
        first = desk.file.stat().st_ino
        desk.rewrite(files, b"second")
        assert desk.file.stat().st_ino == first

    call = desk.call(change)
    assert desk.file.read_bytes() == b"second"
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before


def test_a_call_that_fails_gives_it_back(desk: Desk):
    before = desk.file.read_bytes()
    transaction, files = desk.begin()
    desk.rewrite(files)
    transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    assert desk.file.read_bytes() == before
    desk.call(desk.rewrite)  # and it is one's own to change again


def test_there_is_a_file_by_that_name_at_every_moment(desk: Desk):
    """Others who open it meanwhile get the old one or the new one."""
    stop, missing = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            try:
                desk.file.stat()
            except FileNotFoundError:
                missing.append(time.monotonic())

    looking = threading.Thread(target=look)
    looking.start()
    for n in range(30):
        desk.file.write_bytes(os.urandom(SIZE))
        desk.call(lambda files, n=n: desk.rewrite(files, b"%d" % n))  # type: ignore[misc]
    stop.set()
    looking.join()
    assert missing == []


def test_a_folder_of_100000_entries(tmp_path: Path):
    """One of them is rewritten, one removed, one added; nobody reads the others. And a restart in the middle."""
    desk = Desk(tmp_path.resolve())
    folder = desk.home / "many"
    folder.mkdir()
    descriptor = os.open(folder, os.O_DIRECTORY)
    for n in range(100_000):
        os.close(os.open(f"{n}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=descriptor))
    os.close(descriptor)

    def change(files: Files) -> None:
        for name, content in (("5", b"five"), ("new", b"new")):
            opened = files.open(os.fsencode(folder / name), REWRITE, 0o666, 0o022)
            os.write(opened, content)
            os.close(opened)
        files.remove(os.fsencode(folder / "7"), folder=False)

    call = desk.call(change)
    desk.journal.undo(call, "p")
    assert ((folder / "5").read_bytes(), (folder / "7").exists(), (folder / "new").exists()) == (b"", True, False)
    _transaction, files = desk.begin()
    change(files)
    assert len(desk.journal.recover()) == 1
    assert ((folder / "5").read_bytes(), (folder / "7").exists(), (folder / "new").exists()) == (b"", True, False)
    desk.store.close()


def test_what_is_refused_half_way_leaves_no_file_in_two_places(desk: Desk):
    """The first of several paths was taken as it is, the second can't be: the first is its owner's alone again."""
    (desk.home / "huge").touch()
    os.truncate(desk.home / "huge", 1 << 40)
    transaction, _files = desk.begin()
    with pytest.raises(Refusal):
        transaction.before_changes(
            [Change("replace", os.fsencode(desk.file)), Change("write", os.fsencode(desk.home / "huge"))]
        )
    assert desk.file.stat().st_nlink == 1
    transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    desk.call(desk.rewrite)
    assert desk.file.read_bytes() == b"new"


def test_on_a_disk_that_is_nearly_full_a_large_file_is_not_changed_either(tmp_path: Path):
    """Though its state is taken later."""
    desk = Desk(tmp_path.resolve())
    desk.store.close()
    desk.store = Store(tmp_path / "other")
    journal = Journal(desk.store, AuditLog(desk.store), desk.objects, Keep(1 << 30, low_space_bytes=1 << 60))
    with pytest.raises(JournalError) as caught:
        journal.begin("c", Event(kind="call.intent", call="c"), [os.fsencode(desk.file)])
    assert caught.value.reason is Reason.STORE_FULL
    desk.store.close()


# -- what is only appended to is kept where it is


def append(desk: Desk, files: Files, content: bytes = b"more") -> None:
    desk.rewrite(files, content, os.O_WRONLY | os.O_APPEND)


def test_what_is_only_appended_to_is_not_copied(desk: Desk):
    """However often: its length is enough."""
    before = desk.file.read_bytes()

    def change(files: Files) -> None:
        append(desk, files)
        append(desk, files)

    calls = [desk.call(change), desk.call(change)]
    assert desk.file.read_bytes() == before + b"more" * 4
    assert desk.inodes() == set()
    for call in reversed(calls):
        desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before


OTHERWISE: dict[str, Callable[[Desk, Files], Any]] = {
    "written to": lambda desk, files: desk.rewrite(files, b"X", os.O_WRONLY),
    "opened to read and append": lambda desk, files: desk.rewrite(files, b"X", os.O_RDWR | os.O_APPEND),
    "rewritten": lambda desk, files: desk.rewrite(files, b"X"),
    "cut": lambda desk, files: files.truncate(os.fsencode(desk.file), 3),
    "removed": lambda desk, files: files.remove(os.fsencode(desk.file), folder=False),
    "moved": lambda desk, files: files.rename(os.fsencode(desk.file), os.fsencode(desk.home / "moved"), replace=False),
    "told to stop": lambda desk, files: (files.stop_appending(), os.truncate(desk.file, 3)),
}


@pytest.mark.parametrize("way", OTHERWISE)
@pytest.mark.parametrize("ends", ["well", "badly", "never"])
def test_what_is_changed_otherwise_later_is_kept_in_full_before_that(desk: Desk, way: str, ends: str):
    before = desk.file.read_bytes()
    transaction, files = desk.begin()
    append(desk, files)
    OTHERWISE[way](desk, files)
    if ends == "well":
        transaction.finish(Event(kind="call.end", call=transaction.call))
        desk.journal.undo(transaction.call, "p")
    elif ends == "badly":
        transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    else:
        desk.journal.recover()
    assert desk.file.read_bytes() == before
    assert not (desk.home / "moved").exists()


@pytest.mark.parametrize("later", ["written to", "rewritten", "removed"])
def test_what_a_later_call_has_changed_comes_from_what_that_one_kept(desk: Desk, later: str):
    """Both are taken back at once; the first had only the length."""
    before = desk.file.read_bytes()
    first = desk.call(lambda files: append(desk, files))
    second = desk.call(lambda files: OTHERWISE[later](desk, files))
    rollbacks = desk.journal.rollbacks
    rollbacks.apply(rollbacks.plan(Selection(calls=(first, second)), Ways()), "p")
    assert desk.file.read_bytes() == before


def test_what_it_began_with_is_never_taken_from_something_else(desk: Desk):
    """Somebody has changed the beginning and kept the length: a conflict, and even by force nothing wrong is put back."""
    call = desk.call(lambda files: append(desk, files))
    text = desk.file.read_bytes()
    desk.file.write_bytes(b"\0" + text[1:])
    for ways in (Ways(), Ways(force=True)):
        with pytest.raises(JournalError):
            desk.journal.rollbacks.apply(desk.journal.rollbacks.plan(Selection(calls=(call,)), ways), "p")
    assert desk.file.read_bytes() == b"\0" + text[1:]


# -- the store on one file system, the files on another


@pytest.mark.parametrize("way", WAYS)
def test_files_on_another_file_system_come_back(device: Path, tmp_path: Path, way: str):
    """There they are copied."""
    desk = Desk(tmp_path.resolve(), device.resolve() / "home")
    (desk.home / "other").write_bytes(b"other")
    before, inode = desk.file.read_bytes(), desk.file.stat().st_ino
    call = desk.call(lambda files: WAYS[way](desk, files))
    assert inode not in desk.inodes()
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before
    desk.store.close()


def test_a_file_system_that_becomes_read_only_in_the_middle(device: Path, tmp_path: Path):
    """What can't be put back then is put back by the start after it can be written to again."""
    desk = Desk(tmp_path.resolve(), device.resolve() / "home")
    before = desk.file.read_bytes()
    transaction, files = desk.begin()
    desk.rewrite(files)
    subprocess.run(["mount", "-o", "remount,ro", device], check=True)
    with pytest.raises(JournalError, match="could not be restored"):
        transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    assert len(desk.journal.recover()) == 1  # logged, and left open
    subprocess.run(["mount", "-o", "remount,rw", device], check=True)
    desk.journal.recover()
    assert desk.file.read_bytes() == before
    assert desk.journal.recover() == []
    desk.store.close()


def test_an_undo_on_a_read_only_file_system_says_so_and_changes_nothing(device: Path, tmp_path: Path):
    desk = Desk(tmp_path.resolve(), device.resolve() / "home")
    before = desk.file.read_bytes()
    call = desk.call(desk.rewrite)
    subprocess.run(["mount", "-o", "remount,ro", device], check=True)
    with pytest.raises(JournalError):
        desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == b"new"
    subprocess.run(["mount", "-o", "remount,rw", device], check=True)
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before
    desk.store.close()


def test_a_file_whose_folder_is_gone_is_a_conflict(desk: Desk):
    """Nobody makes folders anew that somebody has removed."""
    folder = desk.home / "folder"
    folder.mkdir()
    desk.file = desk.file.rename(folder / "large")
    call = desk.call(desk.rewrite)
    shutil.rmtree(folder)
    for ways in (Ways(), Ways(force=True)):
        with pytest.raises(JournalError):
            desk.journal.rollbacks.apply(desk.journal.rollbacks.plan(Selection(calls=(call,)), ways), "p")
    assert not folder.exists()


def test_where_files_can_share_blocks_nothing_is_copied(cloning_device: Path):
    """Also of a file that is written to in its place; with store and files on that file system."""
    desk = Desk(cloning_device.resolve())
    size = 60 << 20
    desk.file.write_bytes(os.urandom(size))
    os.sync()
    before, free = desk.file.read_bytes(), room(cloning_device)
    call = desk.call(lambda files: desk.rewrite(files, b"changed", os.O_WRONLY))
    os.sync()
    assert free - room(cloning_device) < size / 4
    assert len(desk.inodes()) == 1
    desk.journal.undo(call, "p")
    assert desk.file.read_bytes() == before
    desk.store.close()


def room(at: Path) -> int:
    space = os.statvfs(at)
    return space.f_bavail * space.f_frsize
