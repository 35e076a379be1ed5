"""Under the grammar even a model that writes at random makes well-formed, typed calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from agentd.calls.arguments import Arguments
from agentd.calls.manifest import Tool, ToolManifest
from agentd.engine.grammar import Grammars
from agentd.engine.parser import CallOut, StreamParser
from agentd.engine.prompt import CALL_CLOSE, CALL_OPEN, QUOTE

if TYPE_CHECKING:
    import llama_cpp.llama_cpp as C

    from agentd.engine.tokens import Vocabulary

PROPERTIES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "level": {"type": "number"},
    "on": {"type": "boolean"},
    "unit": {"type": "string", "enum": ["c", "f"]},
    "pins": {"type": "array", "items": {"type": "integer"}},
    "opts": {"type": "object", "properties": {"pull": {"type": "string"}, "n": {"type": "integer"}}, "required": ["pull"]},
    "maybe": {"type": "integer", "nullable": True},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a.none": {},
    "a.required": {"properties": PROPERTIES, "required": list(PROPERTIES)},
    "a.optional": {"properties": PROPERTIES, "required": []},
    "a.mixed": {"properties": PROPERTIES, "required": ["on", "pins"]},
}


def tool_of(name: str) -> Tool:
    manifest = ToolManifest.model_validate(
        {"name": name.split(".")[1], "description": "x", "effect": "none", "parameters": SCHEMAS[name]}
    )
    return Tool(name, "a", "1", manifest, "")


@pytest.fixture(scope="module")
def grammars(vocabulary_pointer: C.llama_vocab_p, words: Vocabulary) -> Grammars:
    return Grammars(vocabulary_pointer, words.size)


def write_at_random(words: Vocabulary, grammars: Grammars, seed: int) -> list[int]:
    """Sample with random logits under the mask; strings are drawn to their end so that they do end."""
    random = np.random.default_rng(seed)
    matcher = grammars.matcher(list(SCHEMAS.items()))
    closers = [token for token in range(words.size) if words.piece(token) in (b"}", b"]")]
    tokens = []
    for n in range(3000):
        logits = random.normal(size=words.size).astype(np.float32)
        if n % 5 == 0:
            logits[words.special[QUOTE]] += 20
        logits[closers] += 2
        matcher.restrict(logits)
        token = int(logits.argmax())
        tokens.append(token)
        if not matcher.advance(token):
            return tokens
    raise AssertionError("the call does not end")


@pytest.mark.parametrize("seed", range(12))
def test_random_calls_are_well_formed_typed_and_complete(words: Vocabulary, grammars: Grammars, seed: int):
    """Each names a known tool and passes its manifest's own check."""
    tokens = write_at_random(words, grammars, seed)
    assert tokens[-1] == words.special[CALL_CLOSE]
    parser = StreamParser(words.special, frozenset(words.guarded.values()))
    parser.feed(words.special[CALL_OPEN], b"")
    outputs = [output for token in tokens for output in parser.feed(token, words.piece(token))]
    (call,) = outputs
    assert isinstance(call, CallOut)
    assert list(call.arguments) == sorted(call.arguments)
    Arguments(tool_of(call.tool)).check(call.arguments, "/")


def test_a_schema_that_cannot_be_expressed_is_refused(grammars: Grammars):
    """As an error, not as a crash of the process."""
    with pytest.raises((ValueError, KeyError)):
        grammars.matcher([("t", {"properties": {"x": {"type": "set"}}})])
