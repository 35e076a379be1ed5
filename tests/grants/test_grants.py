"""Grants that people have made: kept, counted, taken back, over restarts and full disks."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import apsw
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentd.audit import AuditLog
from agentd.errors import AgentdError, Reason, RequestError
from agentd.grants import Grant, Grants, Moment, Own, Request, Scope, parse
from agentd.grants import grants as module
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOTES = Scope("read", "/h/notes/a.txt")
ASKED = Request("unix:pi", "files.read", (NOTES,))


def wanted(decision: str = "allow", scope: str = "read:/h/notes", **more: Any) -> Grant:
    fields: dict[str, Any] = {"principal": "*", "tool": "*", "source": "cli", "where": "", "spelled": scope} | more
    return Grant(pattern=parse(scope, resolved=True), decision=decision, **fields)  # type: ignore[arg-type]


@dataclass
class Opened:
    """A store with its grants, opened again at will. `now` is the clock."""

    folder: Path
    fixed: tuple[Grant, ...] = ()
    now: int = 1_000
    open_connection: Any = apsw.Connection
    changes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.store = Store(self.folder, self.open_connection)
        self.audit = AuditLog(self.store)
        self.grants = Grants(self.fixed, self.store, self.audit, lambda: Moment(self.now, 0))
        self.grants.changed = lambda: self.changes.append(1)

    def again(self) -> None:
        self.store.close()
        self.open()

    def verdict(self, request: Request = ASKED) -> str:
        return self.grants.decide(request).verdict

    def kinds(self) -> list[str]:
        return [entry.body["kind"] for entry in self.audit.entries()]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    made = Opened(tmp_path / "state")
    yield made
    made.store.close()


def test_a_grant_counts_at_once_and_after_a_restart(opened: Opened):
    """With everything it says; it is in the log, with who made it."""
    made = opened.grants.add(wanted(max_uses=3, expire_ns=5_000), "unix:admin")
    assert opened.verdict() == "allow"
    opened.again()
    assert opened.verdict() == "allow"
    assert opened.grants.get(made.id) == made
    (entry,) = opened.audit.entries()
    assert (entry.body["kind"], entry.body["principal"]) == ("grant.create", "unix:admin")
    assert made.id in entry.body["detail"]["rule"]


def test_a_revoked_grant_is_gone_for_good(opened: Opened):
    """Those who run by it are told; revoking it again is GRANT_NOT_FOUND."""
    made = opened.grants.add(wanted(), "unix:admin")
    opened.grants.revoke(made.id, "unix:admin")
    assert opened.changes == [1]
    assert opened.verdict() == "ask"
    opened.again()
    assert opened.verdict() == "ask"
    with pytest.raises(RequestError) as caught:
        opened.grants.revoke(made.id, "unix:admin")
    assert caught.value.reason is Reason.GRANT_NOT_FOUND
    assert opened.kinds() == ["grant.create", "grant.revoke"]


def test_an_expired_grant_says_so(opened: Opened):
    """From the very moment on."""
    opened.grants.add(wanted(expire_ns=2_000), "unix:admin")
    opened.now = 1_999
    assert opened.verdict() == "allow"
    opened.now = 2_000
    assert opened.verdict() == "ask"
    assert "it expired" in opened.grants.decide(ASKED).near[0]


def test_uses_are_counted_over_restarts_and_never_exceeded(opened: Opened):
    """By threads that come at once, too."""
    opened.grants.add(wanted(max_uses=5), "unix:admin")
    decision = opened.grants.decide(ASKED)
    assert opened.grants.use(decision)
    opened.again()
    decision = opened.grants.decide(ASKED)
    used: list[bool] = []
    threads = [threading.Thread(target=lambda: used.append(opened.grants.use(decision))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(used) == 4
    assert opened.verdict() == "ask"
    opened.again()
    assert opened.verdict() == "ask"


def test_grants_for_a_run_end_with_it(opened: Opened):
    """Others stay."""
    opened.grants.add(wanted(principal="run:r1", source="approval"), "unix:admin")
    opened.grants.add(wanted(principal="run:r2", source="approval"), "unix:admin")
    request = Request("unix:pi", "files.read", (NOTES,), "r1")
    assert opened.verdict(request) == "allow"
    opened.grants.end_run("r1")
    assert opened.verdict(request) == "ask"
    assert len(opened.grants.all()) == 1


def test_a_denied_folder_that_is_moved_stays_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a link in its old place: at its new one, after a moment; and still at its old one."""
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.0)
    home = tmp_path.resolve()
    (home / "secret").mkdir()
    text = f"read:{home}/secret"
    fixed = (Grant("*", "*", parse("*"), "allow", "config", ""), Grant("*", "*", parse(text), "deny", "config", "", text))
    opened = Opened(tmp_path / "state", fixed)
    moved = Request("unix:pi", "files.read", (Scope("read", f"{home}/elsewhere/key"),))
    assert opened.verdict(moved) == "allow"
    (home / "secret").rename(home / "elsewhere")
    (home / "secret").symlink_to("elsewhere")
    assert opened.verdict(moved) == "deny"
    assert opened.verdict(Request("unix:pi", "files.read", (Scope("read", f"{home}/secret"),))) == "deny"
    opened.store.close()


