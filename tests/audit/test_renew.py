"""A log that is not what was signed is put away, and a new one begins: over kills, damage and haste there is always one of the two."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import apsw
import pytest
import zstandard

from agentd.audit import Archive, AuditLog, Checkpoints, Event, Index, Payload, Renewal, Wanted, load_signer, settle_key
from agentd.audit.upkeep import Upkeep
from agentd.errors import Reason, RequestError, StoreError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KILLS = 15
PAGE = 1024  # bytes, of a new store


class Log:
    """A store with its log and key, opened as the daemon does: settled, loaded, and looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key_file = folder, folder / "audit.key"
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        settle_key(self.key_file, self.audit)
        self.points = Checkpoints(self.store, self.audit, load_signer(self.key_file, "pi/log"))
        self.archive = Archive(self.store, self.audit, self.points, folder / "archive")
        self.points.rows = self.archive.rows
        self.index = Index(folder / "index.db", self.audit)
        Upkeep(self.audit, self.points, self.index, self.archive, 1000, None).look()
        parts = (self.store, self.audit, self.points, self.index, self.archive, self.key_file, folder / "archive")
        self.renewal = Renewal(*parts)

    def fill(self, count: int, size: int = 20) -> Log:
        for n in range(count):
            text = Payload(f"text {n} " + "x" * size)
            self.audit.record(Event(kind="call.intent", call=f"c{n}", arguments={"text": text}))
        self.points.make()
        return self

    def renew(self, reason: str = "a test") -> Any:
        return self.renewal.renew(reason, "unix:pi")

    def archived(self, name: str) -> list[dict[str, Any]]:
        with (self.folder / "archive" / name).open("rb") as packed:
            return [json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines()]

    def is_whole(self, *, origin: str) -> bool:
        """Nothing is wrong with it, its key is that of its name, on disk as in use, and it goes on."""
        assert str(load_signer(self.key_file).verifier) == str(self.points.verifier)
        assert not self.key_file.with_name("audit.key.next").exists()
        self.audit.record(Event(kind="call.end", call="goes on"))
        self.points.make()
        found = self.points.verify()
        assert (found.bad, found.lost, found.attested) == (None, 0, self.audit.size()), found.why
        self.audit.require_open()
        return self.points.verifier.name == origin

    def close(self) -> None:
        self.index.close()
        self.store.close()


def edited(folder: Path, *statements: str) -> None:
    """Somebody has been at the file while it was closed."""
    with apsw.Connection(str(folder / "agentd.db")) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def cut(folder: Path, last: int) -> None:
    edited(folder, f"DELETE FROM event WHERE seq > {last}; DELETE FROM payload WHERE seq > {last}")


def damaged(folder: Path, mark: bytes, damage: Callable[[bytes], bytes]) -> None:
    """One page of the store's file, the first that has `mark` in it, is no more what it was."""
    file = folder / "agentd.db"
    data = file.read_bytes()
    start = data.index(mark) // PAGE * PAGE
    file.write_bytes(data[:start] + damage(data[start : start + PAGE]) + data[start + PAGE :])


def test_a_log_whose_end_is_missing_is_closed_and_a_new_one_takes_its_place(tmp_path: Path):
    """All that is left of the old one is in a file, with what was written; its private key is nowhere; the new one knows both."""
    Log(tmp_path).fill(9).close()
    secret, old = (tmp_path / "audit.key").read_bytes()[:32], str(load_signer(tmp_path / "audit.key").verifier)
    cut(tmp_path, 6)
    log = Log(tmp_path)
    with pytest.raises(StoreError) as caught:
        log.audit.require_open()
    assert caught.value.reason is Reason.AUDIT_CLOSED
    assert log.points.make() == log.points.latest()  # nothing more is signed
    assert max(log.points.all()) == 9
    done = log.renew()
    assert (done.origin, done.events) == ("pi/log/2", 7)  # one more says that it was closed
    heading, *lines = log.archived(done.archive)
    assert (heading["key"], len(heading["checkpoints"])) == (old, 1)
    assert [line["event"]["seq"] for line in lines] == list(range(1, 8))
    assert [json.loads(line["payloads"][0]["value"])[:6] for line in lines[:6]] == [f"text {n}" for n in range(6)]
    (first, *_) = log.audit.entries()
    told = first.body["detail"]
    assert (first.body["kind"], first.body["principal"], told["renews"], told["old_key"]) == ("renew", "unix:pi", "pi/log", old)
    assert told["key"] == str(log.points.verifier) != old
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and secret in file.read_bytes()]
    assert log.index.find(Wanted(fields={"kind": ("call.intent",)}), 10) == []
    assert log.is_whole(origin="pi/log/2")
    log.close()
    log = Log(tmp_path)
    assert log.is_whole(origin="pi/log/2")
    log.close()


