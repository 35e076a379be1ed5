"""Worlds that change under the journal, and file systems, names and files of an odd kind: nothing of somebody's is ever lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Change, Refusal, kernel

from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal import Keep, Selection, Ways
from agentd.journal.restoring import Restoring
from agentd.journal.state import look
from agentd.store import ids
from tests.journal.conftest import lent
from tests.journal.worlds import World, as_nobody, need_root, run, small_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from agentd_sandbox.files import Files

    from agentd.journal.restoring import Target
    from agentd.journal.state import PathState

TERABYTE = 1 << 40
REWRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
LARGE = os.urandom(200_000)


@pytest.fixture(autouse=True)
def _own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is ahead in a test is not in the ids of those after it: forked ones would have the same."""
    monkeypatch.setattr(ids, "_last", [0])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path.resolve())
    yield made
    made.store.close()


@pytest.fixture
def work(world: World) -> Path:
    folder = world.home / "work"
    folder.mkdir()
    (folder / "file").write_text("old")
    (folder / "other").write_text("old")
    return folder


def changed(world: World, work: Path) -> str:
    """A call that has written to `file` and `other`, and ended."""
    return world.call(lambda: half_done(work), work / "file", work / "other")


def open_call(world: World, work: Path) -> str:
    """The same, of a daemon that is about to be killed."""
    transaction = world.begin(work / "file", work / "other")
    half_done(work)
    return transaction.call


def half_done(work: Path) -> None:
    for name in ("file", "other"):
        (work / name).write_text("half done")


def undo_recoveries(world: World, call: str) -> None:
    for recovery in reversed(world.recoveries(call)):
        with contextlib.suppress(JournalError):
            world.journal.undo(recovery, "p")


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Kind, mode and content of everything below a folder."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (mode, content)
    return found


# -- another type


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "theirs").write_text("theirs")


def _to_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("theirs")


def _to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _to_device(path: Path) -> None:
    need_root()
    path.unlink()
    os.mknod(path, 0o20600, os.makedev(1, 3))


TYPES: dict[str, Callable[[Path], None]] = {
    "folder": _to_folder,
    "link": _to_link,
    "fifo": _to_fifo,
    "device": _to_device,
}


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_of_another_type_at_a_start_is_not_lost(world: World, work: Path, kind: str):
    """It stays, and the path is on the list, or it can be had again; the other path is restored in any case."""
    call = open_call(world, work)
    TYPES[kind](work / "file")
    theirs = tree(work)
    world.reopen()
    assert (work / "other").read_text() == "old"
    if "work/file" in world.left():
        assert {name: state for name, state in tree(work).items() if name != "other"} == {
            name: state for name, state in theirs.items() if name != "other"
        }
        shutil.rmtree(work / "file") if (work / "file").is_dir() else (work / "file").unlink()
        world.retry(force=True)
        assert ((work / "file").read_text(), world.left(), world.state(call)) == ("old", {}, "rolled_back")
        return
    assert (work / "file").read_text() == "old"
    undo_recoveries(world, call)
    assert tree(work) == theirs


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_of_another_type_is_no_obstacle_to_the_others_of_a_call_that_fails(world: World, work: Path, kind: str):
    """Whatever the path became, the other one is restored, and a folder's contents are never removed."""
    transaction = world.begin(work / "file", work / "other")
    half_done(work)
    TYPES[kind](work / "file")
    error = world.roll_back(transaction)
    assert (work / "other").read_text() == "old"
    assert (error is not None) == ("work/file" in world.left())
    if kind == "folder":
        assert (work / "file" / "theirs").read_text() == "theirs"


def test_a_folder_that_became_a_file_comes_back_with_all_that_was_in_it(world: World, work: Path):
    """At a start; the file can be had again."""
    transaction = world.begin(work / "file", work / "other", work)
    half_done(work)
    shutil.rmtree(work)
    work.write_text("theirs")
    world.reopen()
    assert (set(tree(work)), world.left()) == ({"file", "other"}, {})
    assert (work / "file").read_text() == "old"
    undo_recoveries(world, transaction.call)
    assert work.read_text() == "theirs"


# -- another work directory


@contextlib.contextmanager
def mounted(work: Path, real: Path) -> Iterator[None]:
    """What is really at another place, seen at this one."""
    need_root()
    try:
        run("mount", "--bind", real, work)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", work], check=False, capture_output=True)


