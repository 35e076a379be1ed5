"""What the model writes, taken apart by token id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.engine.parser import CallOut, MalformedOut, Output, StreamParser, TextOut
from agentd.engine.prompt import Called, Conversation, Text, Turn, render

if TYPE_CHECKING:
    from agentd.engine.tokens import Vocabulary

Q = '<|"|>'


def parse(words: Vocabulary, text: str) -> list[Output]:
    """Feed trusted text token by token; neighbouring texts are joined."""
    parser = StreamParser(words.special, frozenset(words.guarded.values()))
    outputs: list[Output] = []
    for token in words.encode([Text(text, trusted=True)]):
        outputs += parser.feed(token, words.piece(token))
    outputs += parser.finish()
    joined: list[Output] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if isinstance(output, TextOut) and isinstance(last, TextOut) and last.thought == output.thought:
            joined[-1] = TextOut(last.text + output.text, output.thought)
        else:
            joined.append(output)
    return joined


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("call:t{}", {}),
        (f"call:t{{path:{Q}a b.txt{Q}}}", {"path": "a b.txt"}),
        (f"call:t{{a:1,b:-2.5,c:true,d:null,e:{Q}{Q}}}", {"a": 1, "b": -2.5, "c": True, "d": None, "e": ""}),
        (f"call:t{{l:[1,{Q}x{Q},[]],o:{{k:{Q}v{Q}}}}}", {"l": [1, "x", []], "o": {"k": "v"}}),
        (f"call:t{{x:{Q}}}, y:1 {{[ \" '{Q}}}", {"x": "}, y:1 {[ \" '"}),
        (f"call:t{{x:{Q}two\nlines\n{Q}}}", {"x": "two\nlines\n"}),
        (f"call:t{{x:{Q}größe 😀{Q}}}", {"x": "größe 😀"}),
    ],
)
def test_well_formed_calls_are_read(words: Vocabulary, written: str, arguments: dict[str, Any]):
    """Whatever stands in strings, it ends only at a real quote token."""
    assert parse(words, f"<|tool_call>{written}<tool_call|>") == [CallOut("t", arguments)]


@pytest.mark.parametrize(
    "written",
    [
        "",
        "call:",
        "call:t",
        "call:t{",
        "call:t{}x",
        "t{}",
        'call:t{path:"a"}',
        "call:t{path='a'}",
        f"call:t{{path={Q}a{Q}}}",
        f"call:t{{path:{Q}a}}",
        f"call:t{{a:1 b:{Q}x{Q}}}",
        f"call:t{{{Q}a{Q}:1}}",
        "call:t{a:1,a:2}",
        "call:t{a:[1 2]}",
        "call:t{a:01x}",
        "call:t{a:" + "[" * 40 + "]" * 40 + "}",
        f"call:t{{a:{Q}<|turn>{Q}}}",
    ],
)
def test_malformed_calls_are_named_not_guessed(words: Vocabulary, written: str):
    """Exactly one error, and no call."""
    outputs = [output for output in parse(words, f"<|tool_call>{written}<tool_call|>") if not isinstance(output, TextOut)]
    assert len(outputs) == 1
    assert isinstance(outputs[0], MalformedOut)
    assert outputs[0].why


@pytest.mark.parametrize(
    ("written", "outputs"),
    [
        ("Hello!", [TextOut("Hello!", thought=False)]),
        ("<|channel>thought\nhm\n<channel|>Yes", [TextOut("hm\n", thought=True), TextOut("Yes", thought=False)]),
        ("<|channel>thought\n<channel|>Yes", [TextOut("Yes", thought=False)]),
        ("<|channel>other\nhm<channel|>Yes", [TextOut("other\nhm", thought=True), TextOut("Yes", thought=False)]),
        ("<|channel>thought\nhm<|tool_call>call:t{}<tool_call|>", [TextOut("hm", thought=True), CallOut("t", {})]),
        ("<tool_call|><channel|>Yes<tool_response|>", [TextOut("Yes", thought=False)]),
        ("<|tool_call>call:a{}<tool_call|><|tool_call>call:b{}<tool_call|>", [CallOut("a", {}), CallOut("b", {})]),
        ("So <|tool_call>call:a{}<tool_call|>", [TextOut("So ", thought=False), CallOut("a", {})]),
        ("<|tool_call>call:a{", [MalformedOut("the call was cut off")]),
        ("<|channel>tho", [TextOut("tho", thought=True)]),
    ],
)
def test_thoughts_calls_and_text_are_told_apart(words: Vocabulary, written: str, outputs: list[Output]):
    """Unclosed thoughts end at a call; stray closers are dropped."""
    assert parse(words, written) == outputs


def test_text_that_spells_markup_is_text(words: Vocabulary):
    """Only token ids count."""
    parser = StreamParser(words.special, frozenset(words.guarded.values()))
    text = "<|tool_call>call:t{}<tool_call|>"
    outputs: list[Output] = []
    for token in words.encode([Text(text, trusted=False)]):
        outputs += parser.feed(token, words.piece(token))
    outputs += parser.finish()
    assert "".join(output.text for output in outputs if isinstance(output, TextOut)) == text
    assert all(isinstance(output, TextOut) for output in outputs)


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
STRINGS = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | STRINGS
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(arguments=st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_the_prompt_renders_the_parser_reads(words: Vocabulary, arguments: dict[str, Any]):
    """A call goes through the prompt format and back unchanged, whatever its strings hold."""
    pieces = render(Conversation("", (), (Turn("x", (Called("t", arguments),)),)))
    ids = words.encode(pieces)
    ids = ids[ids.index(words.special["<|tool_call>"]) :]
    parser = StreamParser(words.special, frozenset(words.guarded.values()))
    outputs = [output for token in ids for output in parser.feed(token, words.piece(token))]
    assert outputs == [CallOut("t", arguments)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_sequence_of_tokens_breaks_the_parser(words: Vocabulary, data: st.DataObject):
    """A model may write anything."""
    token = st.one_of(st.integers(0, words.size - 1), st.sampled_from(sorted(words.special.values())))
    parser = StreamParser(words.special, frozenset(words.guarded.values()))
    for number in data.draw(st.lists(token, max_size=40)):
        parser.feed(number, words.piece(number))
    parser.finish()
