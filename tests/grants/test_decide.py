"""Scopes, patterns and decisions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentd.grants import Grants, Rule, Scope, normalise
from agentd.grants.scopes import pattern_covers, pattern_touches

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """home/{notes/{a.txt,deep/b.txt},x.txt/ (a folder),link -> notes}"""
    home = tmp_path.resolve() / "home"
    (home / "notes" / "deep").mkdir(parents=True)
    (home / "notes" / "a.txt").write_text("a")
    (home / "notes" / "deep" / "b.txt").write_text("b")
    (home / "x.txt").mkdir()
    (home / "link").symlink_to("notes")
    (home / "file-link").symlink_to("notes/a.txt")
    return home


@pytest.mark.parametrize(
    ("given_path", "expected"),
    [
        ("notes/a.txt", "notes/a.txt"),
        ("./notes//a.txt", "notes/a.txt"),
        ("notes/deep/../a.txt", "notes/a.txt"),
        ("link/a.txt", "notes/a.txt"),
        ("link/deep/../a.txt", "notes/a.txt"),
        ("notes/", "notes"),
        ("link", "link"),
        ("file-link", "file-link"),
        ("missing/deeper/x", "missing/deeper/x"),
        ("notes/*.txt", "notes/*.txt"),
        (".", "."),
    ],
)
def test_paths_are_normalised_up_to_their_last_name(tree: Path, given_path: str, expected: str):
    """Dots, slashes and links on the way are resolved; a link as the last name is the link."""
    assert normalise(given_path, str(tree)) == os.path.normpath(tree / expected)


def test_home_is_filled_in(tree: Path, monkeypatch: pytest.MonkeyPatch):
    """`~` means the daemon's home, wherever relative paths start."""
    monkeypatch.setenv("HOME", str(tree))
    assert normalise("~/notes/a.txt", "/") == str(tree / "notes/a.txt")


@pytest.mark.parametrize(
    ("pattern", "value", "covers"),
    [
        ("read:{h}/notes", "{h}/notes", True),
        ("read:{h}/notes", "{h}/notes/a.txt", True),
        ("read:{h}/notes/", "{h}/notes/deep/b.txt", True),
        ("read:{h}/notes", "{h}/notes2", False),
        ("read:{h}/note", "{h}/notes/a.txt", False),
        ("read:{h}/notes/*.txt", "{h}/notes/a.txt", True),
        ("read:{h}/notes/*.txt", "{h}/notes/deep/b.txt", False),
        ("read:{h}/**/b.txt", "{h}/notes/deep/b.txt", True),
        ("read:{h}/**", "{h}", True),
        ("read:{h}/*.txt", "{h}/x.txt", False),  # a folder: its contents are not meant
        ("read:{h}/link", "{h}/notes/a.txt", True),  # patterns are resolved like paths
        ("write:{h}/notes", "{h}/notes/a.txt", False),
        ("read:/", "{h}/notes", True),
        ("*", "{h}/notes", True),
    ],
)
def test_what_a_pattern_covers(tree: Path, pattern: str, value: str, covers: bool):
    """Whole names only; `*` within one name, `**` over branches."""
    assert pattern_covers(pattern.format(h=tree), Scope("read", value.format(h=tree))) is covers


def test_a_star_in_an_argument_is_an_ordinary_character(tree: Path):
    """A file called `*` is one file."""
    assert not pattern_covers(f"read:{tree}/notes/a.txt", Scope("read", f"{tree}/notes/*"))
    assert pattern_covers(f"read:{tree}/notes", Scope("read", f"{tree}/notes/*"))


@pytest.mark.parametrize(
    ("deny", "scope", "touches"),
    [("read:{h}/notes/a.txt", "{h}/notes", True), ("read:{h}/notes/*.key", "{h}/notes", True),
     ("read:{h}/notes/*.key", "{h}", True), ("read:{h}/notes", "{h}/notes2", False), ("read:{h}/x.txt", "{h}/notes", False)],
)  # fmt: skip
def test_a_deny_rule_is_touched_by_wider_scopes(tree: Path, deny: str, scope: str, touches: bool):
    """Searching a folder touches what is denied in it."""
    assert pattern_touches(deny.format(h=tree), Scope("read", scope.format(h=tree))) is touches


def rule(decision: str, scope: str, tool: str = "*", principal: str = "*") -> Rule:
    return Rule(principal, tool, scope, decision, "test")  # type: ignore[arg-type]


def test_deny_beats_ask_beats_allow(tree: Path):
    """Whatever the order of the rules."""
    scope = [Scope("read", f"{tree}/notes/a.txt")]
    allow, ask, deny = (rule(decision, f"read:{tree}/notes") for decision in ("allow", "ask", "deny"))
    for rules, verdict in (([allow, ask, deny], "deny"), ([deny, allow], "deny"), ([allow, ask], "ask"), ([allow], "allow")):
        for order in (rules, rules[::-1]):
            assert Grants(order).decide("unix:pi", "files.read", scope).verdict == verdict


def test_what_nothing_covers_is_denied_with_the_scope_and_a_reason(tree: Path):
    """Every scope must be covered; the reason names the one that is not."""
    scopes = [Scope("read", f"{tree}/notes"), Scope("write", f"{tree}/notes")]
    decision = Grants([rule("allow", f"read:{tree}")]).decide("unix:pi", "files.append", scopes)
    assert decision.verdict == "deny"
    assert decision.scope == f"write:{tree}/notes"
    assert f"write:{tree}/notes" in decision.reason
    assert Grants([]).decide("unix:pi", "files.append", scopes).verdict == "deny"


def test_rules_concern_their_principal_and_tool_only():
    """Both are glob patterns over the whole name."""
    grants = Grants([rule("allow", "*", tool="files.*", principal="unix:pi")])
    assert grants.decide("unix:pi", "files.read", [Scope("read", "/x")]).verdict == "allow"
    assert grants.decide("unix:eve", "files.read", [Scope("read", "/x")]).verdict == "deny"
    assert grants.decide("unix:pi", "files2.read", [Scope("read", "/x")]).verdict == "deny"


def test_a_call_that_touches_nothing_needs_its_tool_granted():
    """Its scope is `call:TOOL`."""
    assert Grants([rule("allow", "call:system.*")]).decide("p", "system.time", []).verdict == "allow"
    assert Grants([rule("allow", "read:/")]).decide("p", "system.time", []).verdict == "deny"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_decision_never_depends_on_how_a_path_is_spelled(tree: Path, data: st.DataObject):
    """Dots, doubled slashes, detours and links give the decision of the plain path."""
    plain = data.draw(st.sampled_from(["notes/a.txt", "notes/deep/b.txt", "notes/deep", "other/c.txt"]))
    spelled = [
        part for name in plain.split("/") for part in (*data.draw(st.lists(st.sampled_from([".", ""]), max_size=2)), name)
    ]
    if data.draw(st.booleans()):
        spelled = ["notes", "..", *spelled]
    text = "/".join(spelled)
    if plain.startswith("notes/") and data.draw(st.booleans()):
        text = text.replace("notes/", "link/", 1)
    grants = Grants([rule("allow", f"read:{tree}/notes"), rule("deny", f"read:{tree}/notes/deep/b.txt")])
    decisions = [
        grants.decide("p", "files.read", [Scope("read", normalise(path, str(tree)))]) for path in (plain, f"{tree}/{text}")
    ]
    assert decisions[0] == decisions[1]