def _disk_with_files(tmp_path: Path) -> Path:
    """On a file system of its own, as a disk that can be pulled out is."""
    real = tmp_path.resolve() / "disk"
    (real / "work").mkdir()
    for name in ("file", "other"):
        (real / "work" / name).write_text("old")
    return real / "work"


def test_an_undo_while_the_disk_is_not_mounted_does_nothing(world: World, tmp_path: Path):
    """The mount point's own empty directory is no place for its files; with the disk there again, the undo goes on."""
    work = world.home / "work"
    work.mkdir()
    with small_disk(tmp_path.resolve() / "disk"):
        real = _disk_with_files(tmp_path)
        with mounted(work, real):
            call = changed(world, work)
        for ways in (Ways(), Ways(partial=True)):
            with pytest.raises(JournalError):
                world.journal.rollbacks.apply(world.journal.rollbacks.plan(Selection(calls=(call,)), ways), "p")
            assert list(work.iterdir()) == []
        with mounted(work, real):
            world.journal.undo(call, "p")
        assert (real / "file").read_text() == (real / "other").read_text() == "old"


def test_a_recovery_while_the_disk_is_not_mounted_waits_for_it(world: World, tmp_path: Path):
    """Nothing is put in the mount point's own directory, and what was half done on the disk is not forgotten."""
    work = world.home / "work"
    work.mkdir()
    with small_disk(tmp_path.resolve() / "disk"):
        real = _disk_with_files(tmp_path)
        with mounted(work, real):
            call = open_call(world, work)
        world.reopen()
        assert list(work.iterdir()) == []
        assert world.left().keys() == {"work/file", "work/other"}
        with mounted(work, real):
            world.retry()
        assert (real / "file").read_text() == (real / "other").read_text() == "old"
        assert (world.left(), world.state(call)) == ({}, "rolled_back")


def _replace(work: Path) -> None:
    work.rename(work.with_name("aside"))
    work.mkdir()
    (work / "file").write_text("theirs")


def _rename(work: Path) -> None:
    work.rename(work.with_name("aside"))


def _link(work: Path) -> None:
    _rename(work)
    work.symlink_to("aside")


@pytest.mark.parametrize("how", [_replace, _rename, _link])
def test_an_undo_does_nothing_in_another_work_directory(world: World, work: Path, how: Callable[[Path], None]):
    """It is a conflict; with the former directory back in its place, the undo goes on."""
    call = changed(world, work)
    how(work)
    before = tree(world.home)
    with pytest.raises(JournalError) as caught:
        world.journal.undo(call, "p")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert tree(world.home) == before
    if os.path.lexists(work):
        work.unlink() if work.is_symlink() else shutil.rmtree(work)
    work.with_name("aside").rename(work)
    world.journal.undo(call, "p")
    assert (work / "file").read_text() == (work / "other").read_text() == "old"


@pytest.mark.parametrize("how", [_replace, _rename, _link])
def test_a_start_loses_nothing_in_another_work_directory(world: World, work: Path, how: Callable[[Path], None]):
    """What is there now stays or can be had again; what was half done is untouched where it is now, or restored."""
    call = open_call(world, work)
    how(work)
    before = tree(world.home)
    world.reopen()
    aside = tree(world.home / "aside")
    assert {content for _mode, content in aside.values()} <= {b"half done", b"old"}
    undo_recoveries(world, call)
    assert tree(world.home) == before


@pytest.mark.parametrize("how", [_rename, _link])
def test_what_was_half_done_in_a_directory_that_is_gone_is_restored_when_it_is_back(
    world: World, work: Path, how: Callable[[Path], None]
):
    """It is on the list until then."""
    call = open_call(world, work)
    how(work)
    world.reopen()
    assert world.left().keys() == {"work/file", "work/other"}
    if work.is_symlink():
        work.unlink()
    work.with_name("aside").rename(work)
    assert world.retry() == []
    assert ((work / "file").read_text(), (work / "other").read_text()) == ("old", "old")
    assert world.state(call) == "rolled_back"


# -- somebody edits while it is restored


def _in_place(file: Path) -> None:
    with file.open("r+") as opened:
        opened.write("theirs, and longer")


def _instead(file: Path) -> None:
    beside = file.with_name("beside")
    beside.write_text("theirs, and longer")
    beside.rename(file)


WHEN = ("before it is looked at", "after it is looked at", "before it is filled")
BY = {"in place": _in_place, "another file": _instead}


