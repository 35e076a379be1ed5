"""A witness signs what continues the log that it knows, and nothing else, whoever asks."""

from __future__ import annotations

import base64
import http.server
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.audit import AuditLog, Checkpoints, Event, load_signer
from agentd.audit.notes import BadNote, Checkpoint
from agentd.audit.witness import Cosigner, Witness
from agentd.cli.witness import _handler
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class Log:
    def __init__(self, folder: Path, witnesses: Sequence[Witness] = (), key: Path | None = None) -> None:
        self.store = Store(folder)
        self.audit = AuditLog(self.store)
        self.signer = load_signer(key or folder / "audit.key", "agentd.local/pi")
        self.points = Checkpoints(self.store, self.audit, self.signer, (), witnesses)

    def add(self, count: int) -> str:
        for _ in range(count):
            self.audit.record(Event(kind="call.end"))
        return self.points.make()


class Office:
    """A witness with its server."""

    def __init__(self, folder: Path, log_key: Path) -> None:
        self.signer = load_signer(folder / "witness.key", "example.org/witness")
        self.cosigner = Cosigner(self.signer, [load_signer(log_key, "agentd.local/pi").verifier], folder / "seen")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self.cosigner))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.witness = Witness.parse(str(self.cosigner.witness), url)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    (tmp_path / "w").mkdir()
    made = Office(tmp_path / "w", tmp_path / "log.key")
    yield made
    made.close()


@pytest.fixture
def log(tmp_path: Path, office: Office) -> Iterator[Log]:
    made = Log(tmp_path / "state", [office.witness], tmp_path / "log.key")
    yield made
    made.store.close()


def test_each_checkpoint_is_cosigned_and_that_is_verified(log: Log, office: Office):
    """The first one, the next ones by their proofs; over a restart of the witness."""
    for count in (1, 3, 40):
        note = log.add(count)
        assert office.witness.has_signed(note) > 1_700_000_000
    (witnessed,) = log.points.verify().witnessed
    assert witnessed.size == 44
    assert abs(time.time() - witnessed.time_s) < 60
    office.cosigner = Cosigner(office.signer, [log.signer.verifier], office.cosigner._folder)
    office.server.RequestHandlerClass = _handler(office.cosigner)
    assert office.witness.has_signed(log.add(2))
    log.audit.record(Event(kind="call.end"))
    found = log.points.verify()
    assert (found.valid, found.attested, found.witnessed[0].size) == (47, 46, 46)


def test_a_log_that_was_cut_gets_no_signature_any_more(
    log: Log, office: Office, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Nor one that was put back and has gone on: the witness has seen what it was."""
    log.add(30)
    log.store.write(lambda db: db.execute("DELETE FROM event WHERE seq > 10"))
    log.store.write(lambda db: db.execute("DELETE FROM checkpoint"))
    assert not office.witness.has_signed(log.add(1))
    assert "its end was cut off" in caplog.text
    assert not office.witness.has_signed(log.add(30))
    assert "422" in caplog.text
    assert log.points.verify().witnessed == ()


def test_a_witness_that_is_away_keeps_nobody_from_signing(tmp_path: Path, office: Office):
    """The next checkpoint has its signature again."""
    log = Log(tmp_path / "state", [Witness.parse(str(office.cosigner.witness), "http://127.0.0.1:9")], tmp_path / "log.key")
    note = log.add(2)
    assert note
    assert not office.witness.has_signed(note)
    log.points.witnesses = (office.witness,)
    assert office.witness.has_signed(log.add(1))
    log.store.close()


def test_a_signature_by_another_key_does_not_count(log: Log, office: Office, tmp_path: Path):
    (tmp_path / "other").mkdir()
    stranger = Cosigner(load_signer(tmp_path / "other" / "k", "example.org/witness"), [], tmp_path / "other")
    known = Witness(stranger.witness.name, stranger.witness.public, office.witness.url)
    log.points.witnesses = (known,)
    note = log.add(3)
    assert not known.has_signed(note)
    assert note.count("\u2014") == 1


# -- what is asked of a witness


def body(old: int, note: str, proof: Sequence[bytes] = ()) -> str:
    return "\n".join([f"old {old}", *(base64.b64encode(each).decode() for each in proof), "", note])


def test_what_a_witness_answers(log: Log, office: Office, tmp_path: Path):
    """The statuses of c2sp.org/tlog-witness; a refusal changes nothing of what it knows."""
    log.points.witnesses = ()
    first, cosigner = log.add(5), office.cosigner
    second = log.add(5)
    proof = log.points.prove_consistency(5, 10)
    assert cosigner.add(body(3, first))[0] == 409  # it has seen none
    assert cosigner.add(body(0, first))[0] == 200
    assert cosigner.add(body(0, second)) == (409, "5\n")
    assert cosigner.add(body(5, second, proof[:-1]))[0] == 422
    assert cosigner.add(body(5, second, [bytes(32)] * len(proof)))[0] == 422
    assert cosigner.add(body(5, second))[0] == 422
    assert cosigner.add(body(5, second, proof))[0] == 200
    assert cosigner.add(body(10, second))[0] == 200  # once more: it may have been lost on the way
    assert cosigner.add(body(5, first))[0] == 409
    assert cosigner.add(body(20, second))[0] == 400
    fork = log.signer.sign(Checkpoint("agentd.local/pi", 10, bytes(32)))
    assert cosigner.add(body(10, fork)) == (409, "10\n")
    strange = Log(tmp_path / "strange")
    assert cosigner.add(body(10, strange.add(20)))[0] == 403  # of the same name, by another key
    strange.store.close()
    unknown = load_signer(tmp_path / "u.key", "agentd.local/unknown").sign(Checkpoint("agentd.local/unknown", 1, bytes(32)))
    assert cosigner.add(body(0, unknown))[0] == 404


@pytest.mark.parametrize(
    "text",
    [
        "",
        "old",
        "old x\n\nnote",
        "old -1\n\nnote",
        "new 0\n\nnote",
        "old 0\nno base64!\n\nn",
        "old 0\nAAAA\n\nn",
        "old \u0661\n\nn",
    ],
)
def test_what_is_no_request_is_told_so(office: Office, text: str):
    assert office.cosigner.add(text)[0] in (400, 404)


@pytest.mark.parametrize("text", ["", "a+b", "a+00000000+AAAA", "x+00000000+" + base64.b64encode(b"\x04" + bytes(32)).decode()])
def test_a_key_with_a_mistake_is_none(text: str):
    with pytest.raises(BadNote):
        Witness.parse(text)


def test_a_note_that_is_none_is_not_signed(office: Office):
    for note in ("", "\n\n", "a\n\n\u2014 example.org/witness AAAA\n", "a\n\n\u2014 example.org/witness !\n", "\u2014 x y"):
        assert office.witness.has_signed(note) == 0


def test_the_cosignature_is_as_the_specification_says(log: Log, office: Office):
    """Key id, eight bytes of time, Ed25519 over the text of a header and the note's body."""
    note = log.add(1)
    line = next(line for line in note.splitlines() if line.startswith("\u2014 example.org/witness "))
    blob: Any = base64.b64decode(line.split(" ")[2])
    assert len(blob) == 4 + 8 + 64
    assert blob[:4] == office.witness.hash
    assert int.from_bytes(blob[4:12], "big") == office.witness.has_signed(note)
