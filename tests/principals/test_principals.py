"""Who is who: roles, tokens that are kept as hashes, wrong ones that are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from agentd.audit import AuditLog
from agentd.errors import Reason, RequestError
from agentd.principals import Principal, Roster, Token, Tokens
from agentd.principals.roster import FREE_ATTEMPTS
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Desk:
    """Tokens and a roster over a store of their own; `now` and `seconds` are the clocks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.seconds = folder, 1_000, 0.0
        self.said: list[tuple[str, str]] = []
        self.open()

    def open(self) -> None:
        self.store = Store(self.folder)
        self.audit = AuditLog(self.store)
        self.tokens = Tokens(self.store, self.audit, lambda: self.now)
        roles: Any = {"unix:nobody": frozenset({"user"}), "tls:desk": frozenset({"auditor"})}
        record = lambda peer, why: self.said.append((peer, why))  # noqa: E731
        self.roster = Roster(1000, roles, self.tokens, record, lambda: self.seconds)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "state")
    yield made
    made.store.close()


def reason(caught: pytest.ExceptionInfo[RequestError]) -> Reason:
    return caught.value.reason


def test_the_owner_has_every_role_and_others_those_they_are_given(desk: Desk):
    """Who has none is nobody, by user and by certificate."""
    owner = desk.roster.unix(1000)
    assert all(owner.has(role) for role in ("user", "approver", "auditor", "admin"))
    nobody = desk.roster.unix(65534)
    assert (nobody.name, nobody.has("user"), nobody.has("approver")) == ("unix:nobody", True, False)
    assert desk.roster.certificate("desk").has("auditor")
    for ask in (lambda: desk.roster.unix(4242), lambda: desk.roster.certificate("eve"), lambda: desk.roster.certificate("*")):
        with pytest.raises(RequestError) as caught:
            ask()
        assert reason(caught) is Reason.UNAUTHENTICATED


def test_an_admin_may_everything_and_others_what_they_may():
    """ROLE_REQUIRED names who and which role."""
    Principal("unix:a", frozenset({"admin"})).require("approver", "answer")
    with pytest.raises(RequestError) as caught:
        Principal("unix:b", frozenset({"user", "auditor"})).require("approver", "answer")
    assert reason(caught) is Reason.ROLE_REQUIRED
    assert caught.value.metadata == {"principal": "unix:b", "role": "approver"}


def test_a_token_is_its_holder_until_it_is_revoked_or_expires(desk: Desk):
    """Also after a restart; its roles and bounds come with it."""
    _, secret = desk.tokens.create(Token("phone", ("user", "approver"), ("read:/h/notes",), 2_000), "unix:pi")
    desk.store.close()
    desk.open()
    holder = desk.roster.bearer(secret, "ipv4:1.2.3.4")
    assert (holder.name, holder.roles, [p.text for p in holder.within]) == (
        "token:phone",
        frozenset({"user", "approver"}),
        ["read:/h/notes"],
    )
    desk.now = 2_000
    assert desk.tokens.holder(secret) is None
    token, other = desk.tokens.create(Token("tablet"), "unix:pi")
    assert desk.tokens.holder(other) is not None
    desk.tokens.revoke(token.id, "unix:pi")
    assert desk.tokens.holder(other) is None
    desk.store.close()
    desk.open()
    assert desk.tokens.holder(other) is None
    assert [entry.body["kind"] for entry in desk.audit.entries()] == ["token.create", "token.create", "token.revoke"]