def edit_while_restoring(monkeypatch: pytest.MonkeyPatch, when: str, edit: Callable[[], None]) -> None:
    """Once, at a certain moment: these are the moments between which a real editor's write falls."""
    edits = [edit]

    def once() -> None:
        while edits:
            edits.pop()()

    look_around, fill = Restoring._look, Restoring._fill

    def _look(self: Restoring) -> None:
        if when == WHEN[0]:
            once()
        look_around(self)
        if when == WHEN[1]:
            once()

    def _fill(self: Restoring, target: Target, now: PathState) -> None:
        if when == WHEN[2]:
            once()
        fill(self, target, now)

    monkeypatch.setattr(Restoring, "_look", _look)
    monkeypatch.setattr(Restoring, "_fill", _fill)


@pytest.fixture(params=WHEN)
def when(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=BY)
def by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_edit_while_a_call_is_undone_is_not_lost(
    world: World, work: Path, monkeypatch: pytest.MonkeyPatch, when: str, by: str
):
    """It stops the undo, or it can be had again by undoing that."""
    call = changed(world, work)
    edit_while_restoring(monkeypatch, when, lambda: BY[by](work / "file"))
    with contextlib.suppress(JournalError):
        undone = world.journal.undo(call, "p")
        if (work / "file").read_text() == "old":
            world.journal.undo(undone.call, "p")
    assert (work / "file").read_text() == "theirs, and longer"


def test_an_edit_during_a_recovery_is_not_lost(world: World, work: Path, monkeypatch: pytest.MonkeyPatch, when: str, by: str):
    """It stays, and the path is on the list; or it can be had again by undoing the recovery."""
    call = open_call(world, work)
    edit_while_restoring(monkeypatch, when, lambda: BY[by](work / "file"))
    world.reopen()
    assert (work / "other").read_text() == "old"
    if (work / "file").read_text() == "old":
        undo_recoveries(world, call)
    assert (work / "file").read_text() == "theirs, and longer"


def test_an_edit_during_a_retry_is_not_lost(world: World, monkeypatch: pytest.MonkeyPatch, when: str, by: str):
    """It stays on the list as what somebody has changed, or can be had again."""
    with small_disk(world.home / "disk") as work:
        (work / "file").write_text("old")
        transaction = world.begin(work / "file")
        (work / "file").write_text("half done")
        run("mount", "-o", "remount,ro", work)
        assert world.roll_back(transaction) is not None
        run("mount", "-o", "remount,rw", work)
        edit_while_restoring(monkeypatch, when, lambda: BY[by](work / "file"))
        world.retry()
        if (work / "file").read_text() == "old":
            undo_recoveries(world, transaction.call)
        assert (work / "file").read_text() == "theirs, and longer"


def test_an_editor_at_work_sees_whole_files_and_nothing_fails(world: World, work: Path):
    """A thread reads all the time while calls are done and undone: each text is a whole one."""
    stop, seen = threading.Event(), set[str]()

    def read() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                seen.add((work / "file").read_text())

    reading = threading.Thread(target=read)
    reading.start()
    for _ in range(20):
        call = world.by_broker(lambda files: _rewrite(files, work / "file", b"new"))
        world.journal.undo(call, "p")
    stop.set()
    reading.join()
    assert seen <= {"old", "new", ""}


def _rewrite(files: Files, path: Path, content: bytes) -> None:
    descriptor = files.open(os.fsencode(path), REWRITE, 0o666, 0o022)
    os.write(descriptor, content)
    os.close(descriptor)


# -- two daemons' calls


def test_calls_that_two_daemons_have_left_open_go_back_newest_first(world: World, work: Path):
    """The first was killed, and the second, which had not recovered, too: the file is as before both."""
    for text in ("first", "second", "third"):
        world.begin(work / "file")
        (work / "file").write_text(text)
        world.store.close()
        world.open()
    assert len(world.reopen()) == 3
    assert (work / "file").read_text() == "old"
    assert (world.reopen(), world.left()) == ([], {})


def test_a_finished_call_between_two_open_ones_stays(world: World, work: Path):
    """Its end is in the log: what it made of the file is neither one's of those that were killed."""
    world.begin(work / "file")
    (work / "file").write_text("first")
    finished = world.call(lambda: (work / "file").write_text("finished"), work / "file")
    world.begin(work / "file")
    (work / "file").write_text("last")
    world.reopen()
    assert (work / "file").read_text() == "finished"
    world.journal.undo(finished, "p")
    assert (work / "file").read_text() == "first"


