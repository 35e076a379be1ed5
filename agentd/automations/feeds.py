"""Where events come from: a folder, a schedule. Each feed is a task; callers need none."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from agentd.automations.events import Event, Fingerprint, State
from agentd.automations.folder import FolderGone, Found, Settling, Sight, fits, is_remote, look
from agentd.automations.watch import Bell
from agentd.errors import AgentdError
from agentd.tasks import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agentd.automations.automation import Automation, FileTrigger, ScheduleTrigger
    from agentd.automations.events import Events, Standing
    from agentd.automations.watch import Watch

_log = logging.getLogger(__name__)
_GATHER_S = 0.05  # after a notice: more come with it
_POLL_S = 10.0  # between two looks where the kernel does not tell of changes
_SHARE = 200.0  # a look that takes long is not taken again for so many times as long
_CLOCK_S = 60.0  # so late at most a schedule notices that the clock was changed
_LATE_S = 90.0  # what is due longer than that was missed
CLOCK_SET = datetime(2024, 1, 1, tzinfo=UTC)
"""Before that it is not the time that a clock shows."""
_PUT_BACK = timedelta(hours=3)  # a clock put back by less fires nothing a second time (as in cron); by more it is a new time


def common(automation: str, moment: datetime) -> dict[str, str]:
    """What every template may name."""
    return {"automation": automation, "time": moment.strftime("%H:%M"), "date": moment.strftime("%Y-%m-%d")}


def _together(every_s: float) -> float:
    """Until the next moment at which all that look so often do: one wake-up of the processor for all."""
    return every_s - time.monotonic() % every_s


def of_path(path: str) -> dict[str, str]:
    """What a template may name of a file."""
    try:
        size = str(os.lstat(path).st_size)
    except OSError:
        size = ""
    shown = path.encode("utf-8", "replace").decode()
    return {"path": shown, "name": os.path.basename(shown), "folder": os.path.dirname(shown), "size": size}


@dataclass(slots=True)
class FolderFeed:
    """`wake` is called when there are events. `trouble` says why the folder is not watched, if it is not."""

    automation: Automation
    trigger: FileTrigger
    events: Events
    watch: Watch
    wake: Callable[[], None]
    trouble: str = ""
    again_s: float = 30.0
    """Between two looks where the kernel tells of changes: it does not tell that the folder itself is another one now."""
    polled: str = ""
    """Why it is looked at every so many seconds instead of when something happens."""
    quiet: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the folder is looked at, and while what a run has changed is put back."""
    _mine: dict[bytes, Fingerprint] = field(default_factory=dict)
    """What the automation's own runs have written there: it does not trigger itself."""
    _real: str = ""
    _accepted: bool = False
    _mounted: bool = False
    _rung: asyncio.Event = field(default_factory=asyncio.Event)
    _watched: tuple[int, int] | None = None

    @property
    def lost(self) -> bool:
        """Whether its folder is not there, or leads elsewhere."""
        return bool(self.trouble) and self._watched is None

    async def run(self, standing: Standing) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        self._real = await asyncio.to_thread(os.path.realpath, self.trigger.path)
        self._accepted = standing.accepted or self.trigger.existing
        self._mounted = standing.mounted
        bell = Bell(functools.partial(loop.call_soon_threadsafe, self._rung.set))
        self._rung.set()
        try:
            while True:
                try:
                    await self._follow(bell)
                except Exception as e:  # a bug of ours, or a disk that fails: said, and tried again
                    _log.exception("%s", self.automation.name)
                    self.trouble = f"it can't be watched: {e}"
                    await asyncio.sleep(_POLL_S)
        finally:
            await asyncio.to_thread(self.watch.remove, bell)

    async def _follow(self, bell: Bell) -> None:
        known = await asyncio.to_thread(self.events.known, self.automation.name)
        settling = Settling(self.trigger.on == "changes", self.trigger.quiet_s, known)
        wait_s = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._rung.wait(), wait_s)
                await asyncio.sleep(_GATHER_S)
            self._rung.clear()
            wait_s = await self._look(settling, bell)

    async def wrote(self, paths: Iterable[str]) -> None:
        """Files that a run of this automation has written: those that a look would find, or this would grow without end."""
        mine = [path for path in paths if self._watches(path)]
        self._mine |= await asyncio.to_thread(_fingerprints, mine)

    def _watches(self, path: str) -> bool:
        folder, name = os.path.split(path)
        inside = folder == self._real or (self.trigger.recursive and folder.startswith(f"{self._real}/"))
        return inside and fits(name, self.trigger.pattern)

    async def _look(self, settling: Settling, bell: Bell) -> float:
        """For how many seconds there is nothing to look at, if nothing is heard."""
        async with self.quiet:
            order, gone = bell.take()
            now = time.monotonic(), time.time_ns()
            try:
                sight = await asyncio.to_thread(look, self.trigger, self._real, was_mounted=self._mounted)
                if self._watched != sight.identity:
                    await asyncio.to_thread(self._listen, sight, bell)
                    self._rung.set()  # what came between the look and now
                settling.local = not self.polled
                wait_s = await self._take_in(settling, sight, now, order, gone)
            except FolderGone as e:
                self.trouble = str(e)
                await asyncio.to_thread(self.watch.remove, bell)
                self._watched = None
                return _POLL_S
            except AgentdError as e:  # the disk is full, or too many events wait: what is there stays there
                self.trouble = e.message
                bell.went |= gone
                settling.known = await asyncio.to_thread(self.events.known, self.automation.name)
                return _POLL_S
        self.trouble = ""
        calm_s = max(_together(_POLL_S if self.polled else self.again_s), (time.monotonic() - now[0]) * _SHARE)
        return calm_s if wait_s is None else min(wait_s, calm_s)

    async def _take_in(
        self, settling: Settling, sight: Sight, now: tuple[float, int], order: dict[bytes, int], gone: set[bytes]
    ) -> float | None:
        """`now` is when the look began: what came while it went on may have been missed, and is not handled before its time."""
        ready, lost, wait_s = settling.step(sight, now, order, gone)
        if not self._accepted:  # what lies there when the automation is new is no news
            ready, wait_s, news = list(sight.files.values()), None, list[Found]()
        else:
            news = [found for found in ready if self._mine.get(found.path) != found.fingerprint]
        if not ready and not lost and self._accepted:
            return wait_s
        # What is half on its way when this is cancelled would be found, and made, once more.
        await to_its_end(asyncio.to_thread(self._record, ready, lost, news, sight.mounted))
        self._accepted, self._mounted = True, sight.mounted
        settling.settled(ready)
        for path in (*lost, *(found.path for found in ready)):
            self._mine.pop(path, None)
        if news:
            self.wake()
        return wait_s

    def _record(self, known: list[Found], lost: list[bytes], news: list[Found], mounted: bool) -> None:  # noqa: FBT001
        name = self.automation.name
        debounce_ns = int(self.automation.limits.debounce_s * 1e9)
        prints = {found.path: found.fingerprint for found in known}
        self.events.arrived(name, prints, lost, map(self._event, news), debounce_ns, mounted=mounted)

    def _event(self, found: Found) -> Event:
        path = os.fsdecode(found.path)
        data = common(self.automation.name, datetime.now().astimezone()) | of_path(path)
        event = Event(0, self.automation.name, data["path"], State.WAITING, 0, data, by="file")
        if data["path"] == path:
            return event
        return replace(event, state=State.FAILED, end_ns=time.time_ns(), note="its name is no text (UTF-8)")

    def _listen(self, sight: Sight, bell: Bell) -> None:
        """Where the folder is another one now, its notices are those of the other. Not for the event loop."""
        self.watch.remove(bell)
        self.polled = "it lies on a network" if is_remote(self._real) else ""
        try:
            self.watch.add(self._real, bell, recursive=self.trigger.recursive)
            self._watched = sight.identity
        except OSError as e:
            self.polled = f"the kernel has no watches left ({e.strerror or e}); see /proc/sys/fs/inotify"


