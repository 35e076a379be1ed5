"""The decision: which grant wins, why, and which almost did."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from agentd.errors import Reason, RequestError
from agentd.grants import Book, Conditions, Grant, Moment, Request, Scope, parse
from agentd.grants.conditions import charging

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from agentd.grants import Decision

NOW = Moment(10**18, 12 * 60, charging=False, nominal=None)


def grant(decision: str, scope: str = "read:/h/notes", **more: Any) -> Grant:
    fields: dict[str, Any] = {"principal": "*", "tool": "*", "source": "config", "where": "here"} | more
    return Grant(pattern=parse(scope, resolved=True), decision=decision, **fields)  # type: ignore[arg-type]


def decide(
    grants: Sequence[Grant], *scopes: str, moment: Moment = NOW, used: dict[str, int] | None = None, **more: Any
) -> Decision:
    wanted = tuple(Scope(*text.split(":", 1)) for text in scopes)
    request = Request(**{"principal": "unix:pi", "tool": "files.read", "scopes": wanted} | more)
    return Book.of(grants, used or {}).decide(request, moment)


ALLOW, ASK, DENY = grant("allow"), grant("ask"), grant("deny")
ANSWER = grant("allow", source="approval")


@pytest.mark.parametrize(
    ("grants", "verdict"),
    [
        ([], "ask"),
        ([ALLOW], "allow"),
        ([ASK], "ask"),
        ([DENY], "deny"),
        ([ALLOW, ASK], "ask"),
        ([ALLOW, ANSWER, ASK], "allow"),
        ([ANSWER, ASK], "allow"),
        ([ALLOW, DENY], "deny"),
        ([ALLOW, ANSWER, ASK, DENY], "deny"),
        ([grant("allow", "read:/h/other")], "ask"),
        ([grant("allow", "write:/h/notes")], "ask"),
        ([grant("allow", "*")], "allow"),
        ([grant("allow", "*"), grant("deny", "read:/h/notes/a.txt")], "deny"),
        ([grant("allow", "*"), grant("deny", "read:/h/notes/a.txt/below")], "deny"),
        ([grant("allow", "*"), grant("ask", "read:/h/notes/a.txt/below")], "allow"),
    ],
)
def test_which_grant_wins(grants: list[Grant], verdict: str):
    """Deny, then an answer, then ask, then allow; what nothing covers is asked; in whatever order they stand."""
    for order in itertools.permutations(grants):
        decision = decide(order, "read:/h/notes/a.txt")
        assert decision.verdict == verdict
        assert decision.reason


@pytest.mark.parametrize(
    ("fields", "request_fields", "applies"),
    [
        ({"principal": "unix:pi"}, {}, True),
        ({"principal": "unix:*"}, {}, True),
        ({"principal": "unix:eve"}, {}, False),
        ({"principal": "run:r1"}, {"run": "r1"}, True),
        ({"principal": "run:r1"}, {"run": "r2"}, False),
        ({"principal": "run:r1"}, {}, False),
        ({"tool": "files.*"}, {}, True),
        ({"tool": "files.read"}, {}, True),
        ({"tool": "files.*"}, {"tool": "files2.read"}, False),
        ({"tool": "files.[r]ead"}, {}, False),
        ({"expire_ns": NOW.now_ns + 1}, {}, True),
        ({"expire_ns": NOW.now_ns}, {}, False),
        ({"id": "g", "max_uses": 2}, {}, True),
        ({"id": "used", "max_uses": 2}, {}, False),
        ({"conditions": Conditions(hours="11:00-13:00")}, {}, True),
        ({"conditions": Conditions(hours="12:01-13:00")}, {}, False),
        ({"conditions": Conditions(hours="22:00-12:01")}, {}, True),
        ({"conditions": Conditions(hours="22:00-12:00")}, {}, False),
        ({"conditions": Conditions(charging=True)}, {}, False),
        ({"conditions": Conditions(nominal=True)}, {}, False),
    ],
)
def test_a_grant_applies_to_whom_what_and_when_it_says(
    fields: dict[str, Any], request_fields: dict[str, Any], *, applies: bool
):
    """Allowing and denying alike; if it almost applied, the decision says what kept it from it."""
    used = {"used": 2}
    decision = decide([grant("allow", **fields)], "read:/h/notes/a.txt", used=used, **request_fields)
    assert decision.verdict == ("allow" if applies else "ask")
    if not applies:
        (near,) = decision.near
        assert near.startswith("allow ")
        assert ": it" in near or ": its" in near
    denied = decide([grant("allow", "*"), grant("deny", **fields)], "read:/h/notes/a.txt", used=used, **request_fields)
    assert denied.verdict == ("deny" if applies else "allow")


@pytest.mark.parametrize(
    ("grants", "verdict"),
    [
        ([grant("allow", "*")], "ask"),
        ([grant("allow", "device:gpio/17")], "ask"),
        ([grant("allow", "device:**", tool="gpio.*")], "ask"),
        ([grant("allow", "*", tool="gpio.set")], "ask"),
        ([grant("allow", "device:gpio/17", tool="gpio.set")], "allow"),
        ([grant("allow", "device:gpio/*", tool="gpio.set")], "allow"),
        ([grant("allow", "*", rehearse=True), grant("allow", "device:gpio/17", tool="gpio.set")], "allow"),
        ([grant("allow", "device:gpio/17", source="approval")], "allow"),
        ([grant("allow", "device:gpio/18", tool="gpio.set")], "ask"),
        ([grant("allow", "device:gpio/17", tool="gpio.set"), grant("ask", "*")], "ask"),
        ([grant("allow", "device:gpio/17", tool="gpio.set"), grant("deny", "*")], "deny"),
    ],
)
def test_what_asks_is_allowed_by_name_only(grants: list[Grant], verdict: str):
    """What moves something in the world is not among whatever there is: a grant for that does not mean it, and it is said."""
    for order in itertools.permutations(grants):
        decision = decide(order, "device:gpio/17", tool="gpio.set", asks=True)
        assert decision.verdict == verdict
        if len(grants) == 1 and verdict == "ask" and grants[0].pattern.text != "device:gpio/18":
            assert decision.near == (f"{grants[0]}: gpio.set asks unless a grant names it",)


@pytest.mark.parametrize(
    ("denied", "value", "verdict"),
    [
        ("*", "gpio/17", "deny"),
        ("gpio", "gpio/17", "deny"),
        ("gpio", "gpio/17/read", "deny"),
        ("gpio/*", "gpio/17", "deny"),
        ("gpio/17", "gpio/17/read", "deny"),
        ("*/17", "gpio/17/read", "deny"),
        ("gp*", "gpio/17/read", "deny"),
        ("*/18", "gpio/17/read", "allow"),
        ("gpio/17/read", "gpio/17", "allow"),
        ("gpio/1", "gpio/17", "allow"),
        ("gpi", "gpio/17", "allow"),
        ("gpio", "gpiox", "allow"),
    ],
)
def test_who_denies_a_device_means_all_that_belongs_to_it(denied: str, value: str, verdict: str):
    assert decide([grant("allow", "device:*"), grant("deny", f"device:{denied}")], f"device:{value}").verdict == verdict


@pytest.mark.parametrize(
    ("pattern", "value", "covers"),
    [
        ("gpio/17", "gpio/17", True),
        ("gpio/17", "gpio/170", False),
        ("gpio/*", "gpio/17", True),
        ("gpio/*", "gpio/17/read", True),
        ("gpio/*/read", "gpio/17", False),
        ("*", "gpio", True),
        ("*", "gpio/17", True),
        ("termux/sms/+4917????", "termux/sms/+49170000", False),
        ("termux/sms/[0-9]", "termux/sms/1", False),
        ("gpio", "gpio/17", False),
    ],
)
def test_a_name_has_no_wildcard_but_the_star(pattern: str, value: str, *, covers: bool):
    """A model may write any other character, and a person say yes to it for always."""
    assert (decide([grant("allow", f"device:{pattern}")], f"device:{value}").verdict == "allow") is covers


@pytest.mark.parametrize(
    ("moment", "applies"),
    [(Moment(1, 0, charging=True), True), (Moment(1, 0, charging=None), False), (Moment(1, 0, charging=False), False)],
)
def test_a_condition_that_nothing_measures_does_not_hold(moment: Moment, *, applies: bool):
    """And the reason says so."""
    decision = decide([grant("allow", conditions=Conditions(charging=True))], "read:/h/notes/a.txt", moment=moment)
    assert (decision.verdict == "allow") is applies
    if moment.charging is None:
        assert "nothing here says so" in decision.near[0]


def test_every_scope_must_be_covered():
    """The reason names the first that is not; all that are not are in `unmet`."""
    decision = decide([grant("allow", "read:/h")], "read:/h/a", "write:/h/a", "connect:x.org:443")
    assert (decision.verdict, decision.scope) == ("ask", "write:/h/a")
    assert [str(scope) for scope in decision.unmet] == ["write:/h/a", "connect:x.org:443"]
    assert "write:/h/a" in decision.reason


def test_a_call_that_touches_nothing_needs_its_tool_granted():
    """Its scope is `call:TOOL`."""
    assert decide([grant("allow", "call:system.*")], tool="system.time").verdict == "allow"
    assert decide([grant("allow", "read:/")], tool="system.time").verdict == "ask"


def test_what_a_token_is_bounded_to_no_grant_widens():
    """`within` is the most its calls may touch."""
    within = (parse("read:/h/notes", resolved=True),)
    assert decide([grant("allow", "*")], "read:/h/notes/a", within=within).verdict == "allow"
    denied = decide([grant("allow", "*")], "read:/h/notes/a", "read:/h/b", within=within)
    assert (denied.verdict, denied.scope) == ("deny", "read:/h/b")
    assert decide([], "read:/h/notes/a", within=within).verdict == "ask"


def test_grants_used_are_named_once():
    """By line for the record, by id for counting uses."""
    one = grant("allow", "read:/h", id="g1", max_uses=5)
    decision = decide([one], "read:/h/a", "read:/h/b")
    assert decision.grants == ("g1",)
    assert decision.rules == (str(one),)


def test_rules_nearby_are_named():
    """Beside the path that was asked for, for the same tool and principal; not those far away."""
    near = [grant("allow", f"read:/h/notes/{name}") for name in ("a.txt", "c.txt")]
    decision = decide([*near, grant("allow", "read:/h/notes/b.txt", tool="x.*")], "read:/h/notes/b.txt")
    assert len(decision.near) == 3
    assert any("it is for the tool x.*" in each for each in decision.near)
    assert all("b.txt" in each for each in decision.near)


@pytest.mark.parametrize("hours", ["7:00-22:00", "07:00", "24:00-01:00", "07:60-08:00", "07:00-07:00", "07:00 - 08:00", "x"])
def test_hours_that_are_none_are_refused(hours: str):
    """GRANT_INVALID, with what was written."""
    with pytest.raises(RequestError) as caught:
        Conditions(hours=hours)
    assert caught.value.reason is Reason.GRANT_INVALID
    assert caught.value.metadata["hours"] == hours


@pytest.mark.parametrize(
    "fields", [{"principal": ""}, {"principal": "x" * 200}, {"tool": "a\nb"}, {"max_uses": -1}, {"expire_ns": -1}]
)
def test_a_grant_that_is_malformed_is_refused(fields: dict[str, Any]):
    """Names are short and printable, numbers not negative."""
    with pytest.raises(RequestError) as caught:
        grant("allow", **fields)
    assert caught.value.reason is Reason.GRANT_INVALID


def supply(root: Path, name: str, **files: str) -> None:
    folder = root / "class" / "power_supply" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ([], True),
        ([{"type": "Battery", "status": "Discharging"}], False),
        ([{"type": "Battery", "status": "Charging"}], True),
        ([{"type": "Battery", "status": "Full"}], True),
        ([{"type": "Battery", "status": "Unknown"}], False),
        ([{"type": "Battery", "status": "Discharging"}, {"type": "USB", "online": "1"}], True),
        ([{"type": "Battery", "status": "Discharging"}, {"type": "Mains", "online": "0"}], False),
        ([{"type": "Mains", "online": "1"}], True),
        ([{"type": "Battery"}], False),
    ],
)
def test_power_from_outside(tmp_path: Path, supplies: list[dict[str, str]], *, expected: bool):
    """As the kernel's power_supply class says; without a battery it must come from outside."""
    (tmp_path / "class" / "power_supply").mkdir(parents=True)
    for n, files in enumerate(supplies):
        supply(tmp_path, f"s{n}", **files)
    assert charging(tmp_path) is expected
    assert charging(tmp_path / "missing") is True