def test_a_clock_that_was_set_back_changes_no_order(world: World, work: Path, monkeypatch: pytest.MonkeyPatch):
    """Open calls go back newest first, whatever the clock said when they began."""
    for year, text in ((2030, "first"), (1999, "second"), (2015, "third")):
        monkeypatch.setattr(time, "time_ns", lambda year=year: (year - 1970) * 365 * 86400 * 10**9)
        world.begin(work / "file")
        (work / "file").write_text(text)
    assert len(world.reopen()) == 3
    assert ((work / "file").read_text(), world.left()) == ("old", {})
    assert world.audit.verify().bad is None


@pytest.mark.parametrize("jump", [-30 * 365, 30 * 365])
def test_finished_calls_are_undone_in_their_order_whatever_the_clock_says(
    world: World, work: Path, monkeypatch: pytest.MonkeyPatch, jump: int
):
    """The clock jumps by decades between two calls and their undo: each is undone, the later one first."""
    real = time.time_ns
    first = world.call(lambda: (work / "file").write_text("first"), work / "file")
    monkeypatch.setattr(time, "time_ns", lambda: real() + jump * 86400 * 10**9)
    second = world.call(lambda: (work / "file").write_text("second"), work / "file")
    with pytest.raises(JournalError):
        world.journal.undo(first, "p")
    monkeypatch.setattr(time, "time_ns", real)
    world.journal.undo(second, "p")
    world.journal.undo(first, "p")
    assert (work / "file").read_text() == "old"
    assert world.audit.verify().bad is None


def test_a_clock_far_ahead_does_not_give_up_the_newest(world: World, work: Path, monkeypatch: pytest.MonkeyPatch):
    """The newest runs keep their contents."""
    call = changed(world, work)
    monkeypatch.setattr(time, "time_ns", lambda: 4 * 10**18)
    assert world.journal.retention.sweep() == ()
    world.journal.undo(call, "p")
    assert (work / "file").read_text() == "old"


def test_what_is_left_under_a_jumping_clock_goes_back_newest_first(world: World, work: Path, monkeypatch: pytest.MonkeyPatch):
    """The list's times say nothing of the order in which its calls began."""
    paths = [work / "file", work / "other"]
    calls = []
    for path, back in zip(paths, (0, 1), strict=True):
        transaction = world.begin(path)
        path.unlink()
        _rename(work)
        work.write_text("in the way")
        monkeypatch.setattr(time, "time_ns", lambda back=back: 10**18 - back * 10**17)
        assert world.roll_back(transaction) is not None
        work.unlink()
        work.with_name("aside").rename(work)
        calls.append(transaction.call)
    assert world.retry() == []
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert {world.state(call) for call in calls} == {"rolled_back"}


# -- an object that is missing or damaged


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
@pytest.mark.parametrize("ends", ["badly", "never"])
def test_a_content_that_is_missing_or_damaged_is_said_and_stops_no_other(world: World, work: Path, damage: str, ends: str):
    """Nothing wrong is put back: the path is on the list with a reason, what is there stays, and a retry writes no event."""
    (work / "file").write_bytes(LARGE)
    transaction = world.begin(work / "file", work / "other")
    half_done(work)
    (kept,) = [path for path in (world.root / "state" / "objects").rglob("*") if path.is_file()]
    kept.chmod(0o600)
    whole = kept.read_bytes()
    match damage:
        case "missing":
            kept.unlink()
        case "flipped":
            kept.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        case "cut":
            kept.write_bytes(whole[:1000])
    if ends == "badly":
        assert world.roll_back(transaction) is not None
    else:
        world.reopen()
    assert ((work / "file").read_text(), (work / "other").read_text()) == ("half done", "old")
    assert any(word in world.left()["work/file"] for word in ("missing", "damaged"))
    assert sorted(os.listdir(work)) == ["file", "other"]
    events = len(world.events())
    world.retry()
    assert len(world.events()) == events
    kept.write_bytes(whole)
    assert world.retry() == []
    assert (work / "file").read_bytes() == LARGE


# -- a plan that is out of date


