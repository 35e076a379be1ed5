"""Scopes and the patterns over them: what is covered never depends on how anything is spelled."""

from __future__ import annotations

import os
import unicodedata
from typing import TYPE_CHECKING

import pytest
from agentd_sandbox.network import split_authority
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentd.errors import Reason, RequestError
from agentd.grants import Grant, Pattern, Scope, normalise, parse
from agentd.grants.index import Index

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
    """`~` means the daemon's home, wherever relative paths start; in patterns too."""
    monkeypatch.setenv("HOME", str(tree))
    assert normalise("~/notes/a.txt", "/") == str(tree / "notes/a.txt")
    assert parse("read:~/notes").text == f"read:{tree}/notes"


@pytest.mark.parametrize(
    ("pattern", "value", "covers"),
    [
        ("read:{h}/notes", "{h}/notes", True),
        ("read:{h}/notes", "{h}/notes/a.txt", True),
        ("read:{h}/notes/", "{h}/notes/deep/b.txt", True),
        ("read:{h}/notes", "{h}/notes2", False),
        ("read:{h}/note", "{h}/notes/a.txt", False),
        ("read:{h}/./notes/../notes//", "{h}/notes/a.txt", True),
        ("read:{h}/notes/*.txt", "{h}/notes/a.txt", True),
        ("read:{h}//notes//*.txt", "{h}/notes/a.txt", True),
        ("read:{h}/link/*.txt", "{h}/notes/a.txt", True),
        ("read:{h}/notes/*.txt", "{h}/notes/deep/b.txt", False),
        ("read:{h}/**/b.txt", "{h}/notes/deep/b.txt", True),
        ("read:{h}/**", "{h}", True),
        ("read:{h}/*.txt", "{h}/x.txt", False),  # a folder: its contents are not meant
        ("read:{h}/link", "{h}/notes/a.txt", True),  # patterns are resolved like paths
        ("read:{h}/missing", "{h}/missing/later.txt", True),
        ("write:{h}/notes", "{h}/notes/a.txt", False),
        ("read:/", "{h}/notes", True),
        ("*", "{h}/notes", True),
    ],
)
def test_what_a_path_pattern_covers(tree: Path, pattern: str, value: str, *, covers: bool):
    """Whole names only; `*` within one name, `**` over branches."""
    assert parse(pattern.format(h=tree)).covers(Scope("read", value.format(h=tree))) is covers


@pytest.mark.parametrize(
    ("pattern", "peer", "covers"),
    [
        ("connect:example.org:443", "example.org:443", True),
        ("connect:EXAMPLE.org.:443", "example.org:443", True),
        ("connect:example.org:443", "example.org:80", False),
        ("connect:example.org:0443", "example.org:443", True),
        ("connect:example.org:*", "example.org:80", True),
        ("connect:*:443", "anything.net:443", True),
        ("connect:*.example.org:443", "www.example.org:443", True),
        ("connect:*.example.org:443", "a.b.example.org:443", False),
        ("connect:**.example.org:443", "a.b.example.org:443", True),
        ("connect:**.example.org:443", "example.org:443", False),
        ("connect:*.example.org:443", "example.org.evil.net:443", False),
        ("connect:*.example.org:443", "wwwexample.org:443", False),
        ("connect:[::1]:80", "[::1]:80", True),
        ("connect:[0:0::1]:80", "[::1]:80", True),
        ("connect:[::ffff:10.0.0.1]:80", "10.0.0.1:80", True),
        ("connect:münchen.example:443", "xn--mnchen-3ya.example:443", True),
        ("connect:MÜNCHEN.example:443", "xn--mnchen-3ya.example:443", True),
        ("connect:*.github.io.example.org:443", "x.github.io.example.org:443", True),
        ("use:home", "home", False),
    ],
)
def test_what_a_host_pattern_covers(pattern: str, peer: str, *, covers: bool):
    """Names in the one form that is dialled; `*.` is one label, `**.` any number, never the domain itself."""
    assert parse(pattern).covers(Scope("connect", peer)) is covers


@pytest.mark.parametrize(
    ("pattern", "kind", "value", "covers"),
    [
        ("call:system.*", "call", "system.time", True),
        ("call:system.time", "call", "system.times", False),
        ("use:*", "use", "home", True),
        ("device:gpio", "device", "gpio", True),
        ("device:gpio", "device", "i2c", False),
    ],
)
def test_what_a_pattern_of_names_covers(pattern: str, kind: str, value: str, *, covers: bool):
    """Tools, credentials, devices."""
    assert parse(pattern).covers(Scope(kind, value)) is covers


