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
import threading
import time
from typing import TYPE_CHECKING

from agentd.audit import Event, FileOperation, FileTouched
from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal.contents import INLINE_BYTES, Contents, Kept, TooLarge
from agentd.journal.images import GIVE_UP, Image, Images
from agentd.journal.plan import Selection, Ways, finished_since
from agentd.journal.retention import Keep, Retention
from agentd.journal.rollback import Rollbacks, Undone
from agentd.journal.state import PathState, keep, look, make_durable, put_back, sweep
from agentd.journal.transaction import Taker, Transaction
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import apsw
    from agentd_sandbox.recorder import Operation

    from agentd.audit import AuditLog
    from agentd.store import Store


_log = logging.getLogger(__name__)
_BEGIN = """INSERT INTO journal (call, state, begun, time_ns, run, session, principal, effect)
            VALUES (?, 'open', ?, ?, ?, ?, ?, ?)"""
_IMAGE = "INSERT INTO pre_image (call, n, path, before, content, object, length) VALUES (?, ?, ?, ?, ?, ?, ?)"
_IN_FULL = "UPDATE pre_image SET content = ?, object = ?, length = 0 WHERE call = ? AND path = ?"
_AFTER = "UPDATE pre_image SET after = ?, result = ?, result_object = ? WHERE call = ? AND path = ?"


