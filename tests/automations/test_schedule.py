"""Schedules over daylight saving, missed times, clocks that are changed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.automations.automation import parsed
from agentd.automations.events import Event, Events, State
from agentd.automations.feeds import ScheduleFeed
from agentd.automations.schedule import MOST_MISSED, Schedule
from agentd.errors import Reason, StoreError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BERLIN = ZoneInfo("Europe/Berlin")


def berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


@pytest.mark.parametrize(
    ("cron", "since", "until", "due"),
    [
        ("30 2 * * *", "2026-03-28T12:00", "2026-03-30T12:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
        ("30 2 * * *", "2026-10-24T12:00", "2026-10-26T12:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
        ("0 * * * *", "2026-10-25T00:30", "2026-10-25T03:30",
         ["2026-10-25T01:00+02:00", "2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00", "2026-10-25T03:00+01:00"]),
        ("0 0 29 2 *", "2026-01-01T00:00", "2029-01-01T00:00", ["2028-02-29T00:00+01:00"]),
    ],
)  # fmt: skip
def test_daylight_saving_neither_loses_nor_doubles_a_time(cron: str, since: str, until: str, due: list[str]):
    """A time that does not exist comes when the clock goes on; one that exists twice comes once, each hour twice."""
    found = Schedule.of(cron, "", "Europe/Berlin").between(berlin(since), berlin(until))
    assert [each.isoformat(timespec="minutes") for each in found] == due


@settings(deadline=None)
@given(
    st.sampled_from(["*/7 * * * *", "0 3 * * 1", "15 10 1 * *", "59 23 * * *"]),
    st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - bounds are to be naive
    st.integers(0, 40 * 86400),
)
def test_what_is_due_is_what_the_steps_forward_give(cron: str, since: datetime, span: int):
    """Backwards and forwards agree, up to the number that is kept."""
    clock, begin = Schedule.of(cron, "", "Europe/Berlin"), since
    end = begin + timedelta(seconds=span)
    forwards, due = [], clock.after(begin)
    while due <= end and len(forwards) < 10_000:
        forwards.append(due)
        due = clock.after(due)
    assert clock.between(begin, end) == forwards[-MOST_MISSED:]


@settings(deadline=None)
@given(st.integers(10, 100_000), st.integers(0, 2_000_000_000), st.integers(0, 1_000_000))
def test_intervals_are_counted_from_1970(every_s: int, since: int, span: int):
    clock = Schedule.of("", f"{every_s}s", "Europe/Berlin")
    begin = datetime.fromtimestamp(since, UTC)
    found = clock.between(begin, begin + timedelta(seconds=span))
    assert len(found) == min(MOST_MISSED, (since + span) // every_s - since // every_s)
    assert all(each.timestamp() % every_s == 0 for each in found)


class Clock:
    """The time that a schedule sees, and a feed that goes by it."""

    def __init__(self, store: Store, now: datetime) -> None:
        self.now, self.events = now, Events(store)

    def go(self, text: str, moves: Callable[[Clock], Iterator[datetime]]) -> list[str]:
        """The times at which events were made while the clock moved so."""
        return asyncio.run(self._go(text, moves))

    async def _go(self, text: str, moves: Callable[[Clock], Iterator[datetime]]) -> list[str]:
        automation = parsed("clock", f'prompt = "hello"\n{text}')
        assert automation.on.schedule
        for now in moves(self):
            self.now = now
            standing = await self.events.meet("clock", int(now.timestamp() * 1e9))
            feed = ScheduleFeed(automation, automation.on.schedule, self.events, lambda: None, lambda: self.now)
            task = asyncio.create_task(feed.run(standing))
            deadline = time.monotonic() + 10
            while feed.next_due is None and time.monotonic() < deadline and now.timestamp() * 1e9 >= standing.since_ns:  # noqa: ASYNC110
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        events = await self.events.page("clock", 0, 500)
        assert all(each.state is State.WAITING for each in events)
        return [each.subject for each in reversed(events)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state")
    yield opened
    opened.close()


START = datetime(2026, 6, 1, 12, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(("missed", "minutes"), [("skip", []), ("once", [65]), ("all", [5, 15, 25, 35, 45, 55, 65])])
def test_times_that_were_missed(store: Store, missed: str, minutes: list[int]):
    """The daemon was off for 70 minutes: every ten minutes something was due."""
    text = f'[on.schedule]\ncron = "5-59/10 * * * *"\nzone = "UTC"\nmissed = "{missed}"\n'
    found = Clock(store, START).go(text, lambda _: iter([START, START + timedelta(minutes=70)]))
    hour = START.replace(second=0)
    assert found == [(hour + timedelta(minutes=each)).isoformat() for each in minutes]


def test_what_is_due_now_is_not_missed(store: Store):
    """Whatever is said of missed ones; and what was missed before goes with it."""
    text = '[on.schedule]\nevery = "10m"\nzone = "UTC"\nmissed = "skip"\n'
    at = START.replace(minute=40, second=5)
    assert Clock(store, START).go(text, lambda _: iter([START, at])) == [START.replace(minute=40, second=0).isoformat()]


def test_a_time_fires_once_however_often_it_is_looked_at(store: Store):
    text = '[on.schedule]\nevery = "10m"\nzone = "UTC"\n'
    at = START.replace(minute=10, second=1)
    times = [START, at, at, at + timedelta(seconds=1), at + timedelta(minutes=1)]
    assert len(Clock(store, START).go(text, lambda _: iter(times))) == 1


def test_a_clock_that_is_put_back_a_little_fires_nothing_twice(store: Store):
    text = '[on.schedule]\nevery = "10m"\nzone = "UTC"\n'
    times = [START, START + timedelta(minutes=10), START + timedelta(minutes=9), START + timedelta(minutes=10)]
    assert len(Clock(store, START).go(text, lambda _: iter(times))) == 1


def test_a_clock_that_was_far_ahead_does_not_silence_a_schedule(store: Store):
    """Somebody set the year 2040 and took it back."""
    text = '[on.schedule]\nevery = "10m"\nzone = "UTC"\n'
    ahead = datetime(2040, 1, 1, 0, 0, 1, tzinfo=UTC)
    times = [START, ahead, START + timedelta(minutes=1), START + timedelta(minutes=10)]
    clock = Clock(store, START)
    assert len(clock.go(text, lambda _: iter(times))) == 1
    (event,) = asyncio.run(clock.events.page("clock", 0, 10))
    assert event.joined == 1


def test_another_schedule_begins_when_it_is_read(store: Store):
    """What the old one had fired, or missed, is not the new one's."""

    async def go() -> None:
        events = Events(store)
        assert (await events.meet("clock", 5, "old")).fired_ns == 5
        assert (await events.meet("clock", 7, "old")).fired_ns == 5
        assert (await events.meet("clock", 9, "new")).fired_ns == 9

    asyncio.run(go())


