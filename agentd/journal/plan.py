"""A plan of a rollback: for each path what it would become, or why not. Made before anything is touched, and shown.

Of the selected calls, the earliest one that changed a path says what it becomes, and the latest one what it should be now.
What it is now and should not be, somebody else has made of it: that is theirs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from agentd.errors import JournalError, Reason, RequestError
from agentd.journal.contents import TooLarge
from agentd.journal.images import times_around
from agentd.journal.merge import merge
from agentd.journal.places import parents, reach_ours
from agentd.journal.state import ABSENT, PathState, look, take

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from agentd.journal.images import Image, Images
    from agentd.store import Store

_MERGED_BYTES = 1 << 20


class Verdict(Enum):
    RESTORE = "restore"
    DELETE_CREATED = "delete-created"
    RECREATE_DELETED = "recreate-deleted"
    MERGE = "merge"
    ALREADY = "already"
    CONFLICT = "conflict"
    TYPE_CHANGED = "type-changed"
    MISSING_PREIMAGE = "missing-preimage"
    NO_PERMISSION = "no-permission"


_DOES = frozenset({Verdict.RESTORE, Verdict.DELETE_CREATED, Verdict.RECREATE_DELETED, Verdict.MERGE})
_REHEARSED = {
    Verdict.RESTORE: "the call has changed it",
    Verdict.DELETE_CREATED: "the call has deleted it",
    Verdict.RECREATE_DELETED: "the call has created it",
    Verdict.ALREADY: "it is so by now",
}
_FORCIBLE = frozenset({Verdict.CONFLICT, Verdict.TYPE_CHANGED})


@dataclass(frozen=True, slots=True)
class Permit:
    """What whoever asks may do with paths. `reads` says whether their content may be shown, `refuses` why one may not be
    changed (empty if it may); its second argument is whether somebody else's later changes would be overwritten.
    """

    reads: Callable[[bytes], bool]
    refuses: Callable[[bytes, bool], str]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which changes: those of calls, of a run, of a session, or of a span of time; all of `paths` if those alone are given.

    `paths` bounds it to these and what is below them, `principal` to that one's calls. With `rehearsed` it means calls that
    were rehearsed: carrying them out is the same as putting back what put them back.
    """

    calls: tuple[str, ...] = ()
    run: str = ""
    session: str = ""
    since_ns: int = 0
    until_ns: int = 0
    paths: tuple[bytes, ...] = ()
    principal: str = ""
    undone: bool = False
    """Whether calls that were put back meanwhile count, too: they do where all that has happened is meant."""
    rehearsed: bool = False
    permit: Permit | None = field(default=None, compare=False, repr=False)
    """None: everything."""

    @property
    def of_time(self) -> bool:
        """Whether it means all that has happened to paths, rollbacks included."""
        return not (self.calls or self.run or self.session)


@dataclass(frozen=True, slots=True)
class Ways:
    """`force` puts back what somebody else has changed, keeping their version as a pre-image; `merge` keeps both changes
    of a text where they don't touch; `partial` does what can be done and leaves the rest.
    """

    partial: bool = False
    force: bool = False
    merge: bool = False


@dataclass(frozen=True, slots=True)
class PathPlan:
    """`now` is what is there, `target` what it would become; `calls` are those that changed it, oldest first."""

    path: bytes
    verdict: Verdict
    why: str
    now: PathState
    target: PathState
    calls: tuple[str, ...]
    first: Image = field(repr=False, compare=False, hash=False)
    last: Image = field(repr=False, compare=False, hash=False)
    forced: bool = False
    merged: bytes | None = field(default=None, repr=False)

    @property
    def does(self) -> bool:
        """Whether anything would be done to the path."""
        return self.forced or self.verdict in _DOES

    @property
    def blocks(self) -> bool:
        return not self.does and self.verdict is not Verdict.ALREADY


