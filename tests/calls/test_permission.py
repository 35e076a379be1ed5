"""A call that a person has to decide on: asked, answered, recorded, and never run without."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.calls import Denied
from agentd.errors import Reason, RequestError, ToolError
from agentd.grants import Answer, Approval, Extent, Grant, parse
from tests.calls.house import House

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

YES = Answer(allow=True)
NO = Answer(allow=False, comment="not today")


async def asked(house: House, answer: Callable[[Approval], Answer | None], tool: str, **arguments: Any) -> Any:
    """A call while somebody is there to be asked; its result, or the error it raised."""
    person = asyncio.create_task(house.answering(answer))
    await asyncio.sleep(0)
    try:
        return await house.call(tool, **arguments)
    except (Denied, ToolError) as e:
        return e
    finally:
        person.cancel()


async def until(there: Callable[[], bool]) -> None:
    while not there():  # noqa: ASYNC110 # a file, or a list that others fill, has no event
        await asyncio.sleep(0.005)


def test_with_nobody_to_ask_what_no_grant_covers_is_denied(tmp_path: Path):
    """At once, with the way out; the record says that nobody was there."""
    with House(tmp_path) as house:
        with pytest.raises(Denied) as caught:
            house.run(house.call("files.write", path="a.txt", text="x"))
        assert caught.value.reason is Reason.GRANT_REQUIRED
        assert "agentd approvals" in caught.value.hint
        (denied,) = house.bodies("call.deny")
        assert denied["decision"]["asked"] == "nobody is there to be asked"
        assert not (house.home / "a.txt").exists()


def test_a_yes_runs_the_call_once(tmp_path: Path):
    """The question has the exact scopes; the next call asks again; question, answer and call are in the log."""
    with House(tmp_path) as house:

        async def twice() -> None:
            first = await asked(house, lambda _: YES, "files.write", path="a.txt", text="1")
            second = await asked(house, lambda _: NO, "files.write", path="a.txt", text="2")
            assert not first.failed
            assert isinstance(second, Denied)
            assert second.message == "files.write was denied: unix:owner said no: not today."

        house.run(twice())
        assert (house.home / "a.txt").read_text() == "1\n"
        question = house.questions[0]
        assert [str(scope) for scope in question.scopes] == [f"write:{house.home}/a.txt"]
        assert (question.tool, question.effect, question.not_undoable) == ("files.write", "files", "")
        expected = ["approval.request", "approval.answer", "call.intent", "call.end"]
        assert house.kinds() == [*expected, "approval.request", "approval.answer", "call.deny"]
        intent = house.bodies("call.intent")[0]["decision"]
        assert intent["rules"][0].startswith("approvals/")
        assert intent["asked"] == "allowed by unix:owner (once)"
        answer = house.bodies("approval.answer")[0]
        assert (answer["principal"], answer["detail"]["state"]) == ("unix:owner", "allowed")


@pytest.mark.parametrize(
    ("answer", "again", "elsewhere", "other_tool"),
    [
        (Answer(allow=True, extent=Extent.ALWAYS), True, False, False),
        (Answer(allow=True, extent=Extent.UNTIL, until_ns=time.time_ns() + 10**12), True, False, False),
        ("folder", True, True, False),
    ],
)
def test_an_answer_that_lasts_is_a_grant_for_what_was_offered(
    tmp_path: Path, answer: Any, *, again: bool, elsewhere: bool, other_tool: bool
):
    """For this file, or this folder; for this tool and whoever asked."""
    with House(tmp_path) as house:
        (house.home / "deep" / "er").mkdir(parents=True)

        def says(question: Approval) -> Answer:
            if answer != "folder":
                return answer  # type: ignore[no-any-return]
            offers = {scope: patterns[-1] for scope, patterns in question.offers.items()}
            return Answer(allow=True, extent=Extent.ALWAYS, offers=offers)

        house.run(asked(house, says, "files.write", path="deep/er/a.txt", text="1"))

        def allowed(tool: str, path: str, principal: str = "unix:pi", **more: Any) -> bool:
            try:
                house.run(house.call(tool, principal=principal, path=path, **more))
            except Denied:
                return False
            return True

        assert allowed("files.write", "deep/er/a.txt", text="2") is again
        assert allowed("files.write", "deep/er/b.txt", text="2") is elsewhere
        assert allowed("files.delete", "deep/er/a.txt") is other_tool
        assert not allowed("files.write", "deep/er/a.txt", "token:other", text="3")
        assert not allowed("files.write", "deep/c.txt", text="3")


def test_an_answer_for_a_run_ends_with_it(tmp_path: Path):
    """Others are asked again, and so is everybody once the run is over."""
    with House(tmp_path) as house:

        async def go() -> list[bool]:
            said = Answer(allow=True, extent=Extent.RUN)
            first = await asked(house, lambda _: said, "files.write", run="r1", path="a.txt", text="1")
            same = await asked(house, lambda _: NO, "files.write", run="r1", path="a.txt", text="2")
            other = await asked(house, lambda _: NO, "files.write", run="r2", path="a.txt", text="3")
            await house.calls.end_run("r1")
            after = await asked(house, lambda _: NO, "files.write", run="r1", path="a.txt", text="4")
            return [isinstance(each, Denied) for each in (first, same, other, after)]

        assert house.run(go()) == [False, False, True, True]
        assert house.book.all() == []


def test_without_an_answer_in_time_the_call_is_denied(tmp_path: Path):
    """And the record says how long was waited."""
    with House(tmp_path, timeout_s=0.2) as house:
        denied = house.run(asked(house, lambda _: None, "files.write", path="a.txt", text="1"))
        assert isinstance(denied, Denied)
        assert denied.decision.reason.startswith("nobody answered in")
        assert house.kinds() == ["approval.request", "approval.answer", "call.deny"]


def test_a_call_that_is_given_up_withdraws_its_question(tmp_path: Path):
    """An answer that comes after that is told so, and nothing runs."""
    with House(tmp_path) as house:

        async def go() -> None:
            person = asyncio.create_task(house.answering(lambda _: None))
            await asyncio.sleep(0)
            call = asyncio.create_task(house.call("files.write", path="a.txt", text="1"))
            await until(lambda: bool(house.questions))
            call.cancel()
            await asyncio.wait([call])
            with pytest.raises(RequestError) as caught:
                house.approvals.resolve(house.questions[0].id, YES, "unix:late")
            assert caught.value.reason is Reason.APPROVAL_CLOSED
            person.cancel()

        house.run(go())
        assert not (house.home / "a.txt").exists()
        assert house.bodies("approval.answer")[0]["detail"]["state"] == "withdrawn"


def test_a_denial_that_comes_while_a_person_thinks_beats_the_answer(tmp_path: Path):
    """Rules made meanwhile count."""
    with House(tmp_path) as house:

        def says(_: Approval) -> Answer:
            deny = Grant("*", "*", parse(f"write:{house.home}"), "deny", "cli", "", f"write:{house.home}")
            house.book.add(deny, "unix:admin")
            return YES

        denied = house.run(asked(house, says, "files.write", path="a.txt", text="1"))
        assert isinstance(denied, Denied)
        assert not (house.home / "a.txt").exists()


def test_a_path_that_leads_elsewhere_after_the_question_is_not_what_was_allowed(tmp_path: Path):
    """A folder becomes a link while the person thinks."""
    with House(tmp_path) as house:
        (house.home / "notes").mkdir()
        (house.home / "secret").mkdir()

        def says(_: Approval) -> Answer:
            (house.home / "notes").rmdir()
            (house.home / "notes").symlink_to("secret")
            return YES

        denied = house.run(asked(house, says, "files.write", path="notes/a.txt", text="1"))
        assert isinstance(denied, Denied)
        assert "lead elsewhere" in denied.decision.reason
        assert os.listdir(house.home / "secret") == []


def test_an_ask_rule_asks_although_an_allow_rule_covers_it(tmp_path: Path):
    """And an answer that lasts settles it."""
    with House(tmp_path, [("*", "write:{h}", "allow"), ("files.write", "write:{h}/a.txt", "ask")]) as house:

        async def go() -> None:
            always = Answer(allow=True, extent=Extent.ALWAYS)
            await asked(house, lambda _: always, "files.write", path="a.txt", text="1")
            await house.call("files.write", path="a.txt", text="2")
            await house.call("files.write", path="b.txt", text="3")

        house.run(go())
        assert (house.home / "a.txt").read_text() == "2\n"
        assert len([q for q in house.questions if q.state.value == "pending"]) == 1


def test_what_can_not_be_undone_is_said_by_the_journal(tmp_path: Path):
    """Before anything runs: a file too large to keep, or a call that reaches outside."""
    with House(tmp_path) as house:
        (house.home / "big").write_bytes(b"x" * (2 << 20))

        async def go() -> None:
            await asked(house, lambda _: NO, "files.delete", path="big")
            await asked(house, lambda _: NO, "http.post", url="http://127.0.0.1:9/", text="x")

        house.run(go())
        first, second = [q.not_undoable for q in house.questions if q.state.value == "pending"]
        assert "more than the 1 MiB" in first
        assert "can't be taken back" in second


def test_a_grant_of_few_uses_is_used_up(tmp_path: Path):
    """By calls that run, not by looks at what would be decided; also when they come at once."""
    with House(tmp_path) as house:
        scope = parse(f"read:{house.home}")
        house.book.add(Grant("*", "files.list", scope, "allow", "cli", "", scope.text, max_uses=3), "unix:admin")

        async def go() -> list[Any]:
            calls = (house.call("files.list", path=".") for _ in range(8))
            return await asyncio.gather(*calls, return_exceptions=True)

        ended = house.run(go())
        assert sum(not isinstance(each, Exception) for each in ended) == 3
        assert all(isinstance(each, Denied) for each in ended if isinstance(each, Exception))


def test_a_revoked_grant_stops_what_runs_by_it(tmp_path: Path):
    """At its next system call that the broker does; what it changed is put back, and others go on."""
    grants = [("shell.run", "exec:/usr", "allow"), ("shell.run", "read:{h}", "allow")]
    with House(tmp_path, grants) as house:
        (house.home / "a.txt").write_text("old")
        scope = parse(f"write:{house.home}")
        made = house.book.add(Grant("*", "shell.run", scope, "allow", "cli", "", scope.text), "unix:admin")
        command = "echo new > a.txt; echo begun > begun; while :; do echo x > b.txt; done"

        async def go() -> Any:
            call = asyncio.create_task(house.call("shell.run", command=command, folder="."))
            await until((house.home / "begun").exists)
            revoked = time.monotonic()
            await asyncio.to_thread(house.book.revoke, made.id, "unix:admin")
            await asyncio.wait([call])
            return call.exception(), time.monotonic() - revoked

        error, took = house.run(go())
        assert isinstance(error, ToolError)
        assert error.reason is Reason.GRANT_REVOKED
        assert took < 5
        assert (house.home / "a.txt").read_text() == "old"
        assert not (house.home / "b.txt").exists()
        assert "its grant was revoked" in house.bodies("call.abort")[0]["error"]


def test_no_decision_in_the_log_is_without_a_reason(tmp_path: Path):
    """Whatever it was: allowed, asked, denied by rule or person, timed out."""
    grants = [("*", "read:{h}", "allow"), ("*", "write:{h}/no", "deny")]
    with House(tmp_path, grants, timeout_s=0.1) as house:
        (house.home / "a.txt").write_text("x")

        async def go() -> None:
            await house.call("files.read", path="a.txt")
            for answer in (YES, NO, None):
                await asked(house, lambda _, answer=answer: answer, "files.write", path="b.txt", text="1")  # type: ignore[misc]
            for path in ("no", "c.txt"):
                with pytest.raises(Denied):
                    await house.call("files.write", path=path, text="1")

        house.run(go())
        decided = house.bodies("call.intent") + house.bodies("call.deny") + house.bodies("approval.request")
        assert len(decided) == 9
        assert all(body["decision"]["reason"] and body["decision"]["verdict"] for body in decided)


def test_the_daemons_own_files_are_out_of_reach_from_above(tmp_path: Path):
    """A shell that may use the folder around them can't read, remove, rename or replace them."""
    root = tmp_path.resolve()
    grants = [("*", "exec:/usr", "allow"), ("*", f"read:{root}", "allow"), ("*", f"write:{root}", "allow")]
    with House(tmp_path, grants) as house:
        attempts = (
            "cat state/agentd.db",
            "rm state/lock",
            "mv state gone",
            "echo x > state/new",
            "ls state",
            "rm -r state",
        )
        command = "; ".join(f"{attempt} && echo DONE" for attempt in attempts) + "; true"
        before = sorted(path.name for path in (root / "state").iterdir())
        result = house.run(house.call("shell.run", command=command, folder=str(root)))
        assert "DONE" not in result.output["output"], result.output
        assert "SQLite" not in str(result.output)
        assert sorted({path.name for path in (root / "state").iterdir()} - {"reserve"}) == before
        with pytest.raises(Denied, match="belongs to agentd itself"):
            house.run(house.call("files.read", path=str(root / "state" / "agentd.db")))


