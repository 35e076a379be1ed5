"""SQL over the log, for questions that nobody has thought of: read only, bounded, blind for all else that is in the store."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import apsw

from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agentd.audit.index import Index

ROWS = 10_000
_SECONDS = 10.0
_STEPS = 10_000  # of SQLite's machine, between two looks at the clock
_LONGEST_CELL = 1 << 20
_VIEWS = """
CREATE TEMP VIEW events AS
    SELECT f.seq, datetime(f.time_ns / 1000000000, 'unixepoch') AS time, f.time_ns, f.kind, f.principal, f.session, f.run,
           f.call, f.tool, f.decision, f.boot, e.body
    FROM main.found AS f JOIN log.event AS e USING (seq);
CREATE TEMP VIEW paths AS SELECT CAST(path AS TEXT) AS path, seq FROM main.touched;
"""
_READABLE = frozenset({"found", "touched", "event", "events", "paths", "json_each", "json_tree"})
_ALLOWED = frozenset({apsw.SQLITE_SELECT, apsw.SQLITE_FUNCTION, apsw.SQLITE_RECURSIVE})
_NO_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"})


@dataclass(frozen=True, slots=True)
class Answer:
    """`more` says whether there were more rows than are given."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    more: bool


def ask(index: Index, index_file: Path, store_file: Path, sql: str) -> Answer:
    """One statement over the views `events` and `paths`. Raises RequestError (BAD_FIELD), StoreError.

    What it may do is held by SQLite's authorizer, https://sqlite.org/c3ref/set_authorizer.html: tokens, pre-images and prompts
    are in the same file as the log.
    """
    index.catch_up()
    db = apsw.Connection(_read_only(index_file), flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    try:
        db.execute("ATTACH ? AS log", (_read_only(store_file),))
        db.execute(_VIEWS)
        db.limit(apsw.SQLITE_LIMIT_LENGTH, _LONGEST_CELL)
        db.limit(apsw.SQLITE_LIMIT_ATTACHED, 0)
        deadline = time.monotonic() + _SECONDS
        db.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
        db.set_authorizer(_authorizer(db))
        return _run(db, sql)
    except apsw.InterruptError:
        raise _refused(f"It took longer than {_SECONDS:g} seconds") from None
    except (apsw.AuthError, apsw.PermissionsError):
        raise _refused("Only SELECT from the views events and paths is allowed") from None
    except (apsw.Error, ValueError, UnicodeError) as e:
        raise _refused(str(e)) from None
    finally:
        db.close()


def _read_only(file: Path) -> str:
    return f"file:{quote(str(file))}?mode=ro"


def _run(db: apsw.Connection, sql: str) -> Answer:
    statements = 0

    def count(_cursor: apsw.Cursor, _sql: str, _bindings: Any) -> bool:
        nonlocal statements
        statements += 1
        return statements == 1

    cursor = db.cursor()
    cursor.exec_trace = count
    rows: list[tuple[Any, ...]] = []
    columns: tuple[str, ...] = ()
    try:
        for row in cursor.execute(sql):
            columns = columns or tuple(name for name, *_ in cursor.get_description())
            rows.append(row)
            if len(rows) > ROWS:
                break
    except apsw.ExecTraceAbort:
        raise _refused("It is more than one statement") from None
    return Answer(columns, tuple(rows[:ROWS]), len(rows) > ROWS)


def _authorizer(db: apsw.Connection) -> Callable[..., int]:
    """Columns may be read of what is readable. Where no column is, as in count(*), SQLite names whatever stands behind FROM,
    which may be a name of the question's own: then it must not be that of a table.
    """
    schemas = ("main", "log", "temp")
    tables = {str(name) for schema in schemas for (name,) in db.execute(f"SELECT name FROM {schema}.sqlite_schema")}  # noqa: S608
    hidden = tables - _READABLE

    def allows(action: int, one: str | None, two: str | None, _database: str | None, _by: str | None) -> int:
        if action == apsw.SQLITE_READ:
            named = str(one).lower()
            own = not two and not named.startswith(("sqlite_", "pragma_")) and named not in {name.lower() for name in hidden}
            return apsw.SQLITE_OK if one in _READABLE or own else apsw.SQLITE_DENY
        if action == apsw.SQLITE_FUNCTION and two in _NO_FUNCTIONS:
            return apsw.SQLITE_DENY
        return apsw.SQLITE_OK if action in _ALLOWED else apsw.SQLITE_DENY

    return allows


def _refused(why: str) -> RequestError:
    hint = "The views are events (seq, time, kind, principal, session, run, call, tool, decision, boot, body) and paths."
    return RequestError(Reason.BAD_FIELD, f"The question can't be answered: {why}.", hint=hint, field="sql")