def test_each_new_log_has_the_next_number_and_a_file_of_its_own(tmp_path: Path):
    """Renewed again and again, over restarts: no file of a former one is lost."""
    for number in range(2, 5):
        log = Log(tmp_path).fill(3)
        done = log.renew()
        assert log.is_whole(origin=f"pi/log/{number}")
        assert len(list((tmp_path / "archive").iterdir())) == number - 1
        assert len(log.archived(done.archive)) == done.events + 1
        log.close()


@pytest.mark.parametrize("reason", ["", "  ", "r" * 501])
def test_without_a_reason_nothing_changes(tmp_path: Path, reason: str):
    """The log stays as it is, with its key."""
    log = Log(tmp_path).fill(2)
    with pytest.raises(RequestError):
        log.renew(reason)
    assert log.audit.size() == 2
    assert log.is_whole(origin="pi/log")
    log.close()


def test_without_room_for_the_old_log_it_stays(tmp_path: Path):
    """Its file can't be written: an error that says so, and the log goes on with its old key, also after a restart."""
    log = Log(tmp_path).fill(2)
    (tmp_path / "archive").write_text("in the way")
    with pytest.raises(StoreError):
        log.renew()
    assert log.audit.size() == 2
    log.close()
    log = Log(tmp_path)
    assert log.is_whole(origin="pi/log")
    log.close()


def test_two_who_renew_at_once_leave_one_log_with_its_key(tmp_path: Path):
    """The second begins when the first has written the old log out: the key on disk is that of the log in the end."""
    log = Log(tmp_path).fill(40)
    latest, others = log.points.latest, list[threading.Thread]()

    def second() -> None:
        with contextlib.suppress(RequestError, StoreError):  # it may as well be refused
            log.renew("the second")

    def interrupted() -> str:
        if not others:
            others.append(threading.Thread(target=second))
            others[0].start()
            others[0].join(1)  # or it waits for the first one
        return latest()

    log.points.latest = interrupted  # type: ignore[method-assign]
    with contextlib.suppress(RequestError, StoreError):
        log.renew("the first")
    others[0].join(20)
    told = log.audit.entries(limit=1)[0].body
    assert told["kind"] == "renew"
    assert str(load_signer(log.key_file).verifier) == told["detail"]["key"]
    assert log.is_whole(origin=log.points.verifier.name)
    log.close()