def test_what_runs_later_is_not_changed_by_who_may_change_what_is_around_it(tmp_path: Path):
    """A shell in a repository leaves its hooks alone, by every way; one that is granted them may change them."""
    root = tmp_path.resolve()
    hooks = root / "repo" / ".git" / "hooks"
    hooks.mkdir(parents=True)
    (hooks / "old").touch()
    attempts = (
        "echo x > .git/hooks/pre-commit",
        "echo x > .git/config",
        "rm .git/hooks/old",
        "mv .git/hooks gone",
        "mv .git gone",
        "mkdir -p a/hooks && echo x > a/hooks/h && mkdir b && mv a b/.git",
        "ln -s ../../a .git/hooks/link",
        "echo x > evil.pth",
        "echo x > m && mv m .envrc",
        "mkdir g sub && ln -s ../g sub/.git",
        "echo 'gitdir: ../g' > sub/.git",
        "echo ../g > .git/commondir",
        "mkdir -p .git/modules/x && echo x > .git/modules/x/config",
    )
    grants = [("*", "exec:/usr", "allow"), ("*", f"read:{root}", "allow"), ("*", f"write:{root}", "allow")]

    def done(tried: tuple[str, ...], granted: list[tuple[str, str, str]]) -> int:
        command = "; ".join(f"{{ {attempt}; }} && echo DONE" for attempt in tried) + "; echo fine > .git/index; true"
        with House(tmp_path, granted) as house:
            result = house.run(house.call("shell.run", command=command, folder=str(root / "repo")))
            return str(result.output["output"]).count("DONE")

    assert done(attempts, grants) == 0
    assert done(attempts[:1], [*grants, ("*", f"write:{hooks}", "allow")]) == 1
    assert (root / "repo" / ".git" / "index").read_text() == "fine\n"


