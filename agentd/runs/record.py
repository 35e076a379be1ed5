"""Runs in the store."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from agentd.errors import Reason, RequestError
from agentd.runs.run import Run, RunEvent, State

if TYPE_CHECKING:
    import apsw

    from agentd.store import Store

_REMEMBERED_TURNS = 32
REDACTED = "(redacted)"
_LOST = ("DAEMON_STOPPING", "The daemon was killed while this run was going on.", "Start it again.")


_GOING_ON = """
SELECT id FROM run WHERE body ->> 'session' = ? AND (
    body ->> 'state' = 'running' OR (body ->> 'state' = 'queued' AND body ->> 'priority' != 'background')
)"""
"""What is in the background, and waits, has not looked yet at what was said before."""


class RunRecords:
    def __init__(self, store: Store) -> None:
        self._store = store

    def close_lost(self) -> list[Run]:
        """Mark what a killed daemon left running as failed; returns them. Called once, before any run starts.

        What can wait and had not begun goes on waiting.
        """

        def close(db: apsw.Connection) -> list[Run]:
            ended_all = []
            found = db.execute("SELECT body FROM run WHERE state IN ('queued', 'running')")
            open_runs = [Run.from_json(body) for (body,) in found]
            lost = [run for run in open_runs if not (run.deferrable and run.state is State.QUEUED)]
            for run in lost:
                ended = replace(run, state=State.FAILED, error=_LOST, end_ns=time.time_ns())
                _finish(db, ended, [RunEvent(1, ended.end_ns, "run", {})])
                ended_all.append(ended)
            return ended_all

        return self._store.write(close)

    async def insert(self, run: Run, request_id: str | None) -> Run:
        """Keep a new run; if `request_id` was used before, returns the run of that time instead."""

        def insert(db: apsw.Connection) -> Run:
            known = db.execute("SELECT body FROM run WHERE request_id = ?", (_own(run.principal, request_id),)).get
            if known is not None:
                return Run.from_json(str(known))
            values = (run.id, run.session, _own(run.principal, request_id), run.state.value, run.to_json())
            db.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?)", values)
            return run

        return await asyncio.wrap_future(self._store.submit(insert))

    async def asked_for(self, principal: str, request_id: str) -> Run | None:
        query = "SELECT body FROM run WHERE request_id = ?"
        body = await asyncio.to_thread(self._store.read, lambda db: db.execute(query, (_own(principal, request_id),)).get)
        return None if body is None else Run.from_json(str(body))

    async def drop(self, run: Run) -> None:
        """It never was."""
        statement = "DELETE FROM run WHERE id = ?"
        await asyncio.wrap_future(self._store.submit(lambda db: db.execute(statement, (run.id,)).get))

    async def keep(self, run: Run) -> None:
        """As it is now. One that is kept as running is lost if the daemon is killed: nothing is done twice."""
        update = "UPDATE run SET state = ?, body = ? WHERE id = ?"
        values = (run.state.value, run.to_json(), run.id)
        await asyncio.wrap_future(self._store.submit(lambda db: db.execute(update, values).get))

    def deferred(self) -> list[Run]:
        """What waits, oldest first. Not for the event loop; to be asked before any run starts."""
        query = "SELECT body FROM run WHERE state = 'queued' ORDER BY id"
        return [Run.from_json(body) for (body,) in self._store.read(lambda db: list(db.execute(query)))]

    async def finish(self, run: Run, events: list[RunEvent]) -> None:
        await asyncio.wrap_future(self._store.submit(lambda db: _finish(db, run, events)))

    @staticmethod
    def forget(db: apsw.Connection, run: str) -> None:
        """Take out what was said in a run: prompt, answer and transcript.

        Raises RequestError (RUN_GOING_ON), also while another one of its session goes on, which has its words before it.
        """
        body = db.execute("SELECT body FROM run WHERE id = ?", (run,)).get
        if body is None:
            return
        known = Run.from_json(str(body))
        if going_on := run if not known.ended else db.execute(_GOING_ON, (known.session,)).get:
            message = (
                f"The run {going_on} is still going on, so {'its' if going_on == run else 'their'} words can't be taken out."
            )
            raise RequestError(Reason.RUN_GOING_ON, message, hint="Cancel it, or wait.", metadata={"run": str(going_on)})
        _finish(db, replace(known, prompt=REDACTED, answer=REDACTED, transcript=()), [])
        db.execute("DELETE FROM run_event WHERE run = ?", (run,))

    async def get(self, run: str) -> Run:
        query = "SELECT body FROM run WHERE id = ?"
        body = await asyncio.to_thread(self._store.read, lambda db: db.execute(query, (run,)).get)
        if body is None:
            raise unknown_run(run)
        return Run.from_json(str(body))

    async def page(self, before: str, limit: int, principal: str) -> list[Run]:
        query = "SELECT body FROM run WHERE id < ?1 AND (?2 = '' OR body ->> 'principal' = ?2) ORDER BY id DESC LIMIT ?3"
        values = (before or "~", principal, limit)
        rows = await asyncio.to_thread(self._store.read, lambda db: list(db.execute(query, values)))
        return [Run.from_json(body) for (body,) in rows]

    async def events(self, run: str, after: int) -> list[RunEvent]:
        await self.get(run)
        query = "SELECT body FROM run_event WHERE run = ? AND sequence > ? ORDER BY sequence"
        rows = await asyncio.to_thread(self._store.read, lambda db: list(db.execute(query, (run, after))))
        return [RunEvent(**json.loads(body)) for (body,) in rows]

    async def history(self, session: str) -> list[Run]:
        """The runs of a session that its next one sees, oldest first."""
        query = "SELECT body FROM run WHERE session = ? AND state = 'succeeded' ORDER BY id DESC LIMIT ?"
        values = (session, _REMEMBERED_TURNS)
        rows = await asyncio.to_thread(self._store.read, lambda db: list(db.execute(query, values)))
        return [Run.from_json(body) for (body,) in reversed(rows)]


def _own(principal: str, request_id: str | None) -> str | None:
    """Everybody has request ids of their own."""
    return None if request_id is None else f"{principal} {request_id}"


def unknown_run(run: str) -> RequestError:
    hint = "Check its name; CreateRun gave it out."
    return RequestError(Reason.RUN_NOT_FOUND, f"There is no run {run!r}.", hint=hint, field="name", metadata={"run": run})


def _finish(db: apsw.Connection, run: Run, events: list[RunEvent]) -> None:
    db.execute("UPDATE run SET state = ?, body = ? WHERE id = ?", (run.state.value, run.to_json(), run.id))
    rows = [(run.id, event.sequence, json.dumps(asdict(event))) for event in events]
    db.executemany("INSERT INTO run_event VALUES (?, ?, ?)", rows)
