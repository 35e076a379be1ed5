"""What is taken out is gone from every file, and the log still verifies: with others at work, and over kills."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import apsw
import pytest

from agentd.audit import Archive, AuditLog, Checkpoints, Event, Index, Payload, Redaction, Wanted, load_signer
from agentd.engine.prompt import Said
from agentd.errors import Reason, RequestError, StoreError
from agentd.runs.record import RunRecords
from agentd.runs.run import Run, RunEvent, State
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KILLS = 15


class Log:
    """A store with its log, index and runs, as the daemon puts them together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        self.points = Checkpoints(self.store, self.audit, load_signer(folder / "audit.key", "o"))
        self.archive = Archive(self.store, self.audit, self.points, folder / "archive")
        self.points.rows = self.archive.rows
        self.index = Index(folder / "index.db", self.audit)
        self.runs = RunRecords(self.store)
        self.redaction = Redaction(self.store, self.audit, self.index, self.runs.forget)

    def wrote(self, text: str, call: str = "", **more: Any) -> int:
        event = Event(kind="call.intent", call=call, arguments={"path": "/notes", "text": Payload(text)}, **more)
        return self.audit.record(event)

    def redact(self, seq: int, field: str = "arguments.text", reason: str = "a password") -> Any:
        return self.redaction.redact(seq, field, reason, "unix:pi")

    def close(self) -> None:
        self.index.close()
        self.store.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "state")
    yield made
    made.close()


def holding(folder: Path, *words: str) -> list[tuple[str, str]]:
    """The files below `folder` that have one of these words, as bytes, in any case: which, and where."""
    found = []
    for file in sorted(folder.rglob("*")):
        data = file.read_bytes().lower() if file.is_file() else b""
        found += [(file.name, word) for word in words if word.lower().encode() in data]
    return found


def word() -> str:
    return "s" + secrets.token_hex(10)


def test_it_goes_from_all_events_of_the_call_and_from_no_other(log: Log):
    """Where the same call has the value again; other fields, calls and events keep theirs, and the log says who took it, and why."""
    secret = word()
    asked = log.audit.record(Event(kind="approval.request", call="c1", arguments={"text": Payload(secret), "to": Payload("x")}))
    ran, other = log.wrote(secret, "c1"), log.wrote("mine", "c2")
    assert log.index.find(Wanted(words=secret), 10) == [asked, ran]
    done = log.redact(ran)
    assert done.events == (asked, ran)
    assert {seq: [kept.field for kept in rows] for seq, rows in log.audit.payloads([asked, ran, other]).items()} == {
        asked: ["arguments.to"],
        other: ["arguments.text"],
    }
    told = log.audit.entries(newest_first=True, limit=1)[0].body
    assert (told["kind"], told["principal"]) == ("redact", "unix:pi")
    assert told["detail"] == {"events": [asked, ran], "field": "arguments.text", "reason": "a password"}
    assert log.index.find(Wanted(words=secret), 10) == []
    log.points.make()
    assert (log.points.verify().bad, log.points.verify().attested) == (None, log.audit.size())
    assert holding(log.folder, secret) == []


@pytest.mark.parametrize(
    ("seq", "field", "reason"),
    [(1, "arguments.path", "r"), (1, "nothing", "r"), (1, "", "r"), (99, "arguments.text", "r"), (1, "arguments.text", " "),
     (1, "arguments.text", "r" * 501), (1, "arguments", "r"), (2, "arguments.text", "r")],
)  # fmt: skip
def test_what_can_not_be_taken_out_is_said_and_leaves_no_trace(log: Log, seq: int, field: str, reason: str):
    """A field in plain, none, no event, no reason or too much of one, and what was taken out before."""
    log.wrote("one")
    log.wrote("two")
    log.redact(2)
    with pytest.raises(RequestError) as caught:
        log.redact(seq, field, reason)
    assert caught.value.reason is Reason.BAD_FIELD
    assert log.audit.size() == 3
    assert [kept.value for kept in log.audit.payloads([1])[1]] == ['"one"']