LATER: dict[str, Callable[[Path], object]] = {
    "content": lambda path: path.write_text("theirs"),
    "same length": lambda path: path.write_text("HALF DONE"),
    "mode": lambda path: path.chmod(0o600),
    "gone": lambda path: path.unlink(),
    "folder": _to_folder,
    "link": _to_link,
    "fifo": _to_fifo,
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("ways", [Ways(), Ways(force=True), Ways(partial=True), Ways(merge=True)], ids=str)
def test_a_plan_of_what_is_not_there_any_more_is_not_carried_out(world: World, work: Path, later: str, ways: Ways):
    """Somebody has changed a path since: all stays as it is, the other path, too; a new plan has another digest."""
    call = changed(world, work)
    selection = Selection(calls=(call,))
    plan = world.journal.rollbacks.plan(selection, ways)
    LATER[later](work / "file")
    before = tree(work)
    with pytest.raises(JournalError) as caught:
        world.journal.rollbacks.apply(plan, "p")
    assert caught.value.reason is Reason.UNDO_CONFLICT
    assert tree(work) == before
    assert world.journal.rollbacks.plan(selection, ways).digest != plan.digest
    assert (world.left(), world.reopen()) == ({}, [])


# -- poor file systems


POOR = {
    "vfat": ("mkfs.vfat",),
    "no attributes": ("mkfs.ext4", "-q", "-F", "-O", "^ext_attr,^has_journal"),
    "minix": ("mkfs.minix",),
}


@pytest.mark.parametrize("kind", POOR)
@pytest.mark.parametrize("ends", ["well", "badly", "never"])
def test_contents_come_back_on_a_file_system_without_modes_links_or_attributes(
    world: World, tmp_path: Path, kind: str, ends: str
):
    """Rewritten, created, removed, moved: what such a file system can hold is as it was."""
    with lent(tmp_path.resolve(), 32 << 20, *POOR[kind]) as disk:
        home = disk / "home"
        grow(home)
        before = contents(home)
        _on_poor_file_system(world, home, ends)
        assert contents(home) == before
        assert world.left() == {}


def grow(home: Path) -> None:
    (home / "sub").mkdir(parents=True)
    (home / "large").write_bytes(LARGE)
    for name in ("a", "sub/b", "c"):
        (home / name).write_text(f"old {name}")


def contents(home: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(home)): path.read_bytes() if path.is_file() else None for path in home.rglob("*")}


def _change_all(files: Files, home: Path) -> None:
    _rewrite(files, home / "large", b"new")
    _rewrite(files, home / "new", b"new")
    files.remove(os.fsencode(home / "a"), folder=False)
    files.rename(os.fsencode(home / "c"), os.fsencode(home / "moved"), replace=False)
    files.rename(os.fsencode(home / "sub"), os.fsencode(home / "sub moved"), replace=False)
    files.make_folder(os.fsencode(home / "made"), 0o755)


def _on_poor_file_system(world: World, home: Path, ends: str) -> None:
    transaction, files = world.broker(home)
    _change_all(files, home)
    if ends == "well":
        world.end(transaction)
        world.journal.undo(transaction.call, "p")
    elif ends == "badly":
        assert world.roll_back(transaction) is None
    else:
        world.reopen()


