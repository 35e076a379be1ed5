"""Whatever byte of a stored event changes, verify finds it; whatever an event holds, its record is one safe line."""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import TYPE_CHECKING

import apsw
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentd.audit import AuditLog, Event
from agentd.store import Store

if TYPE_CHECKING:
    from pathlib import Path

EVENTS = 5
surrogates = st.text(st.characters(codec=None, categories=None), max_size=30) | st.text(
    st.sampled_from("\ud800\udcff\udfff\0\x1b\u202e\u2028\x7fa\n\r"), max_size=10
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | surrogates,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(surrogates, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    store = Store(folder)
    log = AuditLog(store)
    for n in range(EVENTS):
        log.record(Event(kind="call.end", call=f"c{n}", arguments={"n": n}))
    store.close()
    return folder


@pytest.fixture(scope="module")
def open_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("log"))


def verified(folder: Path) -> tuple[int, int | None]:
    store = Store(folder)
    try:
        found = AuditLog(store).verify()
        return found.valid, found.bad
    finally:
        store.close()


@settings(max_examples=40, deadline=None)
@given(seq=st.integers(1, EVENTS), at=st.integers(0), byte=st.integers(0, 255), column=st.sampled_from(["body", "chain"]))
@example(seq=3, at=10, byte=0xFF, column="body")
@example(seq=3, at=10, byte=0, column="body")
def test_a_changed_byte_is_found_at_its_event(original: Path, seq: int, at: int, byte: int, column: str):
    """Any byte of any body or chain value, to any other, also to one that is no UTF-8."""
    folder = original.with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    with apsw.Connection(str(folder / "agentd.db")) as db:
        data = bytearray(db.execute(f"SELECT CAST({column} AS BLOB) FROM event WHERE seq = ?", (seq,)).get)
        if data[at % len(data)] == byte:
            return
        data[at % len(data)] = byte
        new = "CAST(? AS TEXT)" if column == "body" else "?"
        db.execute(f"UPDATE event SET {column} = {new} WHERE seq = ?", (bytes(data), seq))
    db.close()
    assert verified(folder) == (seq - 1, seq)


@settings(max_examples=120, deadline=None)
@given(arguments=st.dictionaries(surrogates, anything, max_size=3), error=surrogates)
def test_any_event_is_one_printable_line_and_reads_back(open_store: Store, arguments: dict[str, object], error: str):
    """Control characters, bidi marks, lone surrogates in keys, values and errors: escaped, never lost."""
    log = AuditLog(open_store)
    seq = log.record(Event(kind="call.abort", arguments=arguments, error=error))
    body = open_store.read(lambda db: db.execute("SELECT body FROM event WHERE seq = ?", (seq,)).get)
    assert isinstance(body, str)
    assert body.isascii()
    assert body.isprintable()
    assert json.loads(body).get("arguments") == json.loads(json.dumps(arguments))
    (entry,) = log.entries(after=seq - 1)
    assert entry.body.get("error", "") == json.loads(json.dumps(error))  # JSON joins surrogates that make a pair
    assert log.verify().bad is None


LONG = "secret " * 1000


@pytest.mark.parametrize(
    "arguments",
    [{"text": LONG}, {"items": ["short", LONG]}, {"item": {"text": LONG}}, {"deep": [{"text": [LONG]}]}],
    ids=["top", "list", "object", "deep"],
)
def test_long_texts_are_recorded_by_digest_wherever_they_stand(open_store: Store, arguments: dict[str, object]):
    """Manifests may have arrays and objects: their texts are the user's too."""
    log = AuditLog(open_store)
    seq = log.record(Event(kind="call.intent", arguments=arguments))
    (entry,) = log.entries(after=seq - 1)
    assert "secret" not in json.dumps(entry.body)
    assert '"$bytes": 7000' in json.dumps(entry.body)


@pytest.mark.parametrize("character", ["a", "\udcff", "\0", "😀"])
def test_a_long_text_of_any_characters_has_a_digest(open_store: Store, character: str):
    """Lone surrogates too."""
    log = AuditLog(open_store)
    seq = log.record(Event(kind="call.reject", arguments={"text": character * 5000}))
    (entry,) = log.entries(after=seq - 1)
    assert set(entry.body["arguments"]["text"]) == {"$sha256", "$bytes"}


def test_a_trigger_in_the_store_changes_nothing_that_is_written(tmp_path: Path):
    """Whoever can write to the file could have events deleted, or changed, as they come."""
    store = Store(tmp_path)
    audit = AuditLog(store)
    audit.record(Event(kind="boot"))
    store.close()
    with contextlib.closing(apsw.Connection(str(tmp_path / "agentd.db"))) as db:
        db.execute("CREATE TRIGGER lose AFTER INSERT ON event BEGIN DELETE FROM event WHERE seq = new.seq; END")
        db.execute("BEGIN; INSERT INTO event SELECT 99, body, chain FROM event")
        assert not list(db.execute("SELECT * FROM event WHERE seq = 99"))  # the control: it works for others
        db.execute("ROLLBACK")
    store = Store(tmp_path)
    audit = AuditLog(store)
    audit.record(Event(kind="boot"))
    assert [entry.seq for entry in audit.entries(limit=10)] == [1, 2]
    store.close()
