"""Transactions over paths, undo of a call, recovery after a kill.

The order is what counts: pre-image durable together with the intent event, then the change, then the end event.
A transaction that has no end when the daemon starts is rolled back; what recovery overwrites is kept as a
pre-image of the recovery itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentd_sandbox import Refusal

from agentd.audit import Event, FileTouched
from agentd.errors import AgentdError, JournalError, Reason, StoreError
from agentd.journal.images import RESULT_BYTES, Image, Images, packed
from agentd.journal.plan import Selection, Ways
from agentd.journal.retention import Keep, Retention
from agentd.journal.rollback import Rollbacks, Undone
from agentd.journal.state import INLINE_BYTES, PathState, TooLarge, look, make_durable, put_back, sweep, take, write_object
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import apsw
    from agentd_sandbox import Change

    from agentd.audit import AuditLog
    from agentd.store import Store


_log = logging.getLogger(__name__)
_BEGIN = """INSERT INTO journal (call, state, begun, time_ns, run, session, principal, effect)
            SELECT ?, 'open', coalesce(max(begun), 0) + 1, ?, ?, ?, ?, ? FROM journal"""
_FINISHED_LATER = """SELECT 1 FROM pre_image JOIN journal USING (call) WHERE path = ? AND state = 'done'
                     AND begun > (SELECT begun FROM journal WHERE call = ?) LIMIT 1"""


@dataclass(slots=True)
class Transaction:
    """The changes of one call. Is the recorder of its worker's broker (`before_changes`)."""

    _journal: Journal
    call: str
    images: dict[bytes, Image] = field(default_factory=dict)
    contents: dict[bytes, bytes] = field(default_factory=dict)
    bytes: int = 0
    """Of all contents that were kept for it."""

    def before_changes(self, changes: Sequence[Change]) -> None:
        """Make the pre-images of paths durable, once per path, in one commit. Raises Refusal where that can't be done."""
        paths = [change.path for change in changes if change.path not in self.images]
        if not paths:
            return
        try:
            self._journal.capture(self, paths, None)
        except JournalError as e:
            raise Refusal(errno.EFBIG, str(e)) from None
        except AgentdError as e:
            raise Refusal(errno.ENOSPC if e.reason is Reason.STORE_FULL else errno.EIO, str(e)) from None

    def finish(self, event: Event) -> tuple[FileTouched, ...]:
        """Record the end of the call with what it changed; durable when it returns."""
        return self._journal.finish(self, event)

    def roll_back(self, event: Event) -> None:
        """Put everything back and record that the call had no effect."""
        self._journal.roll_back(self, event)