@pytest.mark.parametrize("length", [20, 180, 900, 5000, 16_000])
def test_no_byte_of_it_is_left_in_any_file(log: Log, length: int):
    """Of many values, every second one is taken out while the store, its write-ahead log and its index are in use."""
    written: dict[int, list[str]] = {}
    for n in range(40):
        ends = [word(), word()]  # looked for at both ends of the value
        text = f"{ends[0]} {'x' * (length - 44)} {ends[1]}"
        written[log.wrote(text, f"c{n}")] = ends
        if n % 10 == 0:
            assert log.index.find(Wanted(words=ends[1]), 5)
    taken = {seq: ends for seq, ends in written.items() if seq % 2}
    for seq in taken:
        log.redact(seq)
    left = holding(log.folder, *(end for ends in taken.values() for end in ends))
    assert left == [], f"{len(left)} of {2 * len(taken)} are still there"
    for seq in written.keys() - taken.keys():
        assert written[seq][0] in str(log.audit.payloads([seq])[seq][0].value)
    assert log.points.verify().bad is None


def run_of(log: Log, secret: str, state: State) -> str:
    """A run on record with its words everywhere the daemon puts them; its id."""
    run = Run("r1", "unix:pi", secret, "s1", state, 1, answer=f"done {secret}", transcript=(Said(secret),))
    row = (run.id, run.session, None, state.value, run.to_json())
    event = json.dumps(dataclasses.asdict(RunEvent(1, 1, "text", {"text": secret})))
    log.store.write(lambda db: db.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?)", row).fetchall())
    log.store.write(lambda db: db.execute("INSERT INTO run_event VALUES (?, 1, ?)", (run.id, event)).fetchall())
    log.audit.record(Event(kind="run.start", run=run.id, detail={"prompt": Payload(secret)}))
    log.wrote(secret, "c1", run=run.id)
    log.audit.record(Event(kind="run.end", run=run.id, detail={"answer": Payload(f"done {secret}")}))
    return run.id


@pytest.mark.parametrize(("seq", "field"), [(1, "detail.prompt"), (2, "arguments.text"), (3, "detail.answer")])
def test_prompt_answer_and_transcript_of_its_run_go_too(log: Log, seq: int, field: str):
    """They repeat it: wherever it was found first, no file has it afterwards."""
    secret = word()
    run = run_of(log, secret, State.SUCCEEDED)
    assert log.redact(seq, field).run == run
    assert log.points.verify().bad is None
    kept = [(each.seq, each.field) for rows in log.audit.payloads([1, 2, 3]).values() for each in rows]
    assert not {(1, "detail.prompt"), (3, "detail.answer")} & set(kept), kept
    if field == "arguments.text":  # from prompt and answer it is not known which calls repeat them
        assert holding(log.folder, secret) == []


def test_a_run_that_goes_on_is_refused_and_nothing_is_taken(log: Log):
    """Its transcript would have it again: neither value nor event changes."""
    run_of(log, word(), State.RUNNING)
    with pytest.raises(RequestError) as caught:
        log.redact(2)
    assert caught.value.reason is Reason.RUN_GOING_ON
    assert log.audit.size() == 3
    assert len(log.audit.payloads([2])[2]) == 1


