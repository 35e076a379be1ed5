"""A store of an older version is opened with all that is in it."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import apsw

from agentd.audit import AuditLog
from agentd.journal import Journal, Keep, Selection, Ways
from agentd.journal.state import PathState
from agentd.store import Store
from agentd.store.schema import MIGRATIONS

if TYPE_CHECKING:
    from pathlib import Path


def test_calls_of_a_version_before_compression_can_be_undone(tmp_path: Path):
    """Rows that refer to each other are moved to tables of other constraints; contents are as they were stored then."""
    state, file = tmp_path / "state", (tmp_path / "file").resolve()
    state.mkdir()
    file.write_text("new")
    db = apsw.Connection(str(state / "agentd.db"))
    db.execute("PRAGMA journal_mode=WAL; PRAGMA foreign_keys=ON")
    db.execute("CREATE TABLE migration (name TEXT PRIMARY KEY, applied INTEGER NOT NULL) STRICT")
    for name, statements in MIGRATIONS[:4]:
        db.execute(statements)
        db.execute("INSERT INTO migration VALUES (?, 0)", (name,))
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in ("old", "new")}
    before = PathState("file", 0o644, os.getuid(), os.getgid(), 0, digests["old"], attributes=())
    after = PathState("file", 0o644, os.getuid(), os.getgid(), 0, digests["new"], attributes=())
    file.chmod(0o644)
    db.execute("INSERT INTO journal (call, state, begun, time_ns, run) VALUES ('c1', 'done', 1, 5, 'r1')")
    row = ("c1", os.fsencode(file), before.to_json(), b"old", after.to_json())
    db.execute("INSERT INTO pre_image (call, n, path, before, content, after) VALUES (?1, 0, ?2, ?3, ?4, ?5)", row)
    db.close()
    store = Store(state)
    audit = AuditLog(store)
    journal = Journal(store, audit, state / "objects", Keep(low_space_bytes=0))
    applied = store.read(lambda db: [name for (name,) in db.execute("SELECT name FROM migration ORDER BY rowid")])
    assert applied == [name for name, _ in MIGRATIONS]
    assert store.read(lambda db: list(db.execute("PRAGMA foreign_key_check"))) == []
    journal.rollbacks.apply(journal.rollbacks.plan(Selection(run="r1"), Ways()), "p")
    assert file.read_text() == "old"
    store.close()
    Store(state).close()  # and nothing is applied twice