@pytest.mark.parametrize(
    "text",
    [
        "", "read", "read:", "read: ", "reed:/x", "read:x/y", "read:./x", ":/x", "**", "read:~nobody-of-this-name/x", "read:/a\nb",
        "read:/a\0b", "read:/" + "x" * 5000, "read:/a/*/../../etc", "connect:", "connect:example.org", "connect:example.org:",
        "connect:example.org:0", "connect:example.org:65536", "connect:example.org:https", "connect:example.org:4 43",
        "connect:*.com:443", "connect:**.org:443", "connect:*.co.uk:443", "connect:*.github.io:443", "connect:*.localhost:1",
        "connect:*.10.0.0.1:80", "connect:www.*.org:443", "connect:a*.example.org:443", "connect:ex ample.org:443",
        "connect:user@example.org:443", "connect:1.2.3:80", "connect:0x7f.1:80", "connect:[::1:80", "connect:ex\u202eample.org:443",
        "connect:-bad.org:443", "connect:..:443",
    ],
)  # fmt: skip
def test_a_scope_that_says_nothing_is_refused_by_name(text: str):
    """GRANT_INVALID, with the text and what is wrong with it."""
    with pytest.raises(RequestError) as caught:
        parse(text)
    assert caught.value.reason is Reason.GRANT_INVALID
    assert caught.value.metadata["scope"] == text
    assert caught.value.metadata["why"]


@given(st.text(max_size=40).map(lambda t: t if ":" in t else f"connect:{t}"))
def test_whatever_is_written_is_a_pattern_or_a_named_error(text: str):
    """And a pattern's own spelling is read as the same pattern."""
    try:
        pattern = parse(text)
    except RequestError as e:
        reason = e.reason
    else:
        assert parse(pattern.text, resolved=True) == pattern
        reason = Reason.GRANT_INVALID
    assert reason is Reason.GRANT_INVALID


def test_a_star_in_an_argument_is_an_ordinary_character(tree: Path):
    """A file called `*` is one file."""
    assert not parse(f"read:{tree}/notes/a.txt").covers(Scope("read", f"{tree}/notes/*"))
    assert parse(f"read:{tree}/notes").covers(Scope("read", f"{tree}/notes/*"))


@pytest.mark.parametrize(
    ("deny", "scope", "touches"),
    [("read:{h}/notes/a.txt", "{h}/notes", True), ("read:{h}/notes/*.key", "{h}/notes", True),
     ("read:{h}/notes/*.key", "{h}", True), ("read:{h}/notes", "{h}/notes2", False), ("read:{h}/x.txt", "{h}/notes", False)],
)  # fmt: skip
def test_a_denial_is_touched_by_wider_scopes(tree: Path, deny: str, scope: str, *, touches: bool):
    """Searching a folder touches what is denied in it."""
    assert parse(deny.format(h=tree)).touches(Scope("read", scope.format(h=tree))) is touches


def test_a_link_put_in_the_place_of_a_granted_folder_widens_nothing(tree: Path):
    """The pattern stays what it was when it was made; also after it was kept and read again."""
    (tree / "granted").mkdir()
    pattern = parse(f"read:{tree}/granted")
    again = Grant.from_json(Grant("*", "*", pattern, "allow", "cli", "").to_json()).pattern
    (tree / "granted").rmdir()
    (tree / "granted").symlink_to("notes")
    scope = Scope("read", normalise("granted/a.txt", str(tree)))
    assert str(scope) == f"read:{tree}/notes/a.txt"
    assert not pattern.covers(scope)
    assert not Grant.from_json(Grant("*", "*", again, "allow", "cli", "").to_json()).pattern.covers(scope)


names = st.text(st.sampled_from("aäéßñЖ한"), min_size=1, max_size=5)


@given(st.lists(names, min_size=1, max_size=4), st.sampled_from(["NFC", "NFD"]), st.sampled_from(["NFC", "NFD"]))
def test_the_form_of_unicode_does_not_matter(parts: list[str], one: str, other: str):
    """Two spellings that look the same are the same to a grant."""
    path = "/none/" + "/".join(parts)
    forms = [unicodedata.normalize(form, path) for form in (one, other)]  # type: ignore[arg-type]
    assert parse(f"read:{forms[0]}").covers(Scope("read", forms[1]))
    assert parse(f"read:{forms[0]}").touches(Scope("read", forms[1] + "/more"))