def test_a_full_disk_changes_nothing(tmp_path: Path):
    """Neither added nor revoked nor used: what counts is what is kept."""

    def small(path: str) -> apsw.Connection:
        db = apsw.Connection(path)
        db.execute("PRAGMA max_page_count=80")
        return db

    opened = Opened(tmp_path / "state", open_connection=small)
    kept = [opened.grants.add(wanted(max_uses=10**6), "unix:admin")]
    reason = None
    while reason is None:
        try:
            kept.append(opened.grants.add(wanted(scope=f"read:/h/{len(kept)}/" + "x" * 500), "unix:admin"))
        except AgentdError as e:
            reason = e.reason
    assert reason is Reason.STORE_FULL
    assert {grant.id for grant in opened.grants.all()} == {grant.id for grant in kept}
    opened.again()
    assert {grant.id for grant in opened.grants.all()} == {grant.id for grant in kept}
    opened.store.close()


def test_the_daemons_own_files_are_denied_whatever_is_granted(tmp_path: Path):
    """By name; what lies around them is not."""
    store = Store(tmp_path / "state")
    fixed = (Grant("*", "*", parse("*"), "allow", "config", ""),)
    grants = Grants(fixed, store, AuditLog(store), lambda: Moment(1, 0), Own([tmp_path / "state"]))
    for path, verdict in (("state", "deny"), ("state/agentd.db", "deny"), ("state2", "allow"), ("", "allow")):
        scope = Scope("write", os.path.normpath(tmp_path / path))
        assert grants.decide(Request("unix:pi", "files.write", (scope,))).verdict == verdict
    store.close()


FOLDERS = ["/h/a", "/h/b", "/h/a/deep", "/h/c"]


class Machine(RuleBasedStateMachine):
    """Against a list that is scanned: whatever is made, used, revoked, expires or is opened again."""

    @initialize()
    def start(self) -> None:
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.opened = Opened(Path(self.folder.name) / "state")
        self.model: dict[str, Grant] = {}
        self.used: dict[str, int] = {}

    @rule(
        decision=st.sampled_from(["allow", "ask", "deny"]),
        folder=st.sampled_from(FOLDERS),
        source=st.sampled_from(["cli", "approval"]),
        uses=st.sampled_from([0, 0, 1, 2]),
        lasts=st.sampled_from([0, 0, 50]),
    )
    def add(self, decision: str, folder: str, source: str, uses: int, lasts: int) -> None:
        expire = self.opened.now + lasts if lasts else 0
        grant = wanted(decision, f"read:{folder}", source=source, max_uses=uses, expire_ns=expire)
        made = self.opened.grants.add(grant, "unix:admin")
        self.model[made.id] = made

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.model)))
        self.opened.grants.revoke(gone, "unix:admin")
        del self.model[gone]

    @rule(passed=st.integers(1, 60))
    def wait(self, passed: int) -> None:
        self.opened.now += passed

    @rule()
    def open_again(self) -> None:
        self.opened.again()

    @rule(folder=st.sampled_from(FOLDERS))
    def use(self, folder: str) -> None:
        decision = self.opened.grants.decide(Request("unix:pi", "files.read", (Scope("read", f"{folder}/x"),)))
        if decision.verdict == "allow":
            assert self.opened.grants.use(decision)
            for grant in decision.grants:
                if self.model[grant].max_uses:
                    self.used[grant] = self.used.get(grant, 0) + 1

    def expected(self, path: str) -> str:
        def holds(grant: Grant) -> bool:
            over = grant.expire_ns and self.opened.now >= grant.expire_ns
            return not over and not (grant.max_uses and self.used.get(grant.id, 0) >= grant.max_uses)

        found = [g for g in self.model.values() if holds(g) and path.startswith(g.pattern.root + "/")]
        if any(grant.decision == "deny" for grant in found):
            return "deny"
        if any(grant.decision == "allow" and grant.source == "approval" for grant in found):
            return "allow"
        if any(grant.decision == "ask" for grant in found):
            return "ask"
        return "allow" if any(grant.decision == "allow" for grant in found) else "ask"

    @invariant()
    def decides_as_a_scan_does(self) -> None:
        for folder in FOLDERS:
            request = Request("unix:pi", "files.read", (Scope("read", f"{folder}/x"),))
            decision = self.opened.grants.decide(request)
            assert decision.verdict == self.expected(f"{folder}/x")
            assert decision.reason

    def teardown(self) -> None:
        self.opened.store.close()
        self.folder.cleanup()


TestGrants = Machine.TestCase
TestGrants.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_ten_thousand_grants_are_opened_and_decided(tmp_path: Path):
    """Not timed here; `make bench` does that."""
    opened = Opened(tmp_path / "state")

    def insert(db: apsw.Connection) -> None:
        rows = [(f"g{n:05}", wanted(scope=f"read:/h/{n}", id=f"g{n:05}").to_json()) for n in range(10_000)]
        db.executemany("INSERT INTO permission (id, body) VALUES (?, ?)", rows)

    opened.store.write(insert)
    opened.again()
    assert opened.verdict(Request("unix:pi", "x.y", (Scope("read", "/h/9999/a"),))) == "allow"
    assert opened.verdict(Request("unix:pi", "x.y", (Scope("read", "/h/10000/a"),))) == "ask"
    opened.store.close()
