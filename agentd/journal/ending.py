"""What a call has left: the state of each path after it, and which of that is to be on record."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from agentd_sandbox.nearby import Nearby

from agentd.audit import Event, FileOperation, FileTouched
from agentd.journal.state import ABSENT, PathState, look_anyhow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agentd.journal.places import Granting
    from agentd.journal.transaction import Transaction

_ON_RECORD = 5000  # files in the event of a call's end: a megabyte


def looked_at(paths: Iterable[bytes], granting: Granting) -> dict[bytes, PathState]:
    """The state of each; what lies in a directory that is not there is not there, either. Raises OSError."""
    found: dict[bytes, PathState] = {}
    with contextlib.closing(Nearby()) as nearby:
        for path in sorted(paths, key=lambda p: p.count(b"/")):
            above = found.get(os.path.dirname(path))
            gone = above is not None and above.kind != "folder"
            found[path] = ABSENT if gone else look_anyhow(path, granting, nearby=nearby)
    return found


def leave_out_directories(transaction: Transaction, after: dict[bytes, PathState], files: dict[bytes, FileTouched]) -> None:
    """Those that are different only in their time, because of what was changed in them: that is on record with it."""
    for directory in {os.path.dirname(path) for path in files} & files.keys():
        before, now = transaction.images[directory].before, after[directory]
        if before.kind == now.kind == "folder" and before.same_as(now):
            after[directory] = replace(now, mtime_ns=before.mtime_ns)
            del files[directory]


def file_touched(path: bytes, before: PathState, after: PathState) -> FileTouched | None:
    if not after.differs_from(before):
        return None
    if before.kind == "absent":
        operation: FileOperation = "create"
    elif after.kind == "absent":
        operation = "delete"
    else:
        same = (before.kind, before.digest, before.target) == (after.kind, after.digest, after.target)
        operation = "attributes" if same else "change"
    return FileTouched(path=os.fsdecode(path), operation=operation, before=before.digest or None, after=after.digest or None)


def with_files(event: Event, files: Mapping[bytes, FileTouched], *, undoable: bool) -> Event:
    """Of very many, the first ones, how many there are, and a digest of all of them; the journal has them, too."""
    touched = tuple(files.values())
    detail = event.detail
    if len(touched) > _ON_RECORD:
        digest = hashlib.sha256()
        for each in touched:
            digest.update(each.model_dump_json().encode() + b"\n")
        detail = {**(detail or {}), "files": {"count": len(touched), "sha256": digest.hexdigest()}}
    return event.model_copy(update={"files": touched[:_ON_RECORD], "undoable": undoable, "detail": detail})
