"""Rollbacks: a plan carried out, as a call of its own that is recorded and can be undone; and what calls have changed."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import JournalError, Reason
from agentd.journal.contents import TooLarge
from agentd.journal.images import GIVE_UP
from agentd.journal.making import Target, restoring_does
from agentd.journal.places import shown
from agentd.journal.plan import Plan, Planner, Verdict
from agentd.journal.restoring import Restoring
from agentd.journal.state import PathState, take
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import apsw

    from agentd.audit import AuditLog, FileTouched
    from agentd.journal.images import Images
    from agentd.journal.journal import Journal
    from agentd.journal.plan import PathPlan, Selection, Ways
    from agentd.journal.transaction import Transaction
    from agentd.store import Store

_SHOWN_BYTES = 1 << 20
_NAMED = 5  # paths in an error
_STATES = {
    "undone": "is undone already",
    "open": "is still running",
    "rehearsed": "was rehearsed and rolled back",
    "applied": "was rehearsed, and applied as another call",
    "dropped": "was rehearsed and dropped",
}


@dataclass(frozen=True, slots=True)
class Undone:
    """What a rollback did: the call that recorded it, the calls it put back, and the paths."""

    call: str
    files: tuple[FileTouched, ...]
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """What became of one path: a unified diff of text, or a sentence. `added` and `removed` count lines."""

    path: bytes
    summary: str
    diff: str = ""
    added: int = 0
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A call that was put back as soon as it had ended, and the paths that it would change."""

    call: str
    run: str
    principal: str
    time_ns: int
    paths: tuple[bytes, ...]


