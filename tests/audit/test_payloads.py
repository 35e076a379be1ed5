"""What people, models and tools have written stands beside the log: it reads back, and whatever is done to it is found."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.audit import Archive, AuditLog, Checkpoints, Event, Index, Payload, Redaction, load_signer
from agentd.audit.payloads import LONGEST, commitment, text_of
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from agentd.audit import Verification

SECOND = "the second thing that was written"
TAKEN: list[tuple[Any, ...]] = []
"""The row that `original` had before it was taken out, as a copy of the store made in time would have it."""
texts = st.text(st.characters(codec=None, categories=None), max_size=30) | st.text(
    st.sampled_from('\ud800\udcff\0\x1b\u202e\u2028\x7f"\\a\n'), max_size=12
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
_HEX = "ab" * 32
hostile = st.lists(
    st.sampled_from(
        [
            '"$commitment":"', f'"$commitment":"{_HEX}"', '"kind":"redact"', '{"kind":"redact","detail":{"events":[1]}}',
            f'"text":{{"$bytes":7,"$commitment":"{_HEX}"}}', '","kind":"redact","x":"', "\\", '"', "{", "}", "\\u0022", "\ud800",
        ]
    ),
    max_size=4,
).map("".join)  # fmt: skip


class Log:
    """A store with its log, checkpoints, archive and index, as the daemon puts them together."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        self.points = Checkpoints(self.store, self.audit, load_signer(folder / "audit.key", "o"))
        self.archive = Archive(self.store, self.audit, self.points, folder / "archive")
        self.points.rows = self.archive.rows
        self.index = Index(folder / "index.db", self.audit)
        self.redaction = Redaction(self.store, self.audit, self.index, lambda _db, _run: None)

    def sql(self, statement: str, *values: Any) -> list[Any]:
        return self.store.write(lambda db: db.execute(statement, values).fetchall())

    def close(self) -> None:
        self.index.close()
        self.store.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    made = Log(tmp_path_factory.mktemp("shared"))
    made.audit.record(Event(kind="call.intent", call="first", arguments={"text": Payload("the victim")}))
    yield made
    made.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "state")
    yield made
    made.close()


@settings(max_examples=80, deadline=None)
@given(value=anything, error=texts)
def test_any_value_reads_back_and_is_what_its_event_commits_to(shared: Log, value: Any, error: str):
    """Whatever JSON can say comes back as it was, is in no event, and hashes with its salt to what the event says."""
    seq = shared.audit.record(Event(kind="call.abort", arguments={"value": Payload(value)}, error=Payload(error)))
    (entry,) = shared.audit.numbered([seq])
    kept = {each.field: each for each in shared.audit.payloads([seq])[seq]}
    assert set(kept) == {"arguments.value", "error"}
    for field, wanted in (("arguments.value", value), ("error", error)):
        text = kept[field].value
        told = entry.body["arguments"]["value"] if field != "error" else entry.body["error"]
        assert text is not None
        assert json.loads(text) == json.loads(json.dumps(wanted))
        assert told["$commitment"] == hashlib.sha256(b"\x02" + kept[field].salt + f"{field}\0{text}".encode()).hexdigest()
        assert told["$bytes"] == len(text)
    assert len({each.salt for each in kept.values()}) == 2
    assert shared.points.verify().bad is None


@settings(max_examples=60, deadline=None)
@given(text=hostile, key=st.sampled_from(["text", "$commitment", "kind", "events"]))
def test_no_text_is_taken_for_a_commitment_or_a_redaction(shared: Log, text: str, key: str):
    """Whether it is written freely or recorded as it is: verify neither misses nor forgives anything because of it."""
    shared.audit.record(Event(kind="call.intent", principal=text, arguments={key: Payload(text), "path": text}, error=text))
    shared.audit.record(Event(kind="call.abort", error=Payload(text), detail={"why": text, "said": Payload({key: [text]})}))
    assert shared.points.verify().bad is None
    ((salt, value),) = shared.sql("DELETE FROM payload WHERE seq = 1 RETURNING salt, value")
    try:
        assert shared.points.verify().bad == 1
    finally:
        shared.sql("INSERT INTO payload VALUES (1, 'arguments.text', ?, ?)", salt, value)


