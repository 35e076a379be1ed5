"""What calls that did not end well have changed, restored: at once, at the next start, and again while anything is left.

What a killed daemon left open is rolled back at the start: nobody knows any more what the call had made of each path, so what
is there is kept first, as a call of its own that can be undone. A path that can't be restored never stops the others. It is put
on a list with the reason and what was there then; it is tried again while the daemon runs, as long as nobody has changed it.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import AgentdError
from agentd.journal.images import GIVE_UP, times_around
from agentd.journal.making import Target, restoring_does
from agentd.journal.places import Granting, parents, reach, shown
from agentd.journal.plan import finished_since
from agentd.journal.restoring import Failure, Restoring
from agentd.journal.state import ABSENT, PathState, look, look_anyhow, without_content
from agentd.journal.transaction import Transaction
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    import apsw
    from agentd_sandbox.recorder import Operation

    from agentd.audit import AuditLog
    from agentd.audit.events import Kind
    from agentd.journal.contents import Contents
    from agentd.journal.images import Image, Images
    from agentd.journal.journal import Journal
    from agentd.store import Store

_log = logging.getLogger(__name__)
_NAMED = 5  # paths in a message
_AWAY = "the directory that it was in is not there"
_ANOTHER = "its directory is another one now: a disk may not be mounted; `agentd recover --force` takes this one"
_CHANGED = "somebody has changed it since; `agentd recover --force` overwrites it and keeps their version"


@dataclass(frozen=True, slots=True)
class Left:
    """A path that a call changed and that could not be restored. `left` is what was there then, None if that is not known."""

    call: str
    path: bytes
    why: str
    since_ns: int
    left: PathState | None
    principal: str


class Recovery:
    def __init__(self, journal: Journal, store: Store, audit: AuditLog, images: Images, contents: Contents) -> None:
        self._journal, self._store, self._audit = journal, store, audit
        self._images, self._contents = images, contents
        self._busy = threading.Lock()
        self._count = len(self.left())
        self._not_ended: dict[str, None] = {}

    @property
    def count(self) -> int:
        """How many paths are left, and calls whose end could not be written down."""
        return self._count + len(self._not_ended)

    def not_ended(self, call: str) -> None:
        """What a call changed is restored, and its end can't be written down: that is tried again, too. Without it the next
        start would restore the paths once more, whatever people have made of them by then.
        """
        self._not_ended[call] = None

    def ended(self, call: str) -> None:
        self._not_ended.pop(call, None)

    def left(self, call: str = "") -> list[Left]:
        """The paths that could not be restored yet, of one call or of all, oldest first."""
        query = """SELECT call, path, why, since_ns, found, principal FROM leftover JOIN journal USING (call)
                   WHERE ? IN ('', call) ORDER BY since_ns, call, path"""
        rows = self._store.read(lambda db: list(db.execute(query, (call,))))
        return [
            Left(str(call), path, str(why), int(since), PathState.from_json(found) if found else None, str(principal))
            for call, path, why, since, found, principal in rows
        ]

    def calls(self) -> list[tuple[str, list[bytes]]]:
        """The calls of which something is left, and on which paths: newest first, as they found what earlier ones had made."""
        query = "SELECT call, path FROM leftover JOIN journal USING (call) ORDER BY begun DESC, path"
        found: dict[str, list[bytes]] = {}
        for call, path in self._store.read(lambda db: list(db.execute(query))):
            found.setdefault(str(call), []).append(path)
        return list(found.items())

    # -- a call that has failed

    def restore(self, transaction: Transaction) -> list[Failure]:
        """Bring every path of a call back to what it was; returns what could not be. A path that another call has changed
        since, and finished, is that call's.
        """
        theirs = finished_since(self._store, transaction.begun, transaction.images)
        return self._restore(transaction, [i for i in transaction.images.values() if i.path not in theirs])

    def _restore(self, transaction: Transaction, images: Iterable[Image]) -> list[Failure]:
        return self.restoring(images, transaction).run()

    def restoring(
        self,
        images: Iterable[Image],
        transaction: Transaction,
        sweeps: bytes = b"",
        expected: Mapping[bytes, PathState] | None = None,
    ) -> Restoring:
        """Paths on their way to what they were before. `transaction` is the call that does it: what it has kept of a path is
        what may be overwritten there, or what is `expected` there, and nothing that came later.
        """
        ordered = sorted(images, key=lambda image: image.n)
        times = times_around(ordered)
        targets = [Target(i.path, _with_time(i.before, times.get(i.path)), self._content(i), i.content.length) for i in ordered]

        before_granting = functools.partial(self._journal.captures.note_mode, transaction)
        if expected is None:
            own = any(image.call == transaction.call for image in ordered)
            expected = {} if own else {path: image.before for path, image in transaction.images.items()}
        return Restoring(targets, transaction.mark, times, before_granting, sweeps=sweeps, expected=expected)

    def _content(self, image: Image) -> Callable[[], Iterable[bytes]]:
        return lambda: self._images.chunks(image)

    def left_over(self, call: str, failures: Sequence[Failure]) -> str:
        """Put paths on the list of what is left. Returns them in words."""
        now = time.time_ns()
        rows = [(call, f.path, f.why, now, _found(f.path) if f.why not in (_AWAY, _ANOTHER) else None) for f in failures]

        def note(db: apsw.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO leftover (call, path, why, since_ns, found) VALUES (?, ?, ?, ?, ?)", rows)

        try:
            self._journal.write_end(note)
        except AgentdError as e:  # the next start finds the call open
            _log.error("call %s: what is left of it can't be written down: %s", call, e)
        self._recount()
        named = _named(failures)
        _log.error("call %s: could not be restored, and is tried again: %s", call, named)
        return named

    def _recount(self) -> None:
        self._count = len(self.left())

    # -- what a killed daemon has left open

    def recover(self) -> list[str]:
        """Roll back what has no end, newest first; returns the calls. What can't be restored is on the list of what is left."""
        query = "SELECT call, begun FROM journal WHERE state = 'open' ORDER BY begun DESC"
        open_calls = self._store.read(lambda db: [(str(call), int(begun)) for call, begun in db.execute(query)])
        if open_calls:
            self._contents.part_all()
        # Decided for all before the first is restored: a recovery is a finished call, too.
        images = {call: self._changed_by(call) for call, _ in open_calls}
        theirs = {
            call: finished_since(self._store, begun, [image.path for image in images[call]]) for call, begun in open_calls
        }
        again = {left.call for left in self.left()}
        for call, _ in open_calls:
            try:
                if call in again:
                    self._retry(call, self.left(call), force=False)
                else:
                    self._recover(call, [image for image in images[call] if image.path not in theirs[call]])
            except (OSError, AgentdError) as e:  # one call that can't be had must not keep the daemon from starting
                _log.error("call %s is still open, it can't be recovered now: %s", call, e)
        self._journal.retention.reserve.hold()  # not before: it may be what this took
        return [call for call, _ in open_calls]

    def _changed_by(self, call: str) -> list[Image]:
        """States of the paths that an open call may have changed: of those taken ahead, the ones that are gone."""
        return [i for i in self._images.of(call) if not i.ahead or i.after or not os.path.lexists(i.path)]

    def _recover(self, call: str, images: list[Image]) -> None:
        """As a call of its own: what is there now is kept, and can be had again."""
        images, away = _in_their_directories(images, {image.path for image in images})
        changed, failures = self._differing(call, images)
        failures += away
        recovery = new_id()
        detail = _detail(call, [*changed])
        intent = Event(kind="undo.intent", principal="agentd", call=recovery, cause=call, detail=detail)
        transaction = self._journal.begin_restoring(recovery, intent, changed, failures)
        kept = [image for image in images if image.path in transaction.images or image.path not in changed]
        failures += self.restoring(kept, transaction, sweeps=os.fsencode(call)).run()
        end = Event(kind="call.recovered", principal="agentd", call=recovery, cause=call, detail=detail)
        self._journal.finish(transaction, end, [] if failures else [(call, "rolled_back")])
        if failures:
            self.left_over(call, failures)

    def _differing(self, call: str, images: Iterable[Image]) -> tuple[dict[bytes, Operation], list[Failure]]:
        """Paths that are not what they were, and what bringing them back does to each; and those that can't be looked at."""
        changed: dict[bytes, Operation] = {}
        failures: list[Failure] = []
        reopened = self._reopened(call)
        with Granting(lambda path: self._journal.captures.note_mode(reopened, path)) as granting:
            for image in images:
                try:
                    now = look_anyhow(image.path, granting, image.before)
                except OSError as e:
                    failures.append(Failure(image.path, e.strerror or str(e)))
                    continue
                if now.differs_from(image.before):
                    changed[image.path] = restoring_does(now, image.before)
        return changed, failures

    # -- what is left

    def retry(self, call: str, paths: Collection[bytes], *, force: bool = False) -> None:
        """Try again what is left of a call on these paths. With `force`, what somebody has changed since is overwritten, after
        their version was kept. Raises StoreError.
        """
        with self._busy:
            self._retry(call, [left for left in self.left(call) if left.path in paths], force=force)

    def write_ends(self) -> None:
        """Write down the ends of calls that could not be written when they came. Raises StoreError."""
        with self._busy:
            for call in list(self._not_ended):
                if not self.left(call):
                    self._settle(call, (), {})
                self.ended(call)

    def _retry(self, call: str, wanted: Iterable[Left], *, force: bool) -> None:
        left = {each.path: each for each in wanted}
        images = [image for image in self._changed_by(call) if image.path in left]
        changed = {image.path for image in images if not force and self._is_changed(left[image.path], image)}
        # What nobody has seen then may be somebody's by now: it is kept first, as at a start.
        kept = [i for i in images if i.path not in changed and (force or left[i.path].left is None)]
        others = [i for i in images if i.path not in changed and i not in kept]
        known = {image.path for image in self._images.of(call)}
        others, failures = _in_their_directories(others, known)
        kept, away = _in_their_directories(kept, known, or_another=force)
        failures += away
        expected = {path: each.left for path, each in left.items() if each.left}
        failures += self.restoring(others, self._reopened(call), os.fsencode(call), expected).run()
        failures += self._overwrite(call, kept) if kept else []  # last: it may be in a directory that is back now
        why = {failure.path: failure.why for failure in failures} | dict.fromkeys(changed, _CHANGED)
        self._settle(call, left, why)

    def _reopened(self, call: str) -> Transaction:
        """A call that has not ended well goes on: what else must be noted on the way belongs to it."""
        begun = self._store.read(lambda db: db.execute("SELECT begun FROM journal WHERE call = ?", (call,)).get)
        known = self._images.of(call)
        rows = max((image.n for image in known), default=-1) + 1
        images = {image.path: image for image in known if not image.ahead}
        around = {os.path.dirname(path) for path in images}
        roots = tuple(path for path in around if not around.intersection(parents(path)))
        return Transaction(self._journal, call, int(begun), images, limited=False, rows=rows, roots=roots)

    def _overwrite(self, call: str, images: Sequence[Image]) -> list[Failure]:
        """As a call of its own: what somebody has made of these paths is kept, and can be had again."""
        recovery, detail = new_id(), _detail(call, [image.path for image in images])
        intent = Event(kind="undo.intent", principal="agentd", call=recovery, cause=call, detail=detail)
        changed, failures = self._differing(call, images)
        if not changed:
            return failures
        transaction = self._journal.begin_restoring(recovery, intent, changed, failures)
        failures += self._restore(transaction, [image for image in images if image.path in transaction.images])
        kind: Kind = "call.recovered" if len(failures) < len(images) else "call.abort"
        self._journal.finish(transaction, Event(kind=kind, principal="agentd", call=recovery, cause=call, detail=detail))
        return failures

    @staticmethod
    def _is_changed(left: Left, image: Image) -> bool:
        """Whether somebody has made something else of it than what was left there, and than what it is to be."""
        if left.left is None:
            return False
        try:
            now = look(image.path, left.left)
        except OSError:
            now = _unread(image.path) or ABSENT
        return now.differs_from(left.left) and now.differs_from(image.before)

    def _settle(self, call: str, paths: Collection[bytes], still: Mapping[bytes, str]) -> None:
        """Of these paths, those that are `still` left stay on the list, with the reason. With the last one the call ends."""
        gone = [path for path in paths if path not in still]

        def settle(db: apsw.Connection) -> bool:
            db.executemany("DELETE FROM leftover WHERE call = ? AND path = ?", ((call, path) for path in gone))
            db.executemany("UPDATE leftover SET why = ? WHERE call = ? AND path = ?", ((w, call, p) for p, w in still.items()))
            ends = not db.execute("SELECT count(*) FROM leftover WHERE call = ?", (call,)).get
            for path in gone:  # what others have left there is this now
                db.execute("UPDATE leftover SET found = ? WHERE path = ?", (_found(path), path))
            if gone or ends:
                event = Event(kind="call.recovered", principal="agentd", call=call, detail=_detail(call, gone))
                self._audit.append(db, event)
            if ends:
                db.execute("UPDATE journal SET state = 'rolled_back' WHERE call = ?", (call,))
                db.execute(GIVE_UP, (call,))
            return ends

        if self._journal.write_end(settle):
            _log.info("call %s: what was left of it is restored", call)
        self._recount()


