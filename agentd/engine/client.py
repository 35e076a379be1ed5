"""The daemon's side of the engine: starts the process when it is wanted, asks it, survives its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING

from agentd.engine.link import Done, Failed, Forget, Forgotten, Generate, Load, Pace, pack
from agentd.engine.meter import Meter, anonymous_mib
from agentd.engine.process import Output, Process, as_error
from agentd.engine.prompt import Conversation, render_prefix, render_turns
from agentd.engine.selftest import repack_is_usable
from agentd.engine.settings import SESSION, EngineSettings, Room, remember, remembered
from agentd.errors import EngineError, Reason
from agentd.models import identity
from agentd.tasks import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from agentd.engine.link import Ready
    from agentd.models import FileIdentity


_FORGET_S = 60.0


async def _unknown() -> Room:
    return Room()


def _to_nobody(_: Done) -> None:
    """Where nobody counts."""


class Engine:
    """Loads on first use, or on `load`. As many generations as the settings say share the passes over the model; further
    ones wait in the process.
    """

    def __init__(self, settings: EngineSettings, room: Callable[[], Awaitable[Room]] = _unknown) -> None:
        self.settings, self._room = settings, room
        self.meter = Meter()
        self.loads: Counter[tuple[str, str]] = Counter()
        """How often it was (load, reason) or (unload, reason)."""
        self._process: Process | None = None
        self._gate = asyncio.Lock()  # to start and to end the process
        self._ending = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._ids = itertools.count(1)
        self._repack: bool | None = False if settings.repack == "off" else None
        self._pace = Pace()
        self._anonymous_mib = 0.0
        self._idle_since = 0.0
        self.loaded_file: FileIdentity | None = None
        """What was loaded last; None if it changed meanwhile."""

    @property
    def model(self) -> Ready | None:
        """What is loaded now, if anything."""
        return self._process.model if self._process else None

    @property
    def pid(self) -> int | None:
        process = self._process  # once: other threads ask, too
        return process.pid if process else None

    async def load(self) -> Ready:
        """Load the model unless it is. Raises EngineError: MODEL_INVALID, ENGINE_CRASHED, ENGINE_TIMEOUT."""
        async with self._gate:
            return (await self._started()).model

    async def generate(
        self,
        conversation: Conversation,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        spent: Callable[[Done], None] = _to_nobody,
    ) -> AsyncGenerator[Output, None]:
        """Go on with a conversation; ends with Done. Closing the iterator cancels the generation; `spent` gets its Done then,
        too.

        Raises EngineError: PROMPT_TOO_LONG, MANIFEST_INVALID, MODEL_INVALID, ENGINE_CRASHED, ENGINE_TIMEOUT.
        """
        request = Generate(
            id=next(self._ids),
            prefix=pack(render_prefix(conversation)),
            prompt=pack(render_turns(conversation)),
            tools=tuple((tool.name, dict(tool.parameters)) for tool in conversation.tools),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        async with self._in_use() as process:
            if process is None:
                yield _nothing(request.id)
                return
            async with contextlib.aclosing(_exchange(process, request, spent)) as outputs:
                async for output in outputs:
                    yield output

    async def prepare(self) -> bool:
        """Load the model unless it is; False if the budgets do not let that be. Raises EngineError."""
        async with self._gate:
            if self._pace.hold or self._pace.stop:
                return False
            await self._started()
            return not (self._pace.hold or self._pace.stop)

    @contextlib.asynccontextmanager
    async def _in_use(self) -> AsyncIterator[Process | None]:
        """The process, which is not ended meanwhile; None if the budgets keep it from beginning. Raises EngineError."""
        async with self._gate:
            process = None if self._holds_back() else await self._started()
            self._users += 1
            self._unused.clear()
        try:
            yield process
        finally:
            self._users -= 1
            self._idle_since = time.monotonic()
            if not self._users:
                self._unused.set()

    def _holds_back(self) -> bool:
        """Whether nothing is to begin: loading would take the memory that is to be given back, and heat what is to cool."""
        return self._pace.stop or (self._pace.hold and self._process is None)

    def needs_mib(self) -> float:
        """What loading it would take from other programs; 0 while it is loaded."""
        return 0.0 if self._process else self._anonymous_mib

    def idle_s(self) -> float:
        """For how long a loaded model has had nothing to do; 0 if it has, or is not loaded."""
        return 0.0 if self._process is None or self._users or self._gate.locked() else time.monotonic() - self._idle_since

    def pace(self, pace: Pace) -> None:
        """How fast it may go from now on, what is being generated included."""
        self._pace = pace
        if process := self._process:
            process.tell(pace)

    async def warm(self, conversation: Conversation) -> None:
        """Decode what prompts with its system text and tools begin with, unless that is on disk, and a word behind it.

        Raises EngineError.
        """
        async for _ in self.generate(conversation, max_tokens=1, temperature=0.0, seed=0):
            pass

    async def forget(self) -> None:
        """Drop what sessions have said, but for those that are at work. When it returns none of it is on disk.

        Raises TimeoutError, OSError.
        """
        async with self._ending:  # one that is about to end may be writing it to the disk just now
            if process := self._process:
                request = next(self._ids)
                try:
                    await process.last(process.ask(Forget(id=request)))
                finally:
                    process.forget(request)
            await asyncio.to_thread(self.forget_files)

    def forget_from_outside(self) -> None:
        """`forget`, for other threads than the event loop's. Raises EngineError (ENGINE_TIMEOUT)."""
        try:
            if self._loop is None:  # no process has ever been started
                self.forget_files()
            else:
                asyncio.run_coroutine_threadsafe(self.forget(), self._loop).result(_FORGET_S)
        except (OSError, TimeoutError) as e:
            why = e or "the engine did not answer"
            hint = "Ask again, or delete the .session files in the state folder's prefixes."
            raise EngineError(Reason.ENGINE_TIMEOUT, f"What was said may still be on the disk: {why}.", hint=hint) from e

    def forget_files(self) -> None:
        """The same where no process runs. Raises OSError."""
        if folder := self.settings.prefixes:
            for path in folder.glob(f"*{SESSION}*"):
                path.unlink(missing_ok=True)

    async def unload(self, why: str = "idle") -> None:
        """Give all its memory back, the file's cached pages included; the next request loads it again."""
        async with self._gate:
            await self._unused.wait()
            if self._process:
                self._anonymous_mib = _least_mib(self._process)
                self.loads["unload", why] += 1
            await self._end(kept=why == "idle")
            await asyncio.to_thread(_forget, self.settings.path)

    async def stop(self) -> None:
        """End the process; a running generation fails with ENGINE_CRASHED."""
        await self._end(kept=True)

    async def _end(self, *, kept: bool) -> None:
        async with self._ending:
            if process := self._process:
                self._process = None
                await process.stop(kept=kept)

    async def _started(self) -> Process:
        if self._process is not None and self._process.alive:
            return self._process
        await self._end(kept=False)
        self._loop = asyncio.get_running_loop()
        if self._repack is None:
            self._repack = await repack_is_usable(self.settings.path)
        s = self.settings
        room, footprint = await self._room(), await asyncio.to_thread(remembered, s)  # with no child yet to be left behind
        if s.prefixes and not s.prefixes_mib:
            await asyncio.to_thread(shutil.rmtree, s.prefixes, ignore_errors=True)
        load = Load(
            path=str(s.path),
            context=s.context,
            batch=s.batch,
            threads=s.threads,
            parallel=s.parallel,
            prefixes=str(s.prefixes or ""),
            prefixes_mib=s.prefixes_mib,
            repack=self._repack,
            least_context=min(s.least_context, s.context),
            room_mib=room.now_mib,
            ever_mib=room.ever_mib,
            footprint=footprint,
        )
        before = identity(s.path)
        self._process = process = await Process.start(load, s.load_timeout_s, self.meter.told)
        self.loaded_file = before if before == identity(s.path) else None
        process.tell(self._pace)  # what changes it from here on finds the process
        self.meter.begin()
        self.loads["load", "again" if self.loads else "first"] += 1
        self._idle_since = time.monotonic()
        if process.model.footprint != load.footprint:
            await asyncio.to_thread(remember, s, process.model.footprint)
        return process


