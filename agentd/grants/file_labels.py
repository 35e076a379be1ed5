"""Labels of files: what a tainted run has written stays so for whoever reads it, in another session and after a restart.

Kept by path and by which file it is (device and inode), so that a file that is renamed takes its labels along.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from agentd.grants.taint import Labels

if TYPE_CHECKING:
    from collections.abc import Iterable

    import apsw

    from agentd.grants.scopes import Scope
    from agentd.store import Store

_MOST = 50_000
_LABELLED = "SELECT DISTINCT untrusted, private FROM file_label WHERE "
_AT, _BELOW, _IS = "path = ?", "path >= ? AND path < ?", "device = ? AND inode = ?"


class FileLabels:
    """From any thread; what is noted is durable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, paths: Iterable[bytes], labels: Labels) -> None:
        """What has been written to these paths has these labels; what was there keeps its own. Raises StoreError."""
        rows = []
        for path in paths if labels.names else ():
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                known = labels | self._of(path, status)
                rows.append((path, *_which(status), json.dumps(known.untrusted), json.dumps(known.private)))
        if rows:
            insert = "INSERT OR REPLACE INTO file_label (path, device, inode, untrusted, private) VALUES (?, ?, ?, ?, ?)"
            self._store.write(lambda db: db.executemany(insert, rows))

    def of(self, scopes: Iterable[Scope]) -> Labels:
        """Of all files that a call with these scopes may read. Raises StoreError."""
        found = Labels()
        for scope in scopes:
            if scope.kind == "read":
                path = os.fsencode(scope.value.partition("*")[0] if scope.glob else scope.value)
                status = None
                with contextlib.suppress(OSError):
                    status = os.lstat(path)
                found |= self._of(path, status, start=path if scope.glob else path.rstrip(b"/") + b"/")
        return found

    def forget_gone(self) -> None:
        """Of very many, those of paths that are not there: their files may be, under other names. Raises StoreError."""
        rows = self._store.read(lambda db: list(db.execute("SELECT path FROM file_label")))
        gone = [row for row in rows if not os.path.lexists(row[0])] if len(rows) > _MOST else []
        if gone:
            self._store.write(lambda db: db.executemany("DELETE FROM file_label WHERE path = ?", gone))

    def _of(self, path: bytes, status: os.stat_result | None, *, start: bytes = b"") -> Labels:
        asked: list[tuple[str, tuple[bytes | int, ...]]] = [(_AT, (path,))]
        if start:
            asked.append((_BELOW, (start, start[:-1] + bytes([start[-1] + 1]))))
        if status:
            asked.append((_IS, _which(status)))

        def read(db: apsw.Connection) -> list[tuple[str, str]]:
            return [(str(u), str(p)) for where, values in asked for u, p in db.execute(_LABELLED + where, values)]

        found = Labels()
        for untrusted, private in self._store.read(read):
            found |= Labels(tuple(json.loads(untrusted)), tuple(json.loads(private)))
        return found


def _which(status: os.stat_result) -> tuple[int, int]:
    """Device and inode as SQLite keeps numbers: some file systems use all 64 bits."""
    return _signed(status.st_dev), _signed(status.st_ino)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