class Rollbacks:
    def __init__(self, journal: Journal, store: Store, audit: AuditLog, images: Images) -> None:
        self._journal, self._store, self._audit, self._images = journal, store, audit, images
        self._planner = Planner(store, images)

    def plan(self, selection: Selection, ways: Ways) -> Plan:
        """What would be done, path by path. Nothing is touched. Raises what the planner raises."""
        return self._planner.plan(selection, ways)

    def apply(self, plan: Plan, principal: str, progress: Callable[[int], None] = lambda _count: None) -> Undone:
        """Carry out a plan that was just made. All of it or nothing, unless it is partial. `progress` is called with how many
        paths are done, now and then, on this thread.

        Raises JournalError: UNDO_CONFLICT, NOT_UNDOABLE; StoreError. Then everything is as it was.
        """
        chosen = [planned for planned in plan.paths if planned.does]
        blocked = [planned for planned in plan.paths if planned.blocks]
        if blocked and not plan.ways.partial:
            raise _blocked(plan, blocked)
        if not chosen:
            raise self._nothing(plan)
        done = self._complete(plan)
        event = self._event(plan, done, principal)
        paths = {planned.path: restoring_does(planned.now, planned.target) for planned in chosen}
        around = {os.path.dirname(path) for path in paths}
        alone = [directory for directory in plan.times if directory not in paths.keys() | around]  # only their times change
        transaction = self._journal.begin_restoring(event.call, event, paths | dict.fromkeys(alone, "write"))
        try:
            self._restore(transaction, plan, chosen, progress)
        except JournalError as e:
            why = e.message
            transaction.roll_back(event.model_copy(update={"kind": "call.abort", "error": why}))
            raise _failed(plan, why) from e
        if plan.selection.rehearsed:
            end = event.model_copy(update={"kind": "rehearsal.end"})
            files = self._journal.finish(transaction, end, [(call, "applied") for call in done])
        else:
            end = event.model_copy(update={"kind": "undo.end"})
            settled = [(call, "undone") for call in done] + [(call, "done") for call in self._brought_back(done)]
            files = self._journal.finish(transaction, end, settled, done)
        return Undone(event.call, files, done)

    def _event(self, plan: Plan, done: tuple[str, ...], principal: str) -> Event:
        """The intent. What is applied belongs to the run that has rehearsed it."""
        forced = [os.fsdecode(planned.path) for planned in plan.paths if planned.forced]
        what = "applies" if plan.selection.rehearsed else "undoes"
        detail = {what: list(done), "plan": plan.digest, "forced": forced}
        event = Event(kind="undo.intent", principal=principal, call=new_id(), cause=plan.calls[-1], detail=detail)
        if not plan.selection.rehearsed:
            return event
        query = "SELECT run, session FROM journal WHERE call = ?"
        run, session = self._store.read(lambda db: next(iter(db.execute(query, (plan.calls[-1],)))))
        return event.model_copy(update={"kind": "rehearsal.apply", "run": run, "session": session})

    def rehearsals(self, principal: str) -> list[Rehearsal]:
        """Those that wait to be applied or dropped, oldest first; of one principal, or of all."""
        query = """SELECT call, run, principal, time_ns FROM journal WHERE state = 'rehearsed' AND ? IN ('', principal)
                   ORDER BY begun"""
        rows = self._store.read(lambda db: [(str(c), str(r), str(p), int(t)) for c, r, p, t in db.execute(query, (principal,))])
        return [Rehearsal(*row, paths=tuple(i.path for i in self._images.of(row[0]) if i.changed)) for row in rows]

    def drop(self, call: str, principal: str) -> None:
        """Give up what a rehearsed call has made. Raises JournalError (CALL_NOT_FOUND)."""

        def drop(db: apsw.Connection) -> bool:
            db.execute("UPDATE journal SET state = 'dropped' WHERE call = ? AND state = 'rehearsed'", (call,))
            if not db.changes():
                return False
            db.execute(GIVE_UP, (call,))
            self._audit.append(db, Event(kind="rehearsal.drop", principal=principal, cause=call))
            return True

        if not self._store.write(drop):
            hint = "`agentd rehearsals list` shows those that are."
            raise JournalError(
                Reason.CALL_NOT_FOUND, f"Call {call} is no rehearsal that waits.", hint=hint, metadata={"call": call}
            )

    def _restore(
        self, transaction: Transaction, plan: Plan, chosen: Sequence[PathPlan], progress: Callable[[int], None]
    ) -> None:
        """Raises JournalError. What the transaction has captured is what was planned for: nobody came in between. What stopped
        it is somebody's, and what nothing was done to is as it was: neither is rolled back.
        """
        expected = {path: image.before for path, image in transaction.images.items()}
        meanwhile = [planned for planned in chosen if not expected[planned.path].same_as(planned.now)]
        if meanwhile:
            transaction.images.clear()
            raise _stopped(meanwhile[0].path, "it was changed while it was being restored")
        targets = [self._target(planned, plan.times) for planned in chosen]
        before_granting = functools.partial(self._journal.captures.note_mode, transaction)
        restoring = Restoring(
            targets=targets,
            mark=transaction.mark,
            times=plan.times,
            before_granting=before_granting,
            progress=progress,
            others=plan.others,
            expected=expected,
        )
        if failures := restoring.run():
            transaction.keep_only(restoring.changed)
            raise _stopped(failures[0].path, failures[0].why)

    def _target(self, planned: PathPlan, times: Mapping[bytes, int]) -> Target:
        if planned.merged is not None:
            digest = hashlib.sha256(planned.merged).hexdigest()
            return Target(planned.path, replace(planned.now, digest=digest, inode="", links=1), lambda: [planned.merged or b""])
        state = planned.target
        if state.kind == "folder":  # its time is that of what is in it, which somebody else may have changed since
            otherwise = planned.now.mtime_ns if planned.now.kind == "folder" else state.mtime_ns
            state = replace(state, mtime_ns=times.get(planned.path, otherwise))
        return Target(planned.path, state, lambda: self._images.chunks(planned.first), planned.first.content.length)

    def _complete(self, plan: Plan) -> tuple[str, ...]:
        """The calls of which nothing is left when the plan is carried out."""
        stays = {
            call for planned in plan.paths if not (planned.does or planned.verdict is Verdict.ALREADY) for call in planned.calls
        }
        kept = plan.selection.paths and {call for call in plan.calls if self._reaches_beyond(call, plan)}
        return tuple(call for call in plan.calls if call not in stays and call not in (kept or ()))

    def _reaches_beyond(self, call: str, plan: Plan) -> bool:
        inside = {planned.path for planned in plan.paths}
        return any(image.changed and image.path not in inside for image in self._images.of(call))

    def _brought_back(self, undone: tuple[str, ...]) -> list[str]:
        """Calls that one of these had put back: undoing an undo is doing it again."""
        marks = ", ".join("?" * len(undone))
        query = f"SELECT undoes FROM journal WHERE call IN ({marks})"  # noqa: S608
        rows = self._store.read(lambda db: [str(text) for (text,) in db.execute(query, undone)])
        return [call for text in rows for call in json.loads(text) if call not in undone]

    def _nothing(self, plan: Plan) -> JournalError:
        if len(plan.selection.calls) == 1:
            return self._why_not(plan.selection.calls[0])
        hint = "`agentd audit list` shows the calls."
        return JournalError(Reason.NOT_UNDOABLE, "There is nothing to put back in what was selected.", hint=hint)

    def _why_not(self, call: str) -> JournalError:
        """Why there is nothing of a call to undo."""
        state = self._store.read(lambda db: db.execute("SELECT state FROM journal WHERE call = ?", (call,)).get)
        reason, left = Reason.NOT_UNDOABLE, self._journal.recovery.left(call)
        hint = "`agentd audit list` shows the calls."
        if state is None:
            known = self._audit.entries(call=call, limit=1)
            why = "changes nothing that can be undone" if known else "is not known"
            reason = Reason.NOT_UNDOABLE if known else Reason.CALL_NOT_FOUND
        elif left:
            paths = f"{len(left)} path{'s' * (len(left) != 1)}"
            why = f"failed, and {paths} could not be restored yet: {shown(left[0].path)}: {left[0].why}"
            hint = f"`agentd recover {call}` tries again."
        else:
            why = _STATES.get(str(state), "changed nothing")
        return JournalError(reason, f"Call {call} {why}.", hint=hint, metadata={"call": call})

    # -- showing

    def difference(self, planned: PathPlan, *, back: bool) -> Difference:
        """Of a path of a plan: what would be done to it (`back`), or what the calls have done to it."""
        if back:
            before, after = self._text_now(planned), self._text_before(planned)
            return _difference(planned.path, planned.now, planned.target, before, planned.merged or after)
        assert planned.last.after is not None
        result = self._images.result(planned.last)
        if result is None and planned.now.same_as(planned.last.after):
            result = self._text_now(planned)
        return _difference(planned.path, planned.target, planned.last.after, self._text_before(planned), result)

    def _text_before(self, planned: PathPlan) -> bytes | None:
        return self._images.text(planned.first, _SHOWN_BYTES)

    def _text_now(self, planned: PathPlan) -> bytes | None:
        try:
            return take(planned.path, limit=_SHOWN_BYTES)[1]
        except (OSError, TooLarge):
            return None