@dataclass(frozen=True, slots=True)
class Plan:
    """`not_undoable` are selected calls that have reached outside: nothing takes that back."""

    selection: Selection
    ways: Ways
    calls: tuple[str, ...]
    paths: tuple[PathPlan, ...]
    not_undoable: tuple[str, ...]
    times: Mapping[bytes, int] = field(default_factory=dict, compare=False, repr=False)
    """When directories had been changed before all that, where nobody has changed them since."""
    others: Mapping[bytes, PathState] = field(default_factory=dict, compare=False, repr=False)
    """What the calls have touched and left as it was: it may be other names of files that they have changed."""

    @property
    def digest(self) -> str:
        """Of all that was decided on: a plan that is made anew is the same one only if nothing has changed."""
        told = [
            [
                p.path.hex(),
                p.verdict.value,
                p.forced,
                p.now.essence,
                p.target.essence,
                hashlib.sha256(p.merged or b"").hexdigest(),
            ]
            for p in self.paths
        ]
        return hashlib.sha256(json.dumps([self.calls, told]).encode()).hexdigest()


@dataclass(slots=True)
class _Chain:
    """What the selected calls have done to one path, and what others have since the first of them: (begun, call)."""

    images: list[tuple[int, Image]] = field(default_factory=list)
    others: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class _Known:
    """What the selected calls have had to do with: paths that are to be gone, and all that they have touched."""

    going: frozenset[bytes]
    touched: frozenset[bytes]
    not_directories: set[bytes] = field(default_factory=set)
    """Those of the paths that are no directories now: nothing is below them."""

    @classmethod
    def of(cls, chains: Mapping[bytes, _Chain], images: Iterable[Image]) -> _Known:
        going = (path for path, chain in chains.items() if chain.images[0][1].before.kind == "absent")
        return cls(frozenset(going), frozenset(image.path for image in images))


class Planner:
    def __init__(self, store: Store, images: Images) -> None:
        self._store, self._images = store, images

    def plan(self, selection: Selection, ways: Ways) -> Plan:
        """Reads, and changes nothing. Raises JournalError (NOT_UNDOABLE), RequestError (CALL_NOT_FOUND, BAD_FIELD)."""
        rows = self._selected(selection)
        chains: dict[bytes, _Chain] = {}
        images: list[Image] = []
        for call, begun, _effect in rows:
            for image in self._images.of(call):
                images.append(image)
                if image.changed and _is_within(image.path, selection.paths):
                    chains.setdefault(image.path, _Chain()).images.append((begun, image))
        calls = tuple(call for call, _, _ in rows)
        if chains:
            others = _finished(self._store, min(chain.images[0][0] for chain in chains.values()), chains)
            for path, chain in chains.items():
                chain.others = [(begun, call) for begun, call in others.get(path, ()) if call not in calls]
        known = _Known.of(chains, images)
        planned = (self._path(path, chain, known, ways) for path, chain in sorted(chains.items()))
        paths = _held_up(tuple(_permitted(each, selection.permit) for each in planned))
        if selection.rehearsed:
            paths = tuple(replace(planned, why=_REHEARSED.get(planned.verdict, planned.why)) for planned in paths)
        touched = {call for planned in paths for call in planned.calls}
        outside = tuple(call for call, _, effect in rows if effect in ("external", "physical"))
        linked = {image.before.inode for image in images if image.before.links > 1}
        names = {i.path: i.before for i in images if i.before.inode in linked and not i.changed}
        named = tuple(call for call in calls if call in touched)
        return Plan(selection, ways, named, paths, outside, _times(images, paths), names)

    def _selected(self, selection: Selection) -> list[tuple[str, int, str]]:
        """(call, begun, effect), oldest first. Undone ones count only where all that happened is meant."""
        if not (selection.calls or selection.run or selection.session or selection.since_ns or selection.paths):
            raise RequestError(Reason.BAD_FIELD, "Nothing is selected.", hint="Name calls, a run, a session, a time or paths.")
        states = ("done", "undone" if selection.undone or selection.of_time else "done")
        states = ("rehearsed", "rehearsed") if selection.rehearsed else states
        clauses, values = ["state IN (?, ?)"], list[object](states)
        if selection.calls:
            clauses.append(f"call IN ({', '.join('?' * len(selection.calls))})")
            values += selection.calls
        for column in ("run", "session", "principal"):
            if value := getattr(selection, column):
                clauses.append(f"{column} = ?")
                values.append(value)
        if selection.since_ns:
            clauses.append("time_ns >= ?")
            values.append(selection.since_ns)
        if selection.until_ns:
            clauses.append("time_ns < ?")
            values.append(selection.until_ns)
        query = f"SELECT call, begun, effect FROM journal WHERE {' AND '.join(clauses)} ORDER BY begun"  # noqa: S608
        return self._store.read(lambda db: [(str(c), int(b), str(e)) for c, b, e in db.execute(query, values)])

    def _path(self, path: bytes, chain: _Chain, known: _Known, ways: Ways) -> PathPlan:
        first, last = chain.images[0][1], chain.images[-1][1]
        assert last.after is not None
        now = _now(path, last.after, known)
        verdict, why = self._verdict(path, chain, now, known)
        merged = None
        if verdict is Verdict.CONFLICT and ways.merge and (merged := self._merged(first, last, now)) is not None:
            verdict, why = Verdict.MERGE, "changed since, elsewhere in the text: both changes are kept"
        forced = ways.force and verdict in _FORCIBLE and now.kind in ("file", "link", "absent")
        own = tuple(dict.fromkeys(image.call for _, image in chain.images))
        return PathPlan(path, verdict, why, now, first.before, own, first, last, forced, merged)

    def _verdict(self, path: bytes, chain: _Chain, now: PathState, known: _Known) -> tuple[Verdict, str]:
        first, last = chain.images[0][1], chain.images[-1][1]
        target, left = first.before, last.after
        assert left is not None
        if now.same_as(target) and not _only_times(now, left, target):
            return Verdict.ALREADY, "it is so already"
        if not now.same_as(left):
            return _foreign(chain, now, left)
        if other := next((call for begun, call in chain.others if begun < chain.images[-1][0]), ""):
            return Verdict.CONFLICT, f"call {other}, which is not selected, changed it in between"
        try:
            if now is not left:  # these calls have closed the way there: what is kept is looked at when it is opened
                self._images.check(first)
        except JournalError as e:
            return Verdict.MISSING_PREIMAGE, e.message
        if target.kind != "folder" and now.kind == "folder" and (name := _stranger(path, known.going)):
            return Verdict.CONFLICT, f"the folder holds {name}, which these calls did not make"
        if _renames(now, target) and (why := _forbidden(path, known.touched)):
            return Verdict.NO_PERMISSION, why
        if target.kind == "absent":
            return Verdict.DELETE_CREATED, "it was not there before"
        if now.kind == "absent":
            return Verdict.RECREATE_DELETED, "it was there before"
        return Verdict.RESTORE, "it was different before"

    def _merged(self, first: Image, last: Image, now: PathState) -> bytes | None:
        """Our way back applied to what somebody has made of the call's result."""
        if {first.before.kind, now.kind} != {"file"} or (base := self._images.result(last)) is None:
            return None
        try:
            theirs = take(first.path, limit=_MERGED_BYTES)[1]
        except (OSError, TooLarge):
            return None
        ours = self._images.text(first, _MERGED_BYTES)
        return merge(base, ours, theirs) if ours is not None else None