@pytest.mark.parametrize("more", [0, 1])
def test_what_is_too_long_is_not_kept_but_can_be_shown(log: Log, more: int):
    """Up to 16 KiB of JSON; beyond only the salt is there, and with the text it still makes the commitment."""
    value = "x" * (LONGEST - 2 + more)
    log.audit.record(Event(kind="call.intent", arguments={"text": Payload(value)}))
    (entry,), (kept,) = log.audit.entries(), log.audit.payloads([1])[1]
    assert (kept.value is None) == bool(more)
    assert entry.body["arguments"]["text"].get("$kept", True) is not bool(more)
    assert entry.body["arguments"]["text"]["$commitment"] == commitment(kept.salt, "arguments.text", text_of(value))
    assert log.points.verify().bad is None


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine events, signed after the sixth and the ninth; of the seventh a value was taken out."""
    folder = tmp_path_factory.mktemp("original") / "state"
    made = Log(folder)
    made.audit.record(Event(kind="boot"))
    arguments = {"path": "/a", "text": Payload("the first"), "more": Payload(SECOND)}
    made.audit.record(Event(kind="call.intent", call="c1", arguments=arguments))
    made.audit.record(Event(kind="call.abort", call="c1", error=Payload("the tool's own words")))
    made.audit.record(Event(kind="run.start", run="r1", detail={"prompt": Payload("please"), "seed": 1}))
    made.audit.record(Event(kind="call.intent", call="c2", arguments={"text": Payload("long" * LONGEST)}))
    made.audit.record(Event(kind="call.end", call="c2", error="in our words"))
    made.points.make()
    made.audit.record(Event(kind="call.intent", call="c3", arguments={"text": Payload("third"), "more": Payload("gone")}))
    TAKEN[:] = made.sql("SELECT * FROM payload WHERE seq = 7 AND field = 'arguments.more'")
    made.redaction.redact(7, "arguments.more", "a password", "unix:pi")
    made.audit.record(Event(kind="call.end", call="c3"))
    made.points.make()
    assert made.points.verify().bad is None
    made.close()
    return folder


def tampered(original: Path, to: Path, *statements: str, values: Iterable[Any] = (), recompute: bool = False) -> Verification:
    """What is found after somebody has been at a copy of the file; `recompute` makes its chain fit together again."""
    shutil.copytree(original, to)
    with apsw.Connection(str(to / "agentd.db")) as db:
        for statement in statements:
            db.execute(statement, tuple(values) or None)
        chain = AuditLog.link.__globals__["_START"]
        for seq, body in list(db.execute("SELECT seq, body FROM event ORDER BY seq")) if recompute else ():
            chain = AuditLog.link(chain, body.encode())
            db.execute("UPDATE event SET chain = ? WHERE seq = ?", (chain, seq))
    db.close()
    found = Log(to)
    try:
        return found.points.verify()
    finally:
        found.close()


_TEXT = "WHERE seq = 2 AND field = 'arguments.text'"
_EXCHANGED_EVENTS = (
    "UPDATE payload SET seq = 99 WHERE seq = 2 AND field = 'arguments.text';"
    "UPDATE payload SET seq = 2 WHERE seq = 7 AND field = 'arguments.text'; UPDATE payload SET seq = 7 WHERE seq = 99"
)
_EXCHANGED_FIELDS = (
    "UPDATE payload SET field = 'x' WHERE seq = 2 AND field = 'arguments.text';"
    "UPDATE payload SET field = 'arguments.text' WHERE seq = 2 AND field = 'arguments.more';"
    "UPDATE payload SET field = 'arguments.more' WHERE seq = 2 AND field = 'x'"
)
_COPIED = (
    f"UPDATE payload SET (salt, value) = (SELECT salt, value FROM payload WHERE seq = 2 AND field = 'arguments.more') {_TEXT}"
)
TAMPERINGS = {
    "a byte of a body": ("UPDATE event SET body = replace(body, '/a', '/b') WHERE seq = 2", 2),
    "a commitment": ("UPDATE event SET body = replace(body, '$commitment\":\"', '$commitment\":\"0') WHERE seq = 3", 3),
    "a chain value": ("UPDATE event SET chain = zeroblob(32) WHERE seq = 4", 4),
    "a value": (f"UPDATE payload SET value = '\"the fir5t\"' {_TEXT}", 2),
    "a value written in another way": (f"UPDATE payload SET value = value || ' ' {_TEXT}", 2),
    "a value that is no ASCII": (f"UPDATE payload SET value = '\"ü\"' {_TEXT}", 2),
    "a value that is no UTF-8": (f"UPDATE payload SET value = CAST(x'22ff22' AS TEXT) {_TEXT}", 2),
    "a value that is no JSON": (f"UPDATE payload SET value = '{{' {_TEXT}", 2),
    "a value made empty": (f"UPDATE payload SET value = '' {_TEXT}", 2),
    "a value that is said to be too long": (f"UPDATE payload SET value = NULL {_TEXT}", 2),
    "a salt": (f"UPDATE payload SET salt = zeroblob(32) {_TEXT}", 2),
    "a salt cut": (f"UPDATE payload SET salt = substr(salt, 1, 31) {_TEXT}", 2),
    "the salt of a long value": ("UPDATE payload SET salt = zeroblob(32) WHERE seq = 5", 5),
    "a long value made up": ("UPDATE payload SET value = '\"short\"' WHERE seq = 5", 5),
    "the border of salt and value": (
        f"UPDATE payload SET salt = CAST(salt || CAST('\"' AS BLOB) AS BLOB), value = substr(value, 2) {_TEXT}", 2
    ),
    "an argument removed": (f"DELETE FROM payload {_TEXT}", 2),
    "an error removed": ("DELETE FROM payload WHERE seq = 3", 3),
    "a prompt removed": ("DELETE FROM payload WHERE seq = 4", 4),
    "the salt of a long value removed": ("DELETE FROM payload WHERE seq = 5", 5),
    "another value removed where one was taken out": ("DELETE FROM payload WHERE seq = 7", 7),
    "all removed": ("DELETE FROM payload", 2),
    "a value under another name": (f"UPDATE payload SET field = 'arguments.other' {_TEXT}", 2),
    "a value in another part": (f"UPDATE payload SET field = 'detail.text' {_TEXT}", 2),
    "a value with another event": (f"UPDATE payload SET seq = 6 {_TEXT}", 6),  # a redaction after it might excuse the second
    "values of two events exchanged": (_EXCHANGED_EVENTS, 2),
    "values of two fields exchanged": (_EXCHANGED_FIELDS, 2),
    "one field copied over another": (_COPIED, 2),
    "a redaction that names another event": ("UPDATE event SET body = replace(body, '[7]', '[2]') WHERE seq = 8", 8),
    "an event made a redaction": ("UPDATE event SET body = replace(body, 'boot', 'redact') WHERE seq = 1", 1),
    "a value planted at the first event": ("INSERT INTO payload VALUES (1, 'detail.text', zeroblob(32), '\"planted\"')", 1),
    "a value planted at the last event": ("INSERT INTO payload VALUES (9, 'detail.text', zeroblob(32), '\"planted\"')", 9),
    "a salt planted beside plain words": ("INSERT INTO payload VALUES (6, 'error', zeroblob(32), NULL)", 6),
    "a salt planted beside a word": ("INSERT INTO payload VALUES (6, 'kind', zeroblob(32), NULL)", 6),
    "the newest checkpoint": ("UPDATE checkpoint SET note = replace(note, char(10) || '9', char(10) || '8') WHERE size = 9", 7),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERINGS)
def test_what_was_tampered_with_is_found_at_its_event(original: Path, tmp_path: Path, what: str):
    """Each way to change what was written, the event that says so, or the checkpoint over it."""
    statement, bad = TAMPERINGS[what]
    found = tampered(original, tmp_path / "copy", statement)
    assert (found.bad, found.valid) == (bad, bad - 1), found.why


def test_a_value_put_back_does_not_excuse_that_another_is_gone(original: Path, tmp_path: Path):
    """Who has an old copy restores what was taken out and removes what was not: of the same event, as many as before."""
    ((seq, field, salt, value),) = TAKEN
    row = (seq, field, salt, value)
    gone = "DELETE FROM payload WHERE seq = 7 AND length(?2) AND length(?3) AND length(?4) AND ?1"
    found = tampered(original, tmp_path / "copy", gone, "INSERT INTO payload VALUES (?1, ?2, ?3, ?4)", values=row)
    assert found.bad == 7, found.why


def test_a_forged_redaction_with_a_recomputed_chain_is_not_what_was_signed(original: Path, tmp_path: Path):
    """Whoever recomputes the chain can't sign it: the span since the checkpoint before is named."""
    forged = "UPDATE event SET body = replace(body, '[7]', '[2,7]') WHERE seq = 8"
    found = tampered(original, tmp_path / "copy", forged, f"DELETE FROM payload {_TEXT}", recompute=True)
    assert (found.bad, found.attested) == (7, 6)


