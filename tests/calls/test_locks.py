"""Trees of paths that are held: what overlaps comes one after another, in order; nobody waits for ever, or for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.calls import locks
from agentd.calls.locks import Locks, Tree
from agentd.errors import AgentdError, Reason, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ("a", "a/b", "a/b/c", "d", "d/new", "d/new/deep", "")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home").resolve()
    (root / "a" / "b").mkdir(parents=True)
    (root / "d").mkdir()
    (root / "link").symlink_to("a")
    return root


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.0005)


def tree(path: Path) -> Tree:
    return Tree.of(os.fsencode(path))


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("a", "a", True),
        ("a", "a/b", True),
        ("a/b/c", "a", True),
        ("a", "d", False),
        ("d/new", "d/new/deep", True),
        ("d/new", "d/newer", False),
        ("d/new", "d/NEW", True),  # a file system may not tell the two apart
        ("link", "a/b", True),
        ("link/b", "a", True),
        ("", "d/new", True),
        ("link/../d", "d/x", True),
    ],
)
def test_trees_overlap_by_what_they_are(home: Path, one: str, other: str, *, overlap: bool):
    assert tree(home / one).overlaps(tree(home / other)) is overlap
    assert tree(home / other).overlaps(tree(home / one)) is overlap


@given(st.lists(st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2), st.integers(0, 3)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_whatever_overlaps_runs_one_after_another_and_in_order(claims: list[tuple[list[str], int]]):
    """For any claims: none at the same time as one that it overlaps, none before an earlier one, and all of them come to an end."""
    root = Path("/")
    trees = [[root / "no" / "such" / name for name in names] for names, _ in claims]
    begun: list[int] = []
    now: set[int] = set()

    def collide(one: int, other: int) -> bool:
        return any(tree(x).overlaps(tree(y)) for x in trees[one] for y in trees[other])

    async def claim(held: Locks, n: int, turns: int) -> None:
        async with held.changing(str(n), map(os.fsencode, trees[n])):
            assert not any(collide(n, other) for other in now)
            begun.append(n)
            now.add(n)
            for _ in range(turns):
                await asyncio.sleep(0)
            now.discard(n)

    async def all_of_them() -> None:
        held = Locks()
        tasks = []
        for n, (_, turns) in enumerate(claims):
            tasks.append(asyncio.create_task(claim(held, n, turns)))
            await until(lambda n=n: n in begun or str(n) in {each.owner for each in held._queue})  # type: ignore[misc]
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        assert not held._queue

    asyncio.run(all_of_them())
    order = {n: place for place, n in enumerate(begun)}
    for one in range(len(claims)):
        for other in range(one + 1, len(claims)):
            assert not collide(one, other) or order[one] < order[other]


def test_who_waits_says_for_whom_and_a_cancel_ends_the_wait(home: Path):
    async def scene() -> None:
        held, waits = Locks(), list[tuple[str, ...]]()
        async with held.changing("first", [os.fsencode(home / "a")]):

            async def second() -> None:
                await held.acquire("second", [os.fsencode(home / "a" / "b")], waits.append)
                pytest.fail("it should have waited")

            task = asyncio.create_task(second())
            await until(lambda: waits)
            assert waits == [("first",)]
            assert held.waits_for("second") == ("first",)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert held.waits_for("second") == ()
        async with asyncio.timeout(5), held.changing("third", [os.fsencode(home)]):
            pass

    asyncio.run(scene())


def test_a_wait_has_an_end_and_can_be_refused(home: Path):
    """By itself after its patience, by whoever revokes what allowed it at once; those behind it go on."""

    async def scene() -> None:
        held, path = Locks(patience_s=0.05), [os.fsencode(home / "a")]

        async def second(expected: Reason) -> None:
            with pytest.raises(AgentdError) as caught:
                async with held.changing("second", path):
                    pytest.fail("it should have waited")
            assert caught.value.reason is expected

        async with held.changing("first", path):
            await second(Reason.TOOL_TIMEOUT)
            held._patience_s = 60
            task = asyncio.create_task(second(Reason.GRANT_REVOKED))
            await until(lambda: held.waits_for("second"))
            held.refuse("second", ToolError(Reason.GRANT_REVOKED, "revoked"))
            await asyncio.wait_for(task, 5)
        async with asyncio.timeout(5), held.changing("third", path):
            pass

    asyncio.run(scene())


def test_only_so_many_wait(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "WAITING", 1)

    async def scene() -> None:
        held, path = Locks(), [os.fsencode(home / "a")]

        async def second() -> None:
            async with held.changing("second", path):
                pass

        async with held.changing("first", path):
            task = asyncio.create_task(second())
            await until(lambda: held.waits_for("second"))
            with pytest.raises(AgentdError) as caught:
                async with held.changing("third", path):
                    pytest.fail("there is no place to wait")
            assert caught.value.reason is Reason.QUEUE_FULL
        await asyncio.wait_for(task, 5)

    asyncio.run(scene())


def test_a_bind_mount_of_a_part_is_that_part(tmp_path: Path):
    """Whatever it is called: the names within the file system count."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "at here").mkdir()
    made = subprocess.run(["mount", "--bind", tmp_path / "src" / "sub", tmp_path / "at here"], check=False)
    if made.returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        assert tree(tmp_path / "src").overlaps(tree(tmp_path / "at here" / "new"))
        assert tree(tmp_path / "at here").overlaps(tree(tmp_path / "src" / "sub" / "x"))
        assert not tree(tmp_path / "at here" / "x").overlaps(tree(tmp_path / "src" / "y"))
    finally:
        subprocess.run(["umount", tmp_path / "at here"], check=True)
