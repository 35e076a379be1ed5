"""The daemon's side of the engine: starts the process, sends one request at a time, survives its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from agentd.engine.link import (
    LARGEST,
    LENGTH,
    Cancel,
    Delta,
    Done,
    Failed,
    Generate,
    Load,
    Malformed,
    Pace,
    Progress,
    Ready,
    ToolCall,
    frame,
    from_engine,
    pack,
)
from agentd.engine.meter import Meter, anonymous_mib
from agentd.engine.prompt import Conversation, render
from agentd.engine.selftest import repack_is_usable
from agentd.engine.settings import EngineSettings, Room, remember, remembered
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from pydantic import BaseModel

STOP_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 10.0
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH", "PREFIX", "LANG")
_ENGINE_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "GOMP_SPINCOUNT": "1000"}
"""libgomp's threads spin for long at a barrier by default: on 2 cores with another busy program, 20 tokens took 6.5 s
instead of 0.04 s. 1000 turns are as fast on an idle machine (measured: 310 tokens in 0.75 s both ways)."""

Output = Delta | ToolCall | Malformed | Done


async def _unknown() -> Room:
    return Room()


@dataclass(slots=True)
class _Process:
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    model: Ready


class Engine:
    """Loads on first use, or on `load`. One generation at a time; others wait."""

    def __init__(self, settings: EngineSettings, room: Callable[[], Awaitable[Room]] = _unknown) -> None:
        self.settings, self._room = settings, room
        self.meter = Meter()
        self.loads: Counter[tuple[str, str]] = Counter()
        """How often it was (load, reason) or (unload, reason)."""
        self._process: _Process | None = None
        self._turn = asyncio.Lock()
        self._ids = itertools.count(1)
        self._repack: bool | None = False if settings.repack == "off" else None
        self._pace = Pace()
        self._anonymous_mib = 0.0
        self._idle_since = 0.0

    @property
    def model(self) -> Ready | None:
        """What is loaded now, if anything."""
        return self._process.model if self._process else None

    @property
    def pid(self) -> int | None:
        process = self._process  # once: other threads ask, too
        return process.process.pid if process else None

    async def load(self) -> Ready:
        """Load the model unless it is. Raises EngineError: MODEL_INVALID, ENGINE_CRASHED, ENGINE_TIMEOUT."""
        async with self._turn:
            return (await self._started()).model

    async def generate(
        self, conversation: Conversation, *, max_tokens: int, temperature: float, seed: int
    ) -> AsyncGenerator[Output, None]:
        """Go on with a conversation; ends with Done. Closing the iterator cancels the generation.

        Raises EngineError: PROMPT_TOO_LONG, MODEL_INVALID, ENGINE_CRASHED, ENGINE_TIMEOUT.
        """
        request = Generate(
            id=next(self._ids),
            prompt=pack(render(conversation)),
            tools=tuple((tool.name, dict(tool.parameters)) for tool in conversation.tools),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        await self._turn.acquire()
        try:
            if self._holds_back():
                yield _nothing(request.id)
                return
            process = await self._started()
            async with contextlib.aclosing(self._exchange(process, request)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._idle_since = time.monotonic()
            self._turn.release()

    async def prepare(self) -> bool:
        """Load the model unless it is; False if the budgets do not let that be. Raises EngineError."""
        async with self._turn:
            if self._pace.hold or self._pace.stop:
                return False
            await self._started()
            return not (self._pace.hold or self._pace.stop)

    def _holds_back(self) -> bool:
        """Whether nothing is to begin: loading would take the memory that is to be given back, and heat what is to cool."""
        return self._pace.stop or (self._pace.hold and self._process is None)

    def needs_mib(self) -> float:
        """What loading it would take from other programs; 0 while it is loaded."""
        return 0.0 if self._process else self._anonymous_mib

    def idle_s(self) -> float:
        """For how long a loaded model has had nothing to do; 0 if it has, or is not loaded."""
        return 0.0 if self._process is None or self._turn.locked() else time.monotonic() - self._idle_since

    def pace(self, pace: Pace) -> None:
        """How fast it may go from now on, what is being generated included."""
        self._pace = pace
        if process := self._process:
            with contextlib.suppress(RuntimeError):  # the link is closed: whoever waits on it is told so
                process.writer.write(frame(pace))

    async def unload(self, why: str = "idle") -> None:
        """Give all its memory back, the file's cached pages included; the next request loads it again."""
        async with self._turn:
            if self._process:
                self._anonymous_mib = _least_mib(self._process)
                self.loads["unload", why] += 1
            await self.stop()
            await asyncio.to_thread(_forget, self.settings.path)

    async def stop(self) -> None:
        """End the process; a running generation fails with ENGINE_CRASHED."""
        if process := self._process:
            self._process = None
            process.writer.close()
            await _ended(process.process)

    async def _exchange(self, process: _Process, request: Generate) -> AsyncGenerator[Output, None]:
        ended = False
        try:
            await self._send(process, request)
            while not ended:
                message = await self._receive(process.reader, process.process)
                if isinstance(message, Failed):
                    ended = True
                    raise _error(message)
                if isinstance(message, Progress):
                    self.meter.told(message)
                    continue
                if isinstance(message, Ready) or message.id != request.id:
                    continue
                ended = isinstance(message, Done)
                yield message
        except EngineError as e:
            if e.reason is Reason.ENGINE_CRASHED:
                ended = True
                self._process = None
            raise
        finally:
            if not ended:  # our reader went away in the middle
                await _to_its_end(asyncio.create_task(self._abandon(process, request.id)))

    async def _abandon(self, process: _Process, request: int) -> None:
        """Cancel and wait for the end, so that the next request finds a quiet link; kill what does not answer."""
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await self._send(process, Cancel(id=request))
                while True:
                    message = await self._receive(process.reader, process.process)
                    if isinstance(message, Progress):
                        self.meter.told(message)
                    elif isinstance(message, Done | Failed) and message.id == request:
                        return
        except (EngineError, TimeoutError):
            process.process.kill()
            self._process = None

    async def _started(self) -> _Process:
        if self._process is not None and self._process.process.poll() is None:
            return self._process
        if self._repack is None:
            self._repack = await repack_is_usable(self.settings.path)
        s = self.settings
        room, footprint = await self._room(), await asyncio.to_thread(remembered, s)  # with no child yet to be left behind
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(  # noqa: ASYNC220 - a spawn takes a millisecond
                [sys.executable, "-I", "-m", "agentd.engine.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ} | _ENGINE_ENVIRONMENT,
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LARGEST)
        _sacrifice(child.pid)
        load = Load(
            path=str(s.path),
            context=s.context,
            batch=s.batch,
            threads=s.threads,
            repack=self._repack,
            least_context=min(s.least_context, s.context),
            room_mib=room.now_mib,
            ever_mib=room.ever_mib,
            footprint=footprint,
        )
        try:
            async with asyncio.timeout(s.load_timeout_s):
                writer.write(frame(load))
                message = await self._receive(reader, child)
        except TimeoutError:
            message = Failed(id=0, reason="ENGINE_TIMEOUT", message=f"The model was not loaded after {s.load_timeout_s:g} s.")
        except asyncio.CancelledError:
            child.kill()
            raise
        if not isinstance(message, Ready):
            writer.close()
            child.kill()
            await _ended(child)
            raise _error(message) if isinstance(message, Failed) else _crashed(child)
        if message.footprint != load.footprint:
            await asyncio.to_thread(remember, s, message.footprint)
        self.meter.begin()
        self.loads["load", "again" if self.loads else "first"] += 1
        writer.write(frame(self._pace))  # what changes it from here on finds the process
        self._process = _Process(child, reader, writer, message)
        self._idle_since = time.monotonic()
        return self._process

    async def _send(self, process: _Process, message: BaseModel) -> None:
        try:
            process.writer.write(frame(message))
            await process.writer.drain()
        except ConnectionError:
            await _ended(process.process)
            raise _crashed(process.process) from None

    async def _receive(
        self, reader: asyncio.StreamReader, child: subprocess.Popen[bytes]
    ) -> Ready | Progress | Delta | ToolCall | Malformed | Done | Failed:
        try:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            if length > LARGEST:
                child.kill()
                raise EngineError(Reason.ENGINE_CRASHED, "The engine process sent nonsense.")
            return from_engine.validate_json(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, ValidationError):
            await _ended(child)
            raise _crashed(child) from None


async def _to_its_end(task: asyncio.Task[None]) -> None:
    """Whatever cancels come meanwhile: nobody else may use the link before."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def _least_mib(process: _Process) -> float:
    """What it takes with the least context: what must be free for it to be loaded again."""
    known, taken = process.model.footprint, anonymous_mib(process.process.pid)
    return max(0.0, taken - (known.of(process.model.context) - known.least_mib)) if known else taken


def _nothing(request: int) -> Done:
    """The end of a generation that the budgets did not let begin."""
    return Done(id=request, reason="budget", ids=(), prompt_tokens=0, cached_tokens=0, prefill_ms=0, decode_ms=0)


def _sacrifice(pid: int) -> None:
    """If the kernel must kill for memory, then this process: its death costs a reload (oom_score_adj of proc(5))."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")


def _forget(path: Path) -> None:
    """Its pages leave the page cache: unmapping does not do that (measured: all 200 MB of a file stayed)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


async def _ended(child: subprocess.Popen[bytes]) -> None:
    """Wait for a process that is to end; kill it if it does not."""
    try:
        await asyncio.to_thread(child.wait, STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk; the kernel ends it when that answers
            await asyncio.to_thread(child.wait, STOP_TIMEOUT_S)


def _crashed(child: subprocess.Popen[bytes]) -> EngineError:
    code = child.poll()
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
    return EngineError(
        Reason.ENGINE_CRASHED,
        f"The engine process died ({how}) and this request with it.",
        hint="The next request starts it again; if it keeps dying, the model file or the memory is too much for it.",
        metadata={"how": how},
    )


def _error(message: Failed) -> EngineError:
    reason = Reason[message.reason] if message.reason in Reason.__members__ else Reason.ENGINE_CRASHED
    return EngineError(reason, message.message, hint=message.hint, metadata=message.metadata)
