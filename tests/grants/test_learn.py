"""Learning from the log: few grants, narrow ones, and none for what a rule denies."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentd.grants import Book, Grant, Labels, Moment, Request, Scope, Taint, parse, propose

NOW = Moment(1, 0)


def asked(tool: str, *scopes: str, principal: str = "unix:pi", kind: str = "call.deny") -> dict[str, Any]:
    return {"kind": kind, "principal": principal, "tool": {"name": tool}, "scopes": list(scopes)}


def learn(
    bodies: list[dict[str, Any]], grants: list[Grant] | None = None, fixed: frozenset[str] = frozenset(), *, asks: bool = False
) -> list[str]:
    book = Book.of(grants or [], {})
    proposed, _calls = propose(bodies, lambda request: book.decide(request, NOW), lambda _tool: fixed, lambda _tool: asks)
    return [f"{grant.principal} {grant.tool} {grant.pattern}" for grant in proposed]


def test_a_tool_that_asks_is_proposed_by_its_name():
    """With its like it would be a glob, and with everything allowed it is asked for still."""
    bodies = [asked(tool, "device:gpio/17") for tool in ("gpio.set", "gpio.pulse")]
    assert learn(bodies) == ["unix:pi gpio.* device:gpio/17"]
    everything = Grant("*", "*", parse("*"), "allow", "config", "here")
    assert learn(bodies, [everything]) == []
    named = ["unix:pi gpio.set device:gpio/17", "unix:pi gpio.pulse device:gpio/17"]
    assert sorted(learn(bodies, [everything], asks=True)) == sorted(named)


def test_one_file_is_granted_as_it_is_and_several_as_their_folder():
    """And tools of one bundle that need the same, together."""
    assert learn([asked("files.read", "read:/h/p/n/a")]) == ["unix:pi files.read read:/h/p/n/a"]
    two = [asked("files.read", f"read:/h/p/n/{name}") for name in "ab"]
    assert learn(two) == ["unix:pi files.read read:/h/p/n"]
    both = [asked(tool, "read:/h/p/n/a") for tool in ("files.read", "files.search")]
    assert learn(both) == ["unix:pi files.* read:/h/p/n/a"]
    others = [asked("files.read", "read:/h/p/n/a", principal=who) for who in ("unix:pi", "token:x")]
    assert len(learn(others)) == 2


def test_what_is_allowed_denied_or_can_not_be_said_is_left_out():
    """A rule's denial, a grant that is there already, a `*` in an argument."""
    allow = Grant("*", "*", parse("read:/h/ok", resolved=True), "allow", "config", "")
    deny = Grant("*", "*", parse("read:/h/no", resolved=True), "deny", "config", "")
    bodies = [asked("files.read", f"read:/h/{name}/a") for name in ("ok", "no")]
    bodies += [asked("files.read", "read:/h/p/*"), asked("boot", kind="boot")]
    assert learn(bodies, [allow, deny]) == []
    own = "read:/sys/**/x/**"
    assert learn([asked("system.x", own)], fixed=frozenset({own})) == [f"unix:pi system.x {own}"]


parts = st.sampled_from(["a", "b", "c"])
paths = st.lists(parts, min_size=3, max_size=5).map(lambda names: "/h/p/" + "/".join(names))
calls = st.lists(st.tuples(st.sampled_from(["files.read", "files.write", "x.y"]), st.lists(paths, min_size=1, max_size=2)))


@given(calls)
def test_what_is_proposed_allows_all_that_was_asked_for_and_no_folder_that_was_not(made: list[tuple[str, list[str]]]):
    """Replayed under the proposal, every call runs; each pattern lies in a folder in which something was asked for."""
    bodies = [asked(tool, *(f"read:{path}" for path in found)) for tool, found in made]
    empty = Book.of([], {})
    proposed, count = propose(
        bodies, lambda request: empty.decide(request, NOW), lambda _tool: frozenset(), lambda _tool: False
    )
    assert count == len(made)
    book = Book.of(proposed, {})
    for tool, found in made:
        request = Request("unix:pi", tool, tuple(Scope("read", path) for path in found))
        assert book.decide(request, NOW).verdict == "allow"
    folders = {path.rpartition("/")[0] for _tool, found in made for path in found}
    for grant in proposed:
        assert grant.pattern.root in folders or grant.pattern.root.rpartition("/")[0] in folders


def test_labels_of_what_a_call_has_read():
    """Untrusted: the network, files elsewhere, tools that are marked. Private: what touches a private place."""
    taint = Taint(["/home/pi", "/proc"], ["/home/pi/private"])

    def names(*scopes: str, untrusted: bool = False) -> tuple[str, ...]:
        return taint.labels("t", [Scope(*scope.split(":", 1)) for scope in scopes], untrusted=untrusted).names

    assert names() == ()
    assert names("read:/home/pi/notes", "write:/tmp/x", "exec:/usr", "use:home") == ()
    assert names("read:/proc/meminfo") == ()
    assert names("read:/tmp/x") == ("untrusted",)
    assert names("connect:x.org:443") == ("untrusted",)
    assert names(untrusted=True) == ("untrusted",)
    assert names("read:/home/pi/private/diary") == ("private",)
    assert names("read:/home/pi") == ("private",)  # a search from above reads it, too
    assert names("read:/home/pi/private/x", "connect:x.org:443") == ("untrusted", "private")
    both = Labels(("a",), ()) | Labels(("a", "b"), ("c",))
    assert (both.untrusted, both.private, both.both) == (("a", "b"), ("c",), True)
    many = Labels(tuple(str(n) for n in range(100))) | Labels(("x",))
    assert len(many.untrusted) == 16
