"""The same grammar as llguidance understands it: a second opinion on what may come next."""

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

_TERMINALS = r"""
TEXT: /[^\x00]+/
INTEGER: /-?(0|[1-9][0-9]{0,14})/
NUMBER: /-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/
"""


class Oracle:
    """One call under way."""

    def __init__(self, vocabulary: C.llama_vocab_p, size: int, tools: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark(tools))
        self._matcher = llguidance.LLMatcher(llguidance.llamacpp.lltokenizer_from_vocab(vocabulary), grammar)
        assert not self._matcher.is_error(), self._matcher.get_error()
        self._size, self._mask = size, np.zeros((size + 31) // 32, np.int32)

    def allowed(self) -> set[int]:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        return set(np.flatnonzero(np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._size]).tolist())

    def advance(self, token: int) -> bool:
        return bool(self._matcher.consume_token(token)) and not self._matcher.is_stopped()


def lark(tools: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
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
