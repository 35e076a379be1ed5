"""States taken ahead of a removal, and what is restored in place: nothing of it is anybody else's."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from agentd.audit import Event
from agentd.journal import making, restoring
from tests.journal.worlds import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNT = 40


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path.resolve())
    yield made
    made.store.close()


@pytest.fixture
def many(world: World) -> list[Path]:
    """Files in one directory, in the order in which it names them."""
    directory = world.home / "d"
    directory.mkdir()
    for n in range(COUNT):
        (directory / f"f{n}").write_text(f"old {n}")
    return [directory / entry.name for entry in os.scandir(directory)]


def _remove(world: World, paths: list[Path]) -> tuple[object, ...]:
    transaction, files = world.broker()
    for path in paths:
        files.remove(os.fsencode(path), folder=False)
    assert transaction.ahead
    return transaction, files


@pytest.mark.parametrize("end", ["finish and undo", "roll back", "kill"])
def test_what_somebody_edits_beside_a_call_stays_theirs(world: World, many: list[Path], end: str):
    """The call has removed some names of a directory and never touched the others: neither are they on record as its changes."""
    transaction, _files = _remove(world, many[:5])
    theirs, new = many[-1], many[0].with_name("new")
    theirs.write_text("theirs")
    new.write_text("new")
    if end == "finish and undo":
        touched = transaction.finish(Event(kind="call.end", call=transaction.call))  # type: ignore[attr-defined]
        assert {file.path for file in touched} == {str(path) for path in many[:5]}
        world.journal.undo(transaction.call, "p")  # type: ignore[attr-defined]
    elif end == "roll back":
        transaction.roll_back(Event(kind="call.abort", call=transaction.call))  # type: ignore[attr-defined]
    else:
        world.reopen()
    assert [path.exists() for path in many] == [True] * COUNT
    assert (theirs.read_text(), new.read_text(), many[0].read_text()[:3]) == ("theirs", "new", "old")


def test_a_file_that_changed_since_its_state_was_taken_is_taken_again(world: World, many: list[Path]):
    """What is undone is what was removed, and not what was there earlier."""
    transaction, files = _remove(world, many[:5])
    many[5].write_text("newer")
    files.remove(os.fsencode(many[5]), folder=False)  # type: ignore[attr-defined]
    transaction.finish(Event(kind="call.end", call=transaction.call))  # type: ignore[attr-defined]
    world.journal.undo(transaction.call, "p")  # type: ignore[attr-defined]
    assert many[5].read_text() == "newer"


def test_what_takes_the_place_of_a_removed_file_goes_after_a_kill(world: World, many: list[Path]):
    transaction, files = _remove(world, many[:5])
    assert many[4] not in map(os.fsdecode, transaction.ahead)  # type: ignore[attr-defined]
    files.make_folder(os.fsencode(many[4]), 0o755)  # type: ignore[attr-defined]
    world.reopen()
    assert all(path.is_file() for path in many)


def test_a_full_disk_does_not_cost_a_file_that_was_appended_to(world: World, monkeypatch: pytest.MonkeyPatch):
    """What was there is the beginning of what is there: the rest is cut off, and no second copy is written."""
    log = world.home / "log"
    old = os.urandom(100_000)
    log.write_bytes(old)
    transaction, files = world.broker()
    descriptor = files.open(os.fsencode(log), os.O_WRONLY | os.O_APPEND, 0, 0)
    os.write(descriptor, b"more")
    os.close(descriptor)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(restoring, "write_file", full)
    transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    assert log.read_bytes() == old


def test_without_space_for_a_second_copy_a_file_is_restored_in_place(world: World, monkeypatch: pytest.MonkeyPatch):
    """And only if all of its content is there."""
    file = world.home / "file"
    old = os.urandom(100_000)
    file.write_bytes(old)
    inode = file.stat().st_ino
    transaction, files = world.broker()
    descriptor = files.open(os.fsencode(file), os.O_WRONLY, 0, 0)
    os.write(descriptor, b"new")
    os.close(descriptor)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(restoring, "write_file", full)
    transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    assert (file.read_bytes(), file.stat().st_ino) == (old, inode)


def test_what_would_run_as_another_user_than_before_never_does(world: World, monkeypatch: pytest.MonkeyPatch):
    """A set-uid program of somebody's comes back without that bit where it can't be given back to them."""
    program = world.home / "program"
    program.write_text("x")
    program.chmod(0o4755)
    transaction, files = world.broker()
    files.remove(os.fsencode(program), folder=False)
    monkeypatch.setattr(making, "set_owner", lambda *_: False)
    monkeypatch.setattr(restoring, "set_owner", lambda *_: False)
    transaction.roll_back(Event(kind="call.abort", call=transaction.call))
    assert program.stat().st_mode & 0o7777 == 0o755
