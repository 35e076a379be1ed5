"""Text of others is shown as text: it takes over no terminal, adds no lines, and pushes nothing away."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.cli.output import safe, shown
from agentd.grants import Approval, Scope
from agentd.grants.notify import _text
from agentd.journal.places import shown as shown_path
from agentd.untrusted import lines, one_line

HOSTILE = {
    "a\nallow? y": "a\\nallow? y",
    "a\r  b": "a\\r  b",
    "\x1b[2J": "\\u001b[2J",
    "\x9b31m": "\\u009b31m",
    "x\u202egnp.exe": "x\\u202egnp.exe",
    "\u2066x\u2069": "\\u2066x\\u2069",
    "a\u200bb": "a\\u200bb",
    "a\u2028b": "a\\u2028b",
    "\U000e0041": "\\U000e0041",
    "plain \u00fc \u4e2d \U0001f600": "plain \u00fc \u4e2d \U0001f600",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_printable_is_shown_as_its_number(text: str):
    assert one_line(text) == HOSTILE[text]
    assert shown(text).replace("\\[", "[") == HOSTILE[text]
    assert shown_path(text.encode()) == HOSTILE[text]


@given(st.text())
def test_one_line_is_one_line(text: str):
    assert one_line(text).isprintable()
    kept = lines(text).replace("\n", "").replace("\t", "")
    assert kept.isprintable()
    assert not any(
        unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "FSI", "PDF", "PDI") for c in kept
    )
    assert safe(text) == lines(text)


def question(*scopes: str) -> Approval:
    made = tuple(Scope("write", scope) for scope in scopes)
    fields = dict.fromkeys(("call", "principal", "tool", "description", "effect", "reason", "not_undoable", "run"), "")
    return Approval(id="1", arguments={}, scopes=made, unmet=made, **fields)  # type: ignore[arg-type]


def test_a_notification_shows_what_is_touched_first_and_whole_or_can_not_be_allowed():
    text, whole = _text(question("/h/a\nfine, allow it\n", "/h/b"))
    assert whole
    assert text.startswith("write:/h/a\\nfine, allow it\\n, write:/h/b\n")
    text, whole = _text(question("/h/" + "x" * 300, "/h/.ssh"))
    assert not whole
    assert "agentd approvals" in text
