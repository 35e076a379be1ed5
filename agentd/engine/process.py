"""One engine process, from its start to its end, and who has asked it for what."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from pydantic import ValidationError

from agentd.engine.link import (
    LARGEST,
    LENGTH,
    Cancel,
    Delta,
    Done,
    Failed,
    Forget,
    Forgotten,
    Generate,
    Leave,
    Load,
    Malformed,
    Progress,
    Ready,
    ToolCall,
    frame,
    from_engine,
)
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

STOP_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
"""A pass with others in it is not cut short: on the slowest board it takes 8 s."""
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH", "PREFIX", "LANG")
_ENGINE_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "GOMP_SPINCOUNT": "1000"}
"""libgomp's threads spin for long at a barrier by default: on 2 cores with another busy program, 20 tokens took 6.5 s
instead of 0.04 s. 1000 turns are as fast on an idle machine (measured: 310 tokens in 0.75 s both ways)."""

Output = Delta | ToolCall | Malformed | Done


class Process:
    """Has loaded its model. Lives on the event loop; a task of its own reads what the process says."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        model: Ready,
        progress: Callable[[Progress], None],
    ) -> None:
        self.model, self._child, self._reader, self._writer = model, child, reader, writer
        self._progress = progress
        self._asked: dict[int, asyncio.Queue[Output | Forgotten | Failed | EngineError]] = {}
        self._death: EngineError | None = None
        self._reading = asyncio.create_task(self._read(), name="read the engine")

    @classmethod
    async def start(cls, load: Load, timeout_s: float, progress: Callable[[Progress], None]) -> Process:
        """Raises EngineError: MODEL_INVALID, MODEL_TOO_LARGE, BUDGET_MEMORY, ENGINE_CRASHED, ENGINE_TIMEOUT."""
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
        message: object
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=LARGEST)
            _sacrifice(child.pid)
            async with asyncio.timeout(timeout_s):
                writer.write(frame(load))
                message = await _receive(reader, child)
        except TimeoutError:
            message = Failed(id=0, reason="ENGINE_TIMEOUT", message=f"The model was not loaded after {timeout_s:g} s.")
        except asyncio.CancelledError:
            child.kill()
            _hang_up(ours, writer)
            await _to_its_end(child)
            raise
        except EngineError:
            _hang_up(ours, writer)
            raise
        assert writer is not None
        if isinstance(message, Ready):
            return cls(child, reader, writer, message, progress)
        writer.close()
        child.kill()
        await _ended(child)
        raise as_error(message) if isinstance(message, Failed) else _crashed(child)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._death is None and self._child.poll() is None

    def tell(self, message: BaseModel) -> None:
        with contextlib.suppress(RuntimeError):  # the link is closed: whoever waits on it is told so
            self._writer.write(frame(message))

    def ask(self, request: Generate | Forget) -> asyncio.Queue[Output | Forgotten | Failed | EngineError]:
        """Where its outputs come: in the end a Done, a Forgotten, a Failed, or what the process died of. `forget` it then."""
        data = frame(request)
        outputs = self._asked[request.id] = asyncio.Queue()
        if self._death:
            outputs.put_nowait(self._death)
        with contextlib.suppress(RuntimeError):
            self._writer.write(data)
        return outputs

    def forget(self, request: int) -> None:
        self._asked.pop(request, None)

    async def give_up(self, request: int, outputs: asyncio.Queue[Output | Forgotten | Failed | EngineError]) -> Done | None:
        """Cancel and wait for the end, so that what was used is known."""
        self.tell(Cancel(id=request))
        try:
            output = await self.last(outputs)
        except TimeoutError:
            self._child.kill()
            return None
        return output if isinstance(output, Done) else None

    async def last(
        self, outputs: asyncio.Queue[Output | Forgotten | Failed | EngineError]
    ) -> Done | Forgotten | Failed | EngineError:
        """What ends a request. Raises TimeoutError."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while not isinstance(output := await outputs.get(), Done | Forgotten | Failed | EngineError):
                pass
            return output

    async def stop(self, *, kept: bool) -> None:
        """End it; what is being generated fails. With `kept` it may first bring on disk what sessions have said."""
        self.tell(Leave()) if kept and not self._asked else self._writer.close()
        await _ended(self._child)
        self._writer.close()
        await asyncio.wait([self._reading], timeout=STOP_TIMEOUT_S)
        self._reading.cancel()

    async def _read(self) -> None:
        try:
            while True:
                message = await _receive(self._reader, self._child)
                if isinstance(message, Progress):
                    self._progress(message)
                elif not isinstance(message, Ready) and (outputs := self._asked.get(message.id)):
                    outputs.put_nowait(message)
        except EngineError as e:
            self._death = e
            for outputs in self._asked.values():
                outputs.put_nowait(e)


async def _receive(
    reader: asyncio.StreamReader, child: subprocess.Popen[bytes]
) -> Ready | Progress | Delta | ToolCall | Malformed | Done | Forgotten | Failed:
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > LARGEST:
            child.kill()
            raise EngineError(Reason.ENGINE_CRASHED, "The engine process sent nonsense.")
        return from_engine.validate_json(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError, ValidationError):
        await _ended(child)
        raise _crashed(child) from None


def _hang_up(link: socket.socket, writer: asyncio.StreamWriter | None) -> None:
    """Through its transport: a socket closed under one leaves the loop deaf for the next that gets its number."""
    if writer:
        writer.transport.abort()
    else:
        link.close()


def _sacrifice(pid: int) -> None:
    """If the kernel must kill for memory, then this process: its death costs a reload (oom_score_adj of proc(5))."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")


async def _to_its_end(child: subprocess.Popen[bytes]) -> None:
    """Of one that was killed, in a task that is itself cancelled."""
    ending = asyncio.create_task(_ended(child), name="end an engine")
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.shield(ending)


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


def as_error(message: Failed) -> EngineError:
    reason = Reason[message.reason] if message.reason in Reason.__members__ else Reason.ENGINE_CRASHED
    return EngineError(reason, message.message, hint=message.hint, metadata=message.metadata)
