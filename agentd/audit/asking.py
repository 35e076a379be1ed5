"""One question in SQL over the log, in a process of its own: read only, bounded, blind for all else that is in the store.

    python -I asking.py      a JSON object on standard input, its answer on standard output

Needs nothing but apsw: it is started for each question.
"""

from __future__ import annotations

import base64
import json
import resource
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import apsw

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 10_000
LARGEST_ANSWER = 8 << 20
_STEPS = 10_000  # of SQLite's machine, between two looks at the clock
_HEAP = 128 << 20
_LIMITS = {
    apsw.SQLITE_LIMIT_LENGTH: 1 << 20,
    apsw.SQLITE_LIMIT_SQL_LENGTH: 64 << 10,
    apsw.SQLITE_LIMIT_COLUMN: 100,
    apsw.SQLITE_LIMIT_EXPR_DEPTH: 100,
    apsw.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    apsw.SQLITE_LIMIT_VDBE_OP: 100_000,
    apsw.SQLITE_LIMIT_FUNCTION_ARG: 50,
    apsw.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    apsw.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    apsw.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
    apsw.SQLITE_LIMIT_WORKER_THREADS: 0,
    apsw.SQLITE_LIMIT_ATTACHED: 0,
}
_PROCESS = {
    resource.RLIMIT_AS: 512 << 20,
    resource.RLIMIT_CPU: 15,
    resource.RLIMIT_FSIZE: 64 << 20,  # of what is sorted on the disk
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
}
_VIEWS = """
CREATE TEMP VIEW events AS
    SELECT f.seq, datetime(f.time_ns / 1000000000, 'unixepoch') AS time, f.time_ns, f.kind, f.principal, f.session, f.run,
           f.call, f.tool, f.decision, f.boot, e.body
    FROM main.found AS f JOIN log.event AS e USING (seq);
CREATE TEMP VIEW paths AS SELECT CAST(path AS TEXT) AS path, seq FROM main.touched;
"""
_READABLE = frozenset({"found", "touched", "event", "events", "paths", "json_each", "json_tree"})
_ALLOWED = frozenset({apsw.SQLITE_SELECT, apsw.SQLITE_RECURSIVE})
_FUNCTIONS = frozenset(
    """abs char coalesce concat concat_ws format glob hex ifnull iif instr length like lower ltrim max min nullif octet_length
    printf quote replace round rtrim sign soundex substr substring trim typeof unhex unicode upper
    avg count group_concat string_agg sum total median
    date time datetime julianday unixepoch strftime timediff
    row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value
    json json_array json_array_length json_extract json_object json_quote json_type json_valid json_group_array
    json_group_object -> ->> json_each json_tree
    ceil ceiling floor ln log log10 log2 mod pow power sqrt trunc""".split()
)
"""What makes text and numbers of text and numbers; nothing that makes much of little, but within SQLITE_LIMIT_LENGTH."""


class _Refused(Exception):
    pass


def main() -> None:
    for limit, value in _PROCESS.items():
        resource.setrlimit(limit, (value, value))
    asked = json.load(sys.stdin)
    try:
        said = _answer(asked["index"], asked["store"], asked["sql"], time.monotonic() + asked["seconds"])
    except _Refused as e:
        said = {"refused": str(e)}
    except apsw.InterruptError:
        said = {"refused": f"It took longer than {asked['seconds']:g} seconds"}
    except (apsw.AuthError, apsw.PermissionsError):
        said = {"refused": "Only SELECT from the views events and paths is allowed, with functions of text, numbers and times"}
    except (MemoryError, apsw.NoMemError):
        said = {"refused": "It takes more memory than a question may"}
    except (apsw.Error, ValueError, UnicodeError) as e:
        said = {"refused": str(e)}
    sys.stdout.write(json.dumps(said))


def _answer(index_file: str, store_file: str, sql: str, deadline: float) -> dict[str, Any]:
    """What it may do is held by SQLite's authorizer, https://sqlite.org/c3ref/set_authorizer.html: tokens, pre-images and
    prompts are in the same file as the log.
    """
    apsw.hard_heap_limit(_HEAP)
    db = apsw.Connection(_read_only(index_file), flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    db.execute("ATTACH ? AS log", (_read_only(store_file),))
    db.execute(_VIEWS)
    for setting, on in ((apsw.SQLITE_DBCONFIG_DEFENSIVE, 1), (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)):
        db.config(setting, on)
    allows = _authorizer(db)
    for limit, value in _LIMITS.items():
        db.limit(limit, value)
    db.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
    db.set_authorizer(allows)
    return _run(db, sql)


def _read_only(file: str) -> str:
    return f"file:{quote(file)}?mode=ro"


def _run(db: apsw.Connection, sql: str) -> dict[str, Any]:
    statements = 0

    def count(_cursor: apsw.Cursor, _sql: str, _bindings: Any) -> bool:
        nonlocal statements
        statements += 1
        return statements == 1

    cursor = db.cursor()
    cursor.exec_trace = count
    rows: list[list[Any]] = []
    columns: list[str] = []
    size = 0
    try:
        for row in cursor.execute(sql):
            columns = columns or [name for name, *_ in cursor.get_description()]
            rows.append([_value(value) for value in row])
            size += len(json.dumps(rows[-1])) + 2
            if size > LARGEST_ANSWER // 2:
                raise _Refused(f"The answer has more than {LARGEST_ANSWER >> 21} MiB: ask for fewer columns or rows")
            if len(rows) > ROWS:
                break
    except apsw.ExecTraceAbort:
        raise _Refused("It is more than one statement") from None
    return {"columns": columns, "rows": rows[:ROWS], "more": len(rows) > ROWS}


def _value(value: Any) -> Any:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


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
        if action == apsw.SQLITE_FUNCTION:
            return apsw.SQLITE_OK if str(two).lower() in _FUNCTIONS else apsw.SQLITE_DENY
        return apsw.SQLITE_OK if action in _ALLOWED else apsw.SQLITE_DENY

    return allows


if __name__ == "__main__":
    main()