def _refuse(code: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("lacks", ["exchange", "links", "attributes", "all of them"])
@pytest.mark.parametrize("ends", ["well", "badly", "never"])
def test_contents_come_back_where_the_kernel_refuses(world: World, monkeypatch: pytest.MonkeyPatch, lacks: str, ends: str):
    """To exchange two names (EINVAL), to make a hard link (EPERM), to list attributes (ENOTSUP)."""
    home = world.home / "poor"
    grow(home)
    before = contents(home)
    if lacks in ("exchange", "all of them"):
        monkeypatch.setattr(kernel, "exchange", _refuse(errno.EINVAL))
    if lacks in ("links", "all of them"):
        monkeypatch.setattr(os, "link", _refuse(errno.EPERM))
    if lacks in ("attributes", "all of them"):
        for name in ("listxattr", "getxattr", "setxattr"):
            monkeypatch.setattr(os, name, _refuse(errno.ENOTSUP))
    _on_poor_file_system(world, home, ends)
    assert contents(home) == before
    assert world.left() == {}


# -- deep trees


def dig(top: Path, depth: int, name: str = "d") -> None:
    """A chain of directories with a file at the bottom, made without a path that could be too long."""
    top.mkdir()
    here = os.open(top, os.O_DIRECTORY)
    for _ in range(depth - 1):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
    os.close(here)


def depth_of(top: Path, name: str = "d") -> int:
    """How many directories there are, one in the other; 0 if the file at the bottom is missing."""
    depth, here = 1, os.open(top, os.O_DIRECTORY)
    while name in os.listdir(here):
        below = os.open(name, os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here, depth = below, depth + 1
    found = os.listdir(here)
    os.close(here)
    return depth if "bottom" in found else 0


@pytest.mark.parametrize(("depth", "ends"), [(300, "well"), (300, "badly"), (300, "never"), (1500, "badly")])
def test_a_nesting_made_by_renames_comes_apart_again(world: World, depth: int, ends: str):
    """One chain of directories is moved to the bottom of another, and back; nothing runs out on the way."""
    one, other = world.home / "one", world.home / "other"
    for top in (one, other):
        dig(top, depth // 2)
    bottom = os.fsencode(one) + b"/d" * (depth // 2 - 1)
    transaction, files = world.broker()
    files.rename(os.fsencode(other), bottom + b"/d", replace=False)
    assert depth_of(one) == depth
    if ends == "well":
        world.end(transaction)
        world.journal.undo(transaction.call, "p")
    elif ends == "badly":
        assert world.roll_back(transaction) is None
    else:
        world.reopen()
    assert (depth_of(one), depth_of(other)) == (depth // 2, depth // 2)
    assert world.left() == {}


def test_a_nesting_past_the_longest_path_is_restored_or_refused(world: World):
    """Paths of more than 4,096 bytes have no system call that takes them: all is as before in any case."""
    name = "n" * 8
    one, other = world.home / "one", world.home / "other"
    dig(one, 250, name)
    dig(other, 250, name)
    bottom = os.fsencode(one) + (b"/" + name.encode()) * 249
    transaction, files = world.broker()
    with contextlib.suppress(OSError, Refusal):
        files.rename(os.fsencode(other), bottom + b"/" + name.encode(), replace=False)
    assert world.roll_back(transaction) is None
    assert (depth_of(one, name), depth_of(other, name)) == (250, 250)


# -- names


NAMES = (b"a\nb", b"\xff\xfe", b"\n", b" ", b"-rf", b"\x1b[31m", "ü".encode(), b"\xc3", b"x" * 255, b"%s{0}$(id)", b"\\n\"'")


@pytest.mark.parametrize("ends", ["well", "badly", "never", "left"])
def test_odd_names_are_names(world: World, work: Path, ends: str):
    """Line breaks, control characters, bytes that are no UTF-8, as long as can be: restored, listed and said like others."""
    paths = [work / os.fsdecode(name) for name in NAMES]
    for path in paths:
        path.write_text("old")
    before = tree(work)
    transaction = world.begin(*paths)
    for n, path in enumerate(paths):
        path.unlink() if n % 2 or ends == "left" else path.write_text("new")
    if ends == "well":
        world.end(transaction)
        world.journal.undo(transaction.call, "p")
    elif ends == "never":
        world.reopen()
    elif ends == "badly":
        assert world.roll_back(transaction) is None
    else:
        _leave_and_retry(world, work, transaction.call, lambda: world.roll_back(transaction))
    assert tree(work) == before
    assert world.left() == {}
    assert world.audit.verify().bad is None


def _leave_and_retry(world: World, work: Path, call: str, roll_back: Callable[[], JournalError | None]) -> None:
    _rename(work)
    work.write_text("in the way")
    error = roll_back()
    assert error is not None
    error.message.encode("utf-8", "surrogateescape")
    assert {os.path.basename(left.path) for left in world.journal.recovery.left(call)} == set(NAMES)
    world.reopen()
    work.unlink()
    work.with_name("aside").rename(work)
    world.retry()


# -- large


def test_a_tree_of_20000_entries_is_removed_and_undone(world: World):
    """Within bounds: not a commit nor a descriptor for each of them."""
    top = world.home / "tree"
    for n in range(20):
        (top / f"{n}").mkdir(parents=True)
        for m in range(999):
            (top / f"{n}" / f"{m}").write_text(f"{n} {m}")
    before = contents(top)
    assert len(before) == 20_000
    commits: list[int] = []
    world.store.on_commit.append(lambda: commits.append(len(os.listdir("/proc/self/fd"))))
    descriptors = len(os.listdir("/proc/self/fd"))
    call = world.by_broker(lambda files: _remove_tree(files, top))
    assert not top.exists()
    world.journal.undo(call, "p")
    assert contents(top) == before
    assert len(commits) < 1000
    assert max(commits) < descriptors + 100


def _remove_tree(files: Files, top: Path) -> None:
    for folder, folders, names in os.walk(top, topdown=False):
        for name in names:
            files.remove(os.fsencode(os.path.join(folder, name)), folder=False)
        for name in folders:
            files.remove(os.fsencode(os.path.join(folder, name)), folder=True)
    files.remove(os.fsencode(top), folder=True)


class TookTooLong(BaseException):
    """No error of the system: nobody takes it for a path's own."""


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Ends what takes longer, with an error."""

    def end(*_: object) -> None:
        raise TookTooLong

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def sparse(path: Path, end: bytes = b"end") -> Path:
    """4 TiB, with a few bytes at the end."""
    try:
        with path.open("wb") as file:
            file.truncate(4 * TERABYTE)
            file.seek(-len(end), os.SEEK_END)
            file.write(end)
    except OSError as e:
        pytest.skip(f"this file system has no such files: {e}")
    return path


def test_no_call_makes_a_file_of_4_tib(world: World, work: Path):
    """EFBIG, and the file is as it was."""
    transaction, files = world.broker()
    with pytest.raises(OSError) as caught:  # its number is looked at
        files.truncate(os.fsencode(work / "file"), 4 * TERABYTE)
    assert caught.value.errno == errno.EFBIG
    assert world.roll_back(transaction) is None
    assert (work / "file").stat().st_size == 3


def test_a_file_of_4_tib_is_looked_at_within_a_time(work: Path):
    """It is nearly all holes; two that differ in one byte are not the same."""
    with bounded(20):
        one, other = (look(os.fsencode(sparse(work / name, name.encode()))) for name in ("one", "two"))
        again = look(os.fsencode(work / "one"))
    assert one.kind == "file"
    assert (one.digest == again.digest, one.digest == other.digest) == (True, False)


@pytest.mark.parametrize("operation", ["write", "remove", "replace", "move"])
def test_no_call_changes_a_file_of_4_tib_of_somebody_s(world: World, work: Path, operation: Any):
    """It is refused within a time, and nothing is kept of it."""
    path = os.fsencode(sparse(work / "large"))
    transaction = world.begin()
    with bounded(20), pytest.raises(Refusal) as caught:
        transaction.before_changes([Change(operation, path)])
    assert caught.value.errno == errno.EFBIG
    assert world.roll_back(transaction) is None
    assert os.stat(path).st_nlink == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_4_tib_that_took_a_path_s_place_does_not_stop_a_recovery(world: World, work: Path, force: bool):
    """The other path is restored within a time; theirs stays or can be had again."""
    call = open_call(world, work)
    (work / "file").unlink()
    sparse(work / "file")
    with bounded(20):
        world.reopen()
        if force:
            world.retry(force=True)
        assert (work / "other").read_text() == "old"
        if (work / "file").stat().st_size != 4 * TERABYTE:
            undo_recoveries(world, call)
    assert (work / "file").stat().st_size == 4 * TERABYTE


# -- what may not be read


CLOSED = ("file", "folder", "folder above")


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("ends", ["well", "badly", "never"])
def test_what_its_owner_may_not_use_comes_back_with_its_mode(closed: str, ends: str):
    """Mode 000, as an ordinary user: content and mode are as they were, after a call that has opened or removed it."""
    assert as_nobody(lambda root: _closed(root, closed, ends)) == 0


def _closed(root: Path, closed: str, ends: str) -> None:
    world = World(root)
    folder = world.home / "above" / "folder"
    folder.mkdir(parents=True)
    file = folder / "file"
    file.write_text("old")
    shut = {"file": file, "folder": folder, "folder above": folder.parent}[closed]
    shut.chmod(0)
    transaction = world.begin(shut)
    shut.chmod(0o700)
    transaction.before_changes([Change("remove", os.fsencode(file))])
    file.unlink()
    if closed == "folder":
        transaction.before_changes([Change("remove", os.fsencode(folder))])
        folder.rmdir()
    match ends:
        case "well":
            world.end(transaction)
            world.journal.undo(transaction.call, "p")
        case "badly":
            assert world.roll_back(transaction) is None
        case _:
            world.reopen()
    assert shut.stat().st_mode & 0o777 == 0
    shut.chmod(0o700)
    assert (file.read_text(), world.left()) == ("old", {})
    world.store.close()


@pytest.mark.parametrize("closed", CLOSED)
def test_what_the_call_has_closed_comes_back(closed: str):
    """A call takes all permissions away and is killed: a start restores contents and modes."""
    assert as_nobody(lambda root: _close(root, closed)) == 0


def _close(root: Path, closed: str) -> None:
    world = World(root)
    folder = world.home / "above" / "folder"
    folder.mkdir(parents=True)
    file = folder / "file"
    file.write_text("old")
    shut = {"file": file, "folder": folder, "folder above": folder.parent}[closed]
    mode = shut.stat().st_mode
    world.begin(file, shut)
    file.write_text("new")
    shut.chmod(0)
    world.reopen()
    assert (shut.stat().st_mode, file.read_text(), world.left()) == (mode, "old", {})
    world.store.close()


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_file_of_the_same_content_that_was_replaced_by_a_linked_one_is_a_file_of_its_own_again(world: World, ends: str):
    a, b, own = (world.home / name for name in ("a", "b", "own"))
    a.write_text("same")
    own.write_text("same")
    b.hardlink_to(a)
    own.chmod(0o600)
    transaction, files = world.broker()
    files.remove(os.fsencode(b), folder=False)
    files.rename(os.fsencode(a), os.fsencode(own), replace=True)
    if ends == "well":
        world.end(transaction)
        world.journal.undo(transaction.call, "p")
    else:
        assert world.roll_back(transaction) is None
    assert a.samefile(b)
    assert not own.samefile(a)
    assert (a.stat().st_mode & 0o777, own.stat().st_mode & 0o777) == (0o644, 0o600)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_name_comes_back_as_one_of_the_same_file_though_the_other_is_in_a_closed_folder(ends: str):
    """Nobody may look there, and the file may not be read: both have their modes again afterwards."""
    assert as_nobody(lambda root: _twin_in_a_closed_folder(root, ends)) == 0


def _twin_in_a_closed_folder(root: Path, ends: str) -> None:
    world = World(root)
    above, file = world.home / "above", world.home / "file"
    folder = above / "folder"
    folder.mkdir(parents=True)
    file.write_text("old")
    (folder / "twin").hardlink_to(file)
    number = file.stat().st_ino
    for path in (file, folder, above):
        path.chmod(0)
    transaction, files = world.broker()
    files.change_mode(os.fsencode(above), 0o555)
    files.remove(os.fsencode(file), folder=False)
    assert (folder.stat().st_mode & 0o777, above.stat().st_mode & 0o777) == (0, 0o555)
    if ends == "well":
        world.end(transaction)
        world.journal.undo(transaction.call, "p")
    else:
        assert world.roll_back(transaction) is None
    status = file.stat()
    assert (status.st_ino, status.st_nlink, status.st_mode & 0o777, above.stat().st_mode & 0o777) == (number, 2, 0, 0)
    above.chmod(0o700)
    assert folder.stat().st_mode & 0o777 == 0
    folder.chmod(0o700)
    world.store.close()


def test_somebody_else_s_closed_folder_is_left_and_said():
    """What root has closed stays closed: the path is on the list, the others are restored, and later it is, too."""
    need_root()
    assert as_nobody(_not_ours) == 0


def _not_ours(root: Path) -> None:
    world = World(root)
    folder = world.home / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    (world.home / "other").write_text("old")
    transaction = world.begin(folder / "file", world.home / "other")
    for path in (folder / "file", world.home / "other"):
        path.write_text("new")
    folder.rename(world.home / "aside")
    (world.home / "folder").symlink_to("/root")
    assert world.roll_back(transaction) is not None
    assert (world.home / "other").read_text() == "old"
    assert world.left().keys() == {"folder/file"}
    (world.home / "folder").unlink()
    (world.home / "aside").rename(folder)
    with contextlib.suppress(AgentdError):
        world.retry()
    assert ((folder / "file").read_text(), world.left()) == ("old", {})
    world.store.close()


# -- bounds that are small


def test_a_recovery_keeps_what_is_there_however_large(tmp_path: Path):
    """A limit of what a call may change is none of what a recovery may keep."""
    world = World(tmp_path.resolve(), Keep(file_bytes=1000, call_bytes=1000, low_space_bytes=0))
    (world.home / "file").write_text("old")
    transaction = world.begin(world.home / "file")
    (world.home / "file").write_bytes(LARGE)
    world.reopen()
    assert (world.home / "file").read_text() == "old"
    undo_recoveries(world, transaction.call)
    assert (world.home / "file").read_bytes() == LARGE
    world.store.close()
