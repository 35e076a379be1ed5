"""What could not be restored: on a list with the reason, tried again, and never over what somebody has made of it since."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agentd.errors import JournalError, Reason
from agentd.journal import Keep
from tests.journal.worlds import World, as_nobody, in_a_child, kill_at, need_root, run, small_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agentd.journal import Transaction

SHORT = 4096
OLD = os.urandom(200_000)
DAY_NS = 86400 * 10**9


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path.resolve())
    yield made
    made.store.close()


@pytest.fixture
def disk(world: World) -> Iterator[Path]:
    with small_disk(world.home / "disk") as at:
        yield at


# -- what may be in the way, and out of it again


class ReadOnly:
    """The file system was mounted anew, to be read only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self) -> None:
        run("mount", "-o", "remount,ro", self.folder)

    def take_away(self) -> None:
        run("mount", "-o", "remount,rw", self.folder)


class Full(ReadOnly):
    """The file system is full."""

    def put(self) -> None:
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                return

    def take_away(self) -> None:
        (self.folder / "filler").unlink()


class Immutable(ReadOnly):
    """Nothing in the folder may be changed, not by root either."""

    def put(self) -> None:
        need_root()
        try:
            run("chattr", "+i", self.folder)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this file system knows no immutable folders")

    def take_away(self) -> None:
        run("chattr", "-i", self.folder)


class Elsewhere(ReadOnly):
    """Somebody has put a link to a folder of theirs where the folder was."""

    def put(self) -> None:
        self.folder.rename(self.folder.with_name("aside"))
        theirs = self.folder.with_name("theirs")
        theirs.mkdir()
        (theirs / "file").write_text("theirs")
        self.folder.symlink_to("theirs")

    def take_away(self) -> None:
        assert [path.name for path in self.folder.iterdir()] == ["file"]
        assert (self.folder / "file").read_text() == "theirs"
        self.folder.unlink()
        self.folder.with_name("aside").rename(self.folder)


class File(ReadOnly):
    """Somebody has put a file where the folder was."""

    def put(self) -> None:
        self.folder.rename(self.folder.with_name("aside"))
        self.folder.write_text("theirs")

    def take_away(self) -> None:
        assert self.folder.read_text() == "theirs"
        self.folder.unlink()
        self.folder.with_name("aside").rename(self.folder)


OBSTACLES: dict[str, type[ReadOnly]] = {
    "read-only": ReadOnly,
    "full": Full,
    "immutable": Immutable,
    "a link elsewhere": Elsewhere,
    "a file": File,
}
MOUNTED = ("read-only", "full")


@pytest.fixture(params=OBSTACLES)
def obstacle(request: pytest.FixtureRequest, world: World) -> Iterator[ReadOnly]:
    with ExitStack() as stack:
        folder = world.home / "disk"
        if request.param in MOUNTED:
            stack.enter_context(small_disk(folder))
        else:
            folder.mkdir()
        yield OBSTACLES[request.param](folder)
        subprocess.run(["chattr", "-i", folder], check=False, capture_output=True)


def half_done(world: World, folder: Path, *, remove: bool = True) -> Transaction:
    """A call that has removed `disk/file`, or overwritten it, and changed `before` and `later` around it."""
    paths = [world.home / "before", folder / "file", world.home / "later"]
    for path in paths:
        path.write_bytes(OLD if path.name == "file" else b"old")
    transaction = world.begin(*paths)
    for path in paths:
        path.write_bytes(b"half done")
    if remove:
        (folder / "file").unlink()
    return transaction


def others(world: World) -> set[bytes]:
    return {(world.home / name).read_bytes() for name in ("before", "later")}


def failed(world: World, obstacle: ReadOnly) -> str:
    """A call that has failed, and of which a path is left."""
    transaction = half_done(world, obstacle.folder)
    obstacle.put()
    assert world.roll_back(transaction) is not None
    return transaction.call


def test_a_path_that_cannot_be_restored_stops_no_other(world: World, obstacle: ReadOnly):
    """All others are restored; that one is on the list with a reason, and an undo of the call says so and what to do."""
    call = failed(world, obstacle)
    assert others(world) == {b"old"}
    assert world.left().keys() == {"disk/file"}
    assert all(world.left().values())
    assert world.journal.recovery.count == 1
    with pytest.raises(JournalError) as caught:
        world.journal.undo(call, "p")
    assert caught.value.reason is Reason.NOT_UNDOABLE
    assert "agentd recover" in caught.value.hint
    assert "disk/file" in caught.value.message
    obstacle.take_away()


