"""Constrained decoding of calls: which tokens may come next, and which must.

The grammar starts when the model has sampled `<|tool_call>` and ends with `<tool_call|>`: it forces a known tool, its
argument names in sorted order (as the template trains), typed values, and real quote tokens. Free strings are unbounded;
the token limit ends them.

What the model chooses by itself is taken if it is allowed, and only else the allowed ones are looked for: a model that
knows the format hardly ever needs that. Where one thing alone may follow it is written without asking the model.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from agentd.engine.automaton import CLOSED, QUOTED, UTF8, NotExpressible, Position, State, calls
from agentd.engine.prompt import CALL_CLOSE, QUOTE, Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from agentd.engine.sampler import Sampler
    from agentd.engine.tokens import Vocabulary

__all__ = ["Grammars", "Matcher", "NotExpressible"]


_LOOKED_AT = 256
"""So many of the most likely tokens are tried one by one: 3 ms, against a second to bring 262,144 of them in order."""


_MERGED = 8  # tokens: no more of what stands before can become one with what follows
_REMEMBERED = 4096


@dataclass(slots=True, eq=False)
class Grammar:
    """One tool set's automaton, and what was found out about its states."""

    start: State
    allowed: dict[Position, NDArray[np.int64]] = field(default_factory=dict)
    forced: dict[tuple[Position, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)


class Grammars:
    """Makes grammars for one vocabulary; the last few tool sets' are kept."""

    KEPT = 4

    def __init__(self, words: Vocabulary) -> None:
        self._words = words
        self._grammars: dict[str, Grammar] = {}

    def forget(self) -> None:
        """Give back what can be made again."""
        self._grammars = {}
        self._words.forget()

    def matcher(self, tools: Sequence[tuple[str, Mapping[str, Any]]]) -> Matcher:
        """A matcher at the start of a call to one of `tools`. Raises NotExpressible."""
        key = json.dumps(tools, sort_keys=True)
        if key not in self._grammars:
            while len(self._grammars) >= self.KEPT:
                del self._grammars[next(iter(self._grammars))]
            self._grammars[key] = Grammar(calls(tools))
        return Matcher(self._words, self._grammars[key])


class Matcher:
    """The state of one call under way."""

    def __init__(self, words: Vocabulary, grammar: Grammar) -> None:
        self._words, self._grammar = words, grammar
        self._at = Position(grammar.start)
        self._bare: tuple[int, ...] = ()  # tokens since the last special one: what comes may have to be merged with them

    @property
    def ended(self) -> bool:
        return not self._at.state.symbols() and not self._at.state.text

    @property
    def in_text(self) -> bool:
        """Whether any text may come next."""
        return self._at.state.text

    def pick(self, sampler: Sampler, logits: NDArray[np.float32]) -> int:
        """What `sampler` takes of the tokens that may come next. `logits` has the shape [vocabulary] and stays as it is.

        Raises NoProbabilities.
        """
        token = sampler.pick(logits)
        if self._follow(token) is not None:
            return token
        return sampler.pick(logits, self._likely(logits) if not self.in_text else self._allowed())

    def _likely(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Those of the most likely tokens that may come next; where there are none, all that may."""
        known = self._grammar.allowed.get(self._at)
        if known is not None:
            return known
        most = np.argpartition(logits, -_LOOKED_AT)[-_LOOKED_AT:] if len(logits) > _LOOKED_AT else np.arange(len(logits))
        found = [int(token) for token in most if self._follow(int(token)) is not None]
        return np.array(sorted(found), np.int64) if found else self._allowed()

    def advance(self, token: int) -> bool:
        """Take a token; returns whether the call goes on."""
        to = self._follow(token)
        if to is None:
            return False
        self._at = to
        self._bare = () if token in self._words.guarded_ids else (*self._bare, token)[-_MERGED:]
        return not self.ended

    def forced(self) -> tuple[int, ...]:
        """The tokens that come next whatever the model would say; none where it has a choice."""
        if self._at.state.text or len(self._at.state.symbols()) != 1:
            return ()
        key = (self._at, self._bare)
        if key not in self._grammar.forced:
            if len(self._grammar.forced) >= _REMEMBERED:
                self._grammar.forced.clear()
            self._grammar.forced[key] = tuple(self._forced())
        return self._grammar.forced[key]

    def _follow(self, token: int) -> Position | None:
        special = self._words.special
        if token == special[QUOTE]:
            return self._at.step(QUOTED)
        if token == special[CALL_CLOSE]:
            return self._at.step(CLOSED)
        piece = b"" if token in self._words.guarded_ids else self._words.piece(token)
        at: Position | None = self._at if piece else None
        for byte in piece:
            if at is None:
                return None
            at = at.step(byte)
        return at

    def _allowed(self) -> NDArray[np.int64]:
        if self._at.state.text and not self._at.character:
            return self._words.in_texts()
        known = self._grammar.allowed.get(self._at)
        if known is None:
            known = self._grammar.allowed[self._at] = np.array(sorted(self._look_up()), np.int64)
        return known

    def _look_up(self) -> list[int]:
        words, special = self._words, self._words.special
        found = [special[name] for name, symbol in ((QUOTE, QUOTED), (CALL_CLOSE, CLOSED)) if self._at.step(symbol)]
        if self._at.state.text:
            return [words.byte(byte) for byte in UTF8[self._at.character]]
        pieces, order = words.order()
        ways = [(self._at, 0, len(order), 0)]  # tokens order[low:high] begin with `depth` bytes that lead there
        while ways:
            at, low, high, depth = ways.pop()
            while depth and low < high and len(pieces(order[low])) == depth:
                found.append(int(order[low]))
                low += 1
            for symbol, to in at.state.symbols().items():
                if symbol >= QUOTED or low == high:
                    continue
                first = bisect_left(order, symbol, low, high, key=lambda token: pieces(token)[depth])
                last = bisect_left(order, symbol + 1, first, high, key=lambda token: pieces(token)[depth])
                if first < last:
                    ways.append((Position(to), first, last, depth + 1))
        return found

    def _forced(self) -> list[int]:
        """Runs of bytes between special tokens, each tokenised as it would be in a prompt."""
        tokens: list[int] = []
        at, bare, run = self._at, self._bare, bytearray()
        while not at.state.text and len(symbols := at.state.symbols()) == 1:
            ((symbol, state),) = symbols.items()
            at = Position(state)
            if symbol < QUOTED:
                run.append(symbol)
                continue
            made = self._tokens(bare, bytes(run), ())
            tokens += made
            if b"".join(map(self._words.piece, made)) != run:
                return tokens  # a part is left to the model
            tokens.append(self._words.special[QUOTE if symbol == QUOTED else CALL_CLOSE])
            bare, run = (), bytearray()
        if run:
            tokens += self._tokens(bare, bytes(run), tuple(symbol for symbol in symbols if symbol < QUOTED))
        return tokens

    def _tokens(self, before: tuple[int, ...], run: bytes, following: tuple[int, ...]) -> list[int]:
        """`run` in tokens as they are behind those `before`. What could be one token with a byte `following` is left to the
        model.
        """
        words = self._words
        text = b"".join(map(words.piece, before))
        whole = self._encode(text + run)
        if tuple(whole[: len(before)]) == before:
            lead, made = text, whole[len(before) :]
        else:  # the model has cut it in another way than the tokeniser would
            lead, made = b"", self._encode(run)
        if not run.startswith(b"".join(map(words.piece, made))):
            return []  # the tokeniser has made another character of one: that is left to the model, which can spell it out
        skip = len(before) if lead else 0
        for byte in following:
            longer = self._encode(lead + run + bytes([byte]))[skip:]
            same = next((n for n, (one, other) in enumerate(zip(made, longer, strict=False)) if one != other), len(longer))
            del made[same:]
        return made

    def _encode(self, text: bytes) -> list[int]:
        """Of what ends within a character nothing: that is left to the model."""
        try:
            return self._words.encode([Text(text.decode(), trusted=False)])
        except UnicodeDecodeError as e:
            return self._words.encode([Text(text[: e.start].decode(), trusted=False)])
