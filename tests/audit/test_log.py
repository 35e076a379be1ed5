"""The store and the log: durable, chained, and honest when the disk is full."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentd.audit import AuditLog, Event
from agentd.errors import Reason, StoreError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state")
    yield opened
    opened.close()


def filled(folder: Path, events: int = 6) -> None:
    store = Store(folder)
    log = AuditLog(store)
    for n in range(events):
        log.record(Event(kind="call.end", call=f"c{n}", arguments={"n": n}))
    store.close()


def test_an_untouched_log_is_whole(tmp_path: Path):
    """All events count, also after a restart."""
    filled(tmp_path)
    store = Store(tmp_path)
    assert AuditLog(store).verify().valid == 6
    AuditLog(store).record(Event(kind="stop"))
    found = AuditLog(store).verify()
    assert (found.valid, found.bad) == (7, None)
    store.close()


@pytest.mark.parametrize(
    ("tamper", "bad"),
    [
        ("UPDATE event SET body = replace(body, 'c2', 'c9') WHERE seq = 3", 3),
        ("UPDATE event SET body = body || ' ' WHERE seq = 1", 1),
        ("UPDATE event SET chain = zeroblob(32) WHERE seq = 4", 4),
        ("DELETE FROM event WHERE seq = 2", 2),
        ("DELETE FROM event WHERE seq = 1", 1),
        (
            "UPDATE event SET seq = seq + 100 WHERE seq >= 5; INSERT INTO event SELECT 5, body, chain FROM event WHERE seq = 4",
            5,
        ),
        (
            "UPDATE event SET seq = 99 WHERE seq = 3; UPDATE event SET seq = 3 WHERE seq = 4; UPDATE event SET seq = 4 WHERE seq = 99",
            3,
        ),
    ],
)
def test_any_change_in_the_middle_is_found_at_its_place(tmp_path: Path, tamper: str, bad: int):
    """Changed, removed, inserted, swapped: verify names the first event that is not as written."""
    filled(tmp_path)
    with apsw.Connection(str(tmp_path / "agentd.db")) as db:
        db.execute(tamper)
    store = Store(tmp_path)
    found = AuditLog(store).verify()
    store.close()
    assert found.bad == bad
    assert found.valid == bad - 1
    assert str(bad) in found.why


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40) | st.just("\udcff\0\u202e\n"), key=st.from_regex(r"[a-z]{1,5}", fullmatch=True))
def test_an_event_is_one_line_of_ascii_whatever_it_holds(store: Store, text: str, key: str):
    """Control characters, bidi marks, lone surrogates: escaped, and read back as they were."""
    log = AuditLog(store)
    seq = log.record(Event(kind="call.intent", arguments={key: text}))
    body = store.read(lambda db: db.execute("SELECT body FROM event WHERE seq = ?", (seq,)).get)
    assert isinstance(body, str)
    assert body.isascii()
    assert body.isprintable()
    assert json.loads(body)["arguments"] == {key: text}


def test_long_texts_are_recorded_by_digest(store: Store):
    """The log is no copy of the user's files."""
    AuditLog(store).record(Event(kind="call.intent", arguments={"text": "secret " * 10_000}))
    (entry,) = AuditLog(store).entries()
    assert entry.body["arguments"]["text"]["$bytes"] == 70_000
    assert "secret" not in json.dumps(entry.body)


def test_events_are_listed_in_pages_both_ways(tmp_path: Path):
    """By number, and by call."""
    filled(tmp_path)
    store = Store(tmp_path)
    log = AuditLog(store)
    assert [e.seq for e in log.entries(limit=4)] == [1, 2, 3, 4]
    assert [e.seq for e in log.entries(after=4)] == [5, 6]
    assert [e.seq for e in log.entries(newest_first=True, limit=2)] == [6, 5]
    assert [e.seq for e in log.entries(newest_first=True, after=5)] == [4, 3, 2, 1]
    assert [e.seq for e in log.entries(call="c3")] == [4]
    store.close()


def test_a_commit_is_durable_when_it_is_acknowledged(store: Store):
    """WAL with synchronous=FULL, whatever the build's default is."""
    assert store.write(lambda db: db.execute("PRAGMA synchronous").get) == 2
    assert store.write(lambda db: db.execute("PRAGMA journal_mode").get) == "wal"


def test_a_piece_of_work_that_fails_harms_no_other(store: Store):
    """Its own changes are taken back; the others of the same commit stand."""

    def fail(db: apsw.Connection) -> None:
        db.execute("INSERT INTO event VALUES (50, 'x', x'00')")
        raise KeyError("mine")

    log = AuditLog(store)
    futures = [store.submit(lambda db: log.append(db, Event(kind="boot"))) for _ in range(5)]
    broken = store.submit(fail)
    futures += [store.submit(lambda db: log.append(db, Event(kind="stop"))) for _ in range(5)]
    assert [future.result(10) for future in futures] == list(range(1, 11))
    with pytest.raises(KeyError):
        broken.result(10)
    assert log.verify().valid == 10


def test_a_second_store_on_the_folder_is_refused(store: Store, tmp_path: Path):
    """It names the process that has it."""
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "state")
    assert caught.value.reason is Reason.STORE_LOCKED


def record_until_refused(log: AuditLog) -> int:
    """How many events were acknowledged before the disk was full."""
    for n in range(1000):
        try:
            log.record(Event(kind="boot", detail={"fill": "x" * 2000}))
        except StoreError as e:
            assert e.reason is Reason.STORE_FULL  # noqa: PT017 - the number of those before it counts
            return n
    raise AssertionError("the disk is not full")


def test_a_full_disk_is_an_error_and_no_loss(tmp_path: Path):
    """STORE_FULL; what was recorded stays readable; with space again the log goes on and is whole."""
    connections: list[apsw.Connection] = []

    def limited(path: str) -> apsw.Connection:
        connections.append(apsw.Connection(path))
        return connections[-1]

    store = Store(tmp_path / "state", limited)
    log = AuditLog(store)
    store.write(lambda db: db.execute("PRAGMA max_page_count = 40").fetchall())
    recorded = record_until_refused(log)
    kept = log.verify()
    assert (kept.bad, kept.valid) == (None, recorded)
    store.write(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall())
    assert log.record(Event(kind="stop")) == kept.valid + 1
    assert log.verify().bad is None
    store.close()


def test_a_damaged_page_is_an_error_and_not_a_crash(tmp_path: Path):
    """Zeroed in the middle of the file: reading says so, naming the file."""
    filled(tmp_path, events=200)
    file = tmp_path / "agentd.db"
    data = bytearray(file.read_bytes())
    data[5 * 4096 : -4096] = bytes(len(data) - 6 * 4096)
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"agentd\.db"):
        verify_after_reopening(tmp_path)


def verify_after_reopening(folder: Path) -> None:
    store = Store(folder)
    try:
        AuditLog(store).verify()
    finally:
        store.close()


@pytest.mark.parametrize(
    "content", [b"this is no database at all, and long enough to look at" * 20, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_store_that_is_none_is_an_error_that_names_it(tmp_path: Path, content: bytes):
    """Nothing is overwritten."""
    (tmp_path / "agentd.db").write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    assert "agentd.db" in caught.value.message
    assert (tmp_path / "agentd.db").read_bytes() == content