async def _exchange(process: Process, request: Generate, spent: Callable[[Done], None]) -> AsyncGenerator[Output, None]:
    outputs, ended = process.ask(request), False
    giving_up: asyncio.Task[Done | None] | None = None
    try:
        while not ended:
            output = await outputs.get()
            ended = isinstance(output, Done | Failed | EngineError)
            if isinstance(output, Forgotten):
                continue
            if isinstance(output, EngineError):
                raise output
            if isinstance(output, Failed):
                raise as_error(output)
            if isinstance(output, Done):
                spent(output)
            yield output
    finally:
        try:
            if not ended:  # our reader went away in the middle
                giving_up = asyncio.create_task(process.give_up(request.id, outputs), name="cancel a generation")
                await to_its_end(giving_up)
        finally:
            process.forget(request.id)
            if giving_up and (done := giving_up.result()):
                spent(done)


def _least_mib(process: Process) -> float:
    """What it takes with the least context: what must be free for it to be loaded again."""
    known, taken = process.model.footprint, anonymous_mib(process.pid)
    return max(0.0, taken - (known.of(process.model.context) - known.least_mib)) if known else taken


def _nothing(request: int) -> Done:
    """The end of a generation that the budgets did not let begin."""
    return Done(id=request, reason="budget", ids=(), prompt_tokens=0, cached_tokens=0, prefill_ms=0, decode_ms=0)


def _forget(path: Path) -> None:
    """Its pages leave the page cache: unmapping does not do that (measured: all 200 MB of a file stayed)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