def test_somebody_who_reads_meanwhile_keeps_nothing_alive(log: Log, monkeypatch: pytest.MonkeyPatch):
    """The write-ahead log can't be emptied under a reader: that is said, and it can be done when the reader is gone."""
    monkeypatch.setattr("agentd.store.store._BUSY_MS", 50)
    secret = word()
    seq = log.wrote(secret)
    assert log.index.find(Wanted(words=secret), 1) == [seq]
    reader = apsw.Connection(str(log.folder / "agentd.db"), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN; SELECT count(*) FROM payload").fetchall()
    with pytest.raises(StoreError):
        log.redact(seq)
    reader.close()
    try:
        log.redact(seq)
    except RequestError as e:
        assert "already" in e.message  # noqa: PT017 - saying so is right, as long as nothing is left
    assert holding(log.folder, secret) == []


def child(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Python with this module at hand, as `t`."""
    begin = "import importlib, os, pathlib, signal, sys; t = importlib.import_module('tests.audit.test_redact')\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=os.getcwd())


@pytest.mark.parametrize("moment", ["log.store.empty_wal", "log.index.start_anew"])
def test_a_kill_before_the_files_are_clean_is_made_up_for(tmp_path: Path, moment: str):
    """The redaction is on record, but not all is overwritten yet: after the next start, or when it is asked for again, it is."""
    secret = word()
    code = f"""
log = t.Log(pathlib.Path(sys.argv[1]))
seq = log.wrote(sys.argv[2])
log.index.catch_up()
{moment} = lambda: os.kill(os.getpid(), signal.SIGKILL)
log.redact(seq)
"""
    with child(code, tmp_path, secret) as process:
        assert process.wait(20) == -signal.SIGKILL
    log = Log(tmp_path)
    try:
        assert log.audit.entries(newest_first=True, limit=1)[0].body["kind"] == "redact"
        assert log.points.verify().bad is None
        try:
            log.redact(1)
        except RequestError as e:
            assert "already" in e.message  # noqa: PT017
        assert holding(tmp_path, secret) == []
    finally:
        log.close()


_REDACTING = """
log = t.Log(pathlib.Path(sys.argv[1]))
for _ in range(1000):
    seqs = [log.wrote(t.word() * 20) for _ in range(3)]
    log.points.make()
    print(*seqs, flush=True)
    log.redact(seqs[1])
"""


def test_a_kill_at_any_moment_leaves_a_log_that_verifies(tmp_path: Path):
    """Again and again in the same store: a value is gone if and only if a redaction says so."""
    chance = random.Random(7)
    for _ in range(KILLS):
        with child(_REDACTING, tmp_path) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 6)):
                assert process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.random() * 0.015)
            process.kill()
    log = Log(tmp_path)
    try:
        assert log.points.verify().bad is None
        told = [body["detail"]["events"][0] for _, body in _bodies(log) if body["kind"] == "redact"]
        wrote = {seq for seq, body in _bodies(log) if body["kind"] == "call.intent"}
        assert len(told) >= KILLS // 2
        assert wrote - set(told) == set(log.audit.payloads(sorted(wrote)))
    finally:
        log.close()


def _bodies(log: Log) -> list[tuple[int, dict[str, Any]]]:
    return [(seq, json.loads(body)) for seq, body in log.audit.bodies()]


def test_appending_redacting_and_verifying_at_once_is_no_false_alarm(log: Log):
    """Whatever verify sees half way, it waits for the event that explains it."""
    for n in range(1500):  # more than a page of events, and of what stands beside them
        log.store.submit(lambda db, n=n: log.audit.append(db, _two(n)))
    start, found = log.wrote("the last of the first"), list[Any]()
    log.points.make()
    ended = threading.Event()

    def verify() -> None:
        while not ended.is_set():
            found.append(log.points.verify())

    def append() -> None:
        for n in range(150):
            log.audit.record(_two(n))

    def redact() -> None:
        for seq in (start - 1, start - 9, 2, 250, 499, 500, 501, 502, 700, 999, 1000, 1001):
            log.redact(seq)

    failed = working(append, redact, meanwhile=[verify, verify], ended=ended)
    assert failed == []
    found.append(log.points.verify())
    assert len(found) > 2
    assert {each.why for each in found} == {""}


def test_pruning_while_others_verify_is_no_false_alarm(log: Log):
    """The oldest events leave the store a little at a time, and verify goes on over the archives."""
    for n in range(1500):
        log.store.submit(lambda db, n=n: log.audit.append(db, _two(n)))
        if n % 50 == 0:
            log.points.make()
    log.points.make()
    ended, found = threading.Event(), list[Any]()

    def verify() -> None:
        while not ended.is_set():
            found.append(log.points.verify())

    def prune() -> None:
        for keep in range(1400, 0, -50):
            log.archive.prune(keep, "unix:pi", 1)

    assert working(prune, meanwhile=[verify, verify], ended=ended) == []
    assert {each.why for each in found} == {""}


def _two(n: int) -> Event:
    return Event(kind="call.intent", call=f"c{n}", arguments={"text": Payload(f"text {n}"), "to": Payload(n)})


def working(*works: Callable[[], None], meanwhile: list[Callable[[], None]], ended: threading.Event) -> list[BaseException]:
    """All at once; `meanwhile` go on until the others are done. What any of them has raised."""
    failed: list[BaseException] = []

    def caught(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            failed.append(e)

    others = [threading.Thread(target=caught, args=(each,)) for each in meanwhile]
    threads = [threading.Thread(target=caught, args=(each,)) for each in works]
    for thread in (*others, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    ended.set()
    for thread in others:
        thread.join(60)
    return failed
