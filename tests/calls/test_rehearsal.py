"""Rehearsals: a call runs, leaves nothing behind, and is applied or dropped by a person; never what reaches outside."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from agentd.calls import CallRequest
from agentd.errors import AgentdError, JournalError, Reason
from agentd.grants import Grant, parse
from agentd.journal import Selection, Verdict, Ways
from tests.calls.house import House

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.calls import CallResult

ALL = (("*", "read:{h}", "allow"), ("*", "write:{h}", "allow"), ("*", "exec:/usr", "allow"), ("http.*", "*", "allow"))
BUSY = "mv a b; printf new > c; rm -r d; mkdir e; echo x > e/f; chmod 600 g; head -c 90000 /dev/urandom > big; ln -s c link"


def planted(house: House) -> None:
    for name, text in {"a": "a", "c": "old", "g": "g", "big": "B" * 50_000}.items():
        (house.home / name).write_text(text)
    (house.home / "d").mkdir()
    (house.home / "d" / "deep").write_text("deep")


def tree(house: House) -> dict[str, Any]:
    found = {}
    for path in sorted(house.home.rglob("*")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(house.home))] = (path.lstat().st_mode, content)
    return found


def rehearsed(house: House, tool: str, **arguments: Any) -> CallResult:
    return house.run(house.calls.call(CallRequest("unix:pi", tool, arguments, rehearse=True)))  # type: ignore[no-any-return]


def shell(house: House, command: str) -> CallResult:
    return rehearsed(house, "shell.run", command=command, folder=str(house.home))


def apply(house: House, *calls: str, **ways: bool) -> Any:
    rollbacks = house.journal.rollbacks
    return rollbacks.apply(rollbacks.plan(Selection(calls=calls, rehearsed=True), Ways(**ways)), "unix:pi")


def test_a_rehearsal_changes_nothing_and_can_be_applied_and_undone(tmp_path: Path):
    """Names, contents, modes and links, small and large: applying gives what the call would have left."""
    with House(tmp_path / "plain", ALL) as plain:
        planted(plain)
        noise = os.urandom(90_000)
        (plain.home / "noise").write_bytes(noise)
        command = BUSY.replace("head -c 90000 /dev/urandom", "cat noise")
        plain.run(plain.call("shell.run", command=command, folder=str(plain.home)))
        wanted = tree(plain)
    with House(tmp_path / "rehearsed", ALL) as house:
        planted(house)
        (house.home / "noise").write_bytes(noise)
        before = tree(house)
        result = shell(house, command)
        assert result.rehearsed
        assert "rehearsed" not in result.output  # what it is told is what it would be told
        assert tree(house) == before
        assert [each.call for each in house.journal.rollbacks.rehearsals("unix:pi")] == [result.id]
        applied = apply(house, result.id)
        assert tree(house) == wanted
        assert house.journal.rollbacks.rehearsals("") == []
        house.journal.undo(applied.call, "unix:pi")
        assert tree(house) == before
        assert house.audit.verify().bad is None


def test_what_changed_meanwhile_is_in_the_way(tmp_path: Path):
    """All or nothing: a conflict on one path leaves all as they are, unless one is told to."""
    with House(tmp_path, ALL) as house:
        planted(house)
        call = shell(house, "printf new > c; printf made > fresh").id
        (house.home / "c").write_text("mine")
        with pytest.raises(JournalError) as caught:
            apply(house, call)
        assert caught.value.reason is Reason.UNDO_CONFLICT
        assert not (house.home / "fresh").exists()
        apply(house, call, force=True)
        assert (house.home / "c").read_text() == "new"


def test_a_text_that_was_edited_elsewhere_is_merged(tmp_path: Path):
    with House(tmp_path, ALL) as house:
        (house.home / "t").write_text("".join(f"{n}\n" for n in range(20)))
        call = shell(house, "sed -i 's/^2$/two/' t").id
        text = (house.home / "t").read_text().replace("18\n", "eighteen\n")
        (house.home / "t").write_text(text)
        apply(house, call, merge=True)
        assert (house.home / "t").read_text() == text.replace("\n2\n", "\ntwo\n")


def test_what_is_dropped_is_gone(tmp_path: Path):
    """With its content; dropping or applying it again is an error."""
    with House(tmp_path, ALL) as house:
        planted(house)
        call = shell(house, BUSY).id
        house.run(house.calls.undoing.drop(call, "unix:pi"))
        assert house.journal.rollbacks.rehearsals("") == []
        for again in (lambda: house.run(house.calls.undoing.drop(call, "unix:pi")), lambda: apply(house, call)):
            with pytest.raises(AgentdError):
                again()
        kept = "SELECT count(*) FROM pre_image WHERE content IS NOT NULL OR object IS NOT NULL OR result IS NOT NULL"
        assert house.store.read(lambda db: db.execute(kept).get) == 0


@pytest.mark.parametrize("tool", ["http.fetch", "http.post"])
def test_what_reaches_outside_is_not_rehearsed(tmp_path: Path, tool: str):
    """It is not run at all, and that is on record."""
    with House(tmp_path, ALL) as house:
        arguments = {"url": "http://127.0.0.1:9/"} | ({"text": "x"} if tool == "http.post" else {})
        with pytest.raises(JournalError, match="can't be rehearsed") as caught:
            rehearsed(house, tool, **arguments)
        assert caught.value.reason is Reason.NOT_UNDOABLE
        (rejected,) = house.bodies("call.reject")
        assert "can't be rehearsed" in rejected["error"]


def test_what_only_reads_is_an_ordinary_call(tmp_path: Path):
    with House(tmp_path, ALL) as house:
        planted(house)
        result = rehearsed(house, "files.read", path="a")
        assert not result.rehearsed
        assert "rehearsed" not in result.output
        assert house.journal.rollbacks.rehearsals("") == []


def test_a_grant_can_want_it(tmp_path: Path):
    """Before one that simply allows the same; for those calls only that it covers."""
    with House(tmp_path, ALL) as house:
        planted(house)
        scope = f"write:{house.home}/c"
        house.book.add(Grant("*", "files.*", parse(scope), "allow", "cli", "", scope, rehearse=True), "unix:pi")
        result = house.run(house.call("files.write", path="c", text="new"))
        other = house.run(house.call("files.write", path="a", text="new"))
        assert (result.rehearsed, other.rehearsed) == (True, False)
        assert (house.home / "c").read_text() == "old"
        assert (house.home / "a").read_text() == "new\n"


def test_a_rehearsal_that_fails_is_none(tmp_path: Path):
    with House(tmp_path, ALL) as house:
        planted(house)
        before = tree(house)
        result = rehearsed(house, "files.delete", path="missing")
        assert result.failed
        assert not result.rehearsed
        assert tree(house) == before
        assert house.journal.rollbacks.rehearsals("") == []


def test_rehearsals_outlive_the_daemon_and_are_given_up_with_age(tmp_path: Path):
    with House(tmp_path, ALL) as house:
        planted(house)
        call = shell(house, "printf new > c").id
    with House(tmp_path, ALL) as house:
        assert house.journal.recover() == []
        plan = house.journal.rollbacks.plan(Selection(calls=(call,), rehearsed=True), Ways())
        assert [planned.verdict for planned in plan.paths] == [Verdict.RESTORE]
        for n in range(25):  # the newest runs are never given up
            house.run(house.call("files.write", path=f"n{n}", text="x"))
        house.journal.retention.sweep(10**20)
        plan = house.journal.rollbacks.plan(Selection(calls=(call,), rehearsed=True), Ways())
        assert [planned.verdict for planned in plan.paths] == [Verdict.MISSING_PREIMAGE]


def test_what_is_too_large_to_be_kept_is_put_back_and_the_call_is_over(tmp_path: Path):
    """The error says which file; nothing waits for a restart."""
    with House(tmp_path, ALL) as house:
        planted(house)
        before = tree(house)
        with pytest.raises(JournalError, match="can't be kept to be looked at"):
            shell(house, "head -c 2000000 /dev/zero > huge; echo x > small")
        assert tree(house) == before
        assert house.store.read(lambda db: db.execute("SELECT count(*) FROM journal WHERE state = 'open'").get) == 0
        (aborted,) = house.bodies("call.abort")
        assert "huge" in aborted["error"]