def _flipped(page: bytes) -> bytes:
    return bytes(byte ^ 0x55 for byte in page)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeroed": lambda page: bytes(len(page)),
    "flipped": _flipped,
    "header flipped": lambda page: _flipped(page[:12]) + page[12:],
    "pointers flipped": lambda page: page[:8] + _flipped(page[8:32]) + page[32:],
    "rest flipped": lambda page: page[:32] + _flipped(page[32:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("n", [0, 100, 199])
def test_damaged_pages_of_the_log_do_not_keep_it_from_being_renewed(tmp_path: Path, n: int, damage: str):
    """The first events, some in the middle, the newest: what can be read is in the file, and the new log is whole."""
    Log(tmp_path).fill(200).close()
    damaged(tmp_path, f'"call":"c{n}"'.encode(), DAMAGES[damage])
    log = Log(tmp_path)
    done = log.renew()
    found = [line["event"] for line in log.archived(done.archive)[1:] if "event" in line]
    calls = {event.get("call") for event in found}
    assert len([event for event in found if event.get("call")]) == len(calls - {None}) >= 150  # none of them twice
    assert log.is_whole(origin="pi/log/2")
    log.close()
    log = Log(tmp_path)
    assert log.is_whole(origin="pi/log/2")
    log.close()


@pytest.mark.parametrize("mark", [b"text 3 ", b"pi/log\n12\n"], ids=["payload", "checkpoint"])
@pytest.mark.parametrize("damage", ["zeroed", "flipped"])
def test_damaged_pages_beside_the_log_do_not_either(tmp_path: Path, mark: bytes, damage: str):
    """Of what was written, or of the checkpoints: these are what a log is closed for."""
    log = Log(tmp_path)
    for _ in range(20):
        log.fill(6)
    log.close()
    damaged(tmp_path, mark, DAMAGES[damage])
    log = Log(tmp_path)
    done = log.renew()
    assert done.events >= 120
    assert log.is_whole(origin="pi/log/2")
    log.close()


def test_a_newest_event_that_can_not_be_read_does_not_keep_it_from_being_renewed(tmp_path: Path):
    """Its number is there, and the pages that its text goes on in are not."""
    log = Log(tmp_path).fill(5)
    log.audit.record(Event(kind="boot", detail={"tools": {f"tool{n}": "d" * 64 for n in range(60)}}))
    log.points.make()
    log.close()
    data = (tmp_path / "agentd.db").read_bytes()
    start = data.index(b'"tool40"') // PAGE * PAGE  # a page that begins with the number of the next one
    damaged(tmp_path, b'"tool40"', lambda page: b"\x7f\xff\xff\xff" + page[4:])
    assert int.from_bytes(data[start : start + 4], "big") > 0
    log = Log(tmp_path)
    assert log.renew().events >= 5
    assert log.is_whole(origin="pi/log/2")
    log.close()


@pytest.mark.parametrize(
    "change",
    ["UPDATE payload SET value = CAST(x'22ff22' AS TEXT) WHERE seq = 2", "UPDATE payload SET value = 'ü' WHERE seq = 2",
     "UPDATE event SET body = CAST(x'22ff22' AS TEXT) WHERE seq = 2", "UPDATE event SET body = '[]' WHERE seq = 2",
     "UPDATE event SET body = '{\"time_ns\":\"x\"}' WHERE seq = 4", "UPDATE event SET body = '{\"detail\":1,\"kind\":\"renew\"}'",
     "UPDATE event SET seq = -5 WHERE seq = 2", "UPDATE payload SET field = CAST(x'ff' AS TEXT) WHERE seq = 2",
     "UPDATE checkpoint SET note = 'x'", "UPDATE checkpoint SET note = CAST(x'ff' AS TEXT)", "DELETE FROM event"],
)  # fmt: skip
def test_whatever_somebody_has_written_into_it_it_can_be_renewed(tmp_path: Path, change: str):
    """Text that is none, events that are none, numbers below the first."""
    Log(tmp_path).fill(4).close()
    edited(tmp_path, change)
    log = Log(tmp_path)
    log.renew()
    assert log.is_whole(origin="pi/log/2")
    log.close()


def test_numbers_that_go_backwards_are_read_once(tmp_path: Path):
    """A flipped bit in the number of an event must not make the reading begin again, without an end."""
    log = Log(tmp_path)
    for piece in [log.store.submit(lambda db: log.audit.append(db, Event(kind="boot"))) for _ in range(700)]:
        piece.result(20)
    log.close()
    file = tmp_path / "agentd.db"
    data = file.read_bytes()
    number = bytes([0x80 | 500 >> 7, 500 & 0x7F])  # as SQLite writes it, before the record's header
    at = data.index(b'"seq":500,')
    place = data.rindex(number + b"\x05\x00", 0, at)
    assert at - place < 400
    file.write_bytes(data[:place] + b"\x80\x00" + data[place + 2 :])
    log = Log(tmp_path)
    assert len(list(itertools.islice(log.audit.readable(700), 3000))) <= 700
    log.close()


def test_a_key_without_its_log_is_removed_and_one_with_it_is_used(tmp_path: Path):
    """As a kill leaves them, before and after the moment from which the new log is the one."""
    log = Log(tmp_path).fill(2)
    log.close()
    before = (tmp_path / "audit.key").read_bytes()
    load_signer(tmp_path / "audit.key.next", "pi/log/2")
    log = Log(tmp_path)
    assert log.is_whole(origin="pi/log")
    assert (tmp_path / "audit.key").read_bytes() == before
    log.renew()
    log.close()
    after = tmp_path / "audit.key"
    after.rename(tmp_path / "audit.key.next")
    after.write_bytes(before)
    log = Log(tmp_path)
    assert log.is_whole(origin="pi/log/2")
    log.close()


_RENEWING = """
import importlib, pathlib, sys
t = importlib.import_module('tests.audit.test_renew')
log = t.Log(pathlib.Path(sys.argv[1])).fill(30)
while True:
    print(log.points.verifier.name, flush=True)
    log.renew()
"""


def test_a_kill_at_any_moment_leaves_the_old_log_or_the_new_one(tmp_path: Path):
    """Again and again in the same store: it opens with the right key, verifies, and no log before it was lost."""
    chance = random.Random(11)
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", _RENEWING, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd()
        ) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 3)):
                assert process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.random() * 0.03)
            process.send_signal(signal.SIGKILL)
        log = Log(tmp_path)
        try:
            assert log.audit.closed == ""
            first, *_ = log.audit.entries(limit=1)
            name = log.points.verifier.name
            if name != "pi/log":
                assert first.body["kind"] == "renew"
                assert first.body["detail"]["key"] == str(load_signer(log.key_file).verifier)
                log.archived(first.body["detail"]["archive"])
            assert log.is_whole(origin=name)
        finally:
            log.close()
    number = int(name.removeprefix("pi/log/"))
    assert number > 2
    assert len(list((tmp_path / "archive").glob("closed-*.zst"))) >= number - 1


def test_pruning_that_was_under_way_takes_nothing_from_the_new_log(tmp_path: Path):
    """The oldest events are being written to a file when the log is renewed, and the new one grows past their numbers."""
    log = Log(tmp_path).fill(30)
    write = log.archive._write

    def interrupted(*arguments: Any) -> Any:
        segment = write(*arguments)
        log.renew()
        log.fill(40)
        return segment

    log.archive._write = interrupted  # type: ignore[method-assign]
    log.audit.record(Event(kind="boot"))
    with pytest.raises(RequestError, match="can't be pruned"):
        log.archive.prune(1, "unix:pi", 1)
    assert log.audit.size() == 41
    assert log.is_whole(origin="pi/log/2")
    log.close()
