"""Merging by itself, with any lines there may be: both changes of a text, or none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentd.journal.merge import merge

lines = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"\n"]), max_size=12).map(b"".join)


@given(lines, lines, lines)
def test_a_merge_has_both_changes_or_is_none(base: bytes, ours: bytes, theirs: bytes):
    """With one side unchanged it is the other; it does not depend on who is who; two that agree are one."""
    assert merge(base, ours, base) == ours
    assert merge(base, base, theirs) == theirs
    assert merge(base, ours, ours) == ours
    assert merge(base, ours, theirs) == merge(base, theirs, ours)


@given(st.lists(st.integers(0, 9), min_size=6, max_size=20), st.data())
def test_changes_far_apart_merge(numbers: list[int], data: st.DataObject):
    """One at the beginning, one at the end."""
    base = [b"%d %d\n" % (n, number) for n, number in enumerate(numbers)]
    ours = [b"ours\n", *base[data.draw(st.integers(0, 2)) :]]
    theirs = [*base[: len(base) - data.draw(st.integers(0, 2))], b"theirs\n"]
    merged = merge(b"".join(base), b"".join(ours), b"".join(theirs))
    assert merged is not None
    assert merged.startswith(b"ours\n")
    assert merged.endswith(b"theirs\n")