def test_what_is_due_joins_what_still_waits(store: Store):
    """Unless all are wanted: a condition that does not hold for days does not pile up runs."""
    times = [START, *(START + timedelta(minutes=10 * n, seconds=1) for n in range(1, 5))]
    text = '[on.schedule]\nevery = "10m"\nzone = "UTC"\n'
    assert len(Clock(store, START).go(text, lambda _: iter(times))) == 1


def test_a_board_that_does_not_know_the_time_yet_fires_nothing(store: Store):
    """It starts in 1970; then the network tells it the time."""
    text = '[on.schedule]\nevery = "10m"\nzone = "UTC"\n'
    times = [START, datetime(1970, 1, 2, tzinfo=UTC), START + timedelta(minutes=1)]
    assert Clock(store, START).go(text, lambda _: iter(times)) == []


@pytest.mark.parametrize(("ahead_s", "due"), [(-1, True), (0, True), (30, False), (60, False), (61, True), (30 * 86400, True)])
def test_a_clock_that_is_put_back_makes_no_event_wait_for_it(store: Store, ahead_s: int, *, due: bool):
    """Nothing waits for longer than its automation says: what seems to was told its time by another clock."""

    async def go() -> None:
        events, now = Events(store), time.time_ns()
        await events.meet("it", now)
        event = await events.add(Event(0, "it", "x", State.WAITING, now, {}), 0)
        await events.keep(replace(event, due_ns=now + ahead_s * 10**9))
        found = await events.due("it", now, 60 * 10**9)
        assert (found is not None) is due

    asyncio.run(go())


def test_a_time_that_could_not_be_kept_is_kept_when_it_can(store: Store, monkeypatch: pytest.MonkeyPatch):
    """The disk is full when it is due (the edge at which the store is replaced here): once there is room, it fires, and once."""
    monkeypatch.setattr("agentd.automations.feeds._CLOCK_S", 0.02)
    fire, clock = Events.fire, Clock(store, START)
    automation = parsed("clock", 'prompt = "hello"\n[on.schedule]\ncron = "1 12 * * *"\n')

    def full(*_arguments: object, **_more: object) -> None:
        raise StoreError(Reason.STORE_FULL, "The disk is full.")

    async def until(true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not true():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def go() -> None:
        assert automation.on.schedule
        standing = await clock.events.meet("clock", int(START.timestamp() * 1e9))
        feed = ScheduleFeed(automation, automation.on.schedule, clock.events, lambda: None, lambda: clock.now)
        monkeypatch.setattr(Events, "fire", full)
        task = asyncio.create_task(feed.run(standing))
        clock.now = START + timedelta(seconds=40)
        await until(lambda: "full" in feed.trouble)
        monkeypatch.setattr(Events, "fire", fire)
        await until(lambda: not feed.trouble)
        clock.now = START + timedelta(seconds=80)
        await asyncio.sleep(0.1)
        assert [event.subject for event in await clock.events.page("clock", 0, 10)] == ["2026-06-01T12:01:00+00:00"]
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(go())