class Journal:
    """Undo records in the store; large pre-images in the folder `objects` beside it."""

    def __init__(self, store: Store, audit: AuditLog, objects: Path, keep: Keep) -> None:
        self._store, self._audit, self._objects, self._keep = store, audit, objects, keep
        self.retention = Retention(store, audit, objects.parent, objects, keep)
        self._images = Images(store, objects)
        self.rollbacks = Rollbacks(self, store, audit, self._images)

    def begin(self, call: str, intent: Event, paths: Iterable[bytes]) -> Transaction:
        """Record the intent and the present state of the declared paths in one commit.

        Raises JournalError (NOT_UNDOABLE) if a content is too large to keep, StoreError if it can't be written.
        """
        transaction = Transaction(self, call)
        declared = list(paths)
        if declared:
            self.retention.require_space()
        self.capture(transaction, declared, intent)
        return transaction

    def foresee(self, paths: Iterable[bytes]) -> str:
        """Why changing these paths could not be undone, as far as can be said beforehand; empty if it could."""
        whole = 0
        for path in paths:
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                size = status.st_size if stat.S_ISREG(status.st_mode) else 0
                whole += size
                if size > self._keep.file_bytes:
                    limit = self._keep.file_bytes >> 20
                    return f"{os.fsdecode(path)} has {size >> 20} MiB, more than the {limit} MiB the journal keeps of a file"
        if whole > self._keep.call_bytes:
            limit = self._keep.call_bytes >> 20
            return f"it would change {whole >> 20} MiB, more than the {limit} MiB the journal keeps of a call"
        return ""

    def capture(self, transaction: Transaction, paths: Iterable[bytes], intent: Event | None) -> None:
        """Add pre-images to a transaction; with `intent`, the event and the transaction itself too."""
        taken = [self._take(transaction, path) for path in dict.fromkeys(paths) if path not in transaction.images]
        first = len(transaction.images)
        images = [replace(image, object=self._object(content)) for image, content in taken]

        def commit(db: apsw.Connection) -> None:
            if intent is not None:
                self._audit.append(db, intent)
                effect = intent.tool.effect if intent.tool else ""
                db.execute(_BEGIN, (transaction.call, time.time_ns(), intent.run, intent.session, intent.principal, effect))
            for n, (image, (_, content)) in enumerate(zip(images, taken, strict=True), first):
                inline = None if image.object else content
                row = (transaction.call, n, image.path, image.before.to_json(), inline, image.object)
                db.execute("INSERT INTO pre_image (call, n, path, before, content, object) VALUES (?, ?, ?, ?, ?, ?)", row)

        self._store.write(commit)
        transaction.images.update({image.path: image for image in images})
        transaction.contents.update({image.path: content for image, content in taken})

    def finish(
        self,
        transaction: Transaction,
        event: Event,
        settled: Sequence[tuple[str, str]] = (),
        undoes: Sequence[str] = (),
    ) -> tuple[FileTouched, ...]:
        """Record the end; `settled` are other calls and the states that this one brings them to, in the same commit.

        `undoes` are the calls that this one has put back.
        """
        try:
            after, files = self._settle(transaction)
        except OSError as e:  # what can't be read or made durable is no end: a disk that fails may not keep it
            self._put_back(transaction)
            shown = os.fsdecode(e.filename) if e.filename else "what it changed"
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call was put back: {shown} could not be read or made durable after it: {e.strerror}.",
                hint="Check the disk.",
                metadata={"call": transaction.call},
            ) from e
        results = {
            path: _result(path, state) for path, state in after.items() if not state.same_as(transaction.images[path].before)
        }

        def commit(db: apsw.Connection) -> None:
            for path, state in after.items():
                values = (state.to_json(), results.get(path), transaction.call, path)
                db.execute("UPDATE pre_image SET after = ?, result = ? WHERE call = ? AND path = ?", values)
            done = (json.dumps(list(undoes)), transaction.call)
            db.execute("UPDATE journal SET state = 'done', undoes = ? WHERE call = ?", done)
            db.executemany("UPDATE journal SET state = ?2 WHERE call = ?1", settled)
            self._audit.append(db, event.model_copy(update={"files": files, "undoable": bool(files)}))

        try:
            self._end(commit)
        except AgentdError:  # a change without its record must not stand; the next start closes the transaction
            self._put_back(transaction)
            raise
        return files

    def _settle(self, transaction: Transaction) -> tuple[dict[bytes, PathState], tuple[FileTouched, ...]]:
        """What the call has left, durable. Raises OSError."""
        after = {path: _after(path) for path in transaction.images}
        files = tuple(
            touched
            for path, image in transaction.images.items()
            if (touched := _touched(path, image.before, after[path])) is not None
        )
        for file in files:
            make_durable(os.fsencode(file.path))
        return after, files

    def _put_back(self, transaction: Transaction) -> None:
        """Undo what a call that did not end well has changed. What fails stays open for the next start.

        A path that another call has changed since, and finished, is that call's.
        """
        failed: list[str] = []
        for image in _restoring(transaction.images.values()):
            if self._finished_later(image.path, transaction.call):
                continue
            try:
                if not look(image.path).same_as(image.before):
                    put_back(image.path, image.before, transaction.contents[image.path])
            except OSError as e:
                failed.append(f"{os.fsdecode(image.path)} ({e.strerror})")
        if failed:
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call failed, and this could not be put back: {', '.join(failed)}.",
                hint="The next start of agentd tries again; what is there then is kept, too.",
                metadata={"call": transaction.call},
            )

    def _finished_later(self, path: bytes, call: str) -> bool:
        return bool(self._store.read(lambda db: db.execute(_FINISHED_LATER, (path, call)).get))

    def roll_back(self, transaction: Transaction, event: Event) -> None:
        self._put_back(transaction)

        def commit(db: apsw.Connection) -> None:
            db.execute("UPDATE journal SET state = 'rolled_back' WHERE call = ?", (transaction.call,))
            self._audit.append(db, event)

        self._end(commit)

    def _end(self, commit: Callable[[apsw.Connection], None]) -> None:
        """What has begun is ended even on a full disk: there is space set aside for that."""
        try:
            self._store.write(commit)
        except AgentdError as e:
            if e.reason is not Reason.STORE_FULL or not self.retention.release_reserve():
                raise
            self._store.write(commit)

    def undo(self, call: str, principal: str) -> Undone:
        """Put back all that a call changed. Raises JournalError (UNDO_CONFLICT) and does nothing if any path is
        not as the call left it; NOT_UNDOABLE for a call that changed nothing or is undone already.
        """
        return self.rollbacks.apply(self.rollbacks.plan(Selection(calls=(call,)), Ways()), principal)

    def recover(self) -> list[str]:
        """Roll back what a killed daemon left open, newest first; returns the calls. What can't be put back is logged."""
        query = "SELECT call FROM journal WHERE state = 'open' ORDER BY begun DESC"
        open_calls = [call for (call,) in self._store.read(lambda db: list(db.execute(query)))]
        # Decided for all before the first is put back: a recovery is a finished call, too.
        theirs = {call: {path for path in self._paths(call) if self._finished_later(path, call)} for call in open_calls}
        for call in open_calls:
            try:
                self._recover(call, theirs[call])
            except (OSError, JournalError) as e:  # one file that can't be had must not keep the daemon from starting
                _log.error("call %s is still open, some of its changes can't be put back now: %s", call, e)
        return open_calls

    def _paths(self, call: str) -> list[bytes]:
        query = "SELECT path FROM pre_image WHERE call = ?"
        return self._store.read(lambda db: [path for (path,) in db.execute(query, (call,))])

    def _recover(self, call: str, theirs: set[bytes]) -> None:
        images = [image for image in self._images.of(call) if image.path not in theirs]
        for image in images:
            sweep(image.path)
        changed = [image for image in images if not look(image.path).same_as(image.before)]
        recovery = new_id()
        detail = {"recovers": call, "paths": [os.fsdecode(image.path) for image in changed]}
        intent = Event(kind="undo.intent", principal="agentd", call=recovery, cause=call, detail=detail)
        transaction = self.begin(recovery, intent, [image.path for image in changed])
        for image in _restoring(changed):
            put_back(image.path, image.before, self._images.content(image))
        end = Event(kind="call.recovered", principal="agentd", call=recovery, cause=call, detail=detail)
        self.finish(transaction, end, [(call, "rolled_back")])

    def why_not(self, call: str) -> JournalError:
        """Why there is nothing of a call to put back."""
        state = self._store.read(lambda db: db.execute("SELECT state FROM journal WHERE call = ?", (call,)).get)
        if state is None:
            known = self._audit.entries(call=call, limit=1)
            why = "changes nothing that can be put back" if known else "is not known"
            reason = Reason.NOT_UNDOABLE if known else Reason.CALL_NOT_FOUND
        else:
            reason = Reason.NOT_UNDOABLE
            why = {"undone": "is undone already", "open": "is still running"}.get(str(state), "changed nothing")
        hint = "`agentd audit list` shows the calls."
        return JournalError(reason, f"Call {call} {why}.", hint=hint, metadata={"call": call})

    def _take(self, transaction: Transaction, path: bytes) -> tuple[Image, bytes]:
        try:
            state, content = take(path, limit=self._keep.file_bytes)
        except TooLarge:
            shown, limit = os.fsdecode(path), self._keep.file_bytes >> 20
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"{shown} is larger than the {limit} MiB the journal keeps, so changing it could not be undone.",
                hint="Raise journal.file_limit_mib in agentd.toml if it must be changed.",
                metadata={"path": shown, "limit_mib": str(limit)},
            ) from None
        except OSError as e:
            shown = os.fsdecode(path)
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"{shown} can't be read for the journal: {e.strerror}.",
                hint="Check the path and its permissions.",
                metadata={"path": shown},
            ) from e
        if state.kind == "other":
            shown = os.fsdecode(path)
            message = f"{shown} is neither a file nor a folder nor a link, so changing it could not be undone."
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown})
        transaction.bytes += len(content)
        if transaction.bytes > self._keep.call_bytes:
            limit = self._keep.call_bytes >> 20
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call has changed more than the {limit} MiB the journal keeps of one, so the rest could not be undone.",
                hint="Raise journal.call_limit_mib in agentd.toml if it must be.",
                metadata={"limit_mib": str(limit)},
            )
        return Image(transaction.call, path, state), content

    def _object(self, content: bytes) -> str | None:
        """The name of a large content, kept. Raises StoreError."""
        if len(content) <= INLINE_BYTES:
            return None
        try:
            return write_object(self._objects, content)
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(
                Reason.STORE_FULL if full else Reason.AUDIT_UNAVAILABLE,
                f"A former content can't be kept in {self._objects}: {e.strerror}. Nothing was changed.",
                hint="Free some space." if full else "Check the disk.",
                metadata={"path": str(self._objects)},
            ) from e


def _restoring(images: Iterable[Image]) -> list[Image]:
    """The order to put paths back in: first what is to go, deepest first; then what is to come, from the top."""
    known = list(images)
    going = [image for image in known if image.before.kind == "absent"]
    coming = [image for image in known if image.before.kind != "absent"]
    return sorted(going, key=lambda i: -i.path.count(b"/")) + sorted(coming, key=lambda i: i.path.count(b"/"))


def _result(path: bytes, state: PathState) -> bytes | None:
    """What a call has made of a small file, to be shown and merged later."""
    if state.kind != "file":
        return None
    try:
        again, content = take(path, limit=RESULT_BYTES)
    except (OSError, TooLarge):
        return None
    return packed(content) if again.digest == state.digest else None


def _after(path: bytes) -> PathState:
    """Raises OSError. A way that leads elsewhere now has nothing of the call at its end."""
    try:
        return look(path)
    except OSError as e:
        if e.errno == errno.ELOOP:
            return PathState("absent")
        raise


def _touched(path: bytes, before: PathState, after: PathState) -> FileTouched | None:
    if before.same_as(after):
        return None
    return FileTouched(path=os.fsdecode(path), before=before.digest or None, after=after.digest or None)