def test_a_secret_is_kept_nowhere(desk: Desk):
    """Not in the store's files, not in the log, not in what is listed."""
    token, secret = desk.tokens.create(Token("phone"), "unix:pi")
    random = secret.split("_", 2)[2]
    desk.store.close()
    for file in desk.folder.iterdir():
        assert random.encode() not in file.read_bytes()
    desk.open()
    assert random not in repr(desk.tokens.all())
    assert token.id in secret  # what is before the second `_` only says which token it is


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: "", lambda s: s[:-1], lambda s: s + "x", lambda s: s.upper(), lambda s: s.replace("agentd_", ""), lambda s: "a_b_c",
        lambda s: s.rsplit("_", 1)[0] + "_", lambda s: "__", lambda s: "agentd_" + "0" * 26 + s[33:], lambda s: "\udcff" + s,
        lambda s: "x" * 100_000, lambda s: s[:10] + "ü" + s[11:],
    ],
)  # fmt: skip
def test_what_is_not_quite_a_token_is_nobodys(desk: Desk, spoil: Any):
    """Cut, longer, of another, of no token at all."""
    _, secret = desk.tokens.create(Token("phone"), "unix:pi")
    assert spoil(secret) != secret
    with pytest.raises(RequestError) as caught:
        desk.roster.bearer(spoil(secret), "ipv4:1.2.3.4")
    assert reason(caught) is Reason.UNAUTHENTICATED
    assert secret not in str(caught.value)


def test_guessing_is_recorded_and_slowed_down_and_locks_nobody_out(desk: Desk):
    """Five a minute for each peer are looked at in public; a right one is always taken."""
    _, secret = desk.tokens.create(Token("phone"), "unix:pi")
    for _ in range(FREE_ATTEMPTS):
        with pytest.raises(RequestError) as caught:
            desk.roster.bearer("wrong", "ipv4:1.2.3.4")
        assert reason(caught) is Reason.UNAUTHENTICATED
    for _ in range(1000):
        with pytest.raises(RequestError) as caught:
            desk.roster.bearer("wrong", "ipv4:1.2.3.4")
        assert reason(caught) is Reason.TOO_MANY_ATTEMPTS
    assert [peer for peer, _ in desk.said] == ["ipv4:1.2.3.4"] * FREE_ATTEMPTS
    assert "no more are looked at" in desk.said[-1][1]
    assert desk.roster.bearer(secret, "ipv4:1.2.3.4").name == "token:phone"
    with pytest.raises(RequestError) as caught:
        desk.roster.bearer("wrong", "ipv4:5.6.7.8")
    assert reason(caught) is Reason.UNAUTHENTICATED
    desk.seconds += 61
    with pytest.raises(RequestError) as caught:
        desk.roster.bearer("wrong", "ipv4:1.2.3.4")
    assert reason(caught) is Reason.UNAUTHENTICATED


def test_ten_thousand_guessing_peers_take_no_memory_for_good(desk: Desk):
    """The oldest is forgotten."""
    for n in range(10_000):
        with pytest.raises(RequestError):
            desk.roster.bearer("wrong", f"ipv6:{n}")
    assert len(desk.roster._attempts) <= 1024


@pytest.mark.parametrize(
    ("token", "field"),
    [
        (Token(""), "token.label"),
        (Token("Phone"), "token.label"),
        (Token("a" * 65), "token.label"),
        (Token("a*"), "token.label"),
        (Token("taken"), "token.label"),
        (Token("a", ("root",)), "token.roles"),  # type: ignore[arg-type]
        (Token("a", ()), "token.roles"),
        (Token("a", expire_ns=1), "token.expire_time"),
        (Token("a", scopes=("nonsense",)), "grant.scope"),
    ],
)
def test_a_token_that_makes_no_sense_is_refused(desk: Desk, token: Token, field: str):
    """By field; nothing is kept of it."""
    desk.tokens.create(Token("taken"), "unix:pi")
    with pytest.raises(RequestError) as caught:
        desk.tokens.create(token, "unix:pi")
    assert caught.value.field == field
    assert len(desk.tokens.all()) == 1


def test_a_token_that_is_not_there_can_not_be_revoked(desk: Desk):
    """TOKEN_NOT_FOUND."""
    with pytest.raises(RequestError) as caught:
        desk.tokens.revoke("x", "unix:pi")
    assert reason(caught) is Reason.TOKEN_NOT_FOUND