def test_a_retry_restores_it_once_it_can_be(world: World, obstacle: ReadOnly):
    """Before that it changes nothing and writes no event; afterwards nothing is left, and the log says that it was recovered."""
    call = failed(world, obstacle)
    events = len(world.events())
    for _ in range(3):
        assert [left.call for left in world.retry()] == [call]
    assert len(world.events()) == events
    obstacle.take_away()
    assert world.retry() == []
    assert (world.home / "disk" / "file").read_bytes() == OLD
    assert (world.left(), world.journal.recovery.count, world.state(call)) == ({}, 0, "rolled_back")
    assert world.events("call.recovered")[-1]["call"] == call
    assert world.retry() == []
    assert world.reopen() == []
    assert world.audit.verify().bad is None


def test_what_is_left_survives_a_kill_and_a_start_tries_it_again(world: World, obstacle: ReadOnly):
    """A start while the obstacle is there leaves it on the list, one after that restores it."""
    call = failed(world, obstacle)
    assert world.reopen() == [call]
    assert (set(world.left()), world.state(call), world.journal.recovery.count) == ({"disk/file"}, "open", 1)
    obstacle.take_away()
    assert world.reopen() == [call]
    assert (world.home / "disk" / "file").read_bytes() == OLD
    assert (world.left(), world.state(call), world.reopen()) == ({}, "rolled_back", [])


def test_a_killed_call_goes_by_the_same_rules(world: World, obstacle: ReadOnly):
    """What the start after a kill can't restore is on the list, too, and a retry restores it."""
    transaction = half_done(world, obstacle.folder)
    obstacle.put()
    assert world.reopen() == [transaction.call]
    assert others(world) == {b"old"}
    assert world.left().keys() == {"disk/file"}
    obstacle.take_away()
    assert world.retry() == []
    assert (world.home / "disk" / "file").read_bytes() == OLD
    assert world.state(transaction.call) == "rolled_back"


@pytest.mark.parametrize("again", ["retry", "start"])
def test_what_somebody_has_made_where_it_was_is_kept(world: World, obstacle: ReadOnly, again: str):
    """A file of somebody's that took the place meanwhile is not overwritten, and the list says why. Where nobody could see what was
    left there, theirs is kept first, and can be had again.
    """
    call = failed(world, obstacle)
    obstacle.take_away()
    file = world.home / "disk" / "file"
    file.write_text("theirs")
    if again == "retry":
        world.retry()
    else:
        world.reopen()
    if isinstance(obstacle, Elsewhere | File):
        assert (world.left(), file.read_bytes()) == ({}, OLD)
        world.journal.undo(world.recoveries(call)[-1], "p")
        assert file.read_text() == "theirs"
        return
    assert file.read_text() == "theirs"
    assert "changed it since" in world.left()["disk/file"]
    assert world.state(call) == "open"


@pytest.mark.parametrize("edit", ["written", "removed", "replaced", "mode"])
@pytest.mark.parametrize("again", ["retry", "start"])
def test_what_somebody_has_edited_since_is_kept_and_force_overwrites_it(world: World, disk: Path, edit: str, again: str):
    """Whatever they did to it; what force has overwritten can be had again by undoing the recovery's call."""
    transaction = half_done(world, disk, remove=False)
    ReadOnly(disk).put()
    assert world.roll_back(transaction) is not None
    ReadOnly(disk).take_away()
    _edit(disk / "file", edit)
    theirs = _seen(disk / "file")
    world.retry() if again == "retry" else world.reopen()
    assert _seen(disk / "file") == theirs
    assert "changed it since" in world.left()["disk/file"]
    assert world.retry(force=True) == []
    assert (disk / "file").read_bytes() == OLD
    assert world.state(transaction.call) == "rolled_back"
    world.journal.undo(world.recoveries(transaction.call)[-1], "p")
    assert _seen(disk / "file") == theirs
    assert world.audit.verify().bad is None


def _edit(file: Path, how: str) -> None:
    match how:
        case "written":
            file.write_text("theirs")
        case "removed":
            file.unlink()
        case "replaced":
            file.unlink()
            file.symlink_to("elsewhere")
        case "mode":
            file.chmod(0o600)


def _seen(path: Path) -> tuple[object, ...]:
    if not os.path.lexists(path):
        return ()
    status = path.lstat()
    return (status.st_mode, os.readlink(path) if path.is_symlink() else path.read_bytes())


