"""Questions and answers: the first counts, none is a no, and there is an end to how many wait."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.errors import Reason, RequestError
from agentd.grants import Answer, Approval, Approvals, Extent, Scope, State, offers_for
from agentd.grants import approvals as module

if TYPE_CHECKING:
    from collections.abc import Coroutine


def question(identity: str = "q1", **more: Any) -> Approval:
    scope = Scope("write", "/h/notes/a.txt")
    fields: dict[str, Any] = {
        "call": "c1", "principal": "unix:pi", "tool": "files.write", "description": "x", "arguments": {}, "effect": "files",
        "scopes": (scope,), "unmet": (scope,), "reason": "no grant covers it", "not_undoable": "",
        "offers": {str(scope): ("write:/h/notes/a.txt", "write:/h/notes")},
    }  # fmt: skip
    return Approval(id=identity, **(fields | more))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


async def asked(approvals: Approvals, *questions: Approval) -> list[asyncio.Task[Approval]]:
    tasks = [asyncio.create_task(approvals.ask(each)) for each in questions]
    await asyncio.sleep(0)
    return tasks


def test_the_first_answer_counts_and_the_second_is_told():
    """With who was first."""

    async def go() -> None:
        approvals = Approvals(5, 10)
        (task,) = await asked(approvals, question())
        assert approvals.resolve("q1", Answer(allow=True), "unix:a").state is State.ALLOWED
        with pytest.raises(RequestError) as caught:
            approvals.resolve("q1", Answer(allow=False), "unix:b")
        assert caught.value.reason is Reason.APPROVAL_CLOSED
        assert "allowed by unix:a" in caught.value.message
        assert (await task).answered_by == "unix:a"

    run(go())


def test_no_answer_is_a_no():
    """At the end of its time; an answer after that is too late."""

    async def go() -> None:
        approvals = Approvals(0.05, 10)
        closed = await approvals.ask(question())
        assert closed.state is State.EXPIRED
        assert closed.expire_ns - closed.create_ns == 50_000_000
        with pytest.raises(RequestError) as caught:
            approvals.resolve("q1", Answer(allow=True), "unix:a")
        assert caught.value.reason is Reason.APPROVAL_CLOSED

    run(go())


def test_whoever_gives_up_withdraws_the_question():
    """And so does the daemon when it stops."""

    async def go() -> None:
        approvals = Approvals(5, 10)
        first, second = await asked(approvals, question("q1"), question("q2"))
        first.cancel()
        await asyncio.wait([first])
        assert approvals.get("q1").state is State.WITHDRAWN
        approvals.stop()
        assert (await second).state is State.WITHDRAWN
        assert approvals.pending() == []

    run(go())


def test_one_question_too_many_denies_the_oldest():
    """Ten thousand of them leave the limit waiting, and few that are closed."""

    async def go() -> None:
        approvals = Approvals(5, 3)
        tasks = await asked(approvals, *(question(f"q{n}") for n in range(10_000)))
        assert [each.id for each in approvals.pending()] == ["q9997", "q9998", "q9999"]
        closed = await tasks[0]
        assert closed.state is State.DENIED
        assert "too many questions" in closed.said
        assert len(approvals._closed) <= 200
        with pytest.raises(RequestError) as caught:
            approvals.get("q0")
        assert caught.value.reason is Reason.APPROVAL_NOT_FOUND
        approvals.stop()
        await asyncio.wait(tasks)

    run(go())


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (Answer(allow=True, extent=Extent.ALWAYS), "extent"),
        (Answer(allow=True, extent=Extent.UNTIL, until_ns=1), "until"),
        (Answer(allow=True, extent=Extent.RUN, offers={"write:/h/notes/a.txt": "write:/"}), "offers"),
        (Answer(allow=True, extent=Extent.RUN, offers={"write:/h/other": "write:/h/notes"}), "offers"),
    ],
)
def test_only_what_was_offered_can_be_answered(answer: Answer, field: str):
    """BAD_FIELD, and the question goes on waiting."""

    async def go() -> None:
        approvals = Approvals(5, 10)
        (task,) = await asked(approvals, question(extents=(Extent.ONCE, Extent.RUN, Extent.UNTIL)))
        with pytest.raises(RequestError) as caught:
            approvals.resolve("q1", answer, "unix:a")
        assert (caught.value.reason, caught.value.field) == (Reason.BAD_FIELD, field)
        assert approvals.get("q1").state is State.PENDING
        approvals.stop()
        await task

    run(go())


def test_whoever_watches_can_be_asked():
    """From the first look to the last; those who only look on are nobody."""

    async def go() -> None:
        approvals = Approvals(5, 10)
        assert not approvals.answerable
        news, watch = approvals.news(), approvals.watch()
        listening = [asyncio.create_task(anext(each)) for each in (news, watch)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert approvals.answerable
        await asked(approvals, question())
        assert {(await each).id for each in listening} == {"q1"}
        await watch.aclose()  # type: ignore[attr-defined]
        assert not approvals.answerable
        approvals.also(lambda: True)
        assert approvals.answerable
        approvals.stop()

    run(go())


def test_a_watcher_that_does_not_read_holds_up_nobody():
    """It misses news."""

    async def go() -> None:
        approvals = Approvals(5, 2)
        deaf = approvals.watch()
        task = asyncio.create_task(anext(deaf))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        tasks = await asked(approvals, *(question(f"q{n}") for n in range(100)))
        await task
        approvals.stop()
        assert len((await asyncio.wait(tasks))[0]) == 100

    run(go())


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("read:/home/pi/notes/a.txt", ["read:/home/pi/notes/a.txt", "read:/home/pi/notes"]),
        ("read:/home/pi/notes", ["read:/home/pi/notes"]),
        ("write:/etc/hosts", ["write:/etc/hosts"]),
        ("read:/x", ["read:/x"]),
        ("connect:example.org:443", ["connect:example.org:443"]),
        ("exec:/usr/bin/git", ["exec:/usr/bin/git"]),
        ("read:/home/pi/notes/*", []),
    ],
)
def test_what_is_offered_is_narrow(monkeypatch: pytest.MonkeyPatch, scope: str, expected: list[str]):
    """This file, its folder unless that is a home or right below the root; a `*` in a name can't be granted at all."""
    monkeypatch.setattr(module, "_homes", lambda: frozenset({"/home/pi"}))
    assert list(offers_for(Scope(*scope.split(":", 1)))) == expected


def test_what_is_said_of_an_answer_names_who_and_for_how_long():
    """It is the reason in the record."""
    until = Answer(allow=True, extent=Extent.UNTIL, until_ns=time.time_ns() + 10**12, comment="ok")
    made = question(state=State.ALLOWED, answer=until, answered_by="unix:a")
    assert made.said == "allowed by unix:a (until): ok"