def _fingerprints(paths: list[str]) -> dict[bytes, Fingerprint]:
    found = {}
    for path in map(os.fsencode, paths):
        with contextlib.suppress(OSError, ValueError):
            about = os.lstat(path)
            found[path] = Fingerprint(about.st_ino, about.st_mtime_ns, about.st_size)
    return found


@dataclass(slots=True)
class ScheduleFeed:
    automation: Automation
    trigger: ScheduleTrigger
    events: Events
    wake: Callable[[], None]
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    trouble: str = ""
    next_due: datetime | None = None

    async def run(self, standing: Standing) -> None:
        """Until cancelled."""
        schedule = self.trigger.clock()
        fired = datetime.fromtimestamp(standing.fired_ns / 1e9, UTC)
        while True:
            now = self.now()
            if now < CLOCK_SET:  # a board without a battery for its clock, not yet told the time
                await asyncio.sleep(_CLOCK_S)
                continue
            if fired > now + _PUT_BACK:
                fired = await self._fire(fired, now, [])
            due = schedule.between(fired, now)
            if due:
                fired = await self._fire(fired, max(fired, due[-1].astimezone(UTC)), self._wanted(due, now))
            self.next_due = schedule.after(max(now, fired))
            await asyncio.sleep(max(0.05, min(_together(_CLOCK_S), (self.next_due - self.now()).total_seconds())))

    async def _fire(self, before: datetime, up_to: datetime, wanted: list[datetime]) -> datetime:
        """Up to when it has fired. Where the disk is full it has not: it is tried again, as long as `missed` wants the time."""
        try:
            join = self.trigger.missed != "all"
            await self.events.fire(self.automation.name, int(up_to.timestamp() * 1e9), map(self._event, wanted), join=join)
            self.trouble = ""
        except AgentdError as e:
            self.trouble = e.message
            return before
        if wanted:
            self.wake()
        return up_to

    def _wanted(self, due: list[datetime], now: datetime) -> list[datetime]:
        """Of those that have come: the late ones as is said in `missed`."""
        late = [each for each in due if (now - each).total_seconds() > _LATE_S]
        kept = {"skip": [], "once": late[-1:], "all": late}[self.trigger.missed]
        on_time = due[len(late) :]
        return (kept if not on_time or self.trigger.missed == "all" else []) + on_time

    def _event(self, due: datetime) -> Event:
        data = common(self.automation.name, due)
        return Event(0, self.automation.name, due.isoformat(), State.WAITING, 0, data, by="schedule")