def test_what_could_not_even_be_looked_at_is_not_overwritten_unseen(world: World):
    """Nobody knows what was left there: what somebody writes meanwhile can be had again, or is kept."""
    folder = world.home / "disk"
    folder.mkdir()
    transaction = half_done(world, folder, remove=False)
    obstacle = Elsewhere(folder)
    obstacle.put()
    assert world.roll_back(transaction) is not None
    obstacle.take_away()
    (folder / "file").write_text("theirs")
    world.retry()
    if (folder / "file").read_bytes() != b"theirs":
        world.journal.undo(world.recoveries(transaction.call)[-1], "p")
    assert (folder / "file").read_text() == "theirs"


def test_a_path_that_somebody_has_restored_themselves_is_done(world: World, disk: Path):
    """It is as it was: off the list, and rolled back."""
    transaction = half_done(world, disk, remove=False)
    status = os.stat(world.home / "before")
    ReadOnly(disk).put()
    assert world.roll_back(transaction) is not None
    ReadOnly(disk).take_away()
    (disk / "file").write_bytes(OLD)
    (disk / "file").chmod(status.st_mode & 0o777)
    world.retry(force=True)
    assert (disk / "file").read_bytes() == OLD
    assert (world.left(), world.state(transaction.call)) == ({}, "rolled_back")


def test_a_retry_of_one_call_leaves_the_others_alone(world: World):
    """Only what it names is tried."""
    calls, obstacles = [], []
    for name in ("one", "two"):
        folder = world.home / name
        folder.mkdir()
        obstacles.append(File(folder))
        transaction = half_done(world, folder)
        obstacles[-1].put()
        assert world.roll_back(transaction) is not None
        calls.append(transaction.call)
        folder.unlink()
        folder.with_name("aside").rename(folder)
    assert world.retry(calls[:1]) == []
    assert world.left().keys() == {"two/file"}
    assert [world.state(call) for call in calls] == ["rolled_back", "open"]


# -- kills


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_in_the_middle_of_a_retry_is_harmless(world: World, force: bool):
    """At any step of it: what a start makes of that is as if there had been no kill."""
    folder = world.home / "disk"
    folder.mkdir()
    for step in range(1, 400, 7):
        obstacle = File(folder)
        call = failed(world, obstacle)
        obstacle.take_away()
        world.store.close()
        code = in_a_child(lambda step=step: _retry_until_killed(world, step, force=force))  # type: ignore[misc]
        world.open()
        world.journal.recover()
        assert (folder / "file").read_bytes() == OLD, step
        assert (world.left(), world.state(call)) == ({}, "rolled_back"), step
        assert sorted(os.listdir(folder)) == ["file"]
        assert world.audit.verify().bad is None
        if code == 0:
            return
        assert code == -signal.SIGKILL
    pytest.fail("it takes more steps than were tried")


def _retry_until_killed(world: World, step: int, *, force: bool) -> None:
    world.open()
    kill_at(step)
    world.retry(force=force)


def test_a_kill_in_the_middle_of_a_forced_retry_loses_nothing_of_theirs(world: World, disk: Path):
    """Their version is in its place, or can be had again by undoing a recovery."""
    for step in range(1, 400, 11):
        transaction = half_done(world, disk, remove=False)
        ReadOnly(disk).put()
        assert world.roll_back(transaction) is not None
        ReadOnly(disk).take_away()
        (disk / "file").write_text("theirs")
        world.store.close()
        code = in_a_child(lambda step=step: _retry_until_killed(world, step, force=True))  # type: ignore[misc]
        world.open()
        world.journal.recover()
        if world.left():
            assert (disk / "file").read_bytes() in (b"theirs", OLD), step
            world.retry(force=True)
        assert (disk / "file").read_bytes() == OLD, step
        assert _had_again(world, disk / "file") == b"theirs", step
        if code == 0:
            return
        assert code == -signal.SIGKILL
    pytest.fail("it takes more steps than were tried")


def test_another_closed_file_in_the_place_of_one_that_is_restored_keeps_its_mode():
    """It is opened for a while to be read; killed at any step of that, and it is closed again after the next start."""
    assert as_nobody(_another_in_its_place) == 0


def _another_in_its_place(root: Path) -> None:
    world = World(root)
    other, file = world.home / "other", world.home / "file"
    for step in range(1, 400, 3):
        other.write_text("theirs")
        other.chmod(0)
        file.write_text("old")
        world.store.close()
        code = in_a_child(lambda step=step: _roll_back_until_killed(world, file, other, step))  # type: ignore[misc]
        world.open()
        world.journal.recover()
        assert (file.read_text(), other.stat().st_mode & 0o777, world.left()) == ("old", 0, {}), step
        other.unlink()
        if code == 0:
            world.store.close()
            return
        assert code == -signal.SIGKILL
    pytest.fail("it takes more steps than were tried")


