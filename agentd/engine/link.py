"""The messages between the daemon and the engine process: JSON behind a length, over a socket pair.

A token costs well under a millisecond. The daemon treats what comes from the engine as it would a client's: a
model file is hostile input to a C++ program, so the process that holds it is not trusted.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from agentd.engine.prompt import Piece, Text, Tokens

LENGTH = struct.Struct("!I")
LARGEST = 64 << 20


# What comes from the engine is bounded: its numbers are added up, stored and put into protobuf messages.
Count = Annotated[int, Field(ge=0, le=2**53)]
Small = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Mebibytes = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Footprint(_Message):
    """MiB of caches and workspace: of a context of so many tokens, and of the least one. In between it grows evenly."""

    context: int = Field(gt=0, le=2**31 - 1)
    mib: Mebibytes
    least: int = Field(gt=0, le=2**31 - 1)
    least_mib: Mebibytes

    def of(self, context: int) -> float:
        """MiB of a context in between."""
        if self.context <= self.least:
            return self.mib
        return self.least_mib + (self.mib - self.least_mib) * (context - self.least) / (self.context - self.least)

    def largest(self, room_mib: float) -> int:
        """This context, or the first half of a half of it that fits; 0 if none down to the least one does."""
        context = self.context
        while self.of(context) > room_mib:
            if context <= self.least:
                return 0
            context = max(context // 2, self.least)
        return context


class Load(_Message):
    """First message: what to load and how. `threads` 0 means all cores. `parallel` generations share the passes over the
    model; states of prompts are kept in the folder `prefixes`, `prefixes_mib` of them at most.

    The context is halved, down to `least_context`, until all anonymous memory of the process fits into `room_mib`; `ever_mib`
    is what there can be at best; 0: not known. `footprint` is what an earlier load has found of this file.
    """

    kind: Literal["load"] = "load"
    path: str
    context: int
    batch: int
    threads: int
    parallel: int = 1
    prefixes: str = ""
    prefixes_mib: int = 0
    repack: bool = False
    least_context: int = 256
    room_mib: float = 0.0
    ever_mib: float = 0.0
    footprint: Footprint | None = None


Packed = tuple[tuple[str, bool] | tuple[int, ...], ...]
"""A prompt as it travels: (text, trusted) pairs and runs of token ids."""


class Generate(_Message):
    """Go on behind the prompt, which begins with `prefix` as many others do. `tools` are (name, JSON Schema) pairs that
    calls are constrained to.
    """

    kind: Literal["generate"] = "generate"
    id: int
    prefix: Packed = ()
    prompt: Packed
    tools: tuple[tuple[str, dict[str, Any]], ...] = ()
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Cancel(_Message):
    """Stop generating for request `id`, in the middle of a decode if need be."""

    kind: Literal["cancel"] = "cancel"
    id: int


class Forget(_Message):
    """Drop all that sessions have said, from the disk, too; the answer is a Forgotten."""

    kind: Literal["forget"] = "forget"
    id: int


class Leave(_Message):
    """Keep the states of sessions on disk, and end."""

    kind: Literal["leave"] = "leave"


class Pace(_Message):
    """How fast it may go from now on: `threads` 0 means all, `duty` is the share of the time in which it computes.

    With `hold` nothing more is decoded until another one comes; with `stop` what is generated ends with what it has; with
    `trim` what can be made again is given back.
    """

    kind: Literal["pace"] = "pace"
    threads: int = Field(default=0, ge=0)
    duty: float = Field(default=1.0, gt=0, le=1)
    hold: bool = False
    stop: bool = False
    trim: bool = False


class Ready(_Message):
    """The model is loaded. `size` is the bytes of its tensors, `context` in tokens, `load_ms` wall time."""

    kind: Literal["ready"] = "ready"
    name: str
    parameters: Count
    size: Count
    context: Small
    load_ms: Small
    footprint: Footprint | None = None


class Progress(_Message):
    """How much this process has done since it began: tokens of prompts, tokens it wrote, passes over the
    weights, seconds at work, seconds at rest.
    """

    kind: Literal["progress"] = "progress"
    prefilled: Count
    generated: Count
    passes: Count
    busy_s: Seconds
    rest_s: Seconds


class Delta(_Message):
    """Text of the answer, or of the thoughts before it."""

    kind: Literal["delta"] = "delta"
    id: int
    thought: bool
    text: str


class ToolCall(_Message):
    """A well-formed call."""

    kind: Literal["call"] = "call"
    id: int
    tool: str
    arguments: dict[str, Any]


class Malformed(_Message):
    """Something that began as a call and is none."""

    kind: Literal["malformed"] = "malformed"
    id: int
    why: str


class Done(_Message):
    """End of a generation. `ids` are the tokens the model produced, without the one that ended it; `busy_s` is its share of
    the time in which the model was at work for it.
    """

    kind: Literal["done"] = "done"
    id: int
    reason: Literal["stop", "tool", "length", "context", "cancelled", "budget"]
    ids: tuple[int, ...]
    prompt_tokens: Small
    cached_tokens: Small
    prefill_ms: Small
    decode_ms: Small
    busy_s: Seconds = 0.0


class Forgotten(_Message):
    """What sessions had said is no longer on disk, and of what is at work nothing will be."""

    kind: Literal["forgotten"] = "forgotten"
    id: int


class Failed(_Message):
    """The request (or the load, id 0) can't be done. `reason` names an agentd.errors.Reason."""

    kind: Literal["failed"] = "failed"
    id: int
    reason: str
    message: str
    hint: str = ""
    metadata: dict[str, str] = {}


ToEngine = Annotated[Load | Generate | Cancel | Pace | Forget | Leave, Field(discriminator="kind")]
FromEngine = Annotated[Ready | Progress | Delta | ToolCall | Malformed | Done | Forgotten | Failed, Field(discriminator="kind")]
to_engine: TypeAdapter[Load | Generate | Cancel | Pace | Forget | Leave] = TypeAdapter(ToEngine)
from_engine: TypeAdapter[Ready | Progress | Delta | ToolCall | Malformed | Done | Forgotten | Failed] = TypeAdapter(FromEngine)


def frame(message: BaseModel) -> bytes:
    body = message.model_dump_json().encode()
    return LENGTH.pack(len(body)) + body


def pack(pieces: list[Piece]) -> Packed:
    return tuple((p.text, p.trusted) if isinstance(p, Text) else p.ids for p in pieces)


def unpack(prompt: Packed) -> list[Piece]:
    pieces: list[Piece] = []
    for part in prompt:
        match part:
            case (str() as text, bool() as trusted):
                pieces.append(Text(text, trusted))
            case ids:
                pieces.append(Tokens(tuple(int(i) for i in ids)))
    return pieces
