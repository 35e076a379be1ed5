"""An index of the log, in a file of its own: what it takes to find events among a million.

The log itself has none, as each would triple what an event writes to the disk. This file is not synced and can be thrown away
at any time: it is made anew from the log. Before a query it is brought up to date.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import apsw

from agentd.audit.ask import Answer, ask
from agentd.audit.events import parsed
from agentd.errors import Reason, RequestError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from agentd.audit.log import AuditLog
    from agentd.audit.payloads import Kept

T = TypeVar("T")
_VERSION = 2
_BATCH = 2000
_SCHEMA = f"""
CREATE TABLE found (
    seq INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, kind TEXT NOT NULL, principal TEXT NOT NULL, session TEXT NOT NULL,
    run TEXT NOT NULL, call TEXT NOT NULL, tool TEXT NOT NULL, decision TEXT NOT NULL, boot TEXT NOT NULL
) STRICT;
CREATE TABLE touched (path BLOB NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (path, seq)) STRICT, WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5(text, content='', detail=none);
PRAGMA user_version = {_VERSION};
"""
FIELDS = ("kind", "principal", "session", "run", "call", "tool", "decision", "boot")
_INDEXED = ("kind", "principal", "run", "call", "tool", "decision", "time_ns")
_WORD = re.compile(r"[^\W_]+")
_IDS = frozenset(
    {
        "boot",
        "call",
        "run",
        "session",
        "cause",
        "result_digest",
        "before",
        "after",
        "digest",
        "time_ns",
        "$commitment",
        "$sha256",
        "policy",
        "profile",
        "pid",
    }
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """All of it must hold. `fields` are names of FIELDS with values of which any may be; `words` all occur in the event;
    `path` was changed by it. `after` is a number: later events, or earlier ones if the newest come first.
    """

    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    words: str = ""
    path: bytes = b""
    since_ns: int = 0
    until_ns: int = 0
    after: int = 0
    newest_first: bool = False

    @property
    def everything(self) -> bool:
        return not (self.fields or self.words or self.path or self.since_ns or self.until_ns)

    def fits(self, body: Mapping[str, Any], written: Sequence[Kept] = ()) -> bool:
        """Whether one event is wanted, without the index; `written` are its payloads. Raises RequestError (BAD_FIELD)."""
        for name in self.fields:
            _require(name)
        own = _named(body)
        time_ns = int(body.get("time_ns", 0))
        return (
            all(own[name] in any_of for name, any_of in self.fields.items())
            and (not self.path or self.path in _paths(body))
            and (not self.since_ns or time_ns >= self.since_ns)
            and (not self.until_ns or time_ns < self.until_ns)
            and (not self.words or self._has_words([body, *(each.said for each in written)]))
        )

    def _has_words(self, said: list[Any]) -> bool:
        wanted = _words(self.words)
        return bool(wanted) and wanted <= _words(" ".join(_texts(said)))


class Index:
    """Opened at the first query. Safe to use from several threads, one at a time."""

    def __init__(self, file: Path, audit: AuditLog) -> None:
        self._file, self._audit = file, audit
        self._using = threading.Lock()
        self._db: apsw.Connection | None = None
        self._have = 0

    def find(self, wanted: Wanted, limit: int) -> list[int]:
        """The numbers of up to `limit` events. Raises RequestError (BAD_FIELD), StoreError."""
        source, clauses, values = _conditions(wanted)
        order = "DESC" if wanted.newest_first else "ASC"
        number = "words.rowid" if wanted.words else "touched.seq" if wanted.path else "found.seq"  # walked in this order
        query = f"SELECT found.seq FROM {source} WHERE {' AND '.join(clauses)} ORDER BY {number} {order} LIMIT ?"  # noqa: S608
        return self._ask(lambda db: [int(seq) for (seq,) in db.execute(query, (*values, limit))])

    def catch_up(self) -> None:
        """Take in what is new. Raises StoreError."""
        self._ask(lambda _: None)

    def keep_up(self) -> None:
        """Take in what is new if that is much, so that no query has to wait for it. One by one, events would cost the disk more
        here than in the log. Raises StoreError.
        """
        if self._audit.size() - self._have >= _BATCH:
            self.catch_up()

    def forget(self, last: int) -> None:
        """Events up to this one are in an archive now. Raises StoreError."""

        def forget(db: apsw.Connection) -> None:
            with db:
                db.execute("DELETE FROM found WHERE seq <= ?", (last,))
                db.execute("DELETE FROM touched WHERE seq <= ?", (last,))

        self._ask(forget)

    def start_anew(self) -> None:
        """Keep nothing of what it has: a value was taken out of the log. The next query makes it again."""
        with self._using:
            self._throw_away()
            self._have = 0

    def ask(self, sql: str) -> Answer:
        """A question in SQL. Raises RequestError (BAD_FIELD), StoreError."""
        return ask(self, self._file, self._audit.file, sql)

    def close(self) -> None:
        with self._using:
            if self._db:
                self._db.close()
                self._db = None

    def _ask(self, do: Callable[[apsw.Connection], T]) -> T:
        """With an index that has all there is; a damaged one is made anew: it is only an index. Raises StoreError."""
        with self._using:
            try:
                return self._done(do)
            except apsw.Error:
                try:
                    self._throw_away()
                    return self._done(do)
                except (apsw.Error, OSError) as e:
                    raise StoreError(
                        Reason.AUDIT_UNAVAILABLE,
                        f"The index of the audit log, {self._file}, can't be written: {e}.",
                        hint="Free some space, or remove it: it is made anew. `agentd audit list` without filters needs none.",
                        metadata={"path": str(self._file)},
                    ) from e

    def _done(self, do: Callable[[apsw.Connection], T]) -> T:
        db = self._opened()
        self._take_in(db)
        return do(db)

    def _opened(self) -> apsw.Connection:
        if self._db is None:
            db = self._connected()
            if db.execute("PRAGMA user_version").get != _VERSION:
                db.close()
                self._throw_away()
                db = self._connected()
                indexes = ";".join(f"CREATE INDEX found_by_{name} ON found ({name})" for name in _INDEXED)
                with db:
                    db.execute(_SCHEMA + indexes)
            self._db = db
        return self._db

    def _connected(self) -> apsw.Connection:
        db = apsw.Connection(str(self._file))
        os.chmod(self._file, 0o600)
        for pragma in ("journal_mode=WAL", "synchronous=OFF"):
            db.execute(f"PRAGMA {pragma}").fetchall()
        return db

    def _throw_away(self) -> None:
        if self._db:
            with contextlib.suppress(apsw.Error):
                self._db.close()
            self._db = None
        for name in (self._file, *(self._file.with_name(self._file.name + end) for end in ("-wal", "-shm"))):
            name.unlink(missing_ok=True)

    def _take_in(self, db: apsw.Connection) -> None:
        have = int(db.execute("SELECT coalesce(max(seq), 0) FROM found").get)
        size = self._audit.size()
        if have > size:  # of a log that was longer: an older store was put back
            with db:
                db.execute("DELETE FROM found; DELETE FROM touched; INSERT INTO words (words) VALUES ('delete-all')")
            have = 0
        rows = self._audit.texts(after=have) if have < size else iter(())
        while batch := list(itertools.islice(rows, _BATCH)):
            with db:
                for seq, text, written in batch:
                    _add(db, seq, parsed(text), written)
        self._have = size


def _add(db: apsw.Connection, seq: int, body: dict[str, Any], written: list[Kept]) -> None:
    own = _named(body)
    row = (seq, int(body.get("time_ns", 0)), *(own[name] for name in FIELDS))
    db.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    db.executemany("INSERT OR IGNORE INTO touched VALUES (?, ?)", ((path, seq) for path in _paths(body)))
    db.execute(
        "INSERT INTO words (rowid, text) VALUES (?, ?)",
        (seq, _valid(" ".join(_texts([body, *(each.said for each in written)])))),
    )


def _named(body: Mapping[str, Any]) -> dict[str, str]:
    """The values of FIELDS."""
    own = {name: str(body.get(name, "")) for name in FIELDS}
    tool, decision = body.get("tool"), body.get("decision")
    own["tool"] = str(tool.get("name", "")) if isinstance(tool, dict) else ""
    own["decision"] = str(decision.get("verdict", "")) if isinstance(decision, dict) else ""
    return {name: _valid(value) for name, value in own.items()}


def _paths(body: Mapping[str, Any]) -> set[bytes]:
    files = body.get("files", [])
    return {_path(file.get("path", "")) for file in files if isinstance(file, dict)} if isinstance(files, list) else set()


def _words(text: str) -> set[str]:
    """As FTS5's tokenizer unicode61 has them: letters and digits, whatever their case and marks."""
    plain = "".join(each for each in unicodedata.normalize("NFD", _valid(text)) if not unicodedata.combining(each))
    return {word.casefold() for word in _WORD.findall(plain)}