def _permitted(planned: PathPlan, permit: Permit | None) -> PathPlan:
    if permit is None or not planned.does:
        return planned
    why = permit.refuses(planned.path, planned.forced or planned.verdict is Verdict.MERGE)
    return replace(planned, verdict=Verdict.NO_PERMISSION, why=why, forced=False, merged=None) if why else planned


def finished_since(store: Store, begun: int, paths: Collection[bytes]) -> frozenset[bytes]:
    """Those of the paths that calls which began later have changed, and ended."""
    return frozenset(_finished(store, begun, paths)) if paths else frozenset()


def _finished(store: Store, begun: int, paths: Collection[bytes]) -> Mapping[bytes, list[tuple[int, str]]]:
    """(begun, call) of the calls that began later, ended and changed one of the paths, oldest first.

    One scan for all of them: an index of paths would cost every call a page of writes.
    """
    query = """SELECT path, begun, call, before, after FROM journal JOIN pre_image USING (call)
               WHERE state = 'done' AND begun > ? AND after IS NOT NULL AND before != after ORDER BY begun"""
    wanted, found = set(paths), dict[bytes, list[tuple[int, str]]]()
    rows = store.read(lambda db: [row for row in db.execute(query, (begun,)) if row[0] in wanted])
    for path, at, call, before, after in rows:
        if PathState.from_json(after).differs_from(PathState.from_json(before)):
            found.setdefault(path, []).append((int(at), str(call)))
    return found


