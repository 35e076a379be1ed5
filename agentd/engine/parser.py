"""What the model writes, taken apart as it comes: thoughts, calls and text, told apart by token id alone.

Text may spell any markup it likes; only the real special tokens count. Common slips of small models are put
right on the way: a call opened inside an unclosed thought ends the thought, stray closing tokens are dropped.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from agentd.engine.prompt import CALL_CLOSE, CALL_OPEN, CHANNEL_CLOSE, CHANNEL_OPEN, QUOTE

if TYPE_CHECKING:
    from collections.abc import Mapping

_THOUGHT_HEADER = "thought\n"
_NAME = re.compile(r"call:([A-Za-z_][A-Za-z0-9_.]*)\{")
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):")
_SCALAR = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?([eE][-+]?\d{1,2})?|true|false|null")
_DEEPEST = 16


@dataclass(frozen=True, slots=True)
class TextOut:
    text: str
    thought: bool


@dataclass(frozen=True, slots=True)
class CallOut:
    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedOut:
    why: str


Output = TextOut | CallOut | MalformedOut


class _State(Enum):
    TEXT = 1
    THOUGHT = 2
    CALL = 3


@dataclass(frozen=True, slots=True)
class _Quoted:
    """A string between two quote tokens."""

    text: str


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


@dataclass(slots=True)
class StreamParser:
    """Feed it tokens in order, then `finish`. `special` maps token names to ids, `guarded` are all special ids."""

    special: Mapping[str, int]
    guarded: frozenset[int]
    _state: _State = _State.TEXT
    _decoder: codecs.IncrementalDecoder = field(default_factory=_decoder)
    _header: str | None = None  # of a thought, while it may still be one
    _parts: list[str | _Quoted] = field(default_factory=list)
    _raw: bytearray = field(default_factory=bytearray)
    _quoted: bool = False

    @property
    def in_call(self) -> bool:
        return self._state is _State.CALL

    def feed(self, token: int, piece: bytes) -> list[Output]:
        """What has become certain with this token."""
        names = self.special
        if self._state is _State.CALL:
            return self._feed_call(token, piece)
        if token == names[CALL_OPEN]:
            out = self._flush()
            self._state, self._parts, self._quoted = _State.CALL, [], False
            self._raw.clear()
            return out
        if token == names[CHANNEL_OPEN]:
            out = self._flush()
            self._state, self._header = _State.THOUGHT, ""
            return out
        if token == names[CHANNEL_CLOSE]:
            out = self._flush()
            self._state = _State.TEXT
            return out
        if token in self.guarded:
            return []  # a stray closer or other markup: nothing a reader should see
        return self._text(self._decoder.decode(piece))

    def finish(self) -> list[Output]:
        """The rest, at the end of generation."""
        if self._state is _State.CALL:
            self._state = _State.TEXT
            return [MalformedOut("the call was cut off")]
        return self._flush()

    def _feed_call(self, token: int, piece: bytes) -> list[Output]:
        if token == self.special[QUOTE]:
            text = bytes(self._raw).decode("utf-8", "replace")
            self._parts.append(_Quoted(text) if self._quoted else text)
            self._raw.clear()
            self._quoted = not self._quoted
            return []
        if token == self.special[CALL_CLOSE]:
            self._parts.append(bytes(self._raw).decode("utf-8", "replace"))
            self._raw.clear()
            self._state = _State.TEXT
            return [MalformedOut("a string is not closed") if self._quoted else parse_call(self._parts)]
        if token in self.guarded:
            self._state = _State.TEXT
            return [MalformedOut("markup inside a call")]
        self._raw += piece
        return []

    def _flush(self) -> list[Output]:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        out = self._text(rest)
        if self._header:  # a thought that never got past its first line
            out.append(TextOut(self._header, thought=True))
        self._header = None
        return out

    def _text(self, text: str) -> list[Output]:
        if self._header is not None:
            self._header += text
            if _THOUGHT_HEADER.startswith(self._header):
                if self._header == _THOUGHT_HEADER:
                    self._header = None
                return []
            text, self._header = self._header.removeprefix(_THOUGHT_HEADER), None
        return [TextOut(text, thought=self._state is _State.THOUGHT)] if text else []


def parse_call(parts: list[str | _Quoted]) -> CallOut | MalformedOut:
    """`call:NAME{key:value,...}` from its stretches of bare and quoted text."""
    reader = _Reader(parts)
    try:
        return reader.call()
    except _Syntax as e:
        return MalformedOut(str(e))


class _Syntax(Exception):
    """The call is not in Gemma's notation."""


class _Reader:
    """A cursor over bare text with whole quoted strings in it."""

    def __init__(self, parts: list[str | _Quoted]) -> None:
        self._parts = [part for part in parts if part != ""]
        self._part = self._at = 0

    def call(self) -> CallOut:
        match = self._match(_NAME)
        if match is None:
            raise _Syntax("a call begins with call:NAME{")
        arguments = self._members(1)
        if self._part < len(self._parts):
            raise _Syntax("something follows the closing brace")
        return CallOut(match[1], arguments)

    def _bare(self) -> str:
        """The bare text ahead, or nothing if a string or the end comes next."""
        while self._part < len(self._parts):
            part = self._parts[self._part]
            if isinstance(part, _Quoted):
                return ""
            if self._at < len(part):
                return part[self._at :]
            self._part, self._at = self._part + 1, 0
        return ""

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._bare())
        if match:
            self._skip(len(match[0]))
        return match

    def _skip(self, n: int) -> None:
        self._at += n
        self._bare()  # step over an exhausted part

    def _take(self, character: str) -> bool:
        if self._bare().startswith(character):
            self._skip(1)
            return True
        return False

    def _members(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while not self._take("}"):
            if members and not self._take(","):
                raise _Syntax("arguments are not separated by a comma")
            key = self._match(_KEY)
            if key is None:
                raise _Syntax(f"no argument name before {self._bare()[:12]!r}")
            if key[1] in members:
                raise _Syntax(f"argument {key[1]} is given twice")
            members[key[1]] = self._value(depth)
        return members

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise _Syntax("values are nested too deeply")
        if self._part < len(self._parts) and isinstance(part := self._parts[self._part], _Quoted):
            self._part, self._at = self._part + 1, 0
            self._bare()
            return part.text
        if self._take("{"):
            return self._members(depth + 1)
        if self._take("["):
            items: list[Any] = []
            while not self._take("]"):
                if items and not self._take(","):
                    raise _Syntax("items are not separated by a comma")
                items.append(self._value(depth + 1))
            return items
        if scalar := self._match(_SCALAR):
            return json.loads(scalar[0])
        raise _Syntax(f"no value before {self._bare()[:12]!r}")
