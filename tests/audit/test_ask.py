"""Questions in SQL: answered from the log, and from nothing else in the store, whatever is tried."""

from __future__ import annotations

import contextlib
import resource
from typing import TYPE_CHECKING

import pytest

from agentd.audit import AuditLog, Event, FileTouched, Index, ToolIdentity
from agentd.audit.asking import ROWS
from agentd.errors import Reason, RequestError
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "the secret of another table"
MANY = "WITH RECURSIVE r(x, n) AS (SELECT printf('%900000d', 1), 1 UNION ALL SELECT x, n + 1 FROM r LIMIT 10000)"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("with # and ? in its name")
    store = Store(folder)
    audit = AuditLog(store)
    tool = ToolIdentity(name="files.write", version="1", digest="", effect="files")
    for n in range(12):
        files = (FileTouched(operation="change", path=f"/home/{n % 3}", after="a"),)
        audit.record(Event(kind="call.end", call=f"c{n}", principal=f"u{n % 2}", tool=tool, files=files, wall_us=n))
    store.write(lambda db: db.execute("INSERT INTO token VALUES ('t', x'00', ?, NULL)", (SECRET,)))
    made = Index(folder / "index.db", audit)
    yield made
    made.close()
    store.close()


QUESTIONS = {
    "SELECT count(*) FROM events": [(12,)],
    "SELECT principal, count(*) AS n FROM events GROUP BY 1 ORDER BY 1": [("u0", 6), ("u1", 6)],
    "SELECT max(body ->> 'wall_us') FROM events": [(11,)],
    "SELECT call FROM events JOIN paths USING (seq) WHERE path = '/home/2' ORDER BY seq LIMIT 2": [("c2",), ("c5",)],
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3) SELECT x FROM n": [(1,), (2,), (3,)],
    "SELECT value FROM events, json_each(events.body, '$.files') WHERE seq = 1": [
        ('{"after":"a","operation":"change","path":"/home/0"}',)
    ],
    "SELECT 1 WHERE false": [],
    "SELECT count(*) FROM (SELECT DISTINCT principal FROM events)": [(2,)],
    "WITH some AS (SELECT * FROM events LIMIT 3) SELECT count(*) FROM some": [(3,)],
    "SELECT upper('x'), NULL, 1.5, x'ff'": [("X", None, 1.5, b"\xff")],
}


@pytest.mark.parametrize("sql", QUESTIONS)
def test_questions_are_answered(index: Index, sql: str):
    assert list(index.ask(sql).rows) == QUESTIONS[sql]


REFUSED = [
    "SELECT * FROM token",
    "SELECT count(*) FROM token",
    "SELECT * FROM log.token",
    "SELECT body FROM log.run",
    "SELECT * FROM log.pre_image",
    "SELECT * FROM sqlite_schema",
    "SELECT * FROM log.sqlite_master",
    "SELECT * FROM pragma_table_info('token')",
    "SELECT * FROM dbstat",
    "SELECT * FROM (SELECT body AS event FROM token) AS event",
    "WITH event AS (SELECT body FROM token) SELECT * FROM event",
    "SELECT (SELECT body FROM token)",
    "SELECT load_extension('x')",
    "INSERT INTO found VALUES (1)",
    "DELETE FROM events",
    "UPDATE log.event SET body = ''",
    "DROP VIEW events",
    "CREATE TABLE t (x)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE TEMP VIEW found AS SELECT 1",
    "ATTACH '/etc/passwd' AS p",
    "DETACH log",
    "PRAGMA database_list",
    "PRAGMA writable_schema = 1",
    "VACUUM INTO '/tmp/x'",
    "BEGIN",
    "SELECT 1; SELECT 2",
    "SELECT count(*) FROM TOKEN",
    'SELECT count(*) FROM "log"."token"',
    "SELECT count(*) FROM [token] AS event",
    "SELECT 1 WHERE EXISTS (SELECT * FROM token)",
    "SELECT count(*) FROM events, token",
    "SELECT count(*) FROM sqlite_master",
    "SELECT",
    "\0",
    "SELECT '\ud800'",
    "SELECT randomblob(100000000)",
    "SELECT printf('%.*c', 100000000, 'x')",
    "SELECT zeroblob(1000)",
    "SELECT randomblob(1)",
    "SELECT fts5_source_id()",
    "SELECT sqlite_version()",
    f"SELECT {', '.join(map(str, range(101)))}",
    f"SELECT 1{' + 1' * 200}",
    f"SELECT '{'x' * 100_000}'",
    f"{MANY} SELECT x FROM r",
    f"{MANY} SELECT n FROM r ORDER BY x || n DESC",
    f"{MANY} SELECT json_group_array(substr(x, 1, 900)) FROM r",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_everything_else_is_refused(index: Index, sql: str):
    """An error that names no content of other tables, and changes nothing."""
    with pytest.raises(RequestError) as caught:
        index.ask(sql)
    assert caught.value.reason is Reason.BAD_FIELD
    assert SECRET not in str(caught.value)
    assert index.ask("SELECT count(*) FROM events").rows == ((12,),)


def test_rows_are_bounded_and_that_is_said(index: Index):
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    answer = index.ask(endless)
    assert (len(answer.rows), answer.more) == (ROWS, True)


def test_time_is_bounded(index: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("agentd.audit.ask._SECONDS", 0.2)
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(RequestError, match="longer than"):
        index.ask(endless)


def test_a_question_takes_nothing_of_the_daemon(index: Index):
    """Its memory is another process's, which has ended by the time of the answer."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what in ("x", "max(x || n)", "count(DISTINCT x || n)"):
        with contextlib.suppress(RequestError):
            index.ask(f"{MANY} SELECT {what} FROM r")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
