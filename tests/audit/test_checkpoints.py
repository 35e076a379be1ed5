"""What signed checkpoints and anchors find that a chain can't: a chain recomputed, an end cut off, an older store put back."""

from __future__ import annotations

import shutil
import socket
from typing import TYPE_CHECKING

import apsw
import pytest

from agentd.audit import AuditLog, Checkpoints, Event, load_signer
from agentd.audit.anchors import FileAnchor, JournaldAnchor, read_notes
from agentd.audit.checkpoints import EVERY_EVENTS
from agentd.audit.log import _START, _link
from agentd.audit.tree import includes, is_consistent
from agentd.errors import RequestError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from agentd.audit.anchors import Anchor


class Log:
    def __init__(self, folder: Path, anchors: Sequence[Anchor] = ()) -> None:
        self.folder, self.closed = folder, False
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        signer = load_signer(folder / "audit.key", "agentd.local/test")
        self.points = Checkpoints(self.store, self.audit, signer, anchors)

    def add(self, count: int) -> None:
        for n in range(count):
            self.audit.record(Event(kind="call.end", call=f"c{n}"))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.store.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "state", [FileAnchor(tmp_path / "anchor")])
    yield made
    made.close()


def notes(log: Log) -> list[str]:
    return read_notes((log.folder.parent / "anchor").read_text())


def edited(log: Log, *statements: str) -> Log:
    """The same log after somebody has been at its file while it was closed."""
    log.close()
    db = apsw.Connection(str(log.folder / "agentd.db"))
    for statement in statements:
        db.execute(statement)
    db.close()
    return Log(log.folder)


def rechained(log: Log) -> Log:
    """As somebody would leave it who knows how the chain is made."""
    log.close()
    db = apsw.Connection(str(log.folder / "agentd.db"))
    chain = _START
    for seq, body in list(db.execute("SELECT seq, CAST(body AS BLOB) FROM event ORDER BY seq")):
        chain = _link(chain, body)
        db.execute("UPDATE event SET chain = ? WHERE seq = ?", (chain, seq))
    db.close()
    return Log(log.folder)


def test_a_checkpoint_covers_all_there_is_and_the_next_one_continues_it(log: Log):
    """Made from the events after the one before only; the roots are those of the whole tree all the same."""
    for size in (1, 2, 9, 300, 301):
        log.add(size - log.audit.size())
        point = log.points.verifier.open(log.points.make())
        assert point.size == size
    found = log.points.verify(notes(log))
    assert (found.valid, found.bad, found.attested, found.anchored, found.lost) == (301, None, 301, 301, 0)
    assert len(notes(log)) == 5
    assert log.points.make() == log.points.latest()  # nothing new: nothing signed, nothing sent
    assert len(notes(log)) == 5


def test_one_is_due_when_there_is_enough_new(log: Log):
    log.add(1)
    log.points.make()
    assert not log.points.is_due()
    log.add(EVERY_EVENTS - 1)
    assert not log.points.is_due()
    log.add(1)
    assert log.points.is_due()
    log.points._made_s -= 3601
    log.points.make()
    assert not log.points.is_due()
    log.add(1)
    log.points._made_s -= 3601
    assert log.points.is_due()


def test_what_is_newer_is_valid_and_not_signed_yet(log: Log):
    log.add(5)
    log.points.make()
    log.add(3)
    found = log.points.verify(notes(log))
    assert (found.valid, found.attested, found.anchored) == (8, 5, 5)


def test_a_row_that_was_changed_with_the_whole_chain_is_found(log: Log):
    """The chain fits; what was signed does not."""
    log.add(10)
    log.points.make()
    log.add(10)
    log.points.make()
    changed = edited(log, """UPDATE event SET body = replace(body, '"c4"', '"c5"') WHERE seq = 15""")
    changed = rechained(changed)
    assert changed.audit.verify().bad is None
    found = changed.points.verify()
    assert (found.valid, found.bad, found.attested) == (10, 11, 10)
    assert "11 to 20 are not those that were signed" in found.why
    changed.close()


def test_an_end_that_was_cut_off_is_found_by_an_anchor(log: Log):
    """With the checkpoints in the store, or without: whoever cuts may cut those, too."""
    log.add(20)
    log.points.make()
    kept = notes(log)
    cut = edited(log, "DELETE FROM event WHERE seq > 12")
    assert cut.audit.verify().bad is None
    assert cut.points.verify().lost == 8
    cut = edited(cut, "DELETE FROM checkpoint")
    assert cut.points.verify().lost == 0
    found = cut.points.verify(kept)
    assert (found.valid, found.bad, found.lost) == (12, None, 8)
    assert "8 events are missing" in cut.points.contradiction(kept)
    cut.close()


