"""A folder feed with the real kernel, watchdog and store: folders that go, are replaced, fill, or can't be watched."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from agentd.automations.automation import parsed
from agentd.automations.events import Events, State
from agentd.automations.feeds import FolderFeed
from agentd.automations.watch import Watch
from agentd.errors import Reason, StoreError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

DEADLINE_S = 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state")
    yield opened
    opened.close()


class Feed:
    """A feed at work."""

    def __init__(self, store: Store, folder: Path, more: str = "", quiet_s: float = 0.05) -> None:
        text = f'prompt = "hello"\n[on.file]\npath = "{folder}"\nquiet_s = {quiet_s}\n{more}'
        automation = parsed("it", text)
        assert automation.on.file
        self.events, self.watch, self.woken = Events(store), Watch(), 0
        self.feed = FolderFeed(automation, automation.on.file, self.events, self.watch, self.wake, again_s=0.1)

    def wake(self) -> None:
        self.woken += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Feed]:
        standing = await self.events.meet("it", time.time_ns())
        task = asyncio.create_task(self.feed.run(standing))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
            await asyncio.to_thread(self.watch.stop)
            assert task.cancelled()

    async def names(self) -> list[str]:
        return [os.path.basename(each.subject) for each in reversed(await self.events.page("it", 0, 20_000))]

    async def until(self, *wanted: str) -> None:
        await self.until_true(lambda names: sorted(names) == sorted(wanted))

    async def until_true(self, true: Callable[[list[str]], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not true(await self.names()):
            assert time.monotonic() < deadline, await self.names()
            await asyncio.sleep(0.02)


def test_a_folder_that_becomes_a_link_is_not_followed(store: Store, tmp_path: Path):
    """Nor one that goes and comes again forgotten."""

    async def go() -> None:
        inbox, elsewhere = tmp_path / "inbox", tmp_path / "elsewhere"
        inbox.mkdir()
        elsewhere.mkdir()
        (elsewhere / "secret").touch()
        async with Feed(store, inbox).running() as feed:
            (inbox / "a").touch()
            await feed.until("a")
            inbox.rename(tmp_path / "old")
            inbox.symlink_to(elsewhere)
            await feed.until_true(lambda _: "leads to" in feed.feed.trouble)
            inbox.unlink()
            inbox.mkdir()
            (inbox / "b").touch()
            await asyncio.sleep(0)
            feed.feed._rung.set()
            await feed.until("a", "b")
            assert feed.feed.trouble == ""

    asyncio.run(go())


def test_what_lies_there_counts_or_does_not(store: Store, tmp_path: Path):
    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        (inbox / "old").touch()
        async with Feed(store, inbox, "existing = false\n").running() as feed:
            await feed.until_true(lambda _: feed.feed._accepted)
            (inbox / "new").touch()
            await feed.until("new")

    asyncio.run(go())


def test_ten_thousand_files_in_a_second_are_one_event_each(store: Store, tmp_path: Path):
    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        async with Feed(store, inbox, quiet_s=1).running() as feed:
            await asyncio.to_thread(lambda: [(inbox / f"{n:05}").touch() for n in range(10_000)])
            while sum((await feed.events.counts()).get("it", {}).values()) < 10_000:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            names = await feed.names()
            assert sorted(names) == [f"{n:05}" for n in range(10_000)]
            came = [(inbox / name).stat().st_ctime_ns for name in names]
            assert came == sorted(came)
            assert feed.woken < 1000  # one for many

    asyncio.run(go())


def test_files_that_are_made_and_taken_away_again_and_again_come_to_nothing_bad(store: Store, tmp_path: Path):
    """What has gone before it came to rest is no event; what stays is one."""

    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        async with Feed(store, inbox).running() as feed:
            for n in range(300):
                (inbox / "temporary").write_text(str(n))
                (inbox / "temporary").rename(inbox / f"{n % 7}")
                if n % 3 == 0:
                    (inbox / f"{n % 7}").unlink()
            (inbox / "last").touch()
            await feed.until_true(lambda names: "last" in names)
            names = await feed.names()
            assert {name for name in names if (inbox / name).exists()} == {path.name for path in inbox.iterdir()}

    asyncio.run(go())


def test_without_watches_the_folder_is_looked_at_all_the_same(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel has none left: the edge at which inotify is replaced here."""

    def none_left(*_arguments: object, **_more: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        monkeypatch.setattr("agentd.automations.feeds._POLL_S", 0.1)
        feed = Feed(store, inbox)
        monkeypatch.setattr(feed.watch, "add", none_left)
        async with feed.running():
            (inbox / "a").touch()
            await feed.until("a")
            assert "no watches left" in feed.feed.polled

    asyncio.run(go())


def test_what_is_put_back_as_it_was_is_no_new_file(store: Store, tmp_path: Path):
    """The journal makes another inode of the same content and times. What really replaces a file is new."""

    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        async with Feed(store, inbox).running() as feed:
            (inbox / "a").write_text("one")
            await feed.until("a")
            for text, same in (("one", True), ("another", False)):
                about = (inbox / "a").stat()
                (tmp_path / "new").write_text(text)
                if same:
                    os.utime(tmp_path / "new", ns=(about.st_atime_ns, about.st_mtime_ns))
                (tmp_path / "new").rename(inbox / "a")
                await asyncio.sleep(0.5)
                assert await feed.names() == (["a"] if same else ["a", "a"])

    asyncio.run(go())


def test_a_store_that_fails_for_a_while_loses_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk is full when the first file comes: the edge at which the store is replaced here."""

    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        monkeypatch.setattr("agentd.automations.feeds._POLL_S", 0.1)
        feed, arrived = Feed(store, inbox), Events.arrived

        def full(*_arguments: object, **_more: object) -> None:
            raise StoreError(Reason.STORE_FULL, "The disk is full.")

        monkeypatch.setattr(Events, "arrived", full)
        async with feed.running():
            (inbox / "a").touch()
            await feed.until_true(lambda _: "full" in feed.feed.trouble)
            monkeypatch.setattr(Events, "arrived", arrived)
            await feed.until("a")
            await feed.until_true(lambda _: not feed.feed.trouble)

    asyncio.run(go())


def test_names_that_are_no_text_are_told_of_and_not_tried(store: Store, tmp_path: Path):
    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        async with Feed(store, inbox).running() as feed:
            open(os.fsencode(inbox) + b"/\xff", "w").close()  # noqa: ASYNC230
            await feed.until_true(lambda names: len(names) == 1)
            (event,) = await feed.events.page("it", 0, 10)
            assert (event.state, event.note) == (State.FAILED, "its name is no text (UTF-8)")

    asyncio.run(go())


def test_a_tree_that_is_too_deep_is_watched_as_far_as_it_goes(store: Store, tmp_path: Path):
    async def go() -> None:
        inbox = tmp_path / "inbox"
        deep = inbox / "/".join("d" * 100)
        deep.mkdir(parents=True)
        async with Feed(store, inbox, "recursive = true\n").running() as feed:
            (inbox / "d" / "a").touch()
            (deep / "b").touch()
            await feed.until("a")

    asyncio.run(go())


def test_a_folder_that_may_not_be_read_says_so(store: Store, tmp_path: Path):
    async def go() -> None:
        inbox = tmp_path / "inbox"
        inbox.write_text("")
        async with Feed(store, inbox).running() as feed:
            await feed.until_true(lambda _: "not a folder" in feed.feed.trouble)

    asyncio.run(go())
