"""Transactions over paths: former states kept before a change, and the end of each call on record.

The order is what counts: pre-image durable together with the intent event, then the change, then the end event. A transaction
that has no end when the daemon starts is rolled back (`recovery`).
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal.capturing import Captures
from agentd.journal.contents import INLINE_BYTES, Contents, Kept, TooLarge
from agentd.journal.ending import file_touched, leave_out_directories, looked_at, with_files
from agentd.journal.flushing import make_all_durable
from agentd.journal.images import GIVE_UP, Image, Images, times_around
from agentd.journal.places import Granting, parents
from agentd.journal.plan import Selection, Ways
from agentd.journal.recovery import Recovery
from agentd.journal.retention import Keep, Retention
from agentd.journal.rollback import Rollbacks, Undone
from agentd.journal.state import PathState, keep, look_anyhow
from agentd.journal.transaction import Taker, Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import apsw
    from agentd_sandbox.recorder import Operation

    from agentd.audit import AuditLog, Event, FileTouched
    from agentd.journal.restoring import Failure
    from agentd.store import Store


T = TypeVar("T")
_AFTER = "UPDATE pre_image SET after = ?, result = ?, result_object = ? WHERE call = ? AND n = ?"
_UNUSED = "DELETE FROM pre_image WHERE call = ? AND ahead = 1 AND after IS NULL"
"""States that were taken ahead, and of which nothing came."""
_BATCH = 500
"""Rows of one commit: others' commits come in between."""