def _in_their_directories(
    images: Iterable[Image], known: Collection[bytes], *, or_another: bool = False
) -> tuple[list[Image], list[Failure]]:
    """Those whose directory is the one that it was, or is `known` as one of the call's. Another one may be somebody's, or be
    there because a disk is not mounted: with `or_another` it will do.
    """
    there: list[Image] = []
    away: list[Failure] = []
    homes: dict[bytes, int | None] = {}
    for image in images:
        directory = os.path.dirname(image.path)
        if directory not in homes:
            homes[directory] = _inode_of(directory)
        home = homes[directory]
        ours = any(parent in known for parent in parents(image.path))
        if ours or home == image.before.home or (home is not None and (or_another or not image.before.home)):
            there.append(image)
        else:
            away.append(Failure(image.path, _AWAY if home is None else _ANOTHER))
    return there, away


def _inode_of(directory: bytes) -> int | None:
    """None if it is not there, or the way to it leads elsewhere."""
    try:
        place = reach(directory) if directory != b"/" else None
    except OSError:
        return None
    if place is None:
        return os.stat(b"/").st_ino if directory == b"/" else None
    with place:
        return place.status.st_ino if place.is_folder else None


def _detail(call: str, paths: Sequence[bytes]) -> dict[str, object]:
    return {"recovers": call, "paths": [shown(path) for path in paths[:_NAMED]], "count": len(paths)}


def _with_time(state: PathState, mtime_ns: int | None) -> PathState:
    if state.kind != "folder" or mtime_ns is None:
        return state
    return replace(state, mtime_ns=mtime_ns)


def _found(path: bytes) -> str | None:
    """What is there; None if that can't be said, or if not even its directory is."""
    try:
        place = reach(path)
        if place is None:
            return None
        place.__exit__()
        return look(path).to_json()
    except OSError:
        unread = _unread(path)
        return unread.to_json() if unread else None


def _unread(path: bytes) -> PathState | None:
    """What can be said of a file without reading it; None if nothing can be."""
    try:
        return without_content(path)
    except OSError:
        return None


def _named(failures: Sequence[Failure]) -> str:
    more = f" and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    return ", ".join(map(str, failures[:_NAMED])) + more
