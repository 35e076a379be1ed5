"""What triggered an automation, kept until it is handled and for a while after: the queue that survives kills."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import apsw

    from agentd.store import Store

T = TypeVar("T")
_KEPT = 1000  # ended ones of each automation
_MOST_WAITING = 100_000  # of each automation: what comes beyond that is not taken
_BETWEEN_PRUNES = 64
_OPEN = "state IN ('waiting', 'running')"
_PRUNE = f"""DELETE FROM trigger_event WHERE automation = ?1 AND NOT {_OPEN} AND seq <= (
    SELECT seq FROM trigger_event WHERE automation = ?1 ORDER BY seq DESC LIMIT 1 OFFSET {_KEPT})"""  # noqa: S608 - constants


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DROPPED = "dropped"
    """It could not begin in time, or was not wanted any more."""


@dataclass(frozen=True, slots=True)
class Event:
    """`subject` is what further events are joined by: a path, a time, a caller. `data` fills the templates; `note` says why it
    waits, or how it ended. `attempt` counts its runs from 1, of which all but the last were taken back. Times are nanoseconds
    since 1970.
    """

    seq: int
    automation: str
    subject: str
    state: State
    due_ns: int
    data: Mapping[str, str]
    by: str = ""
    create_ns: int = 0
    begin_ns: int = 0
    end_ns: int = 0
    attempt: int = 0
    failures: int = 0
    run: str = ""
    note: str = ""
    joined: int = 0
    """How many more came while it waited."""

    @property
    def request_id(self) -> str:
        """Of its run: asked for again after a kill, it is the same run."""
        return f"event {self.seq}.{self.attempt}"

    @property
    def ended(self) -> bool:
        return self.state not in (State.WAITING, State.RUNNING)

    def body(self) -> str:
        left_out = ("seq", "automation", "subject", "state", "due_ns")
        return json.dumps({key: value for key, value in asdict(self).items() if key not in left_out})


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """By which a file is known again."""

    inode: int
    mtime_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What is kept of an automation itself."""

    since_ns: int
    paused: bool
    fired_ns: int
    accepted: bool
    """Whether what its folder held when the automation was new is known."""
    mounted: bool
    """Whether its folder lay on a disk of its own."""