@given(st.sampled_from(["example.org", "www.example.org", "a.b.example.org", "xn--mnchen-3ya.example"]), st.data())
def test_the_spelling_of_a_host_does_not_matter(host: str, data: st.DataObject):
    """Case and a dot at the end, in arguments and in grants."""
    spelled = "".join(data.draw(st.sampled_from([c, c.upper()])) for c in host) + data.draw(st.sampled_from(["", "."]))
    name, port = split_authority(f"{spelled}:443", None)
    assert parse(f"connect:{host}:443").covers(Scope("connect", f"{name}:{port}"))
    assert parse(f"connect:{spelled}:443").covers(Scope("connect", f"{host}:443"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_spelling_of_a_path_does_not_matter(tree: Path, data: st.DataObject):
    """Dots, doubled slashes, detours and links, in arguments and in grants."""
    plain = data.draw(st.sampled_from(["notes/a.txt", "notes/deep/b.txt", "notes/deep", "other/c.txt"]))
    spelled = [
        part for name in plain.split("/") for part in (*data.draw(st.lists(st.sampled_from([".", ""]), max_size=2)), name)
    ]
    if data.draw(st.booleans()):
        spelled = ["notes", "..", *spelled]
    text = "/".join(spelled)
    if plain.startswith("notes/") and data.draw(st.booleans()):
        text = text.replace("notes/", "link/", 1)
    assert normalise(f"./{text}", str(tree)) == normalise(f"{tree}/{text}", "/") == str(tree / plain)
    assert parse(f"read:{tree}/{text}").text == parse(f"read:{tree}/{plain}").text


# -- the index finds what a look at every pattern finds

part = st.sampled_from(["a", "b", "ab", "c.txt", "d.txt"])
paths = st.lists(part, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
globs = st.lists(st.one_of(part, st.sampled_from(["*", "**", "*.txt"])), min_size=1, max_size=4).map(
    lambda p: "/" + "/".join(p)
)
hosts = st.sampled_from(["example.org", "www.example.org", "a.www.example.org", "other.net", "10.0.0.1"])
wild = st.sampled_from(["*", "*.example.org", "**.example.org", "*.www.example.org", "example.org", "10.0.0.1", "other.net"])
patterns = st.one_of(
    st.just("*"),
    st.builds("{}:{}".format, st.sampled_from(["read", "write"]), st.one_of(paths, globs, st.just("/"))),
    st.builds("connect:{}:{}".format, wild, st.sampled_from(["443", "80", "*"])),
    st.builds("{}:{}".format, st.sampled_from(["call", "use"]), st.sampled_from(["a.b", "a.*", "*", "c"])),
)
scopes = st.one_of(
    st.builds(Scope, st.sampled_from(["read", "write"]), st.one_of(paths, st.just("/"))),
    st.builds(Scope, st.sampled_from(["read", "write"]), globs, st.just(True)),
    st.builds(lambda host, port: Scope("connect", f"{host}:{port}"), hosts, st.sampled_from([443, 80])),
    st.builds(Scope, st.sampled_from(["call", "use"]), st.sampled_from(["a.b", "c"])),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(patterns, max_size=30), scopes)
def test_the_index_finds_what_a_scan_finds(texts: list[str], scope: Scope):
    """Covering and touching, for any set of patterns; each once."""
    grants = [Grant("*", "*", parse(text, resolved=True), "allow", "cli", str(n)) for n, text in enumerate(texts)]
    index = Index(grants)

    def found(grants_found: list[Grant]) -> list[str]:
        return sorted(grant.where for grant in grants_found)

    assert found(list(index.covering(scope))) == found([grant for grant in grants if grant.pattern.covers(scope)])
    assert found(list(index.touching(scope))) == found([grant for grant in grants if grant.pattern.touches(scope)])


def test_a_pattern_that_covers_also_touches():
    """A denial can't be narrower than a permission."""
    everything = Pattern("*")
    assert everything.covers(Scope("read", "/"))
    assert everything.touches(Scope("connect", "x.org:1"))