def _roll_back_until_killed(world: World, file: Path, other: Path, step: int) -> None:
    world.open()
    transaction = world.begin(file)
    transaction.roots = (os.fsencode(world.home),)
    file.unlink()
    file.hardlink_to(other)
    kill_at(step)
    assert world.roll_back(transaction) is None


def test_a_name_that_comes_back_leaves_the_mode_of_its_file_alone():
    """Its owner may not write to it, and another name of it was no business of the call's: not even a kill changes its mode."""
    assert as_nobody(_twin_is_left_alone) == 0


def _twin_is_left_alone(root: Path) -> None:
    world = World(root)
    twin, file = world.home / "twin", world.home / "file"
    for step in range(1, 400, 2):
        twin.write_text("old")
        file.hardlink_to(twin)
        twin.chmod(0o400)
        world.store.close()
        code = in_a_child(lambda step=step: _undo_until_killed(world, file, step))  # type: ignore[misc]
        world.open()
        world.journal.recover()
        assert (twin.stat().st_mode & 0o777, world.left()) == (0o400, {}), step
        twin.unlink()
        file.unlink(missing_ok=True)
        if code == 0:
            world.store.close()
            return
        assert code == -signal.SIGKILL
    pytest.fail("it takes more steps than were tried")


def _undo_until_killed(world: World, file: Path, step: int) -> None:
    world.open()
    transaction, files = world.broker()
    files.remove(os.fsencode(file), folder=False)
    world.end(transaction)
    kill_at(step)
    world.journal.undo(transaction.call, "p")


def _had_again(world: World, file: Path) -> bytes:
    """What undoing the recoveries, newest first, brings back first."""
    done = [str(event["call"]) for event in world.events("call.recovered") if event.get("cause")]
    for recovery in reversed(done):
        try:
            world.journal.undo(recovery, "p")
        except JournalError:
            continue
        if file.read_bytes() != OLD:
            return file.read_bytes()
    return b""


# -- many