class Events:
    """All methods but `standing` and those of files may be awaited on the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ended: dict[str, int] = {}

    async def meet(self, automation: str, now_ns: int, trigger: str = "") -> Standing:
        """What is known of an automation, from now on if nothing was. Where its trigger is another now, it has fired so far."""

        def meet(db: apsw.Connection) -> Standing:
            insert = "INSERT OR IGNORE INTO automation (name, since_ns, fired_ns, trigger) VALUES (?, ?, ?, ?)"
            db.execute(insert, (automation, now_ns, now_ns, trigger))
            changed = "UPDATE automation SET fired_ns = ?, trigger = ? WHERE name = ? AND trigger != ?"
            db.execute(changed, (now_ns, trigger, automation, trigger))
            return _standing(db, automation)

        return await self._write(meet)

    async def pause(self, automation: str, now_ns: int, *, paused: bool) -> Standing:
        """What a schedule would have done in a pause is left out."""

        def pause(db: apsw.Connection) -> Standing:
            fired = now_ns if not paused else _standing(db, automation).fired_ns
            db.execute("UPDATE automation SET paused = ?, fired_ns = ? WHERE name = ?", (paused, fired, automation))
            return _standing(db, automation)

        return await self._write(pause)

    async def forget_others(self, names: Iterable[str]) -> None:
        """Automations whose files are gone: what waits of them is not wanted any more."""

        def forget(db: apsw.Connection) -> None:
            others = "NOT IN (SELECT value FROM json_each(?))"
            kept = json.dumps(sorted(names))
            for row in list(db.execute(f"SELECT * FROM trigger_event WHERE {_OPEN} AND automation {others}", (kept,))):  # noqa: S608
                ended = replace(_event(row), state=State.DROPPED, end_ns=time.time_ns(), note="the automation was removed")
                _keep(db, ended)
            db.execute(f"DELETE FROM watched WHERE automation {others}", (kept,))  # noqa: S608
            db.execute(f"DELETE FROM automation WHERE name {others}", (kept,))  # noqa: S608
            for (name,) in list(db.execute("SELECT DISTINCT automation FROM trigger_event")):
                db.execute(_PRUNE, (name,))

        await self._write(forget)

    async def add(self, event: Event, debounce_ns: int = 0) -> Event:
        """Raises RequestError (QUEUE_FULL) where too many wait."""

        def add(db: apsw.Connection) -> Event:
            _require_room(db, event.automation, 1)
            return _add(db, event, debounce_ns)

        return await self._write(add)

    async def fire(self, automation: str, fired_ns: int, events: Iterable[Event], *, join: bool) -> list[Event]:
        """Times of a schedule that have come, and that it has fired up to there. With `join` they join one that still waits."""
        made = list(events)

        def fire(db: apsw.Connection) -> list[Event]:
            db.execute("UPDATE automation SET fired_ns = ? WHERE name = ?", (fired_ns, automation))
            if join and made:
                query = "SELECT * FROM trigger_event WHERE automation = ? AND state = 'waiting' ORDER BY seq LIMIT 1"
                for row in list(db.execute(query, (automation,))):
                    known = _event(row)
                    if not known.attempt:
                        _keep(db, replace(known, data=made[-1].data, joined=known.joined + len(made)))
                        return []
            _require_room(db, automation, len(made))
            return [_add(db, event, 0) for event in made]

        return await self._write(fire)

    def known(self, automation: str) -> dict[bytes, Fingerprint]:
        """Not for the event loop."""
        query = "SELECT path, inode, mtime_ns, size FROM watched WHERE automation = ?"
        rows = self._store.read(lambda db: list(db.execute(query, (automation,))))
        return {bytes(path): Fingerprint(int(inode), int(mtime), int(size)) for path, inode, mtime, size in rows}

    def arrived(
        self,
        automation: str,
        known: Mapping[bytes, Fingerprint],
        gone: Iterable[bytes],
        events: Iterable[Event],
        debounce_ns: int,
        *,
        mounted: bool = False,
    ) -> None:
        """What a look at the folder has shown: files to be known from now on, or no longer, and the events they make. In one
        transaction, so that a kill can't make two of one. Not for the event loop.
        """

        made = list(events)

        def arrive(db: apsw.Connection) -> None:
            _require_room(db, automation, len(made))
            update = "UPDATE automation SET accepted = 1, mounted = ? WHERE name = ?"
            db.execute(update, (mounted, automation))
            db.executemany("DELETE FROM watched WHERE automation = ? AND path = ?", [(automation, path) for path in gone])
            rows = [(automation, path, each.inode, each.mtime_ns, each.size) for path, each in known.items()]
            db.executemany("INSERT OR REPLACE INTO watched VALUES (?, ?, ?, ?, ?)", rows)
            for event in made:
                _add(db, event, debounce_ns)

        self._store.write(arrive)

    async def due(self, automation: str, now_ns: int, longest_ns: int, besides: Iterable[int] = ()) -> Event | None:
        """The first that waits and is due, but for those under way in this daemon. Nothing waits for longer than `longest_ns`:
        what seems to was told its time before the clock was put back.
        """
        query = f"""SELECT * FROM trigger_event WHERE automation = ? AND {_OPEN} AND NOT due_ns BETWEEN ? AND ?
            AND seq NOT IN (SELECT value FROM json_each(?)) ORDER BY seq LIMIT 1"""  # noqa: S608 - a constant
        values = (automation, now_ns + 1, now_ns + longest_ns, json.dumps(list(besides)))
        return await self._one(query, values)

    async def next_due_ns(self, automation: str) -> int | None:
        """When the next one that waits is due."""
        query = "SELECT min(due_ns) FROM trigger_event WHERE automation = ? AND state = 'waiting'"
        found = await asyncio.to_thread(self._store.read, lambda db: db.execute(query, (automation,)).get)
        return None if found is None else int(str(found))

    async def keep(self, event: Event) -> Event:
        """As it is now."""

        def keep(db: apsw.Connection) -> Event:
            _keep(db, event)
            self._ended[event.automation] = self._ended.get(event.automation, 0) + event.ended
            if self._ended[event.automation] >= _BETWEEN_PRUNES:
                self._ended[event.automation] = 0
                db.execute(_PRUNE, (event.automation,))
            return event

        return await self._write(keep)

    async def get(self, automation: str, seq: int) -> Event:
        """Raises RequestError (EVENT_NOT_FOUND)."""
        found = await self._one("SELECT * FROM trigger_event WHERE automation = ? AND seq = ?", (automation, seq))
        if found is None:
            message = f"There is no event {seq} of {automation}; the oldest ones are not kept."
            raise RequestError(Reason.EVENT_NOT_FOUND, message, field="name", metadata={"event": str(seq)})
        return found

    async def page(self, automation: str, before: int, limit: int) -> list[Event]:
        """Newest first; of one automation, or of all."""
        query = "SELECT * FROM trigger_event WHERE (?1 = '' OR automation = ?1) AND seq < ?2 ORDER BY seq DESC LIMIT ?3"
        values = (automation, before or 1 << 62, limit)
        rows = await asyncio.to_thread(self._store.read, lambda db: list(db.execute(query, values)))
        return [_event(row) for row in rows]

    async def counts(self) -> dict[str, dict[State, int]]:
        """Of each automation, how many are in which state."""
        query = "SELECT automation, state, count(*) FROM trigger_event GROUP BY automation, state"
        rows = await asyncio.to_thread(self._store.read, lambda db: list(db.execute(query)))
        found: dict[str, dict[State, int]] = {}
        for automation, state, count in rows:
            found.setdefault(str(automation), {})[State(state)] = int(count)
        return found

    async def _one(self, query: str, values: tuple[Any, ...]) -> Event | None:
        rows = await asyncio.to_thread(self._store.read, lambda db: list(db.execute(query, values)))
        return _event(rows[0]) if rows else None

    async def _write(self, do: Callable[[apsw.Connection], T]) -> T:
        return await asyncio.wrap_future(self._store.submit(do))


def _require_room(db: apsw.Connection, automation: str, wanted: int) -> None:
    """Raises RequestError (QUEUE_FULL)."""
    query = f"SELECT count(*) FROM trigger_event WHERE automation = ? AND {_OPEN}"  # noqa: S608 - a constant
    if wanted and int(str(db.execute(query, (automation,)).get)) + wanted > _MOST_WAITING:
        message = f"{_MOST_WAITING} events of {automation} may wait, and with {wanted} more there would be too many."
        raise RequestError(Reason.QUEUE_FULL, message, hint="`agentd automations history` says why they wait.")


def _add(db: apsw.Connection, event: Event, debounce_ns: int) -> Event:
    """With `debounce_ns` it joins one of the same subject that still waits, which then waits anew, and goes with its data."""
    now = time.time_ns()
    if debounce_ns:
        query = "SELECT * FROM trigger_event WHERE automation = ? AND subject = ? AND state = 'waiting' ORDER BY seq LIMIT 1"
        for row in list(db.execute(query, (event.automation, event.subject))):
            known = _event(row)
            if not known.attempt:
                joined = replace(known, data=event.data, due_ns=now + debounce_ns, joined=known.joined + 1)
                update = "UPDATE trigger_event SET due_ns = ?, body = ? WHERE seq = ?"
                db.execute(update, (joined.due_ns, joined.body(), joined.seq))
                return joined
    made = replace(event, due_ns=max(event.due_ns, now + debounce_ns if debounce_ns else 0), create_ns=now)
    insert = "INSERT INTO trigger_event (automation, subject, due_ns, state, body) VALUES (?, ?, ?, ?, ?) RETURNING seq"
    seq = db.execute(insert, (made.automation, made.subject, made.due_ns, made.state.value, made.body())).get
    return replace(made, seq=int(str(seq)))


def _keep(db: apsw.Connection, event: Event) -> None:
    update = "UPDATE trigger_event SET state = ?, due_ns = ?, body = ? WHERE seq = ?"
    db.execute(update, (event.state.value, event.due_ns, event.body(), event.seq))


def _standing(db: apsw.Connection, automation: str) -> Standing:
    query = "SELECT since_ns, paused, fired_ns, accepted, mounted FROM automation WHERE name = ?"
    since, paused, fired, accepted, mounted = next(iter(db.execute(query, (automation,))))
    return Standing(int(since), bool(paused), int(fired), bool(accepted), bool(mounted))


def _event(row: tuple[Any, ...]) -> Event:
    seq, automation, subject, due_ns, state, body = row
    return Event(int(seq), automation, subject, State(state), int(due_ns), **json.loads(body))
