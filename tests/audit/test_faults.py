"""What may happen to a log, and what is to be seen of it then."""

from __future__ import annotations

import json
import shutil
import time
import unicodedata
from typing import TYPE_CHECKING

import apsw
import pytest

from agentd.audit import Archive, AuditLog, Checkpoints, Event, FileTouched, Index, Payload, Wanted, load_signer
from agentd.audit.anchors import FileAnchor, read_notes
from agentd.errors import Reason, StoreError
from agentd.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def opened(folder: Path, anchor: Path | None = None) -> tuple[Store, AuditLog, Checkpoints]:
    store = Store(folder)
    audit = AuditLog(store)
    anchors = [FileAnchor(anchor)] if anchor else []
    return store, audit, Checkpoints(store, audit, load_signer(folder / "audit.key", "o"), anchors)


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_wal_that_is_lost_is_found_by_the_anchor(tmp_path: Path, damage: str):
    """SQLite opens what is left without a word, and its chain is whole."""
    store, audit, points = opened(tmp_path / "state", tmp_path / "anchor")
    for n in range(50):
        audit.record(Event(kind="call.end", call=f"c{n}"))
    store.write(lambda db: db.execute("SELECT 1"))
    points.make()
    store.close()  # all is in the database itself from here on
    store, audit, points = opened(tmp_path / "state", tmp_path / "anchor")
    for n in range(150):
        audit.record(Event(kind="call.end", call=f"c{n}"))
    points.make()
    shutil.copytree(tmp_path / "state", tmp_path / "left")  # as a kill leaves it
    store.close()
    wal = tmp_path / "left" / "agentd.db-wal"
    (tmp_path / "left" / "agentd.db-shm").unlink()
    if damage == "removed":
        wal.unlink()
    else:
        wal.write_bytes(wal.read_bytes()[: wal.stat().st_size // 3])
    store, audit, points = opened(tmp_path / "left")
    assert audit.verify().bad is None
    assert 50 <= audit.size() < 200
    found = points.verify(read_notes((tmp_path / "anchor").read_text()))
    assert (found.bad, found.lost) == (None, 200 - audit.size())
    store.close()


def test_a_clock_that_is_set_back_a_year_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Numbers are the order; nothing is moved away because of its time, and times are found as they were recorded."""
    store, audit, points = opened(tmp_path / "state")
    archive = Archive(store, audit, points, tmp_path / "archive")
    audit.record(Event(kind="call.end", call="before"))
    now, year = time.time_ns(), 365 * 86400 * 10**9
    for jump in (-year, year * 30):
        monkeypatch.setattr("agentd.audit.log.time.time_ns", lambda jump=jump: now + jump)
        audit.record(Event(kind="call.end", call=f"after {jump}"))
    points.make()
    assert [entry.body["kind"] for entry in audit.entries()] == ["call.end", *["clock.jump", "call.end"] * 2]
    jumps = [entry.body["detail"]["by_s"] for entry in audit.entries() if entry.body["kind"] == "clock.jump"]
    assert [round(by / 86400 / 365) for by in jumps] == [-1, 31]
    assert audit.verify().bad is None
    assert archive.prune(5, "p", 1) is None
    index = Index(tmp_path / "index.db", audit)
    assert index.find(Wanted(until_ns=now - year // 2), 10) == [2, 3]
    assert audit.newest_ns() == now + year * 30
    index.close()
    store.close()


def test_huge_arguments_are_recorded_by_digest(tmp_path: Path):
    """64 MiB of them in well under a kilobyte, of which only the salt is kept; deep ones, too."""
    store, audit, _ = opened(tmp_path / "state")
    arguments = {"text": Payload("x" * (64 << 20)), "list": Payload([{"a": "y" * 10_000}] * 3), "path": "/" + "z" * 5000}
    audit.record(Event(kind="call.reject", arguments=arguments))
    (entry,) = audit.entries()
    assert entry.body["arguments"]["text"]["$bytes"] == (64 << 20) + 2
    assert entry.body["arguments"]["text"]["$kept"] is False
    assert entry.body["arguments"]["path"]["$bytes"] == 5001
    assert len(entry.text) < 1000
    assert [kept.value for kept in audit.payloads([1])[1]] == [None, None]
    assert audit.verify().bad is None
    store.close()


def test_names_that_look_the_same_stay_two(tmp_path: Path):
    """NFC and NFD; with a right-to-left override, of which a terminal never sees more than its escape."""
    store, audit, _ = opened(tmp_path / "state")
    names = [unicodedata.normalize(form, "/home/ü") for form in ("NFC", "NFD")] + ["/home/\u202efdp.exe"]
    for name in names:
        audit.record(Event(kind="call.end", files=(FileTouched(operation="change", path=name),)))
    assert len(set(names)) == 3
    index = Index(tmp_path / "index.db", audit)
    for number, name in enumerate(names, 1):
        assert index.find(Wanted(path=name.encode()), 10) == [number]
    text = audit.entries()[2].text
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["files"][0]["path"] == names[2]
    index.close()
    store.close()


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_a_page_that_was_damaged_is_found_or_an_error(tmp_path: Path, at: int):
    """Flipped bits anywhere in the file: never a different log that verifies."""
    store, audit, points = opened(tmp_path / "state", tmp_path / "anchor")
    for n in range(20):
        audit.record(Event(kind="call.end", call=f"c{n}"))
    points.make()
    texts = [entry.text for entry in audit.entries()]
    store.close()
    file = tmp_path / "state" / "agentd.db"
    data = bytearray(file.read_bytes())
    place = 1024 + (len(data) - 1024) * at // 40  # past the header and the schema's root
    for offset in range(64):
        data[(place + offset) % len(data)] ^= 0x55
    file.write_bytes(data)
    try:
        store, audit, points = opened(tmp_path / "state")
    except StoreError:
        return
    try:
        found = points.verify(read_notes((tmp_path / "anchor").read_text()))
        if found.bad is None and not found.lost:
            assert [entry.text for entry in audit.entries()] == texts  # it hit something else
    except (StoreError, apsw.Error):
        pass
    finally:
        store.close()


def test_a_second_daemon_on_the_same_store_is_refused(tmp_path: Path):
    """Before it writes anything; the first one goes on."""
    store, audit, _ = opened(tmp_path / "state")
    audit.record(Event(kind="boot"))
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "state")
    assert caught.value.reason is Reason.STORE_LOCKED
    audit.record(Event(kind="stop"))
    assert audit.verify().valid == 2
    store.close()