def test_labels_follow_a_file_wherever_a_tool_takes_it(tmp_path: Path):
    """Private content that is moved, copied, added to or renamed by a person is private still, after a restart, too."""
    grants = [("*", "exec:/usr", "allow"), ("*", "read:{h}", "allow"), ("*", "write:{h}", "allow")]

    def labels(house: House, path: str) -> tuple[str, ...]:
        result = house.run(house.call("files.read", path=path))
        return tuple(result.labels.private)

    with House(tmp_path, grants, trusted=["{h}"], private=["{h}/private"]) as house:
        for folder in ("private", "open"):
            (house.home / folder).mkdir()
            (house.home / folder / "file").write_text(folder)
        assert labels(house, "open/file") == ()
        assert labels(house, "private/file")
        house.run(house.call("files.move", path="private/file", to="open/moved"))
        house.run(house.call("shell.run", command="cp moved copied; mkdir d; cp file d/mixed", folder=str(house.home / "open")))
        (house.home / "open" / "moved").rename(house.home / "renamed")
    with House(tmp_path, grants, trusted=["{h}"], private=["{h}/private"]) as house:
        assert labels(house, "renamed")
        assert labels(house, "open/copied")
        listed = house.run(house.call("files.list", path="open"))
        assert listed.labels.private
        (house.home / "new").write_text("a person's own")
        assert labels(house, "new") == ()
