"""Scopes as path rules: what they cover, what they let be seen, on borders of names only."""

from __future__ import annotations

import pytest
from agentd_sandbox import Access, PathRule
from agentd_sandbox.access import Rules
from hypothesis import given
from hypothesis import strategies as st

names = st.binary(min_size=1, max_size=4).filter(lambda n: b"/" not in n and b"\0" not in n)
paths = st.lists(names, max_size=5).map(lambda parts: b"/" + b"/".join(parts))


@pytest.mark.parametrize(
    ("rule", "path", "covered"),
    [
        (b"/a/b", b"/a/b", True),
        (b"/a/b", b"/a/b/c", True),
        (b"/a/b", b"/a/b/c/d", True),
        (b"/a/b", b"/a/bc", False),
        (b"/a/b", b"/a/b.txt", False),
        (b"/a/b", b"/a", False),
        (b"/a/b", b"/", False),
        (b"/a/b", b"/x/a/b", False),
        (b"/a/b", b"/A/B", False),
        (b"/", b"/", True),
        (b"/", b"/a/b", True),
        (b"/a*", b"/a*", True),
        (b"/a*", b"/a*/x", True),
        (b"/a*", b"/ab", False),
        (b"/\xff", b"/\xff/x", True),
        (b"/a\n", b"/a", False),
    ],
)
def test_a_path_covers_itself_and_what_lies_below(rule: bytes, path: bytes, *, covered: bool):
    """Prefixes count by whole names; a `*` in a plain path is an ordinary character."""
    assert PathRule(rule).covers(path) is covered


@pytest.mark.parametrize(
    ("glob", "path", "covered"),
    [
        (b"/a/*.txt", b"/a/x.txt", True),
        (b"/a/*.txt", b"/a/.txt", True),
        (b"/a/*.txt", b"/a/x.txt.bak", False),
        (b"/a/*.txt", b"/a/xtxt", False),
        (b"/a/*.txt", b"/a/b/x.txt", False),
        (b"/a/*.txt", b"/a/x.txt/below", False),
        (b"/a/*.txt", b"/a/x.txt\n", False),
        (b"/a/*.txt", b"/a/x\ny.txt", True),
        (b"/a/*/c", b"/a/b/c", True),
        (b"/a/*/c", b"/a/b/b/c", False),
        (b"/a/**", b"/a/b", True),
        (b"/a/**", b"/a/b/c/d", True),
        (b"/a/**", b"/ab/c", False),
        (b"/a/**/t", b"/a/b/c/t", True),
        (b"/z*/temp", b"/zone0/temp", True),
        (b"/z*/temp", b"/zone0/temper", False),
        (b"/a.b", b"/axb", False),
        (b"/a[bc]", b"/ab", False),
        (b"/a?", b"/ab", False),
        (b"/\xff*", b"/\xff\xfe", True),
    ],
)
def test_a_glob_covers_whole_paths_only(glob: bytes, path: bytes, *, covered: bool):
    """`*` stays within one name, `**` does not; every other character stands for itself."""
    assert PathRule(glob, glob=True).covers(path) is covered


@pytest.mark.parametrize(
    ("rule", "folder", "seen"),
    [
        (PathRule(b"/a/b/c"), b"/", True),
        (PathRule(b"/a/b/c"), b"/a", True),
        (PathRule(b"/a/b/c"), b"/a/b", True),
        (PathRule(b"/a/b/c"), b"/a/b/c", True),
        (PathRule(b"/a/b/c"), b"/a/b/c/d", False),
        (PathRule(b"/a/b/c"), b"/a/x", False),
        (PathRule(b"/ab/c"), b"/a", False),
        (PathRule(b"/a/b*/c", glob=True), b"/a", True),
        (PathRule(b"/a/b*/c", glob=True), b"/x", False),
        (PathRule(b"/ab*", glob=True), b"/a", False),
    ],
)
def test_only_folders_on_the_way_to_a_path_lie_above_it(rule: PathRule, folder: bytes, *, seen: bool):
    """A name that merely begins the same way is not on the way."""
    assert rule.lies_below(folder) is seen


@given(rule=paths, path=paths)
def test_covering_is_being_an_ancestor(rule: bytes, path: bytes):
    """For all paths: a rule covers exactly those whose first names are its own."""
    mine = [part for part in rule.split(b"/") if part]
    its = [part for part in path.split(b"/") if part]
    assert PathRule(rule).covers(path) == (its[: len(mine)] == mine)


short = st.lists(st.sampled_from([b"a", b"b", b"*", b"**"]), max_size=4).map(lambda names: b"/" + b"/".join(names))


@given(rules=st.lists(st.builds(PathRule, short, st.booleans()), max_size=40), path=short)
def test_many_rules_cover_what_any_of_them_covers(rules: list[PathRule], path: bytes):
    """However many there are."""
    together = Rules(tuple(rules))
    assert together.cover(path) == any(rule.covers(path) for rule in rules)
    seen = path == b"/" or any(rule.covers(path) or rule.lies_below(path) for rule in rules)
    assert (together.cover(path) or together.lie_below(path)) == seen


@given(rule=paths, path=paths)
def test_all_on_the_way_to_a_covered_path_may_be_seen(rule: bytes, path: bytes):
    """What may be read can be reached: every folder above it may be seen, and nothing is readable unseen."""
    access = Access(read=(PathRule(rule),))
    if access.may_read(path):
        pieces = path.split(b"/")
        assert all(access.may_see(b"/".join(pieces[:n]) or b"/") for n in range(1, len(pieces) + 1))
    if access.may_see(path):
        assert access.may_read(path) or rule == path or rule.startswith(path.rstrip(b"/") + b"/")


@given(pieces=st.lists(st.sampled_from([b"a", b".", b"+", b"(", b"\\", b"[", b"$", b"\n", b"\xff"]), min_size=1, max_size=8))
def test_a_glob_without_stars_matches_itself_alone(pieces: list[bytes]):
    """No character of a path is ever taken for a pattern."""
    path = b"/" + b"".join(pieces)
    rule = PathRule(path, glob=True)
    assert rule.covers(path)
    assert not rule.covers(path + b"x")
    assert not rule.covers(path + b"\n")


def test_rights_are_separate():
    """To write is not to read, to read is not to write; both let a path be seen; none lets nothing be seen but /."""
    access = Access(read=(PathRule(b"/r"), PathRule(b"/g/*.txt", glob=True)), write=(PathRule(b"/w"),))
    assert [access.may_read(p) for p in (b"/r/x", b"/w/x", b"/g/x.txt", b"/g/x.md")] == [True, False, True, False]
    assert [access.may_write(p) for p in (b"/r/x", b"/w/x", b"/g/x.txt")] == [False, True, False]
    assert [access.may_see(p) for p in (b"/r/x", b"/w/x", b"/g/x.txt", b"/g", b"/x")] == [True, True, True, True, False]
    nothing = Access()
    assert not any(right(b"/x") for right in (nothing.may_read, nothing.may_write, nothing.may_see))
    assert not nothing.connect
