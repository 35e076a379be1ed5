"""The evaluation of the pocket model is about what training never shows."""

from __future__ import annotations

import re

from training import phrases
from training.dialogues import HELD_OUT_WORDS, WORDS


def plain(phrase: str) -> str:
    return re.sub(r"\W+", " ", phrase.lower())


def test_no_phrasing_of_the_evaluation_is_trained_on():
    """Per tool, and for requests that no tool fits."""
    for tool, held_out in phrases.HELD_OUT.items():
        assert not set(map(plain, held_out)) & set(map(plain, phrases.TRAIN[tool])), tool
    assert not set(map(plain, phrases.NO_TOOL_HELD_OUT)) & set(map(plain, phrases.NO_TOOL))


def test_no_word_of_the_evaluation_is_trained_on():
    """Words of paths and texts are drawn from two lists that share none."""
    assert not set(HELD_OUT_WORDS) & set(WORDS)


def test_every_bundled_tool_has_phrasings():
    """A tool without any would never be learnt."""
    from training.preamble import tools

    names = {tool.name for tool in tools()}
    assert names == set(phrases.TRAIN) == set(phrases.HELD_OUT)
