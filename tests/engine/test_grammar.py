"""Under the grammar even a model that writes at random makes well-formed, typed calls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.calls.arguments import Arguments
from agentd.calls.manifest import Tool, ToolManifest
from agentd.engine.automaton import DEEPEST
from agentd.engine.grammar import Grammars, NotExpressible
from agentd.engine.parser import CallOut, StreamParser
from agentd.engine.prompt import CALL_CLOSE, CALL_OPEN, QUOTE, Text
from agentd.engine.sampler import NoProbabilities, Sampler
from tests.engine.oracle import Oracle

if TYPE_CHECKING:
    from random import Random

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
def grammars(words: Vocabulary) -> Grammars:
    return Grammars(words)


def write_at_random(words: Vocabulary, grammars: Grammars, seed: int) -> list[int]:
    """Sample with random logits; strings are drawn to their end so that they do end."""
    random = np.random.default_rng(seed)
    matcher, sampler = grammars.matcher(list(SCHEMAS.items())), Sampler(0, 0)
    closers = [token for token in range(words.size) if words.piece(token) in (b"}", b"]")]
    tokens = []
    for n in range(3000):
        logits = random.normal(size=words.size).astype(np.float32)
        if n % 5 == 0:
            logits[words.special[QUOTE]] += 20
        logits[closers] += 2
        token = matcher.pick(sampler, logits)
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


NAMES = st.from_regex(r"[a-c][a-c0-9_]{0,3}", fullmatch=True)
CHOICES = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=4), min_size=1, max_size=3
)


def values(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of one argument."""
    plain: st.SearchStrategy[dict[str, Any]] = st.sampled_from(["string", "integer", "number", "boolean"]).map(
        lambda kind: {"type": kind}
    )
    made = plain | CHOICES.map(lambda choices: {"type": "string", "enum": choices})
    if depth:
        made |= values(depth - 1).map(lambda items: {"type": "array", "items": items})
        made |= members(depth - 1).map(lambda schema: {"type": "object", **schema})
    return st.tuples(made, st.booleans()).map(lambda pair: pair[0] | ({"nullable": True} if pair[1] else {}))


@st.composite
def members(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, values(depth), max_size=3))
    return {"properties": properties, "required": [name for name in properties if draw(st.booleans())]}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, members(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_what_may_come_next_is_what_llguidance_says(
    words: Vocabulary, vocabulary_pointer: C.llama_vocab_p, grammars: Grammars, tools: dict[str, Any], random: Random
):
    """Token by token along a random call; what must come is the only way on."""
    matcher, oracle = grammars.matcher(list(tools.items())), Oracle(vocabulary_pointer, words.size, list(tools.items()))
    going_on, forced = True, list[int]()
    for n in range(60):
        if not going_on:
            break
        mine = {token for token in range(words.size) if matcher._follow(token)}
        assert mine == set(matcher._allowed().tolist())
        theirs = oracle.allowed()
        assert mine == theirs or (len(theirs) == 1 and theirs < mine)  # where bytes are forced it allows their first token only
        forced = forced or list(matcher.forced())
        ends = words.special[QUOTE] if n % 3 == 0 and words.special[QUOTE] in mine else None
        token = forced.pop(0) if forced else (ends or random.choice(sorted(mine)))
        assert token in mine
        going_on = matcher.advance(token)
        assert oracle.advance(token) == going_on


def test_where_one_thing_alone_may_follow_it_is_written(words: Vocabulary, grammars: Grammars):
    """Names, keys, braces, quotes and the rest of a choice; in the tokens that the same text has in a prompt."""
    matcher = grammars.matcher([("files.read", {"properties": {"path": {"type": "string"}}, "required": ["path"]})])
    forced = matcher.forced()
    wanted = [*words.encode([Text("call:files.read{path:", trusted=False)]), words.special[QUOTE]]
    assert list(forced) == wanted
    for token in forced:
        assert matcher.advance(token)
    assert matcher.in_text
    assert matcher.forced() == ()
    assert matcher.advance(words.special[QUOTE])
    assert [words.piece(token) for token in matcher.forced()][-1] == CALL_CLOSE.encode()


def test_what_could_be_one_token_with_what_follows_is_left_to_the_model(words: Vocabulary, grammars: Grammars):
    """The forced beginning of a call to one of several tools is no longer than all of them agree on, token by token."""
    names = ["files.read", "files.rename", "files.remove", "filter.do"]
    forced = grammars.matcher([(name, {}) for name in names]).forced()
    for name in names:
        assert words.encode([Text(f"call:{name}{{", trusted=False)])[: len(forced)] == list(forced)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": {"type": "set"}}},
        {"properties": {"x": {}}},
        {"properties": {f"{'x' * 32}{n}": {"type": "string", "enum": ["y" * 400]} for n in range(200)}},
        functools.reduce(lambda inner, _: {"properties": {"x": {"type": "object", **inner}}}, range(DEEPEST + 1), {}),
        functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(60), {"type": "string"})
        | {"properties": {"x": functools.reduce(lambda i, _: {"type": "array", "items": i}, range(60), {"type": "string"})}},
    ],
    ids=["no such type", "no type", "too many states", "nested objects", "nested lists"],
)
def test_a_schema_that_cannot_be_expressed_is_refused(grammars: Grammars, schema: dict[str, Any]):
    """At once and as an error, however large it is."""
    with pytest.raises(NotExpressible):
        grammars.matcher([("t", schema)])


def test_a_tool_that_comes_twice_is_refused(grammars: Grammars):
    with pytest.raises(NotExpressible):
        grammars.matcher([("t", {}), ("t", {"properties": {"x": {"type": "string"}}})])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_noticed(words: Vocabulary, bad: float):
    """Whatever is asked of the sampler."""
    logits = np.full(words.size, bad, np.float32)
    for temperature in (0.0, 0.7):
        with pytest.raises(NoProbabilities):
            Sampler(temperature, 1).pick(logits)


@given(st.integers(0, 2**31), st.floats(0.05, 2))
def test_a_token_is_taken_as_gemma_recommends(seed: int, temperature: float):
    """Among the 64 most likely, of these as many as it takes for 95 %; the same seed takes the same ones."""
    logits = (np.random.default_rng(seed).normal(size=3000) * 3).astype(np.float32)
    order = np.argsort(-logits, kind="stable")[:64]
    chances = np.exp(logits[order].astype(np.float64))
    kept = int(np.searchsorted(np.cumsum(chances / chances.sum()), 0.95)) + 1
    sampler, again = Sampler(temperature, seed), Sampler(temperature, seed)
    taken = [sampler.pick(logits) for _ in range(20)]
    assert set(taken) <= set(order[:kept].tolist())
    assert taken == [again.pick(logits) for _ in range(20)]


@given(st.floats(1e-6, 0.02), st.integers(0, 2**31))
def test_the_coldest_temperature_takes_the_best(temperature: float, seed: int):
    """However small the numbers become."""
    assert Sampler(temperature, seed).pick(np.zeros(300, np.float32)) < 300
    logits = np.zeros(300, np.float32)
    logits[17] = 1
    assert Sampler(temperature, seed).pick(logits) == 17


def test_probabilities_are_those_of_the_softmax():
    """Ten thousand draws of three tokens, within four standard deviations."""
    logits, sampler = np.log(np.array([0.5, 0.3, 0.2], np.float32)), Sampler(1.0, 7)
    drawn = np.bincount([sampler.pick(logits) for _ in range(10_000)], minlength=3) / 10_000
    assert np.abs(drawn - [0.5, 0.3, 0.2]).max() < 0.02