def test_an_older_store_that_was_put_back_is_found_by_an_anchor(log: Log, tmp_path: Path):
    """Also if it has gone on since: what it says now is not what was signed then."""
    log.add(10)
    log.points.make()
    log.store.write(lambda db: db.execute("SELECT 1"))
    log.close()
    shutil.copytree(log.folder, tmp_path / "older")
    again = Log(log.folder, [FileAnchor(tmp_path / "anchor")])
    again.add(10)
    again.points.make()
    again.close()
    older = Log(tmp_path / "older")
    assert older.points.verify(notes(log)).lost == 10
    older.add(15)
    older.points.make()
    assert older.points.verify().bad is None
    found = older.points.verify(notes(log))
    assert (found.bad, found.attested) == (11, 10)
    older.close()


def test_a_checkpoint_in_the_store_that_was_changed_is_found(log: Log):
    log.add(10)
    log.points.make()
    changed = edited(log, "UPDATE checkpoint SET note = replace(note, 'agentd.local/test', 'agentd.local/best')")
    found = changed.points.verify()
    assert found.bad is not None
    assert "checkpoint in the store" in found.why
    changed.close()


def test_notes_of_another_log_do_not_count(log: Log, tmp_path: Path):
    """An anchor may be shared; a stranger's note proves and breaks nothing."""
    other = Log(tmp_path / "other")
    other.add(50)
    strange = other.points.make()
    other.close()
    log.add(3)
    log.points.make()
    found = log.points.verify([strange, "nonsense", ""])
    assert (found.bad, found.lost, found.anchored) == (None, 0, 0)


# -- anchors


def test_an_anchor_that_can_not_be_reached_gets_the_newest_one_later(tmp_path: Path):
    """And keeps nobody from signing."""
    folder = tmp_path / "not there"
    log = Log(tmp_path / "state", [FileAnchor(folder / "anchor")])
    log.add(2)
    log.points.make()
    log.add(2)
    log.points.make()
    folder.mkdir()
    log.points.make()
    (note,) = read_notes((folder / "anchor").read_text())
    assert log.points.verifier.open(note).size == 4
    log.close()


def test_journald_gets_the_note_whole(tmp_path: Path):
    """By its native protocol: a value of several lines has its length before it."""
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        log = Log(tmp_path / "state", [JournaldAnchor(path)])
        log.add(1)
        note = log.points.make()
        said = journal.recv(1 << 16)
        log.close()
    fields, _, message = said.partition(b"MESSAGE\n")
    assert fields == b"SYSLOG_IDENTIFIER=agentd-audit\nPRIORITY=6\n"
    assert int.from_bytes(message[:8], "little") == len(note.encode())
    assert message[8:] == note.encode() + b"\n"


def test_an_anchor_file_that_was_cut_or_written_into_gives_what_is_whole(log: Log):
    for _ in range(3):
        log.add(1)
        log.points.make()
    text = (log.folder.parent / "anchor").read_text()
    assert [log.points.verifier.open(note).size for note in read_notes(text)] == [1, 2, 3]
    assert len(read_notes(text[:-30])) == 2
    assert len(read_notes("somebody's words\n\n" + text + "more\n")) == 3
    assert read_notes("") == []


# -- proofs


def test_proofs_hold_against_checkpoints(log: Log):
    """Every event of a log with several checkpoints, and every two of these."""
    points = []
    for size in (3, 8, 21):
        log.add(size - log.audit.size())
        points.append(log.points.verifier.open(log.points.make()))
    last = points[-1]
    for seq in range(1, 22):
        own, proof = log.points.prove_inclusion(seq, last.size)
        assert includes(own, seq - 1, last.size, proof, last.root)
    for old in points:
        proof = log.points.prove_consistency(old.size, last.size)
        assert is_consistent(old.size, old.root, last.size, last.root, proof)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (3, 2), (1, 9), (-1, 2), (9, 9)])
def test_there_is_no_proof_for_what_is_not_there(log: Log, one: int, other: int):
    log.add(5)
    for prove in (log.points.prove_inclusion, log.points.prove_consistency):
        with pytest.raises(RequestError):
            prove(one, other)
