"""Constrained decoding of calls: from the tools' schemas to a grammar, and from there to masks.

The grammar starts when the model has sampled `<|tool_call>` and ends with `<tool_call|>`: it forces a known tool,
its argument names in sorted order (as the template trains), typed values, and real quote tokens. Free strings
are unbounded (a bound defeats llguidance's slicer: 2.7 ms a token instead of 5 us); the token limit ends them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.llamacpp
import numpy as np

from agentd.engine.prompt import CALL_CLOSE, QUOTE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import llama_cpp.llama_cpp as C
    from numpy.typing import NDArray

_TERMINALS = r"""
TEXT: /[^\x00]+/
INTEGER: /-?(0|[1-9][0-9]{0,14})/
NUMBER: /-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/
"""


class Grammars:
    """Compiles grammars for one vocabulary; the last tool set's grammar is kept."""

    def __init__(self, vocab: C.llama_vocab_p, size: int) -> None:
        self._tokenizer = llguidance.llamacpp.lltokenizer_from_vocab(vocab)
        self._mask: NDArray[np.int32] = np.zeros((size + 31) // 32, np.int32)
        self._size = size
        self._grammars: dict[str, str] = {}

    def forget(self) -> None:
        """Give back what can be made again."""
        self._grammars = {}

    def matcher(self, tools: Sequence[tuple[str, Mapping[str, Any]]]) -> Matcher:
        """A matcher at the start of a call to one of `tools`. Raises ValueError if a schema can't be expressed."""
        key = json.dumps(tools, sort_keys=True)
        if key not in self._grammars:
            self._grammars = {key: llguidance.LLMatcher.grammar_from_lark(lark(tools))}
        matcher = llguidance.LLMatcher(self._tokenizer, self._grammars[key])
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return Matcher(matcher, self._mask, self._size)


class Matcher:
    """The state of one call under way."""

    def __init__(self, matcher: llguidance.LLMatcher, mask: NDArray[np.int32], size: int) -> None:
        self._matcher, self._mask, self._size = matcher, mask, size

    def restrict(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of all tokens that may not come next to minus infinity, in place. Shape [vocabulary]."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._size]
        np.putmask(logits, allowed == 0, -np.inf)

    def advance(self, token: int) -> bool:
        """Take a sampled token; returns whether the call goes on."""
        return bool(self._matcher.consume_token(token)) and not self._matcher.is_stopped()


def lark(tools: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The grammar of what may follow `<|tool_call>`, in llguidance's dialect of Lark."""
    rules = _Rules()
    calls = [f'"call:{name}" {rules.members(schema)}' for name, schema in tools]
    start = f"start: call {CALL_CLOSE}\ncall: {' | '.join(calls)}\nstring: {QUOTE} TEXT? {QUOTE}\n"
    return start + "".join(f"{name}: {body}\n" for name, body in rules.rules) + _TERMINALS


class _Rules:
    def __init__(self) -> None:
        self.rules: list[tuple[str, str]] = []

    def _rule(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append((name, body))
        return name

    def members(self, schema: Mapping[str, Any]) -> str:
        """`{key:value,...}`: required keys always, optional ones or not, in sorted order, commas between."""
        properties: Mapping[str, Any] = schema.get("properties", {})
        required = schema.get("required", ())
        first = following = '""'
        for name in sorted(properties, reverse=True):
            value = self.value(properties[name])
            given, given_first = f'",{name}:" {value} {following}', f'"{name}:" {value} {following}'
            if name not in required:
                given, given_first = f"{given} | {following}", f"{given_first} | {first}"
            first, following = self._rule(given_first), self._rule(given)
        return f'"{{" {first} "}}"'

    def value(self, schema: Mapping[str, Any]) -> str:
        kind = schema["type"]
        if schema.get("enum"):
            body = " | ".join(f"{QUOTE} {json.dumps(choice)} {QUOTE}" for choice in schema["enum"])
        elif kind == "array":
            item = self._rule(self.value(schema["items"]))
            body = f'"[" ({item} ("," {item})*)? "]"'
        elif kind == "object":
            body = self.members(schema)
        else:
            body = {"string": "string", "integer": "INTEGER", "number": "NUMBER", "boolean": '"true" | "false"'}[kind]
        return self._rule(f'{body} | "null"' if schema.get("nullable") else body)
