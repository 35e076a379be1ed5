"""What a call may look like, as a deterministic automaton over bytes and the two special tokens that calls contain.

A schema has no recursion, so all calls to all tools are one finite automaton: it knows what may come next, and also where
only one thing may. Its states are made from the end to the beginning, each with where it goes on known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

QUOTED, CLOSED = 256, 257
"""Symbols beside the 256 bytes: the tokens `<|"|>` and `<tool_call|>`."""
_DIGITS = b"0123456789"
_DIGITS_MOST = 15  # before and behind the point: a double holds that many
DEEPEST = 8
LARGEST = 50_000  # states; all bundled tools together have about 3,000


class NotExpressible(ValueError):
    """A schema that no grammar can be made of; the text says why."""


@dataclass(slots=True, eq=False)
class State:
    """`edges` lead on by a symbol; what has none here goes on as it would from `otherwise`. In `text` any text may come."""

    edges: dict[int, State] = field(default_factory=dict)
    otherwise: State | None = None
    text: bool = False

    def symbols(self) -> dict[int, State]:
        """All that may come next, where it is no text."""
        return {**(self.otherwise.symbols() if self.otherwise else {}), **self.edges}


@dataclass(frozen=True, slots=True)
class Position:
    """A state, and within text how far a character of several bytes is (a key of UTF8)."""

    state: State
    character: int = 0

    def step(self, symbol: int) -> Position | None:
        """Where `symbol` leads; None if it may not come."""
        state: State | None = self.state
        if self.state.text and symbol < QUOTED:
            character = UTF8[self.character].get(symbol)
            return None if character is None else Position(self.state, character)
        if self.character:
            return None
        while state is not None:
            if (to := state.edges.get(symbol)) is not None:
                return Position(to)
            state = state.otherwise
        return None


def _utf8() -> list[dict[int, int]]:
    """Well-formed UTF-8 without NUL (RFC 3629, section 4): for each number of a state, byte to number. 0 is between two."""
    more = range(0x80, 0xC0)
    return [
        dict.fromkeys(range(0x01, 0x80), 0)
        | dict.fromkeys(range(0xC2, 0xE0), 1)
        | dict.fromkeys((*range(0xE1, 0xED), 0xEE, 0xEF), 2)
        | dict.fromkeys(range(0xF1, 0xF4), 3)
        | {0xE0: 4, 0xED: 5, 0xF0: 6, 0xF4: 7},
        dict.fromkeys(more, 0),
        dict.fromkeys(more, 1),
        dict.fromkeys(more, 2),
        dict.fromkeys(range(0xA0, 0xC0), 1),
        dict.fromkeys(range(0x80, 0xA0), 1),
        dict.fromkeys(range(0x90, 0xC0), 2),
        dict.fromkeys(range(0x80, 0x90), 2),
    ]


UTF8 = _utf8()


def calls(tools: Sequence[tuple[str, Mapping[str, Any]]]) -> State:
    """What may follow `<|tool_call>`: one call of one of these (name, JSON Schema) pairs, up to `<tool_call|>`.

    Raises NotExpressible.
    """
    making = _Making()
    end = making.state({CLOSED: making.state()})
    return making.ways((f"call:{name}{{".encode(), making.members(schema, end, 1)) for name, schema in tools)


class _Making:
    def __init__(self) -> None:
        self._made = 0

    def state(self, edges: dict[int, State] | None = None, otherwise: State | None = None, *, text: bool = False) -> State:
        self._made += 1
        if self._made > LARGEST:
            raise NotExpressible("the tools' parameters are too many, or their names too long")
        return State(edges or {}, otherwise, text)

    def ways(self, ways: Iterable[tuple[Sequence[int], State]]) -> State:
        """A state from which each sequence of symbols leads to its own state; none may begin with another."""
        start = self.state()
        for symbols, to in ways:
            at = start
            for symbol in symbols[:-1]:
                at = at.edges.get(symbol) or at.edges.setdefault(symbol, self.state())
            if at.edges.setdefault(symbols[-1], to) is not to:
                raise NotExpressible("a name occurs twice")
        return start

    def members(self, schema: Mapping[str, Any], after: State, depth: int) -> State:
        """Behind `{`: required keys always, optional ones or not, in sorted order as the template trains, then `}`."""
        if depth > DEEPEST:
            raise NotExpressible(f"objects and lists are nested deeper than {DEEPEST}")
        properties: Mapping[str, Any] = schema.get("properties", {})
        required = schema.get("required", ())
        values: list[tuple[str, State]] = []  # of the keys from the one at hand on
        following = self.ways([(b"}", after)])
        for name in sorted(properties, reverse=True):
            values.insert(0, (name, self.value(properties[name], following, depth)))
            if name in required:
                del values[1:]
            following = self._keys(values, ",", after, closes=values[-1][0] not in required)
        if not values:
            return following
        return self._keys(values, "", after, closes=values[-1][0] not in required)

    def _keys(self, values: list[tuple[str, State]], comma: str, after: State, *, closes: bool) -> State:
        ways = [(f"{comma}{name}:".encode(), value) for name, value in values]
        return self.ways([*ways, (b"}", after)] if closes else ways)

    def value(self, schema: Mapping[str, Any], after: State, depth: int) -> State:
        made = self._value(schema, after, depth)
        return self.state(self.ways([(b"null", after)]).edges, made) if schema.get("nullable") else made

    def _value(self, schema: Mapping[str, Any], after: State, depth: int) -> State:
        match schema.get("type"):
            case "string" if schema.get("enum"):
                return self.ways(((QUOTED, *str(choice).encode(), QUOTED), after) for choice in schema["enum"])
            case "string":
                return self.state({QUOTED: self.state({QUOTED: after}, text=True)})
            case "integer":
                return self._number(after, fraction=False)
            case "number":
                return self._number(after, fraction=True)
            case "boolean":
                return self.ways([(b"true", after), (b"false", after)])
            case "object":
                return self.ways([(b"{", self.members(schema, after, depth + 1))])
            case "array":
                return self._array(schema["items"], after, depth + 1)
            case other:
                raise NotExpressible(f"there are no values of the type {other!r}")

    def _array(self, items: Mapping[str, Any], after: State, depth: int) -> State:
        if depth > DEEPEST:
            raise NotExpressible(f"objects and lists are nested deeper than {DEEPEST}")
        behind = self.state({ord("]"): after})
        item = self.value(items, behind, depth)
        behind.edges[ord(",")] = item
        return self.state({ord("["): self.state({ord("]"): after}, item)})

    def _number(self, after: State, *, fraction: bool) -> State:
        """`-?(0|[1-9][0-9]*)`, and `(\\.[0-9]+)?`, with a bound on both."""
        decimals: State = after
        for n in range(_DIGITS_MOST, 0, -1):
            more = self.state(dict.fromkeys(_DIGITS, decimals))
            if n == 1:
                decimals = more  # at least one digit follows the point
            else:
                more.otherwise = after
                decimals = more
        point = {ord("."): decimals} if fraction else {}
        whole = self.state(dict(point), after)
        zero = whole
        for _ in range(_DIGITS_MOST - 1):
            whole = self.state({**dict.fromkeys(_DIGITS, whole), **point}, after)
        unsigned = {ord("0"): zero} | dict.fromkeys(_DIGITS[1:], whole)
        return self.state({**unsigned, ord("-"): self.state(unsigned)})
