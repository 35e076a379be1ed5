"""The Gemma 4 prompt format, written out by us.

GGUF files carry chat templates that differ and are sometimes wrong, and no template escapes markup inside
user text. So the format is rendered here, as a list of pieces that keep their trust: markup of ours is
`trusted`, everything that a user, a file, a manifest or a tool says is not, and the engine tokenises each
piece on its own (`tokens.py`).

Source: https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4 and the canonical E2B template of
2026-07-09. For E2B with thinking off the generation prompt is exactly `<|turn>model\\n`; the empty-thought
primer of the larger models makes E2B leak untagged reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

QUOTE = '<|"|>'
CALL_OPEN, CALL_CLOSE = "<|tool_call>", "<tool_call|>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<|tool_response>", "<tool_response|>"
CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
TOOL_OPEN, TOOL_CLOSE = "<|tool>", "<tool|>"
BOS, THINK = "<bos>", "<|think|>"

MARKUP = (
    *(BOS, THINK, QUOTE, TURN_OPEN, TURN_CLOSE, TOOL_OPEN, TOOL_CLOSE, CALL_OPEN, CALL_CLOSE),
    *(RESPONSE_OPEN, RESPONSE_CLOSE, CHANNEL_OPEN, CHANNEL_CLOSE),
)
"""The special tokens that a vocabulary must have to be used as a Gemma 4 text model."""


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch of prompt. Only `trusted` text may turn into special tokens."""

    text: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens exactly as the model produced them, so that the cached state of the loop stays valid."""

    ids: tuple[int, ...]


Piece = Text | Tokens


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What the model is told of a tool. `parameters` is the JSON Schema subset that Gemma can express."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """Text the model answered with."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A tool call the model made in an earlier run of the session."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Responded:
    """What a tool gave back; keys are identifiers, values JSON."""

    tool: str
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Generated:
    """A step of the loop that is still going on, thoughts included, without its end-of-generation token."""

    ids: tuple[int, ...]


Part = Said | Called | Responded | Generated


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user asked and all that the model did about it so far, in one model turn."""

    user: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole prompt. The last turn is the open one: generation goes on behind its parts."""

    system: str
    tools: tuple[ToolSpec, ...]
    turns: tuple[Turn, ...]
    thinking: bool = False


@dataclass(slots=True)
class _Writer:
    pieces: list[Piece] = field(default_factory=list)

    def markup(self, text: str) -> None:
        if not text:
            return
        last = self.pieces[-1] if self.pieces else None
        if isinstance(last, Text) and last.trusted:
            self.pieces[-1] = Text(last.text + text, trusted=True)
        else:
            self.pieces.append(Text(text, trusted=True))

    def untrusted(self, text: str) -> None:
        if text:  # half of a surrogate pair, as JSON can hold it, is no text that could be sent on
            self.pieces.append(Text(text.encode(errors="replace").decode(), trusted=False))

    def quoted(self, text: str) -> None:
        self.markup(QUOTE)
        self.untrusted(text)
        self.markup(QUOTE)

    def value(self, value: object) -> None:
        """A JSON value in Gemma's notation: bare keys in sorted order, strings in quote tokens."""
        match value:
            case None:
                self.markup("null")
            case bool():
                self.markup("true" if value else "false")
            case str():
                self.quoted(value)
            case int() | float():
                self.markup(repr(value))
            case dict():
                self.mapping(value)
            case list() | tuple():
                self.markup("[")
                for i, item in enumerate(value):
                    self.markup("," if i else "")
                    self.value(item)
                self.markup("]")
            case _:
                raise TypeError(f"{type(value).__name__} has no Gemma notation")

    def mapping(self, mapping: Mapping[str, Any]) -> None:
        self.markup("{")
        for i, key in enumerate(sorted(mapping)):
            self.markup("," if i else "")
            # A bare key is outside quotes: one that is not a plain word could end the call or open markup.
            if key.isidentifier():
                self.markup(key)
            else:
                self.untrusted(key)
            self.markup(":")
            self.value(mapping[key])
        self.markup("}")