class Journal:
    """Undo records in the store; large pre-images in the folder `objects` beside it."""

    def __init__(self, store: Store, audit: AuditLog, objects: Path, bounds: Keep) -> None:
        self._store, self._audit = store, audit
        self._contents = Contents(objects)
        self._taker = Taker(self._contents, bounds)
        self._bounds = bounds
        self.retention = Retention(store, audit, objects.parent, self._contents, bounds)
        self._images = Images(store, self._contents)
        self.rollbacks = Rollbacks(self, store, audit, self._images)
        self._counting = threading.Lock()
        self._begun = int(store.read(lambda db: db.execute("SELECT coalesce(max(begun), 0) FROM journal").get))

    def begin(self, call: str, intent: Event, declared: Iterable[bytes] = (), replaced: Iterable[bytes] = ()) -> Transaction:
        """Record the intent and the present state of paths in one commit.

        Of `declared` paths, which a tool may change, large files are taken later; `replaced` ones are about to be put back.
        Raises JournalError (NOT_UNDOABLE) if a content is too large to keep, StoreError if it can't be written.
        """
        with self._counting:
            self._begun += 1
            transaction = Transaction(self, call, self._begun)
        named = list(declared)
        if named:
            self.retention.require_space()
        wanted = self._taker.at_once(named)
        self.capture(transaction, wanted | dict.fromkeys(replaced, "replace"), intent)
        return transaction

    def foresee(self, paths: Iterable[bytes]) -> str:
        """Why changing these paths could not be undone, as far as can be said beforehand; empty if it could."""
        return self._taker.foresee(paths)

    def capture(self, transaction: Transaction, paths: Mapping[bytes, Operation], intent: Event | None) -> None:
        """Add pre-images of paths to a transaction; with `intent`, the event and the transaction itself too.

        A path maps to what is about to happen to it. Raises JournalError (NOT_UNDOABLE), StoreError.
        """
        images: list[Image] = []
        try:
            for path, operation in paths.items():
                images.append(self._taker.take(transaction, path, operation))
        except AgentdError:
            self._part(images)
            raise
        new = [image for image in images if image.path not in transaction.images]
        known = [image for image in images if image.path in transaction.images]
        first = len(transaction.images)

        def commit(db: apsw.Connection) -> None:
            if intent is not None:
                self._audit.append(db, intent)
                effect = intent.tool.effect if intent.tool else ""
                row = (
                    transaction.call,
                    transaction.begun,
                    time.time_ns(),
                    intent.run,
                    intent.session,
                    intent.principal,
                    effect,
                )
                db.execute(_BEGIN, row)
            for n, image in enumerate(new, first):
                kept, before = image.content, image.before.to_json()
                db.execute(_IMAGE, (image.call, n, image.path, before, kept.inline, kept.object, kept.length))
            in_full = [(i.content.inline, i.content.object, i.call, i.path) for i in known]
            db.executemany(_IN_FULL, in_full)

        try:
            self._store.write(commit)
        except AgentdError:
            self._part(images)
            raise
        transaction.images.update({image.path: image for image in images})

    def _part(self, images: Iterable[Image]) -> None:
        """A file that was to be kept as it is, but is still in its place, is somebody's again, and nobody else's."""
        for image in images:
            if image.content.as_it_is and image.content.object:
                with contextlib.suppress(AgentdError):  # the next start does it
                    self._contents.part(image.content.object)

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
        after, files = self._settled(transaction)
        results = {path: self._result(path, state, INLINE_BYTES) for path, state in after.items() if path in files}

        def commit(db: apsw.Connection) -> None:
            self._record_results(db, transaction, after, results)
            done = (json.dumps(list(undoes)), transaction.call)
            db.execute("UPDATE journal SET state = 'done', undoes = ? WHERE call = ?", done)
            db.executemany("UPDATE journal SET state = ?2 WHERE call = ?1", settled)
            self._audit.append(db, event.model_copy(update={"files": tuple(files.values()), "undoable": bool(files)}))

        try:
            self._end(commit)
        except AgentdError:  # a change without its record must not stand; the next start closes the transaction
            self._put_back(transaction)
            raise
        self._part(transaction.images.values())
        return tuple(files.values())

    def rehearse(self, transaction: Transaction, event: Event) -> tuple[FileTouched, ...]:
        """Keep what a call has made of each path, put everything back, and record it: nothing has happened, but could.

        Raises JournalError (NOT_UNDOABLE) if a result is too large to keep, StoreError: everything is put back then, too.
        """
        after, files = self._settled(transaction)
        try:
            results = {path: self._result(path, after[path], self._bounds.file_bytes) for path in files}
        finally:
            self._put_back(transaction)

        def commit(db: apsw.Connection) -> None:
            self._record_results(db, transaction, after, results)
            db.execute("UPDATE journal SET state = ? WHERE call = ?", ("rehearsed" if files else "done", transaction.call))
            self._audit.append(db, event.model_copy(update={"files": tuple(files.values()), "undoable": False}))

        self._end(commit)
        self._part(transaction.images.values())
        return tuple(files.values())

    def _record_results(
        self, db: apsw.Connection, transaction: Transaction, after: Mapping[bytes, PathState], results: Mapping[bytes, Kept]
    ) -> None:
        for path, state in after.items():
            kept = results.get(path, Kept())
            db.execute(_AFTER, (state.to_json(), kept.inline, kept.object, transaction.call, path))

    def _settled(self, transaction: Transaction) -> tuple[dict[bytes, PathState], dict[bytes, FileTouched]]:
        """What the call has left, durable, and what of it is new. Raises JournalError with everything put back."""
        try:
            after = {path: _after(path) for path in transaction.images}
            files = {
                path: touched
                for path, image in transaction.images.items()
                if (touched := _touched(path, image.before, after[path])) is not None
            }
            for path in files:
                make_durable(path)
        except OSError as e:  # what can't be read or made durable is no end: a disk that fails may not keep it
            self._put_back(transaction)
            shown = os.fsdecode(e.filename) if e.filename else "what it changed"
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call was put back: {shown} could not be read or made durable after it: {e.strerror}.",
                hint="Check the disk.",
                metadata={"call": transaction.call},
            ) from e
        return after, files

    def _result(self, path: bytes, state: PathState, limit: int) -> Kept:
        """What a call has made of a file: small ones to be shown and merged later, all of a rehearsal to be applied."""
        if state.kind != "file":
            return Kept()
        try:
            again, kept = keep(path, self._contents, limit=limit)
        except (OSError, TooLarge) as e:
            if limit == INLINE_BYTES:
                return Kept()
            shown = os.fsdecode(path)
            message = f"What the call made of {shown} can't be kept to be looked at, so it was put back."
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown}) from e
        return kept if again.digest == state.digest else Kept()

    def _put_back(self, transaction: Transaction) -> None:
        """Undo what a call that did not end well has changed. What fails stays open for the next start.

        A path that another call has changed since, and finished, is that call's.
        """
        failed: list[str] = []
        theirs = finished_since(self._store, transaction.begun, transaction.images)
        for image in _restoring(transaction.images.values()):
            if image.path in theirs:
                continue
            try:
                if not look(image.path).same_as(image.before):
                    put_back(image.path, image.before, self._images.chunks(image))
            except OSError as e:
                failed.append(f"{os.fsdecode(image.path)} ({e.strerror})")
            except JournalError as e:
                failed.append(e.message)
        if failed:
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call failed, and this could not be put back: {', '.join(failed)}.",
                hint="The next start of agentd tries again; what is there then is kept, too.",
                metadata={"call": transaction.call},
            )

    def roll_back(self, transaction: Transaction, event: Event) -> None:
        """Put everything back and record the end of a call that has had no effect. Raises JournalError, StoreError."""
        self._put_back(transaction)

        def commit(db: apsw.Connection) -> None:
            db.execute("UPDATE journal SET state = 'rolled_back' WHERE call = ?", (transaction.call,))
            db.execute(GIVE_UP, (transaction.call,))
            self._audit.append(db, event)

        self._end(commit)
        self._part(transaction.images.values())

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
        query = "SELECT call, begun FROM journal WHERE state = 'open' ORDER BY begun DESC"
        open_calls = self._store.read(lambda db: [(str(call), int(begun)) for call, begun in db.execute(query)])
        if open_calls:
            self._contents.part_all()
        # Decided for all before the first is put back: a recovery is a finished call, too.
        images = {call: self._images.of(call) for call, _ in open_calls}
        theirs = {
            call: finished_since(self._store, begun, [image.path for image in images[call]]) for call, begun in open_calls
        }
        for call, _ in open_calls:
            try:
                self._recover(call, [image for image in images[call] if image.path not in theirs[call]])
            except (OSError, AgentdError) as e:  # one file that can't be had must not keep the daemon from starting
                _log.error("call %s is still open, some of its changes can't be put back now: %s", call, e)
        return [call for call, _ in open_calls]

    def _recover(self, call: str, images: list[Image]) -> None:
        for folder in {os.path.dirname(image.path) for image in images}:
            sweep(folder)
        changed = [image for image in images if not look(image.path).same_as(image.before)]
        recovery = new_id()
        detail = {"recovers": call, "paths": [os.fsdecode(image.path) for image in changed]}
        intent = Event(kind="undo.intent", principal="agentd", call=recovery, cause=call, detail=detail)
        transaction = self.begin(recovery, intent, replaced=[image.path for image in changed])
        for image in _restoring(changed):
            put_back(image.path, image.before, self._images.chunks(image))
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
            why = {
                "undone": "is undone already",
                "open": "is still running",
                "rehearsed": "was rehearsed and put back",
                "applied": "was rehearsed, and applied as another call",
                "dropped": "was rehearsed and dropped",
            }.get(str(state), "changed nothing")
        hint = "`agentd audit list` shows the calls."
        return JournalError(reason, f"Call {call} {why}.", hint=hint, metadata={"call": call})


def _restoring(images: Iterable[Image]) -> list[Image]:
    """The order to put paths back in: first what is to go, deepest first; then what is to come, from the top."""
    known = list(images)
    going = [image for image in known if image.before.kind == "absent"]
    coming = [image for image in known if image.before.kind != "absent"]
    return sorted(going, key=lambda i: -i.path.count(b"/")) + sorted(coming, key=lambda i: i.path.count(b"/"))


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
    if before.kind == "absent":
        operation: FileOperation = "create"
    elif after.kind == "absent":
        operation = "delete"
    else:
        same = (before.kind, before.digest, before.target) == (after.kind, after.digest, after.target)
        operation = "attributes" if same else "change"
    return FileTouched(path=os.fsdecode(path), operation=operation, before=before.digest or None, after=after.digest or None)
