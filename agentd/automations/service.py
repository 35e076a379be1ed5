"""All automations: read from their files, each with its feed and its line; triggered, paused, checked, told of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentd.automations import template
from agentd.automations.automation import COMMON_FIELDS, Automation, Broken, absolute, parsed, read_all
from agentd.automations.events import Event, State
from agentd.automations.feeds import FolderFeed, ScheduleFeed, common, of_path
from agentd.automations.folder import FolderGone, look
from agentd.automations.line import Line
from agentd.automations.watch import Watch
from agentd.errors import AgentdError, ConfigError, Reason, RequestError
from agentd.tasks import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from pathlib import Path

    from agentd.automations.automation import When
    from agentd.automations.events import Events, Standing
    from agentd.automations.line import Runner, TakeBack
    from agentd.grants import Grant

__all__ = ["Automations", "Checked", "Told"]

_log = logging.getLogger(__name__)
_SHOWN = 10  # matches of a check
_TIMES = 5


@dataclass(slots=True)
class _Loaded:
    automation: Automation
    line: Line
    feed: FolderFeed | ScheduleFeed | None
    standing: Standing
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    feeding: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """An automation as it is now. `counts` are of the events that are still on record."""

    name: str
    automation: Automation | None = None
    error: str = ""
    paused: bool = False
    trouble: str = ""
    polled: str = ""
    waits_for: str = ""
    parked: int = 0
    next_due: datetime | None = None
    counts: Mapping[State, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checked:
    """What would trigger an automation now, the first of so many, and a call it would make, if that is known beforehand."""

    told: Told
    matches: tuple[str, ...]
    matching: int
    waits_for: str
    call: tuple[str, dict[str, Any]] | None


class Automations:
    """Lives on the event loop. `fix` gets the grants of all of them whenever they are read, on another thread; `commands` says
    which arguments of a tool are command lines.
    """

    def __init__(
        self,
        folder: Path,
        events: Events,
        runs: Runner,
        take_back: TakeBack,
        unmet: Callable[[When], str],
        fix: Callable[[Iterable[Grant]], None],
        commands: Callable[[str], frozenset[str]],
    ) -> None:
        self._folder, self._events, self._runs = folder, events, runs
        self._take_back, self._unmet, self._fix, self._commands = take_back, unmet, fix, commands
        self._watch = Watch()
        self._loaded: dict[str, _Loaded] = {}
        self._broken: dict[str, Broken] = {}
        self._changing = asyncio.Lock()
        self._started = self._stopped = self._reloading = False

    async def start(self) -> None:
        """Go on with what is there. `reload` before it: what is not begun yet can be asked about already."""
        async with self._changing:
            self._started = True
            for loaded in self._loaded.values():
                self._begin(loaded)

    async def stop(self) -> None:
        """What is under way is left as it is on disk; the next start goes on with it."""
        async with self._changing:
            self._stopped = True
            await self._end(list(self._loaded.values()))
        await asyncio.to_thread(self._watch.stop)

    def knows(self, principal: str) -> bool:
        """Whether this is an automation that may have runs: also one whose file is broken at the moment, or not read yet."""
        name = principal.removeprefix("automation:")
        there = name in self._loaded or name in self._broken or self._reloading or not self._started
        return principal != name and there

    async def reload(self) -> None:
        """Read all files again. What has not changed goes on undisturbed; a file that is broken is told of, and keeps nothing
        from working. Raises StoreError.

        To its end, even if whoever asked for it is gone meanwhile.
        """
        await to_its_end(self._reload())

    async def _reload(self) -> None:
        async with self._changing:
            if self._stopped:
                return
            self._reloading = True
            try:
                await self._read()
            finally:
                self._reloading = False

    async def _read(self) -> None:
        found, broken = await asyncio.to_thread(self._read_all)
        for each in broken:
            _log.warning("%s", each.error)
        await asyncio.to_thread(self._fix, rules(found))
        stale = [name for name, loaded in self._loaded.items() if found.get(name) != loaded.automation or _is_lost(loaded.feed)]
        gone = {name: list(self._loaded[name].line.under_way.values()) for name in stale if name not in found}
        await self._end([self._loaded.pop(name) for name in stale])
        for each in broken:
            gone.pop(each.name, None)
        self._broken = {each.name: each for each in broken}
        failed: AgentdError | None = None
        for event in (event for events in gone.values() for event in events):
            try:
                await self._give_up(event)
            except AgentdError as e:
                failed = e
        for name, automation in found.items():
            try:
                if name not in self._loaded:
                    self._loaded[name] = await self._load(automation)
            except AgentdError as e:  # the disk is full, say: the others are not to suffer
                failed = e
        await self._events.forget_others({*found, *self._broken})
        if failed:
            raise failed

    def _read_all(self) -> tuple[dict[str, Automation], list[Broken]]:
        found, broken = read_all(self._folder)
        for name, automation in list(found.items()):
            try:
                self._require_quotable(automation)
            except ConfigError as e:
                broken.append(Broken(name, e))
                del found[name]
        return found, broken

    def _require_quotable(self, automation: Automation) -> None:
        if automation.call:
            automation.require_quotable(self._commands(automation.call.tool))

    async def _give_up(self, event: Event) -> None:
        """Of an automation that was removed: nobody is to be asked for it any more, and it is to do nothing more."""
        if not event.run:
            return
        await self._runs.cancel(event.run)
        if not (await self._events.get(event.automation, event.seq)).ended:
            why = "the automation was removed"
            await self._events.keep(replace(event, state=State.DROPPED, end_ns=time.time_ns(), note=why))

    async def _load(self, automation: Automation) -> _Loaded:
        standing = await self._events.meet(automation.name, time.time_ns(), automation.on.model_dump_json())
        feed: FolderFeed | ScheduleFeed | None = None
        unmet = lambda: self._unmet(automation.when)  # noqa: E731
        line = Line(automation, self._events, self._runs, self._take_back, unmet, self._commands)
        line.paused = standing.paused
        if automation.on.file:
            feed = line.feed = FolderFeed(automation, automation.on.file, self._events, self._watch, line.wake)
        elif automation.on.schedule:
            feed = ScheduleFeed(automation, automation.on.schedule, self._events, line.wake)
        loaded = _Loaded(automation, line, feed, standing)
        if self._started:
            self._begin(loaded)
        return loaded

    def _begin(self, loaded: _Loaded) -> None:
        loaded.tasks = [_task(loaded.automation.name, loaded.line.run())]
        self._feed(loaded)

    def _feed(self, loaded: _Loaded) -> None:
        if loaded.feed and not loaded.line.paused:
            loaded.feeding = _task(loaded.automation.name, loaded.feed.run(loaded.standing))

    async def _end(self, all_loaded: list[_Loaded]) -> None:
        tasks = [task for loaded in all_loaded for task in (*loaded.tasks, loaded.feeding) if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _get(self, name: str) -> _Loaded:
        """Raises RequestError (AUTOMATION_NOT_FOUND), ConfigError (AUTOMATION_INVALID)."""
        if loaded := self._loaded.get(name):
            return loaded
        if broken := self._broken.get(name):
            raise broken.error
        message = f"There is no automation {name!r}."
        hint = f"They are files in {self._folder}; `agentd automations reload` reads them again."
        raise RequestError(Reason.AUTOMATION_NOT_FOUND, message, hint=hint, field="name", metadata={"automation": name})

    def callers(self, name: str) -> tuple[str, ...]:
        """Who may trigger it, beside admins. Raises what `_get` raises."""
        on = self._get(name).automation.on
        return on.call.callers if on.call else ()

    async def trigger(self, name: str, data: Mapping[str, str], by: str) -> Event:
        """Put an event into its line. Raises what `_get` raises; RequestError: AUTOMATION_PAUSED, BAD_FIELD, QUEUE_FULL."""
        loaded = self._get(name)
        automation = loaded.automation
        if loaded.line.paused:
            message = f"The automation {name} is paused."
            hint = f"`agentd automations resume {name}` lets it go on."
            raise RequestError(Reason.AUTOMATION_PAUSED, message, hint=hint, metadata={"automation": name})
        given = dict(data)
        if automation.on.file and "path" in given:
            try:
                path = absolute(given["path"])
            except ValueError as e:
                raise RequestError(Reason.BAD_FIELD, f"data.path: {e}.", field="data") from None
            given = await asyncio.to_thread(of_path, path)
        _require_all(automation, given)
        full = given | common(name, datetime.now().astimezone())
        template.require_fit(full)
        subject = full["path"] if automation.on.file else by
        event = Event(0, name, subject, State.WAITING, 0, full, by=by)
        made = await self._events.add(event, int(automation.limits.debounce_s * 1e9))
        self._loaded.get(name, loaded).line.wake()  # it may be another one by now
        return made

    async def pause(self, name: str, *, paused: bool) -> Told:
        """Raises what `_get` raises."""
        async with self._changing:
            loaded = self._get(name)
            if loaded.line.paused != paused and not self._stopped:
                loaded.standing = await self._events.pause(name, time.time_ns(), paused=paused)
                loaded.line.paused = paused
                if paused and loaded.feeding:
                    loaded.feeding.cancel()
                    await asyncio.wait([loaded.feeding])
                elif self._started:
                    self._feed(loaded)
                loaded.line.wake()
        return await self.told(name)

    async def told(self, name: str) -> Told:
        """Raises RequestError (AUTOMATION_NOT_FOUND)."""
        counts = (await self._events.counts()).get(name, {})
        if broken := self._broken.get(name):
            return Told(name, error=broken.error.message, counts=counts)
        return self._tell(self._get(name), counts)

    async def all(self) -> list[Told]:
        """By name."""
        counts = await self._events.counts()
        told = [self._tell(loaded, counts.get(name, {})) for name, loaded in self._loaded.items()]
        told += [Told(each.name, error=each.error.message, counts=counts.get(each.name, {})) for each in self._broken.values()]
        return sorted(told, key=lambda each: each.name)

    def _tell(self, loaded: _Loaded, counts: Mapping[State, int]) -> Told:
        feed, line = loaded.feed, loaded.line
        return Told(
            loaded.automation.name,
            loaded.automation,
            paused=line.paused,
            trouble=feed.trouble if feed else "",
            polled=feed.polled if isinstance(feed, FolderFeed) else "",
            waits_for=line.waits,
            parked=len(line.parked),
            next_due=feed.next_due if isinstance(feed, ScheduleFeed) and not line.paused else None,
            counts=counts,
        )

    async def check(self, name: str, text: str) -> Checked:
        """What an automation would do now. Raises what `_get` and `parsed` raise."""
        if text:
            automation = parsed(name, text)
            self._require_quotable(automation)
            told = Told(name, automation)
        else:
            automation, told = self._get(name).automation, await self.told(name)
        try:
            matches = await asyncio.to_thread(_matches, automation)
        except FolderGone as e:
            told, matches = replace(told, trouble=str(e)), []
        data = _sample(automation, matches)
        call = automation.call
        direct = (call.tool, template.filled_call(call.arguments, data, self._commands(call.tool))) if call else None
        unmet = await asyncio.to_thread(self._unmet, automation.when)
        return Checked(told, tuple(matches[:_SHOWN]), len(matches), unmet, direct)

    async def history(self, name: str, before: int, limit: int) -> list[Event]:
        """Newest first; of one automation, or of all."""
        return [self._as_it_is(event) for event in await self._events.page(name, before, limit)]

    async def event(self, name: str, seq: int) -> Event:
        """Raises RequestError (EVENT_NOT_FOUND)."""
        return self._as_it_is(await self._events.get(name, seq))

    def _as_it_is(self, event: Event) -> Event:
        """With its run, which is on disk only when it has ended."""
        loaded = self._loaded.get(event.automation)
        live = loaded.line.under_way.get(event.seq) if loaded else None
        if loaded is None or live is None or event.ended:
            return event
        note = "waits for an answer: agentd approvals" if event.seq in loaded.line.parked else event.note
        return replace(event, run=live.run, note=note)


def _is_lost(feed: FolderFeed | ScheduleFeed | None) -> bool:
    """Its folder leads elsewhere, say: whoever has the files read again accepts that."""
    return isinstance(feed, FolderFeed) and feed.lost


def rules(found: Mapping[str, Automation]) -> list[Grant]:
    """The grants of all of them."""
    return [grant for automation in found.values() for grant in automation.rules()]


def _require_all(automation: Automation, data: Mapping[str, str]) -> None:
    """Raises RequestError (BAD_FIELD) unless the templates can be filled, and nothing is left."""
    wanted = automation.fields - COMMON_FIELDS
    missing, unknown = sorted(wanted - set(data)), sorted(set(data) - wanted)
    if not missing and not unknown:
        return
    needs = ["path"] if automation.on.file else missing
    what = f"needs {', '.join(needs)}" if missing else f"knows no {', '.join(unknown)}"
    example = "path" if automation.on.file else next(iter(missing), "")
    hint = f"Give it as {example}=VALUE." if example else f"It wants {', '.join(sorted(wanted)) or 'none'}."
    message = f"The automation {automation.name} {what}."
    raise RequestError(Reason.BAD_FIELD, message, field="data", hint=hint, metadata={"automation": automation.name})


def _matches(automation: Automation) -> list[str]:
    """What would trigger it: the files that lie there, the next times. Raises FolderGone."""
    if trigger := automation.on.file:
        files = look(trigger, os.path.realpath(trigger.path)).files.values()
        return [os.fsdecode(each.path) for each in sorted(files, key=lambda each: each.ctime_ns)]
    times: list[str] = []
    if automation.on.schedule:
        clock, due = automation.on.schedule.clock(), datetime.now(UTC)
        with contextlib.suppress(StopIteration):
            for _ in range(_TIMES):
                due = clock.after(due)
                times.append(due.isoformat(" ", "minutes"))
    return times


def _sample(automation: Automation, matches: list[str]) -> dict[str, str]:
    """What its templates would be filled with, by the first match."""
    data = {name: f"<{name}>" for name in automation.fields} | common(automation.name, datetime.now().astimezone())
    if automation.on.file:
        data |= of_path(matches[0] if matches else os.path.join(automation.on.file.path, "file"))
    return data


def _task(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(work, name=f"automation {name}")
    task.add_done_callback(_say_why)
    return task


def _say_why(task: asyncio.Task[None]) -> None:
    """A bug of ours ends one automation, and is found in the log."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s has ended", task.get_name(), exc_info=error)