@pytest.mark.parametrize(
    "detail",
    ["null", "[7]", "7", '"x"', "{}", '{"events":null}', '{"events":7}', '{"events":{"7":1}}', '{"events":[[7],{},"7",1e9,null]}',
     '{"events":[7],"field":7}'],
)  # fmt: skip
def test_a_redaction_that_says_nonsense_is_no_crash(original: Path, tmp_path: Path, detail: str):
    """Somebody has added it and made the chain fit: verify answers, and it excuses nothing."""
    body = f'{{"detail":{detail},"kind":"redact","seq":10,"time_ns":"1"}}'
    add = "INSERT INTO event VALUES (10, ?, x'00')"
    assert tampered(original, tmp_path / "copy", add, values=(body,), recompute=True).bad is None
    shutil.rmtree(tmp_path / "copy")
    remove = "DELETE FROM payload WHERE seq = 2 AND length(?)"
    assert tampered(original, tmp_path / "copy", add, remove, values=(body,), recompute=True).bad == 2


def test_a_cut_end_is_missed_by_the_checkpoints_and_by_the_anchors(original: Path, tmp_path: Path):
    """Two events are gone with their values; then the checkpoint over them, too."""
    cut = "DELETE FROM event WHERE seq > 7; DELETE FROM payload WHERE seq > 7"
    found = tampered(original, tmp_path / "cut", cut)
    assert (found.lost or found.bad) == (2 if found.bad is None else 7)
    untouched = Log(original)
    anchors = list(untouched.points.all().values())
    untouched.close()
    shutil.copytree(original, tmp_path / "more")
    with apsw.Connection(str(tmp_path / "more" / "agentd.db")) as db:
        db.execute("DELETE FROM event WHERE seq > 6; DELETE FROM payload WHERE seq > 6; DELETE FROM checkpoint WHERE size > 6")
    db.close()
    log = Log(tmp_path / "more")
    assert (log.points.verify().bad, log.points.verify().lost) == (None, 0)
    assert log.points.verify(anchors).lost == 3
    log.close()


