"""One generation at work: what it has been given, what it has written, and what becomes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agentd.engine.drafting import Drafter
from agentd.engine.link import Delta, Done, Malformed, ToolCall
from agentd.engine.parser import CallOut, MalformedOut, StreamParser, TextOut
from agentd.engine.prompt import CALL_OPEN, RESPONSE_OPEN
from agentd.engine.sampler import NoProbabilities, Sampler
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray
    from pydantic import BaseModel

    from agentd.engine.cache import Sequence
    from agentd.engine.grammar import Grammars, Matcher
    from agentd.engine.link import Generate
    from agentd.engine.parser import Output
    from agentd.engine.tokens import Vocabulary

Ending = Literal["stop", "tool", "length", "context", "cancelled", "budget"]


@dataclass(slots=True, eq=False)
class Generation:
    """`tokens` are the prompt and all that was written behind it; the first `prefix` of them many prompts have in common."""

    request: Generate
    tokens: list[int]
    prefix: int
    words: Vocabulary
    grammars: Grammars
    send: Callable[[BaseModel], None]
    sequence: Sequence | None = None
    drafter: Drafter = field(default_factory=Drafter)
    busy_s: float = 0.0
    """Of the passes that it was in, its share of their rows."""
    cached: int | None = None
    """How much of the prompt was there when it had its place for the first time."""
    _prompt: int = 0
    _begun: float = 0.0
    _decoding: float = 0.0
    _parser: StreamParser = field(init=False)
    _sampler: Sampler = field(init=False)
    _matcher: Matcher | None = None

    def __post_init__(self) -> None:
        self._prompt, self._begun = len(self.tokens), time.monotonic()
        self._parser = StreamParser(self.words.special, self.words.guarded_ids)
        self._sampler = Sampler(self.request.temperature, self.request.seed)

    @property
    def written(self) -> tuple[int, ...]:
        return tuple(self.tokens[self._prompt :])

    @property
    def writes(self) -> bool:
        return len(self.tokens) > self._prompt

    def ahead(self) -> int:
        """How many of its tokens the cache does not hold yet."""
        return len(self.tokens) - (len(self.sequence.tokens) if self.sequence else 0)

    def is_preceded_by(self, other: Generation) -> bool:
        """Whether the other one is about to decode what both begin with: to wait for that is faster than to do it twice."""
        reads = other.sequence is not None and len(other.sequence.tokens) < other.prefix
        return reads and other.prefix == self.prefix and other.tokens[: self.prefix] == self.tokens[: self.prefix]

    def placed(self, sequence: Sequence) -> None:
        """It has its place in the cache, for the first time or again."""
        self.sequence = sequence
        if self.cached is None:
            self.cached = len(sequence.tokens)

    def go_on(self, logits: NDArray[np.float32], context: int) -> Ending | None:
        """Write the next token, and those that must follow it; what ends it, if that does.

        Raises EngineError (MODEL_INVALID) where the logits are no numbers.
        """
        if not self._decoding:
            self._decoding = time.monotonic()
        try:
            token = self._matcher.pick(self._sampler, logits) if self._matcher else self._sampler.pick(logits)
        except NoProbabilities:
            where = f"behind token {len(self.tokens)}"
            hint = "The file may be damaged: `agentd doctor` shows which it is; load it anew."
            raise EngineError(Reason.MODEL_INVALID, f"The model gives no usable probabilities {where}.", hint=hint) from None
        if self.words.ends_generation(token) and not self._matcher:
            return "tool" if token == self.words.special[RESPONSE_OPEN] else "stop"
        ended = self._write(token, context)
        while self._matcher and not ended and (forced := self._matcher.forced()):
            for each in forced:
                ended = self._write(each, context)
                if ended or not self._matcher:
                    break
        return ended

    def _write(self, token: int, context: int) -> Ending | None:
        if self._matcher:
            if not self._matcher.advance(token):
                self._matcher = None
        elif token == self.words.special[CALL_OPEN] and self.request.tools:
            self._matcher = self.grammars.matcher(self.request.tools)
        self._tell(self._parser.feed(token, self.words.piece(token)))
        self.tokens.append(token)
        if len(self.tokens) - self._prompt >= self.request.max_tokens:
            return "length"
        return "context" if len(self.tokens) > context else None

    def end(self, reason: Ending) -> None:
        now = time.monotonic()
        self._tell(self._parser.finish())
        decoding = self._decoding or now
        self.send(
            Done(
                id=self.request.id,
                reason=reason,
                ids=self.written,
                prompt_tokens=self._prompt,
                cached_tokens=self.cached or 0,
                prefill_ms=round((decoding - self._begun) * 1000),
                decode_ms=round((now - decoding) * 1000),
                busy_s=self.busy_s,
            )
        )

    def _tell(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            match output:
                case TextOut(text, thought):
                    self.send(Delta(id=self.request.id, thought=thought, text=text))
                case CallOut(tool, arguments):
                    self.send(ToolCall(id=self.request.id, tool=tool, arguments=arguments))
                case MalformedOut(why):
                    self.send(Malformed(id=self.request.id, why=why))
