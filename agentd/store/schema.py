"""The tables, as named migrations that are only ever appended to; `migration` records what has been applied."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import apsw

MIGRATIONS: tuple[tuple[str, str], ...] = (
    (
        "0001_first_light",
        """
        -- The audit log. `body` is hashed exactly as stored; no secondary indexes (they triple the writes).
        CREATE TABLE event (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, chain BLOB NOT NULL) STRICT;

        -- One row for each call that may change files. open -> done -> undone; open -> rolled_back.
        CREATE TABLE journal (
            call TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('open', 'done', 'undone', 'rolled_back'))
        ) STRICT, WITHOUT ROWID;

        -- The state of a path before its first change by a call, and after its end.
        CREATE TABLE pre_image (
            call TEXT NOT NULL REFERENCES journal (call), n INTEGER NOT NULL, path BLOB NOT NULL, before TEXT NOT NULL,
            content BLOB, object TEXT, after TEXT,
            PRIMARY KEY (call, n)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE run (
            id TEXT PRIMARY KEY, session TEXT NOT NULL, request_id TEXT UNIQUE, state TEXT NOT NULL, body TEXT NOT NULL
        ) STRICT;
        CREATE INDEX run_by_session ON run (session, id);
        CREATE TABLE run_event (
            run TEXT NOT NULL REFERENCES run (id), sequence INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (run, sequence)
        ) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0002_order_of_calls",
        """
        -- When a call began among all others: ids of calls say so only to the millisecond.
        ALTER TABLE journal ADD COLUMN begun INTEGER NOT NULL DEFAULT 0;
        CREATE INDEX journal_by_begun ON journal (begun);
        CREATE INDEX pre_image_by_path ON pre_image (path);
        """,
    ),
    (
        "0003_who_may_do_what",
        """
        -- Grants that people have made; `body` is JSON. Those that were revoked or have ended stay, to be asked about.
        CREATE TABLE permission (
            id TEXT PRIMARY KEY, body TEXT NOT NULL, used INTEGER NOT NULL DEFAULT 0, revoke_ns INTEGER
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX permission_in_force ON permission (id) WHERE revoke_ns IS NULL;

        -- Access for programs: only a hash of each secret.
        CREATE TABLE token (
            id TEXT PRIMARY KEY, hash BLOB NOT NULL, body TEXT NOT NULL, revoke_ns INTEGER
        ) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0004_what_a_rollback_selects_by",
        """
        ALTER TABLE journal ADD COLUMN time_ns INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE journal ADD COLUMN run TEXT NOT NULL DEFAULT '';
        ALTER TABLE journal ADD COLUMN session TEXT NOT NULL DEFAULT '';
        ALTER TABLE journal ADD COLUMN principal TEXT NOT NULL DEFAULT '';
        ALTER TABLE journal ADD COLUMN effect TEXT NOT NULL DEFAULT '';
        -- The calls that a rollback has put back, as JSON: undoing it brings them back.
        ALTER TABLE journal ADD COLUMN undoes TEXT NOT NULL DEFAULT '[]';
        ALTER TABLE journal ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;

        -- What a small text was after the call, compressed: for diffs, and for merging with what came later.
        ALTER TABLE pre_image ADD COLUMN result BLOB;
        """,
    ),
    (
        "0005_rehearsals_and_fewer_writes",
        """
        -- A rehearsed call waits to be applied or dropped. Contents are compressed (zstd) from here on; `result_object` names
        -- a large result. A file of `length` bytes that was only appended to is kept where it is. Without the two indexes a
        -- call writes a third less: what they found takes a scan, which is rare.
        CREATE TABLE undoable (
            call TEXT PRIMARY KEY, begun INTEGER NOT NULL, time_ns INTEGER NOT NULL, run TEXT NOT NULL, session TEXT NOT NULL,
            principal TEXT NOT NULL, effect TEXT NOT NULL, undoes TEXT NOT NULL DEFAULT '[]', pinned INTEGER NOT NULL DEFAULT 0,
            state TEXT NOT NULL
            CHECK (state IN ('open', 'done', 'undone', 'rolled_back', 'rehearsed', 'applied', 'dropped'))
        ) STRICT, WITHOUT ROWID;
        INSERT INTO undoable (call, begun, time_ns, run, session, principal, effect, undoes, pinned, state)
            SELECT call, begun, time_ns, run, session, principal, effect, undoes, pinned, state FROM journal;
        CREATE TABLE former (
            call TEXT NOT NULL REFERENCES undoable (call), n INTEGER NOT NULL, path BLOB NOT NULL, before TEXT NOT NULL,
            content BLOB, object TEXT, length INTEGER NOT NULL DEFAULT 0, after TEXT, result BLOB, result_object TEXT,
            PRIMARY KEY (call, n)
        ) STRICT, WITHOUT ROWID;
        INSERT INTO former (call, n, path, before, content, object, after)
            SELECT call, n, path, before, content, object, after FROM pre_image;
        DROP TABLE pre_image;
        DROP TABLE journal;
        ALTER TABLE undoable RENAME TO journal;
        ALTER TABLE former RENAME TO pre_image;
        """,
    ),
    (
        "0006_checkpoints",
        """
        -- Signed notes over the first `size` events; `peaks` are the roots of the perfect trees that these make.
        CREATE TABLE checkpoint (size INTEGER PRIMARY KEY, peaks BLOB NOT NULL, note TEXT NOT NULL) STRICT;
        """,
    ),
    (
        "0007_what_was_shipped",
        """
        -- Up to which event each receiver has got the log.
        CREATE TABLE shipped (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0008_archives_of_the_log",
        """
        -- The oldest events, moved to files: the chain value and the tree's peaks after the last of each.
        CREATE TABLE segment (
            first INTEGER PRIMARY KEY, last INTEGER NOT NULL, chain BLOB NOT NULL, peaks BLOB NOT NULL, name TEXT NOT NULL,
            digest TEXT NOT NULL
        ) STRICT;
        """,
    ),
    (
        "0009_payloads",
        """
        -- What people, models and tools have written: events only have commitments to it, so that it can be taken out.
        -- `value` is JSON; NULL if it was too long to be kept.
        CREATE TABLE payload (
            seq INTEGER NOT NULL, field TEXT NOT NULL, salt BLOB NOT NULL, value TEXT, PRIMARY KEY (seq, field)
        ) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0010_what_principals_use",
        """
        -- For quotas: what each principal has used in each hour since 1970.
        CREATE TABLE used (
            principal TEXT NOT NULL, hour INTEGER NOT NULL, tokens INTEGER NOT NULL, seconds REAL NOT NULL,
            calls INTEGER NOT NULL, joules REAL NOT NULL, PRIMARY KEY (principal, hour)
        ) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0011_automations",
        """
        -- Since when each is known, whether a person has paused it, and up to when its schedule has fired.
        CREATE TABLE automation (
            name TEXT PRIMARY KEY, since_ns INTEGER NOT NULL, paused INTEGER NOT NULL DEFAULT 0, fired_ns INTEGER NOT NULL,
            -- Its trigger, as JSON; whether what its folder held at first is known; whether that lay on a disk of its own.
            trigger TEXT NOT NULL, accepted INTEGER NOT NULL DEFAULT 0, mounted INTEGER NOT NULL DEFAULT 0
        ) STRICT, WITHOUT ROWID;

        -- What triggered them, in order: each has one run, which is there or not, whatever was killed meanwhile.
        CREATE TABLE trigger_event (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, automation TEXT NOT NULL, subject TEXT NOT NULL, due_ns INTEGER NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'succeeded', 'failed', 'dropped')), body TEXT NOT NULL
        ) STRICT;
        CREATE INDEX trigger_event_open ON trigger_event (automation, seq) WHERE state IN ('waiting', 'running');
        CREATE INDEX trigger_event_waiting ON trigger_event (automation, subject) WHERE state = 'waiting';
        CREATE INDEX trigger_event_by_automation ON trigger_event (automation, seq);

        -- The files that a watched folder is known to hold: written with the events that they made.
        CREATE TABLE watched (
            automation TEXT NOT NULL, path BLOB NOT NULL, inode INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
            size INTEGER NOT NULL, PRIMARY KEY (automation, path)
        ) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0012_what_could_not_be_restored",
        """
        -- Paths of calls that have ended, or were cut off, which could not be brought back to what they were: why, since when,
        -- and what was found there (NULL if it could not be read).
        CREATE TABLE leftover (
            call TEXT NOT NULL, path BLOB NOT NULL, why TEXT NOT NULL, since_ns INTEGER NOT NULL, found TEXT,
            PRIMARY KEY (call, path)
        ) STRICT, WITHOUT ROWID;
        """,
    ),
    (
        "0013_taken_ahead",
        """
        -- Whether a state was taken before anybody was about to change the path: it counts only where that came about.
        ALTER TABLE pre_image ADD COLUMN ahead INTEGER NOT NULL DEFAULT 0;
        """,
    ),
    (
        "0014_labels_of_files",
        """
        -- What tainted runs have written: JSON lists of where it came from. By path, and by which file it is.
        CREATE TABLE file_label (
            path BLOB PRIMARY KEY, device INTEGER NOT NULL, inode INTEGER NOT NULL,
            untrusted TEXT NOT NULL, private TEXT NOT NULL
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX file_label_by_file ON file_label (device, inode);
        """,
    ),
)


def migrate(db: apsw.Connection) -> None:
    db.execute("CREATE TABLE IF NOT EXISTS migration (name TEXT PRIMARY KEY, applied INTEGER NOT NULL) STRICT")
    applied = {name for (name,) in db.execute("SELECT name FROM migration")}
    for name, statements in MIGRATIONS:
        if name not in applied:
            with db:
                db.execute(statements)
                db.execute("INSERT INTO migration VALUES (?, unixepoch())", (name,))
