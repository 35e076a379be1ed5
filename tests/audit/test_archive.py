"""The oldest part of the log in files: it still verifies from its first event on, and only what was signed is moved."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import apsw
import pytest
import zstandard

from agentd.audit import Archive, AuditLog, Checkpoints, Event, Index, Wanted, load_signer
from agentd.audit.tree import includes
from agentd.errors import RequestError, StoreError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Log:
    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, folder / "archive"
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        self.points = Checkpoints(self.store, self.audit, load_signer(folder / "audit.key", "o"))
        self.archive = Archive(self.store, self.audit, self.points, self.files)
        self.points.rows = self.archive.rows
        self.index = Index(folder / "index.db", self.audit)

    def add(self, count: int) -> None:
        for _ in range(count):
            self.audit.record(Event(kind="call.end", call=f"c{self.audit.size()}", arguments={"text": "ü\n"}))
        self.points.make()

    def prune(self, keep: int, least: int = 1) -> Any:
        return self.archive.prune(keep, "unix:pi", least)

    def verified(self) -> tuple[int, int | None, int, int]:
        found = self.points.verify()
        return found.valid, found.bad, found.attested, found.absent

    def close(self) -> None:
        self.index.close()
        self.store.close()


def lines_of(file: Path) -> list[bytes]:
    with file.open("rb") as packed:
        return zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines(keepends=True)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "state")
    yield made
    made.close()


def test_what_was_moved_still_verifies_from_the_first_event_on(log: Log):
    """Twice, with events between; numbers, chain and tree go on."""
    log.add(40)
    log.add(40)
    moved = log.prune(keep=30)
    assert (moved.first, moved.last, moved.name) == (1, 40, "1-40.jsonl.zst")
    assert [entry.seq for entry in log.audit.entries(limit=1)] == [41]
    log.add(20)
    log.add(20)
    moved = log.prune(keep=20)
    assert (moved.first, moved.last) == (41, 101)  # the event of the first pruning is one of them
    log.points.make()
    size = log.audit.size()
    assert log.verified() == (size, None, size, 0)
    lines = lines_of(log.files / "1-40.jsonl.zst")
    assert [json.loads(line)["event"]["seq"] for line in lines] == list(range(1, 41))
    assert (log.files / "1-40.jsonl.zst").stat().st_mode & 0o777 == 0o600
    prunes = [entry.body for entry in log.audit.entries(limit=1000) if entry.body["kind"] == "prune"]
    assert prunes[-1]["detail"]["last"] == 101
    assert prunes[-1]["principal"] == "unix:pi"


def test_nothing_is_moved_that_is_new_few_or_not_signed(log: Log):
    log.add(50)
    assert log.prune(keep=50) is None
    assert log.prune(keep=10, least=100) is None
    for _ in range(50):
        log.audit.record(Event(kind="call.end"))
    moved = log.prune(keep=10)
    assert moved.last == 50
    assert log.prune(keep=1) is None


@pytest.mark.parametrize("change", ["body", "with its chain"])
def test_what_does_not_verify_is_not_moved(log: Log, change: str):
    """Evidence stays where it is."""
    log.add(20)
    log.add(20)
    log.store.write(lambda db: db.execute("UPDATE event SET body = replace(body, 'call.end', 'call.bad') WHERE seq = 7"))
    if change == "with its chain":
        chain = log.audit.start
        for seq, body, _ in list(log.audit.rows()):
            chain = log.audit.link(chain, body)
            log.store.write(lambda db, row=(chain, seq): db.execute("UPDATE event SET chain = ? WHERE seq = ?", row))  # type: ignore[misc]
    with pytest.raises(RequestError, match="not what was written and signed"):
        log.prune(keep=5)
    assert log.audit.entries(limit=1)[0].seq == 1
    assert os.listdir(log.files) == []


@pytest.mark.parametrize("damage", ["gone", "cut", "garbage", "changed", "a line less", "a line more", "packed anew"])
def test_a_file_that_is_not_what_it_was_is_found(log: Log, damage: str):
    """What is missing is said; what was changed is no part of the log; what comes after is verified all the same."""
    log.add(40)
    log.add(40)
    log.prune(keep=30)
    log.points.make()
    file, size = log.files / "1-40.jsonl.zst", log.audit.size()
    data = file.read_bytes()
    lines = lines_of(file)
    match damage:
        case "gone":
            file.unlink()
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "garbage":
            file.write_bytes(os.urandom(1000))
        case "changed":
            lines[8] = lines[8].replace(b"call.end", b"call.bad")
            file.write_bytes(zstandard.compress(b"".join(lines)))
        case "a line less":
            file.write_bytes(zstandard.compress(b"".join(lines[:-1])))
        case "a line more":
            file.write_bytes(zstandard.compress(b"".join([*lines, lines[-1]])))
        case _:
            file.write_bytes(zstandard.compress(b"".join(lines), level=1))
    valid, bad, attested, absent = log.verified()
    if damage == "changed":
        assert bad == 9
    else:
        assert (valid, bad, attested) == (size, None, size)
        assert absent == 40


def test_a_segment_that_was_changed_in_the_store_is_found(log: Log):
    """Its tree is that of a checkpoint, and the chain goes on after it."""
    log.add(40)
    log.add(40)
    log.prune(keep=30)
    log.points.make()
    (log.files / "1-40.jsonl.zst").unlink()
    for change in ("chain = zeroblob(32)", "peaks = zeroblob(64)"):
        before = log.store.read(lambda db: next(iter(db.execute("SELECT chain, peaks FROM segment"))))
        log.store.write(lambda db, change=change: db.execute(f"UPDATE segment SET {change}"))  # type: ignore[misc]
        assert log.verified()[1] is not None
        log.store.write(lambda db, row=before: db.execute("UPDATE segment SET chain = ?, peaks = ?", row))  # type: ignore[misc]
    assert log.verified()[1] is None


def test_a_kill_between_file_and_store_loses_nothing(tmp_path: Path):
    """The file is written again the next time."""
    child = os.fork()
    if child == 0:
        log = Log(tmp_path / "state")
        log.add(40)
        log.add(10)
        write = Store.write

        def killed(store: Store, do: Any) -> Any:
            if do.__name__ == "commit":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(store, do)

        Store.write = killed  # type: ignore[method-assign]
        log.prune(keep=5)
        os._exit(1)
    os.waitpid(child, 0)
    log = Log(tmp_path / "state")
    assert (log.files / "1-40.jsonl.zst").exists()
    assert log.verified() == (50, None, 50, 0)
    assert log.prune(keep=5).last == 40
    log.points.make()
    assert log.verified() == (51, None, 51, 0)
    log.close()


def test_a_folder_that_can_not_be_written_is_an_error_and_moves_nothing(log: Log):
    log.add(40)
    log.add(40)
    log.files.write_text("in the way")
    with pytest.raises(StoreError):
        log.prune(keep=5)
    assert log.audit.entries(limit=1)[0].seq == 1


def test_what_was_moved_is_found_no_more_and_the_rest_is(log: Log):
    log.add(40)
    log.add(40)
    assert len(log.index.find(Wanted(words="ü"), 1000)) == 80
    log.index.forget(log.prune(keep=30).last)
    assert log.index.find(Wanted(words="ü"), 1000) == list(range(41, 81))
    assert len(log.audit.numbered(log.index.find(Wanted(fields={"kind": ("call.end",)}), 1000))) == 40


def test_somebody_who_removes_old_events_without_an_archive_is_found(log: Log):
    log.add(40)
    log.close()
    db = apsw.Connection(str(log.folder / "agentd.db"))
    db.execute("DELETE FROM event WHERE seq <= 20")
    db.close()
    again = Log(log.folder)
    assert again.verified()[1] == 1
    again.close()
    log.store, log.index = Store(log.folder.parent / "other"), Index(log.folder.parent / "x", log.audit)


def test_proofs_of_what_was_moved_need_the_file(log: Log):
    log.add(40)
    log.add(40)
    point = log.points.verifier.open(log.points.latest())
    log.prune(keep=30)
    for seq in (5, 40, 41, 80):
        own, proof = log.points.prove_inclusion(seq, 80)
        assert includes(own, seq - 1, 80, proof, point.root)
    (log.files / "1-40.jsonl.zst").unlink()
    with pytest.raises(RequestError, match="archive that is not there"):
        log.points.prove_inclusion(60, 80)
