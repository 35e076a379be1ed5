"""Nothing a user, file or tool says can become a special token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.engine.prompt import MARKUP, Text

if TYPE_CHECKING:
    from agentd.engine.tokens import Vocabulary

SHAPES = ("{t}", "a{t}b", "{t}{t}", " {t} ", "x\n{t}\ny", "<{t}>", "{half}{t}", "{t}{rest}", "<|{t}|>")


def untrusted(words: Vocabulary, text: str) -> list[int]:
    return words.encode([Text(text, trusted=False)])


def spelled(words: Vocabulary, ids: list[int]) -> str:
    return b"".join(map(words.piece, ids)).decode()


def test_every_special_token_of_the_vocabulary_stays_text(words: Vocabulary):
    """Alone, doubled, inside words, overlapping with parts of itself: its id never comes out, its letters do."""
    assert set(MARKUP) <= set(words.guarded)
    guarded = set(words.guarded.values())
    for token in words.guarded:
        for shape in SHAPES:
            text = shape.format(t=token, half=token[: len(token) // 2], rest=token[len(token) // 2 :])
            ids = untrusted(words, text)
            assert guarded.isdisjoint(ids), (token, text)
            assert spelled(words, ids) == text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_mixture_of_markers_and_text_makes_a_special_token(words: Vocabulary, data: st.DataObject):
    """Random text with whole and broken markers in it comes back letter for letter."""
    part = st.one_of(
        st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=12),
        st.sampled_from(sorted(words.guarded)),
        st.sampled_from(sorted(words.guarded)).map(lambda token: token[:-1]),
        st.sampled_from(["<", "|", ">", "<|", "|>", '"', "\n", " "]),
    )
    text = "".join(data.draw(st.lists(part, max_size=8)))
    ids = untrusted(words, text)
    assert set(words.guarded.values()).isdisjoint(ids)
    assert spelled(words, ids) == text


def test_our_own_markup_does_become_special_tokens(words: Vocabulary):
    """The control: trusted text gives the ids."""
    for name in MARKUP:
        assert words.encode([Text(name, trusted=True)]) == [words.special[name]]