def _difference(path: bytes, old: PathState, new: PathState, before: bytes | None, after: bytes | None) -> Difference:
    summary = _summary(old, new)
    kinds = {old.kind, new.kind}
    if not kinds <= {"file", "absent"} or before is None or after is None or old.digest == new.digest:
        return Difference(path, summary)
    if any(len(text) > _SHOWN_BYTES or b"\0" in text for text in (before, after)):
        return Difference(path, f"{summary}, binary: {len(before)} and {len(after)} bytes")
    name = os.fsdecode(path)
    names = ("/dev/null" if old.kind == "absent" else f"a{name}", "/dev/null" if new.kind == "absent" else f"b{name}")
    old_lines, new_lines = (text.decode("utf-8", "replace").splitlines(keepends=True) for text in (before, after))
    lines = [line if line.endswith("\n") else line + "\n" for line in difflib.unified_diff(old_lines, new_lines, *names)]
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    return Difference(path, summary, "".join(lines), added, removed)


def _summary(old: PathState, new: PathState) -> str:
    if old.kind == "absent" or new.kind == "absent":
        return f"{new.kind} created" if old.kind == "absent" else f"{old.kind} deleted"
    if old.kind != new.kind:
        return f"a {old.kind} became a {new.kind}"
    parts = [
        "content changed" if old.digest != new.digest else "",
        f"mode {old.mode:o} became {new.mode:o}" if old.mode != new.mode else "",
        f"link to {old.target} became link to {new.target}" if old.target != new.target else "",
        "attributes changed" if old.attributes != new.attributes else "",
    ]
    return ", ".join(filter(None, parts)) or "the same"


def _blocked(plan: Plan, blocked: list[PathPlan]) -> JournalError:
    named = "; ".join(f"{shown(planned.path)}: {planned.why}" for planned in blocked[:_NAMED])
    more = f" (and {len(blocked) - _NAMED} more)" if len(blocked) > _NAMED else ""
    what = f"Call {plan.calls[0]} was" if len(plan.calls) == 1 else f"{len(plan.calls)} calls were"
    missing = all(planned.verdict is Verdict.MISSING_PREIMAGE for planned in blocked)
    return JournalError(
        Reason.NOT_UNDOABLE if missing else Reason.UNDO_CONFLICT,
        f"{what} not undone: {named}{more}. Everything is as it was.",
        hint="Put back what can be with --partial, keep both changes with --merge, or overwrite with --force.",
        metadata={"path": os.fsdecode(blocked[0].path), "call": plan.calls[-1]},
    )


def _stopped(path: bytes, why: str) -> JournalError:
    return JournalError(Reason.UNDO_CONFLICT, f"{shown(path)} can't be restored: {why}", metadata={"path": os.fsdecode(path)})


def _failed(plan: Plan, why: str) -> JournalError:
    message = f"Nothing was undone: {why}. Everything is as it was."
    return JournalError(Reason.UNDO_CONFLICT, message, metadata={"call": plan.calls[-1]})