def _foreign(chain: _Chain, now: PathState, left: PathState) -> tuple[Verdict, str]:
    if now.kind not in (left.kind, "absent") or now.kind == "other":
        return Verdict.TYPE_CHANGED, f"it is a {now.kind} now, and was left a {left.kind}"
    later = next((call for begun, call in chain.others if begun > chain.images[-1][0]), "")
    return Verdict.CONFLICT, f"call {later} changed it since" if later else "somebody changed it since"


def _is_within(path: bytes, roots: Iterable[bytes]) -> bool:
    chosen = tuple(roots)
    return not chosen or any(path == root or path.startswith(root.rstrip(b"/") + b"/") for root in chosen)


def _now(path: bytes, left: PathState, known: _Known) -> PathState:
    """What is there, as far as it can be told without touching anything. Where the way is closed or leads elsewhere because of
    what these calls have done to a directory above, that directory comes back first.
    """
    if os.path.dirname(path) in known.not_directories:
        known.not_directories.add(path)
        return ABSENT
    try:
        now = look(path, left)
    except OSError as e:
        ours = any(parent in known.touched for parent in parents(path))
        if e.errno == errno.ELOOP and ours:
            return ABSENT
        if e.errno == errno.EACCES and (ours or path in known.touched):
            return left if ours else replace(left, digest="")
        return PathState("other")
    if now.kind != "folder":
        known.not_directories.add(path)
    return now


def _only_times(now: PathState, left: PathState, target: PathState) -> bool:
    """Whether the calls have changed nothing but a time, or which file it is a name of, and nobody has since."""
    return now.same_as(left) and left.same_as(target) and left.differs_from(target) and now.mtime_ns == left.mtime_ns


def _held_up(paths: tuple[PathPlan, ...]) -> tuple[PathPlan, ...]:
    """What lies in a directory that stays as somebody else has made it stays, too."""
    blocked = {planned.path for planned in paths if planned.blocks and planned.target.kind == "folder"}
    return tuple(
        replace(planned, verdict=Verdict.CONFLICT, why=f"{os.fsdecode(above)} is in the way", forced=False)
        if planned.does and (above := next((p for p in parents(planned.path) if p in blocked), b""))
        else planned
        for planned in paths
    )


def _times(images: Sequence[Image], paths: Iterable[PathPlan]) -> dict[bytes, int]:
    """Of directories in which all that was changed goes back, and nobody else has changed anything since."""
    stays = {p.path for p in paths if not (p.does or p.verdict is Verdict.ALREADY) or p.merged is not None}
    planned = {p.path for p in paths}
    stays |= {image.path for image in images if image.changed and image.path not in planned}
    mixed = {os.path.dirname(path) for path in stays} | stays
    left = times_around(images, left=True)
    return {
        directory: ns
        for directory, ns in times_around(images).items()
        if directory not in mixed and _is_as_left(directory, left.get(directory))
    }


def _is_as_left(directory: bytes, mtime_ns: int | None) -> bool:
    """Whether nobody has changed a directory since, or it is to be made first."""
    try:
        place = reach_ours(directory)
    except OSError as e:
        return e.errno == errno.EACCES  # these calls have closed what is above it: nobody else has been there
    if place is None:
        return True
    with place:
        return not place.is_folder or place.status.st_mtime_ns == mtime_ns


def _stranger(folder: bytes, going: Collection[bytes]) -> str:
    """Something in a folder that is to go which does not go with it."""
    try:
        with os.scandir(folder) as entries:
            return next((os.fsdecode(entry.name) for entry in entries if folder + b"/" + entry.name not in going), "")
    except OSError:
        return ""


def _renames(now: PathState, target: PathState) -> bool:
    """Whether names in the directory have to change for it: not for modes, times and attributes."""
    linked = now.links > 1 or target.links > 1
    return now.kind != target.kind or now.digest != target.digest or now.target != target.target or linked


def _forbidden(path: bytes, touched: Collection[bytes]) -> str:
    """Why its directory can't be written to. One that these calls have touched is made writable for as long as it takes."""
    directory = os.path.dirname(path)
    try:
        status = os.lstat(directory)
    except OSError:  # it comes back first
        return ""
    if directory in touched and status.st_uid == os.geteuid():
        return ""
    if not stat.S_ISDIR(status.st_mode) or any(parent in touched for parent in parents(directory)):
        return ""
    return "" if os.access(directory, os.W_OK | os.X_OK) else f"{os.fsdecode(directory)} can't be written to"