def render(conversation: Conversation) -> list[Piece]:
    """The prompt as pieces; it ends where the model goes on writing."""
    return render_prefix(conversation) + render_turns(conversation)


def render_prefix(conversation: Conversation) -> list[Piece]:
    """What all prompts with this system text and these tools begin with."""
    out = _Writer()
    out.markup(BOS)
    if conversation.system or conversation.tools or conversation.thinking:
        out.markup(f"{TURN_OPEN}system\n")
        if conversation.thinking:
            out.markup(f"{THINK}\n")
        out.untrusted(conversation.system.strip())
        for tool in conversation.tools:
            _declaration(out, tool)
        out.markup(f"{TURN_CLOSE}\n")
    return out.pieces


def render_turns(conversation: Conversation) -> list[Piece]:
    """What follows that. A turn begins with a special token, so both can be tokenised on their own."""
    out = _Writer()
    last = len(conversation.turns) - 1
    for i, turn in enumerate(conversation.turns):
        _turn(out, turn)
        if i != last:
            out.markup(f"{TURN_CLOSE}\n")
    return out.pieces


def _turn(out: _Writer, turn: Turn) -> None:
    out.markup(f"{TURN_OPEN}user\n")
    out.untrusted(turn.user.strip())
    out.markup(f"{TURN_CLOSE}\n{TURN_OPEN}model\n")
    for part in turn.parts:
        match part:
            case Said():
                out.untrusted(part.text.strip())
            case Called():
                out.markup(f"{CALL_OPEN}call:{part.tool}")
                out.mapping(part.arguments)
                out.markup(CALL_CLOSE)
            case Responded():
                out.markup(f"{RESPONSE_OPEN}response:{part.tool}")
                out.mapping(part.result)
                out.markup(RESPONSE_CLOSE)
            case Generated():
                out.pieces.append(Tokens(part.ids))


def _declaration(out: _Writer, tool: ToolSpec) -> None:
    out.markup(f"{TOOL_OPEN}declaration:{tool.name}{{description:")
    out.quoted(tool.description)
    out.markup(",parameters:{")
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    if properties:
        out.markup("properties:{")
        _properties(out, properties)
        out.markup("},")
    if required := tool.parameters.get("required", ()):
        _names(out, "required", required)
        out.markup(",")
    out.markup("type:")
    out.quoted("OBJECT")
    out.markup(f"}}}}{TOOL_CLOSE}")


def _properties(out: _Writer, properties: Mapping[str, Any]) -> None:
    for i, name in enumerate(sorted(properties)):
        out.markup(f"{',' if i else ''}{name}:{{")
        _schema(out, properties[name])
        out.markup("}")


def _schema(out: _Writer, schema: Mapping[str, Any]) -> None:
    """One parameter: description, enum, items, nullable, properties, required, type, in the template's order."""
    if description := schema.get("description"):
        out.markup("description:")
        out.quoted(description)
        out.markup(",")
    kind = str(schema["type"])
    if kind == "string" and schema.get("enum"):
        _names(out, "enum", schema["enum"])
        out.markup(",")
    if kind == "array" and schema.get("items"):
        out.markup("items:{")
        _schema(out, schema["items"])
        out.markup("},")
    if schema.get("nullable"):
        out.markup("nullable:true,")
    if kind == "object":
        out.markup("properties:{")
        _properties(out, schema.get("properties", {}))
        out.markup("},")
        if schema.get("required"):
            _names(out, "required", schema["required"])
            out.markup(",")
    out.markup("type:")
    out.quoted(kind.upper())


def _names(out: _Writer, key: str, names: Sequence[str] | Iterable[str]) -> None:
    out.markup(f"{key}:[")
    for i, name in enumerate(names):
        out.markup("," if i else "")
        out.quoted(name)
    out.markup("]")