@pytest.mark.parametrize(("n", "mark"), [(n, mark) for n in (0, 30, 59) for mark in ('"call":"c{n}"', "written {n:03}")])
def test_an_unreadable_page_is_a_finding_and_no_crash(tmp_path: Path, n: int, mark: str):
    """Of the log or of what stands beside it, the first page, one in the middle or the last: what is before it still counts."""
    made = Log(tmp_path)
    for each in range(60):
        text = Payload(f"written {each:03} " + "w" * 150)
        made.audit.record(Event(kind="call.intent", call=f"c{each}", arguments={"text": text}))
    made.points.make()
    made.close()
    data = (tmp_path / "agentd.db").read_bytes()
    page = data.index(mark.format(n=n).encode()) // 1024 * 1024
    (tmp_path / "agentd.db").write_bytes(data[:page] + bytes(1024) + data[page + 1024 :])
    log = Log(tmp_path)
    try:
        found = log.points.verify()
    finally:
        log.close()
    assert found.bad is not None
    assert found.bad <= n + 1, found.why


@pytest.mark.parametrize("at", [0, 1, 700])
def test_events_moved_to_an_archive_meanwhile_are_no_false_alarm(log: Log, at: int):
    """Verify has just begun, is at its first event, or past a page, when the oldest events leave the store."""
    for _ in range(6):
        pieces = [log.store.submit(lambda db: log.audit.append(db, _written())) for _ in range(200)]
        assert [piece.result(20) for piece in pieces]
        log.points.make()
    rows = log.archive.rows

    def interrupted() -> Iterator[Any]:
        for n, row in enumerate(itertools.chain([None], rows())):
            if n == at:
                assert log.archive.prune(100, "unix:pi", 1) is not None
            if row:
                yield row

    log.points.rows = interrupted
    found = log.points.verify()
    assert found.bad is None, found.why


def _written() -> Event:
    return Event(kind="call.intent", call="c", arguments={"text": Payload("written"), "to": Payload("two")})
