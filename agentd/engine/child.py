"""The engine process: owns the model, decodes on its main thread, talks over one socket.

    python -I -m agentd.engine.child DESCRIPTOR

A thread reads messages so that a cancellation reaches a decode under way; when the daemon goes, so does this.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as C

from agentd.engine.footprint import footprint
from agentd.engine.grammar import Grammars
from agentd.engine.link import (
    LARGEST,
    LENGTH,
    Cancel,
    Delta,
    Done,
    Failed,
    Footprint,
    Generate,
    Load,
    Malformed,
    Pace,
    Progress,
    Ready,
    ToolCall,
    frame,
    to_engine,
    unpack,
)
from agentd.engine.meter import anonymous_mib
from agentd.engine.model import Aborted, Model, greedy_or_sampled
from agentd.engine.pace import OutOfBudget, Pacer
from agentd.engine.parser import CallOut, MalformedOut, StreamParser, TextOut
from agentd.engine.prompt import CALL_OPEN, RESPONSE_OPEN
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    from pydantic import BaseModel

    from agentd.engine.grammar import Matcher
    from agentd.engine.parser import Output

    Ending = Literal["stop", "tool", "length", "context"]


_TELL_S = 0.5


class Inbox:
    """Reads messages on a thread of its own. `cancelled` says whether the request at work has been given up."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._requests: queue.SimpleQueue[Load | Generate] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self.working_on = 0
        self.pacer = Pacer(self.cancelled)
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self) -> Load | Generate:
        return self._requests.get()

    def cancelled(self) -> bool:
        return self.working_on in self._cancelled

    def ends(self) -> bool:
        """Whether a decode under way is not to be finished."""
        return self.pacer.stops or self.cancelled()

    def _read(self) -> None:
        while True:
            (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
            if length > LARGEST:
                os._exit(1)
            message = to_engine.validate_json(self._exactly(length))
            if isinstance(message, Cancel):
                self._cancelled.add(message.id)
                self.pacer.wake()
            elif isinstance(message, Pace):
                self.pacer.told(message)
            else:
                self._requests.put(message)

    def _exactly(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            chunk = self._link.recv(n - len(data))
            if not chunk:
                os._exit(0)  # the daemon is gone, and nothing here is worth keeping
            data += chunk
        return bytes(data)


class Engine:
    def __init__(self, link: socket.socket) -> None:
        self._link, self._inbox = link, Inbox(link)
        self._prefilled = self._generated = 0
        self._told = math.inf  # until the model is loaded
        self._footprint: Footprint | None = None

    def run(self) -> None:
        load = self._inbox.next()
        assert isinstance(load, Load)
        started = time.monotonic()
        try:
            model = self._load(load)
        except EngineError as e:
            self._send(_failed(0, e))
            return
        self._model = model
        took = round((time.monotonic() - started) * 1000)
        ready = Ready(
            name=model.name,
            parameters=model.parameters,
            size=model.size,
            context=model.context,
            load_ms=took,
            footprint=self._footprint,
        )
        self._send(ready)
        self._told = 0.0
        while True:
            request = self._inbox.next()
            assert isinstance(request, Generate)
            self._inbox.working_on = request.id
            try:
                self._generate(request)
            except EngineError as e:
                self._send(_failed(request.id, e))
            if self._inbox.pacer.trims:
                self._trim()

    def _load(self, load: Load) -> Model:
        return Model(
            Path(load.path),
            context=load.context,
            batch=load.batch,
            threads=load.threads,
            repack=load.repack,
            should_stop=self._inbox.ends,
            pacer=self._inbox.pacer,
            fit=lambda model, _context: self._fit(model, load),
            done=self._report,
        )

    def _fit(self, model: Model, load: Load) -> int:
        """How large a context the room allows, with all else of this process in place. Raises EngineError."""
        self._grammars = Grammars(model.vocabulary_pointer, model.words.size)
        if not load.room_mib:
            return load.context
        known = load.footprint
        if known is None or (known.context, known.least) != (load.context, load.least_context):
            known = footprint(Path(load.path), model.parameters_of_context, load.context, load.least_context)
        self._footprint = known
        taken = anonymous_mib(os.getpid())
        if context := known.largest(load.room_mib - taken):
            return context
        least = taken + known.least_mib
        never = least > load.ever_mib
        raise EngineError(
            Reason.MODEL_TOO_LARGE if never else Reason.BUDGET_MEMORY,
            f"The model needs {least:.0f} MiB beside its weights, and {'there are' if never else 'now there are only'} "
            f"{load.ever_mib if never else load.room_mib:.0f} MiB for it.",
            hint="Use a smaller model, or raise budgets.memory.max_anon_mib."
            if never
            else "Try again when other programs have given memory back.",
            metadata={"needs_mib": f"{least:.0f}", "room_mib": f"{load.room_mib:.0f}", "ever_mib": f"{load.ever_mib:.0f}"},
        )

    def _report(self) -> None:
        """How far it is, now and then."""
        now = time.monotonic()
        if now - self._told >= _TELL_S:
            self._told = now
            self._tell_progress()

    def _tell_progress(self) -> None:
        pacer, model, generated = self._inbox.pacer, self._model, self._generated
        progress = Progress(
            prefilled=max(0, model.decoded - generated),
            generated=generated,
            passes=model.passes,
            busy_s=pacer.busy_s,
            rest_s=pacer.rest_s,
        )
        self._send(progress)

    def _trim(self) -> None:
        """Give back what can be made again, and what the allocator keeps for later (malloc_trim(3), where there is one)."""
        self._grammars.forget()
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)

    def _generate(self, request: Generate) -> None:
        model = self._model
        prompt = model.words.encode(unpack(request.prompt))
        if len(prompt) >= model.context:
            raise EngineError(
                Reason.PROMPT_TOO_LONG,
                f"The prompt has {len(prompt)} tokens; the context holds {model.context}, the answer included.",
                hint="Ask for less at once, or raise engine.context.",
                metadata={"tokens": str(len(prompt)), "context": str(model.context)},
            )
        started = time.monotonic()
        cached = model.rewind(prompt)
        generated: list[int] = []
        reason: Ending | Literal["cancelled", "budget"]
        decoding = started
        try:
            model.decode(prompt[cached:])
            decoding = time.monotonic()
            reason = self._decode(request, generated)
        except (Aborted, OutOfBudget):
            reason = "cancelled" if self._inbox.cancelled() else "budget"
        now = time.monotonic()
        self._tell_progress()
        self._send(
            Done(
                id=request.id,
                reason=reason,
                ids=tuple(generated),
                prompt_tokens=len(prompt),
                cached_tokens=cached,
                prefill_ms=round((decoding - started) * 1000),
                decode_ms=round((now - decoding) * 1000),
            )
        )

    def _decode(self, request: Generate, generated: list[int]) -> Ending:
        """Sample until the model ends, or may not go on; `generated` grows with every token kept."""
        model, words = self._model, self._model.words
        parser = StreamParser(words.special, frozenset(words.guarded.values()))
        sampler = greedy_or_sampled(request.temperature, request.seed)
        matcher: Matcher | None = None
        try:
            while len(generated) < request.max_tokens:
                if matcher:
                    matcher.restrict(model.logits())
                token = model.sample(sampler)
                if words.ends_generation(token) and not matcher:
                    self._tell(request.id, parser.finish())
                    return "tool" if token == words.special[RESPONSE_OPEN] else "stop"
                if matcher and not matcher.advance(token):
                    matcher = None
                elif token == words.special[CALL_OPEN] and request.tools:
                    matcher = self._grammars.matcher(request.tools)
                self._tell(request.id, parser.feed(token, words.piece(token)))
                generated.append(token)
                self._generated += 1
                if len(model.tokens) >= model.context:
                    self._tell(request.id, parser.finish())
                    return "context"
                model.decode([token])
        except (Aborted, OutOfBudget):
            self._tell(request.id, parser.finish())
            raise
        else:
            self._tell(request.id, parser.finish())
            return "length"
        finally:
            C.llama_sampler_free(sampler)

    def _tell(self, request: int, outputs: Iterable[Output]) -> None:
        for output in outputs:
            match output:
                case TextOut(text, thought):
                    self._send(Delta(id=request, thought=thought, text=text))
                case CallOut(tool, arguments):
                    self._send(ToolCall(id=request, tool=tool, arguments=arguments))
                case MalformedOut(why):
                    self._send(Malformed(id=request, why=why))

    def _send(self, message: BaseModel) -> None:
        self._link.sendall(frame(message))


def _failed(request: int, error: EngineError) -> Failed:
    metadata = dict(error.metadata)
    return Failed(id=request, reason=error.reason.name, message=error.message, hint=error.hint, metadata=metadata)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when we stop
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Engine(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