def _require(name: str) -> None:
    if name not in FIELDS:
        message = f"Events can't be found by {name!r}."
        hint = f"By {', '.join(FIELDS)} and path they can; other words with --grep."
        raise RequestError(Reason.BAD_FIELD, message, hint=hint, field="matches", metadata={"field": name})


def _texts(value: Any) -> Iterator[str]:
    """Whatever somebody might look for: no ids, no digests."""
    match value:
        case str():
            yield value
        case dict():
            for key, item in value.items():
                if key not in _IDS:
                    yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


def _path(text: object) -> bytes:
    return os.fsencode(text) if isinstance(text, str) else b""


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _conditions(wanted: Wanted) -> tuple[str, list[str], list[Any]]:
    """Tables to look in, conditions and their values. Raises RequestError (BAD_FIELD) for a field that there is not."""
    source, clauses, values = "found", ["true"], list[Any]()
    if wanted.words:
        terms = " ".join(f'"{word}"' for word in _WORD.findall(wanted.words))
        source = "words CROSS JOIN found ON found.seq = words.rowid"
        clauses.append("words MATCH ?" if terms else "false")
        values += [_valid(terms)] if terms else []
    if wanted.path and wanted.words:
        clauses.append("found.seq IN (SELECT seq FROM touched WHERE path = ?)")
        values.append(wanted.path)
    elif wanted.path:
        source = "touched CROSS JOIN found USING (seq)"
        clauses.append("touched.path = ?")
        values.append(wanted.path)
    for name, any_of in wanted.fields.items():
        _require(name)
        clauses.append(f"found.{name} IN ({', '.join('?' * len(any_of))})")
        values += map(_valid, any_of)
    for name, compare in (("since_ns", ">="), ("until_ns", "<")):
        if limit := getattr(wanted, name):
            clauses.append(f"found.time_ns {compare} ?")
            values.append(limit)
    if wanted.after:
        clauses.append(f"found.seq {'<' if wanted.newest_first else '>'} ?")
        values.append(wanted.after)
    return source, clauses, values