class Journal:
    """Undo records in the store; large pre-images in the directory `objects` beside it."""

    def __init__(self, store: Store, audit: AuditLog, objects: Path, bounds: Keep) -> None:
        self._store, self._audit = store, audit
        self._contents = Contents(objects)
        self._taker = Taker(self._contents, bounds)
        self.captures = Captures(store, audit, self._taker, self._contents)
        self._bounds = bounds
        self.retention = Retention(store, audit, objects.parent, self._contents, bounds)
        self._images = Images(store, self._contents)
        self.recovery = Recovery(self, store, audit, self._images, self._contents)
        self.rollbacks = Rollbacks(self, store, audit, self._images)
        self._counting = threading.Lock()
        self._begun = int(store.read(lambda db: db.execute("SELECT coalesce(max(begun), 0) FROM journal").get))

    def begin(self, call: str, intent: Event, declared: Iterable[bytes] = ()) -> Transaction:
        """Record the intent and the present state of paths in one commit.

        Of `declared` paths, which a tool may change, large files are taken later. Raises JournalError (NOT_UNDOABLE) if a
        content is too large to keep, StoreError if it can't be written.
        """
        named = list(declared)
        transaction = self._new(call)
        transaction.roots = tuple(named)
        if named:
            self.retention.require_space(named)
        self.captures.capture(transaction, self._taker.at_once(named), intent)
        return transaction

    def begin_restoring(
        self, call: str, intent: Event, paths: Mapping[bytes, Operation], failures: list[Failure] | None = None
    ) -> Transaction:
        """As `begin`, for paths that are about to be restored, and how: what is there is kept however large it is.

        With `failures`, paths that can't be kept are noted there instead of ending it.
        """
        transaction = self._new(call, limited=False)
        ordered = dict(sorted(paths.items(), key=lambda item: item[0].count(b"/")))
        around = {os.path.dirname(path) for path in paths}
        transaction.roots = tuple(path for path in around if not around.intersection(parents(path)))
        self.captures.capture(transaction, ordered, intent, failures)
        return transaction

    def _new(self, call: str, *, limited: bool = True) -> Transaction:
        with self._counting:
            self._begun += 1
            return Transaction(self, call, self._begun, limited=limited)

    def foresee(self, paths: Iterable[bytes]) -> str:
        """Why changing these paths could not be undone, as far as can be said beforehand; empty if it could."""
        return self._taker.foresee(paths)

    def finish(
        self,
        transaction: Transaction,
        event: Event,
        settled: Sequence[tuple[str, str]] = (),
        undoes: Sequence[str] = (),
    ) -> tuple[FileTouched, ...]:
        """Record the end; `settled` are other calls and the states that this one brings them to, in the same commit.

        `undoes` are the calls that this one has undone.
        """
        after, files = self._settled(transaction)
        results = {path: self._result(path, state, INLINE_BYTES) for path, state in after.items() if path in files}

        def commit(db: apsw.Connection) -> None:
            db.execute(_UNUSED, (transaction.call,))
            done = (json.dumps(list(undoes)), transaction.call)
            db.execute("UPDATE journal SET state = 'done', undoes = ? WHERE call = ?", done)
            db.executemany("UPDATE journal SET state = ?2 WHERE call = ?1", settled)
            self._audit.append(db, with_files(event, files, undoable=bool(files)))

        try:
            self._end(commit, self._results(transaction, after, results))
        except AgentdError:  # a change without its record must not stand
            self.recovery.not_ended(transaction.call)
            self.restore(transaction)
            raise
        self.captures.part(transaction.images.values())
        return tuple(files.values())

    def rehearse(self, transaction: Transaction, event: Event) -> tuple[FileTouched, ...]:
        """Keep what a call has made of each path, restore everything, and record it: nothing has happened, but could.

        Raises JournalError (NOT_UNDOABLE) if a result is too large to keep, StoreError: everything is restored then, too.
        """
        after, files = self._settled(transaction)
        try:
            results = {path: self._result(path, after[path], self._bounds.file_bytes) for path in files}
        finally:
            self.restore(transaction)

        def commit(db: apsw.Connection) -> None:
            db.execute(_UNUSED, (transaction.call,))
            db.execute("UPDATE journal SET state = ? WHERE call = ?", ("rehearsed" if files else "done", transaction.call))
            self._audit.append(db, with_files(event, files, undoable=False))

        self._end(commit, self._results(transaction, after, results))
        self.captures.part(transaction.images.values())
        return tuple(files.values())

    def _results(
        self, transaction: Transaction, after: Mapping[bytes, PathState], results: Mapping[bytes, Kept]
    ) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for path, state in after.items():
            kept = results.get(path, Kept())
            rows.append((state.to_json(), kept.inline, kept.object, transaction.call, transaction.images[path].n))
        return rows

    def _settled(self, transaction: Transaction) -> tuple[dict[bytes, PathState], dict[bytes, FileTouched]]:
        """What the call has left, durable, and what of it is new. Raises JournalError with everything restored."""
        try:
            with Granting(lambda path: self.captures.note_mode(transaction, path)) as granting:
                after = looked_at(transaction.images, granting)
                files = {
                    path: touched
                    for path, image in transaction.images.items()
                    if path in after and (touched := file_touched(path, image.before, after[path])) is not None
                }
                leave_out_directories(transaction, after, files)
                self._add_directories(transaction, after, files, granting)
                make_all_durable(files, one_by_one=not granting.used)
        except AgentdError:  # what it left can't be written down
            self.restore(transaction)
            raise
        except OSError as e:  # what can't be read or made durable is no end: a disk that fails may not keep it
            self.restore(transaction)
            shown = os.fsdecode(e.filename) if e.filename else "what it changed"
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call was rolled back: {shown} could not be read or made durable after it: {e.strerror}.",
                hint="Check the disk.",
                metadata={"call": transaction.call},
            ) from e
        return after, files

    def _add_directories(
        self, transaction: Transaction, after: dict[bytes, PathState], files: dict[bytes, FileTouched], granting: Granting
    ) -> None:
        """Directories of which nothing but the time is different: what was made in them has gone again. And those whose own
        state was taken when something in them had been changed already.
        """
        around = {os.path.dirname(path) for path in files}
        images: dict[bytes, Image] = {}
        for directory, former in times_around(transaction.images.values()).items():
            if image := transaction.images.get(directory):
                if image.before.kind == "folder" and image.before.mtime_ns != former:
                    images[directory] = replace(image, before=replace(image.before, mtime_ns=former))
            elif directory not in around:
                state = look_anyhow(directory, granting)
                if state.kind == "folder" and state.mtime_ns != former:
                    images[directory] = Image(transaction.call, directory, replace(state, mtime_ns=former))
                    after[directory] = state
        if images:
            self.captures.write(transaction, list(images.values()), None, self.write_end)
            touched = {path: file_touched(path, image.before, after[path]) for path, image in images.items() if path in after}
            files |= {path: each for path, each in touched.items() if each}

    def _result(self, path: bytes, state: PathState, limit: int) -> Kept:
        """What a call has made of a file: small ones to be shown and merged later, all of a rehearsal to be applied."""
        if state.kind != "file":
            return Kept()
        try:
            with Granting() as granting:
                again, kept = granting.reading(lambda: keep(path, self._contents, limit=limit), path)
        except (OSError, TooLarge) as e:
            if limit == INLINE_BYTES:
                return Kept()
            shown = os.fsdecode(path)
            message = f"What the call made of {shown} can't be kept to be looked at, so it was rolled back."
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown}) from e
        return kept if again.digest == state.digest else Kept()

    def restore(self, transaction: Transaction) -> None:
        """Undo what a call that did not end well has changed. What fails is kept on a list, and tried again.

        Raises JournalError if anything is left.
        """
        failures = self.recovery.restore(transaction)
        if failures:
            named = self.recovery.left_over(transaction.call, failures)
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call failed, and this could not be restored: {named}.",
                hint="agentd goes on trying; `agentd recover` tries at once and says what is in the way.",
                metadata={"call": transaction.call},
            )

    def roll_back(self, transaction: Transaction, event: Event) -> None:
        """Restore everything and record the end of a call that has had no effect.

        Raises JournalError if something could not be restored: that is on record, too, and is tried again. StoreError.
        """
        left: JournalError | None = None
        try:
            self.restore(transaction)
        except JournalError as e:
            left = e
            event = event.model_copy(update={"detail": {**(event.detail or {}), "left": e.message}})

        def commit(db: apsw.Connection) -> None:
            if left is None:
                db.execute(_UNUSED, (transaction.call,))
                db.execute("UPDATE journal SET state = 'rolled_back' WHERE call = ?", (transaction.call,))
                db.execute(GIVE_UP, (transaction.call,))
            self._audit.append(db, event)

        try:
            self._end(commit)
        except AgentdError:
            if left is None:
                self.recovery.not_ended(transaction.call)
            raise
        self.recovery.ended(transaction.call)
        self.captures.part(transaction.images.values())
        if left is not None:
            raise left

    def _end(self, commit: Callable[[apsw.Connection], None], results: Sequence[tuple[object, ...]] = ()) -> None:
        """Many results come in commits of their own before: without the end they mean nothing."""
        early = len(results) // _BATCH * _BATCH
        for start in range(0, early, _BATCH):
            batch = results[start : start + _BATCH]
            self.write_end(lambda db, batch=batch: db.executemany(_AFTER, batch))  # type: ignore[misc]

        def end(db: apsw.Connection) -> None:
            db.executemany(_AFTER, results[early:])
            commit(db)

        self.write_end(end)

    def write_end(self, commit: Callable[[apsw.Connection], T]) -> T:
        """A commit that something which has begun needs to end, on a full disk from what is set aside. Raises StoreError."""
        try:
            return self._store.write(commit)
        except AgentdError as e:
            if e.reason is not Reason.STORE_FULL or not self.retention.reserve.release():
                raise
            return self._store.write(commit)

    def undo(self, call: str, principal: str) -> Undone:
        """Undo all that a call changed. Raises JournalError (UNDO_CONFLICT) and does nothing if any path is not as the call
        left it; NOT_UNDOABLE for a call that changed nothing or is undone already.
        """
        return self.rollbacks.apply(self.rollbacks.plan(Selection(calls=(call,)), Ways()), principal)

    def recover(self) -> list[str]:
        """Roll back what a killed daemon left open, newest first; returns the calls."""
        return self.recovery.recover()
