"""Finding events: the index says what a scan of the whole log would say, and is made anew whenever it does not fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.audit import AuditLog, Event, FileTouched, Index, ToolIdentity, Verdict, Wanted
from agentd.errors import AgentdError, Reason, RequestError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOOLS, WHO, WORDS = ("files.read", "files.write"), ("unix:pi", "token:phone"), ("milk", "bread", "eggs", "Öl")


class Log:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        self.index = Index(folder / "index.db", self.audit)

    def add(self, n: int, **more: Any) -> None:
        tool = ToolIdentity(name=TOOLS[n % 2], version="1", digest="d", effect="files")
        files = (FileTouched(operation="change", path=f"/home/{n % 5}", after="a"),) if n % 2 else ()
        event = Event(
            kind="call.end" if n % 3 else "call.deny",
            principal=WHO[n % 2],
            call=f"c{n}",
            run=f"r{n // 10}",
            tool=tool,
            files=files,
            decision=Verdict(verdict="deny", reason="no grant") if n % 3 == 0 else None,
            arguments={"text": f"{WORDS[n % 4]} and {WORDS[n % 3]}"},
        )
        self.audit.record(event.model_copy(update=more))

    def close(self) -> None:
        self.index.close()
        self.store.close()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    made = Log(tmp_path_factory.mktemp("log"))
    for n in range(120):
        made.add(n)
    yield made
    made.close()


def scanned(log: Log, wanted: Wanted) -> list[int]:
    """The same by looking at every event."""
    found = []
    for entry in log.audit.entries(limit=10_000):
        body = entry.body
        own = {**body, "tool": body.get("tool", {}).get("name", ""), "decision": body.get("decision", {}).get("verdict", "")}
        paths = [os.fsencode(file["path"]) for file in body.get("files", [])]
        text = json.dumps(body.get("arguments", {}), ensure_ascii=False).lower()
        if (
            all(str(own.get(name, "")) in values for name, values in wanted.fields.items())
            and (not wanted.path or wanted.path in paths)
            and all(word.lower() in text for word in wanted.words.split())
            and (not wanted.since_ns or int(body["time_ns"]) >= wanted.since_ns)
            and (not wanted.until_ns or int(body["time_ns"]) < wanted.until_ns)
            and (not wanted.after or (entry.seq < wanted.after if wanted.newest_first else entry.seq > wanted.after))
        ):
            found.append(entry.seq)
    return found[::-1] if wanted.newest_first else found


fields = st.fixed_dictionaries(
    {},
    optional={
        "tool": st.lists(st.sampled_from((*TOOLS, "none")), min_size=1, max_size=2).map(tuple),
        "principal": st.sampled_from(WHO).map(lambda who: (who,)),
        "kind": st.sampled_from(("call.end", "call.deny")).map(lambda kind: (kind,)),
        "run": st.sampled_from(("r0", "r7", "")).map(lambda run: (run,)),
        "decision": st.just(("deny",)),
    },
)


@settings(max_examples=200, deadline=None)
@given(
    fields,
    st.lists(st.sampled_from(WORDS), max_size=2).map(" ".join),
    st.sampled_from((b"", b"/home/1", b"/home/none")),
    st.integers(0, 130),
    st.booleans(),
    st.sampled_from((0, 40, 90)),
    st.sampled_from((0, 40, 90)),
)
def test_the_index_finds_what_a_scan_finds(
    log: Log, named: dict[str, tuple[str, ...]], words: str, path: bytes, after: int, newest: bool, first: int, last: int
):
    """Fields, words, paths and times together, in both directions, from any place."""
    times = {n: int(log.audit.numbered([n])[0].body["time_ns"]) for n in (40, 90)}
    wanted = Wanted(named, words, path, times.get(first, 0), times.get(last, 0), after, newest)
    assert log.index.find(wanted, 10_000) == scanned(log, wanted)
    assert log.index.find(wanted, 3) == scanned(log, wanted)[:3]
    fitting = {entry.seq for entry in log.audit.entries(limit=10_000) if wanted.fits(entry.body)}
    assert fitting >= set(scanned(log, wanted))
    assert not wanted.after or fitting == set(scanned(log, replace(wanted, after=0)))


@pytest.mark.parametrize(
    "words", ['"', "milk*", "milk OR bread", "NEAR(a b)", "text:milk", "-milk", "()", "*", "a\0b", "\ud800", "''; DROP"]
)
def test_words_are_words_and_no_language(log: Log, words: str):
    """Whatever somebody looks for."""
    assert isinstance(log.index.find(Wanted(words=words), 10), list)


def test_an_unknown_field_is_named(log: Log):
    with pytest.raises(RequestError, match="'body'") as caught:
        log.index.find(Wanted(fields={"body": ("x",)}), 10)
    assert caught.value.reason is Reason.BAD_FIELD


# -- the index itself may be lost


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "state")
    for n in range(30):
        made.add(n)
    made.index.catch_up()
    yield made
    made.close()


def denied(log: Log) -> list[int]:
    return log.index.find(Wanted(fields={"decision": ("deny",)}), 1000)


@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "older version"])
def test_an_index_that_is_lost_or_damaged_is_made_anew(own: Log, damage: str):
    before, file = denied(own), own.folder / "index.db"
    own.index.close()
    for end in ("-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    match damage:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "garbage":
            file.write_bytes(os.urandom(20_000))
        case _:
            data = bytearray(file.read_bytes())
            data[60:64] = (99).to_bytes(4, "big")  # user_version, https://sqlite.org/fileformat2.html
            file.write_bytes(data)
    own.index = Index(file, own.audit)
    try:
        found = denied(own)
    except AgentdError:  # it may say so once
        found = denied(own)
    assert found == before
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_index_of_a_log_that_was_longer_is_made_anew(own: Log, tmp_path: Path):
    """An older store was put back, and the index stayed."""
    own.close()
    shutil.copytree(own.folder, tmp_path / "older")
    longer = Log(own.folder)
    for n in range(30, 60):
        longer.add(n)
    longer.index.catch_up()
    longer.close()
    (tmp_path / "older" / "index.db").unlink()
    shutil.copy(own.folder / "index.db", tmp_path / "older" / "index.db")
    older = Log(tmp_path / "older")
    assert max(denied(older)) <= 30
    older.close()
    own.index, own.store = Index(tmp_path / "x", own.audit), Store(tmp_path / "y")


def test_paths_that_are_no_text_are_found(own: Log):
    own.add(1, files=(FileTouched(operation="change", path="/home/\udcff\udcfe", after="a"),))
    assert own.index.find(Wanted(path=b"/home/\xff\xfe"), 5) == [31]


def test_a_damaged_event_is_indexed_as_such(own: Log):
    own.index.close()
    own.store.write(lambda db: db.execute("UPDATE event SET body = 'no json' WHERE seq = 7"))
    (own.folder / "index.db").unlink()
    assert own.index.find(Wanted(fields={"kind": ("damaged",)}), 5) == [7]