@pytest.fixture(params=["roll back", "start"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("names", ["short", "long"])
def test_texts_stay_short_however_many_paths_fail(
    world: World, way: str, names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """5,000 paths are on the list; what is said, logged and recorded of them is under 4 KB each, with long names, too."""
    with small_disk(world.home / "disk", 64) as disk:
        folder = disk if names == "short" else disk / ("x" * 200) / ("y" * 200) / ("z" * 200)
        folder.mkdir(parents=True, exist_ok=True)
        stem = "" if names == "short" else "n" * 200
        paths = [folder / f"{stem}{n}" for n in range(5000)]
        for path in paths:
            path.write_text("old")
        transaction = world.begin(*paths)
        for path in paths:
            path.unlink()
        ReadOnly(disk).put()
        texts = [str(world.roll_back(transaction))] if way == "roll back" else []
        if way == "start":
            world.reopen()
        assert len(world.left()) == 5000
        texts += _said(world, transaction.call)
        texts += [record.getMessage() for record in caplog.records]
        assert max(map(len, texts)) < SHORT
        ReadOnly(disk).take_away()
        assert world.retry() == []
        assert len(list(folder.iterdir())) == 5000
        assert max(map(len, _said(world, transaction.call))) < SHORT


def _said(world: World, call: str) -> list[str]:
    """Of the call: the error of an undo, the events, the reasons on the list."""
    with pytest.raises(JournalError) as caught:
        world.journal.undo(call, "p")
    error = caught.value
    told = [str({**event, "files": ()}) for event in world.events()]
    return [*told, *world.left().values(), error.message + error.hint + str(error.metadata)]


# -- names like ours


@pytest.mark.parametrize("ends", ["badly", "never"])
@pytest.mark.parametrize("whose", ["somebody's", "the call's"])
def test_a_directory_named_like_a_temporary_is_no_obstacle(world: World, ends: str, whose: str):
    """It stays, with all that is in it, and everything else is restored."""
    folder = world.home / "disk"
    folder.mkdir()
    transaction = half_done(world, folder)
    call = transaction.call if whose == "the call's" else "0123456789abcdef"
    for name in (f".agentd-{call}", f".agentd-{call}-00000000"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("theirs")
    if ends == "badly":
        assert world.roll_back(transaction) is None
    else:
        world.reopen()
    assert (folder / "file").read_bytes() == OLD
    assert others(world) == {b"old"}
    assert world.left() == {}
    for name in (f".agentd-{call}", f".agentd-{call}-00000000"):
        assert (folder / name / "file").read_text() == "theirs"


def test_a_directory_named_like_a_temporary_does_not_keep_the_others(world: World):
    """What a killed call has left under such names is removed, beside a directory that has one."""
    folder = world.home / "disk"
    folder.mkdir()
    transaction = half_done(world, folder)
    beginning = f".agentd-{transaction.call}-"
    for n in range(8):
        (folder / f"{beginning}d{n}").mkdir()
        (folder / f"{beginning}{secrets.token_hex(4)}").write_text("half a file")
    world.reopen()
    assert sorted(os.listdir(folder)) == sorted([*(f"{beginning}d{n}" for n in range(8)), "file"])


# -- retention


def test_contents_that_something_left_needs_are_not_given_up(tmp_path: Path):
    """However old and however much: the call is not over yet."""
    world = World(tmp_path.resolve(), Keep(file_bytes=8 << 20, low_space_bytes=0, total_bytes=0, days=0, runs=0))
    folder = world.home / "disk"
    folder.mkdir()
    obstacle = File(folder)
    call = failed(world, obstacle)
    world.reopen()
    given_up = world.journal.retention.sweep(time.time_ns() + 1000 * DAY_NS)
    assert call not in given_up
    obstacle.take_away()
    assert world.retry() == []
    assert (folder / "file").read_bytes() == OLD
    world.store.close()


def test_contents_are_given_up_when_nothing_is_left(world: World):
    """A call that is rolled back needs them no more."""
    folder = world.home / "disk"
    folder.mkdir()
    obstacle = File(folder)
    failed(world, obstacle)
    obstacle.take_away()
    world.retry()
    world.journal.retention.sweep(time.time_ns() + 1000 * DAY_NS)
    assert [path for path in (world.root / "state" / "objects").rglob("*") if path.is_file()] == []


# -- several calls


def test_what_is_left_of_two_calls_of_one_path_goes_back_newest_first(world: World, disk: Path):
    """Both were open at a kill, and neither could be restored: one retry brings back what was there before the first."""
    file = disk / "file"
    file.write_text("old")
    for text in ("first", "second"):
        world.begin(file)
        file.write_text(text)
    ReadOnly(disk).put()
    assert len(world.reopen()) == 2
    assert len(world.journal.recovery.left()) == 2
    ReadOnly(disk).take_away()
    world.retry()
    assert (file.read_text(), world.left()) == ("old", {})


def test_a_finished_call_since_then_is_not_overwritten(world: World, disk: Path):
    """What another call has made of the path is that call's; it can still be undone."""
    transaction = half_done(world, disk, remove=False)
    ReadOnly(disk).put()
    assert world.roll_back(transaction) is not None
    ReadOnly(disk).take_away()
    file = disk / "file"
    other = world.call(lambda: file.write_text("of another call"), file)
    world.retry()
    assert file.read_text() == "of another call"
    world.journal.undo(other, "p")
    world.retry()
    assert (file.read_bytes(), world.left()) == (OLD, {})


def test_an_empty_list_is_tried_without_a_trace(world: World):
    """Nothing is left: nothing is read, written or recorded."""
    events = len(world.events())
    assert world.retry() == world.retry(force=True) == []
    assert len(world.events()) == events


def test_the_log_says_what_was_left(world: World):
    """The end of the call that could not be restored names the path."""
    folder = world.home / "disk"
    folder.mkdir()
    call = failed(world, File(folder))
    (ended,) = [event for event in world.events("call.abort") if event["call"] == call]
    assert "disk/file" in str(ended["detail"]["left"])


def test_a_forced_retry_that_can_do_nothing_writes_no_event(world: World):
    """It changes nothing, so there is nothing to record: neither that something was done nor that it was recovered."""
    folder = world.home / "disk"
    folder.mkdir()
    failed(world, File(folder))
    events = len(world.events())
    world.retry(force=True)
    world.retry(force=True)
    assert [event["kind"] for event in world.events()[events:]] == []


def test_a_file_whose_folder_is_gone_stays_on_the_list(world: World):
    """Nobody makes folders anew that somebody has removed; another one in its place is theirs, unless a person says otherwise."""
    folder = world.home / "disk"
    folder.mkdir()
    obstacle = File(folder)
    call = failed(world, obstacle)
    obstacle.take_away()
    shutil.rmtree(folder)
    world.retry()
    assert world.left().keys() == {"disk/file"}
    assert world.reopen() == [call]
    folder.mkdir()
    (folder / "of another").write_text("x")  # or it might get the number of the one that is gone
    world.retry()
    if world.left():
        assert list(folder.iterdir()) == [folder / "of another"]
        world.retry(force=True)
    assert ((folder / "file").read_bytes(), world.left()) == (OLD, {})
