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

from agentd.engine.cache import Cache
from agentd.engine.decoder import Decoder
from agentd.engine.footprint import footprint
from agentd.engine.generation import Generation
from agentd.engine.grammar import Grammars, NotExpressible
from agentd.engine.link import (
    LARGEST,
    LENGTH,
    Cancel,
    Done,
    Failed,
    Footprint,
    Forget,
    Forgotten,
    Generate,
    Leave,
    Load,
    Pace,
    Packed,
    Progress,
    Ready,
    frame,
    to_engine,
    unpack,
)
from agentd.engine.meter import anonymous_mib
from agentd.engine.model import Model, Shape
from agentd.engine.pace import Pacer
from agentd.engine.prefixes import PrefixFiles, identity
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from pydantic import BaseModel

_TELL_S = 0.5
_KNOWN_PREFIXES = 4

Request = Load | Generate | Forget | Leave


class Inbox:
    """Reads messages on a thread of its own. `cancelled` are the requests that have been given up, until that is seen to."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self._urgent = False  # whether something has come in that is not to wait for a hold's end
        self.pacer = Pacer(lambda: self._urgent or bool(self.cancelled))
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self, *, wait: bool) -> Request | None:
        self._urgent = False
        try:
            return self._requests.get(block=wait)
        except queue.Empty:
            return None

    def _read(self) -> None:
        """Until the daemon is gone: then nothing here is worth keeping. Whatever else ends this ends the process, too."""
        try:
            self._follow()
        finally:
            os._exit(1)

    def _follow(self) -> None:
        while True:
            (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
            if length > LARGEST:
                os._exit(1)
            message = to_engine.validate_json(self._exactly(length))
            if isinstance(message, Cancel):
                self.cancelled.add(message.id)
                self.pacer.wake()
            elif isinstance(message, Pace):
                self.pacer.told(message)
            else:
                self._requests.put(message)
                self._urgent = True
                self.pacer.wake()

    def _exactly(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            try:
                chunk = self._link.recv(n - len(data))
            except ConnectionError:  # a daemon that was killed had not read all that we have told it (unix(7))
                chunk = b""
            if not chunk:
                os._exit(0)
            data += chunk
        return bytes(data)


class Engine:
    def __init__(self, link: socket.socket) -> None:
        self._link, self._inbox = link, Inbox(link)
        self._decoder: Decoder | None = None
        self._told = math.inf  # until the model is loaded
        self._footprint: Footprint | None = None
        self._prefixes: dict[Packed, list[int]] = {}

    def run(self) -> None:
        load = self._inbox.next(wait=True)
        assert isinstance(load, Load)
        started = time.monotonic()
        try:
            model = self._load(load)
        except EngineError as e:
            self._send(_failed(0, e))
            return
        took = round((time.monotonic() - started) * 1000)
        ready = Ready(
            name=model.name,
            parameters=model.parameters,
            size=model.size,
            context=model.shape.context,
            load_ms=took,
            footprint=self._footprint,
        )
        self._send(ready)
        self._model, self._told = model, 0.0
        self._cache = Cache(model, _files(load, model))
        self._decoder = decoder = Decoder(
            *(model, self._cache, load.parallel),
            cancelled=lambda generation: generation.request.id in self._inbox.cancelled,
            failed=lambda generation, error: self._send(_failed(generation.request.id, error)),
        )
        while self._take(wait=not decoder.busy):
            if decoder.busy:
                decoder.step()
                if not decoder.busy:
                    self._idle()

    def _take(self, *, wait: bool) -> bool:
        """What has come in by now; False if this process is to end."""
        decoder = self._decoder
        assert decoder is not None
        given_up = set(self._inbox.cancelled)  # before what has come in: it was asked for before it was given up
        while (request := self._inbox.next(wait=wait)) is not None:
            wait = False
            if isinstance(request, Generate):
                self._add(decoder, request)
            elif isinstance(request, Forget):
                self._cache.forget()
                self._send(Forgotten(id=request.id))
            elif isinstance(request, Leave):
                self._cache.save()
                return False
        for each in given_up:
            if not decoder.knows(each):
                self._inbox.cancelled.discard(each)
        return True

    def _add(self, decoder: Decoder, request: Generate) -> None:
        try:
            generation = self._generation(request)
        except EngineError as e:
            self._send(_failed(request.id, e))
        else:
            decoder.add(generation)

    def _generation(self, request: Generate) -> Generation:
        """Raises EngineError: PROMPT_TOO_LONG, MANIFEST_INVALID."""
        model = self._model
        if request.prefix not in self._prefixes:
            while len(self._prefixes) >= _KNOWN_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[request.prefix] = model.words.encode(unpack(request.prefix))
        prefix = self._prefixes[request.prefix]
        prompt = prefix + model.words.encode(unpack(request.prompt))
        context = model.shape.context
        if not 0 < len(prompt) < context:
            raise EngineError(
                Reason.PROMPT_TOO_LONG,
                f"The prompt has {len(prompt)} tokens; the context holds {context}, the answer included.",
                hint="Ask for less at once, or raise engine.context.",
                metadata={"tokens": str(len(prompt)), "context": str(context)},
            )
        try:
            if request.tools:
                self._grammars.matcher(request.tools)  # now, and not in the middle of the answer
        except NotExpressible as e:
            raise EngineError(Reason.MANIFEST_INVALID, f"No grammar can be made of the tools' parameters: {e}.") from None
        return Generation(request, prompt, len(prefix), model.words, self._grammars, self._hear)

    def _load(self, load: Load) -> Model:
        return Model(
            Path(load.path),
            Shape.of(load.context, load.batch, load.parallel),
            threads=load.threads,
            repack=load.repack,
            should_stop=self._stops,
            pacer=self._inbox.pacer,
            fit=lambda model, _context: self._fit(model, load),
            done=self._report,
        )

    def _stops(self) -> bool:
        """Whether a pass under way is not to be finished."""
        return self._inbox.pacer.stops or bool(self._inbox.cancelled and self._decoder and self._decoder.given_up())

    def _fit(self, model: Model, load: Load) -> int:
        """How large a context the room allows, with all else of this process in place. Raises EngineError."""
        self._grammars = Grammars(model.words)
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
        pacer, model = self._inbox.pacer, self._model
        written = self._decoder.written if self._decoder else 0
        progress = Progress(
            prefilled=max(0, model.decoded - written),
            generated=written,
            passes=model.passes,
            busy_s=pacer.busy_s,
            rest_s=pacer.rest_s,
        )
        self._send(progress)

    def _idle(self) -> None:
        """All is done. Where memory is short, what can be made again is given back, and what the allocator keeps for later
        (malloc_trim(3), where there is one).
        """
        self._tell_progress()
        if self._inbox.pacer.trims:
            self._grammars.forget()
            gc.collect()
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)

    def _hear(self, message: BaseModel) -> None:
        """What a generation says. What it took of all is known before it ends."""
        if isinstance(message, Done):
            self._tell_progress()
        self._send(message)

    def _send(self, message: BaseModel) -> None:
        self._link.sendall(frame(message))


def _files(load: Load, model: Model) -> PrefixFiles | None:
    if not load.prefixes or not load.prefixes_mib:
        return None
    kind = f"window {model.shape.full_window}, repack {load.repack}"
    return PrefixFiles(Path(load.prefixes), f"{identity(Path(load.path))}, {kind}", load.prefixes_mib << 20)


def _failed(request: int, error: EngineError) -> Failed:
    metadata = dict(error.metadata)
    return Failed(id=request, reason=error.reason.name, message=error.message, hint=error.hint, metadata=metadata)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when we stop
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Engine(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
