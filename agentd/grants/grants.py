"""All grants in force: those of the configuration, and those that people have made, which are kept in the store."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import Reason, RequestError
from agentd.grants.decide import Book, Decision, Request
from agentd.grants.grant import Grant
from agentd.grants.later import Later
from agentd.grants.own import Own
from agentd.grants.patterns import parse
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import apsw

    from agentd.audit import AuditLog
    from agentd.grants.conditions import Moment
    from agentd.grants.patterns import Pattern
    from agentd.store import Store

_LOOK_AGAIN_S = 5.0


class Grants:
    """Decides, and changes what is decided by. From any thread; what changes is durable before it counts.

    `own` are the daemon's own files, which no grant can open; `later` is what runs later. `changed` is called after every
    change that may take something away.
    """

    def __init__(
        self,
        fixed: Iterable[Grant],
        store: Store,
        audit: AuditLog,
        moment: Callable[[], Moment],
        own: Own | None = None,
        later: Later | None = None,
    ) -> None:
        self._own, self.later = own or Own(), later or Later()
        self._fixed, self._store, self._audit = tuple(fixed), store, audit
        self._moment = moment
        self._lock = threading.Lock()
        rows = store.read(lambda db: list(db.execute("SELECT body, used FROM permission WHERE revoke_ns IS NULL ORDER BY id")))
        kept = [(Grant.from_json(body), used) for body, used in rows]
        self._made = {grant.id: grant for grant, _ in kept}
        self._used = {grant.id: int(used) for grant, used in kept}
        self._book: Book | None = None
        self._policy = ""
        self._looked = 0.0
        self.changed: Callable[[], None] = lambda: None

    def fix(self, fixed: Iterable[Grant]) -> None:
        """From now on these are the rules of the configuration; calls that run by others are stopped."""
        with self._lock:
            self._fixed, self._book = tuple(fixed), None
        self.changed()

    def decide(self, request: Request, supposed: Sequence[Grant] | None = None) -> Decision:
        """By the grants in force, or as if those `supposed` were all there are."""
        for scope in request.scopes:
            if why := self._own.forbids(scope):
                return Decision("deny", why, ("built in: agentd's own files",), str(scope), policy=self.policy)
        if supposed is not None:
            return Book.of(supposed, self._used, self.later).decide(request, self._moment())
        book, policy = self._current()
        return replace(book.decide(request, self._moment()), policy=policy)

    def named(self, request: Request) -> tuple[Pattern, ...]:
        """What runs later and a call may change all the same."""
        return self._current()[0].named(request, self._moment())

    @property
    def policy(self) -> str:
        """SHA-256 over all grants in force, as they are told to people, in their order."""
        return self._current()[1]

    def now_ns(self) -> int:
        """By the clock that expiry is held against."""
        return self._moment().now_ns

    def used(self, grant: Grant) -> int:
        return self._used.get(grant.id, 0)

    def all(self) -> list[Grant]:
        """Those of the configuration first, then those made, oldest first."""
        with self._lock:
            return [*self._fixed, *self._made.values()]

    def has(self, grants: Iterable[str]) -> bool:
        """Whether none of these has been revoked."""
        with self._lock:
            return all(grant in self._made for grant in grants)

    def get(self, grant: str) -> Grant:
        """One that a person has made. Raises RequestError (GRANT_NOT_FOUND)."""
        with self._lock:
            if found := self._made.get(grant):
                return found
        hint = "`agentd grants list` shows those in force; those of agentd.toml are changed there."
        message = f"There is no grant {grant!r} that could be revoked."
        raise RequestError(Reason.GRANT_NOT_FOUND, message, hint=hint, field="name", metadata={"grant": grant})

    def add(self, grant: Grant, by: str, cause: str = "") -> Grant:
        """Keep a new grant; returns it with its id. `cause` is the approval it answers. Not for the event loop."""
        identity = new_id()
        where = f"grants/{identity}"
        made = replace(grant, id=identity, where=where, create_ns=self.now_ns(), created_by=by)

        def insert(db: apsw.Connection) -> None:
            db.execute("INSERT INTO permission (id, body) VALUES (?, ?)", (made.id, made.to_json()))
            self._audit.append(db, Event(kind="grant.create", principal=by, cause=cause, detail=_told(made)))

        self._store.write(insert)
        with self._lock:
            self._made[made.id] = made
            self._book = None
        if made.decision != "allow":
            self.changed()
        return made

    def revoke(self, grant: str, by: str) -> Grant:
        """Take a grant back; calls that run by it are stopped. Not for the event loop.

        Raises RequestError (GRANT_NOT_FOUND).
        """
        found = self.get(grant)

        def revoke(db: apsw.Connection) -> None:
            db.execute("UPDATE permission SET revoke_ns = ? WHERE id = ?", (time.time_ns(), grant))
            self._audit.append(db, Event(kind="grant.revoke", principal=by, detail=_told(found)))

        self._store.write(revoke)
        with self._lock:
            self._made.pop(grant, None)
            self._book = None
        self.changed()
        return found

    def end_run(self, run: str) -> None:
        """Grants for this run alone have nobody left to use them. Not for the event loop."""
        with self._lock:
            ended = [grant.id for grant in self._made.values() if grant.principal == f"run:{run}"]
        for grant in ended:
            self.revoke(grant, "agentd")

    def use(self, decision: Decision) -> bool:
        """Count a use of each grant that has a limit; False if another call was quicker. Not for the event loop."""
        with self._lock:
            limited = [self._made[grant] for grant in decision.grants if grant in self._made and self._made[grant].max_uses]
        if not limited:
            return True

        def count(db: apsw.Connection) -> bool:
            for grant in limited:
                if db.execute("SELECT used >= ? FROM permission WHERE id = ?", (grant.max_uses, grant.id)).get:
                    return False
            db.executemany("UPDATE permission SET used = used + 1 WHERE id = ?", [(grant.id,) for grant in limited])
            return True

        counted = self._store.write(count)
        with self._lock:
            for grant in limited:
                self._used[grant.id] = self._used.get(grant.id, 0) + 1 if counted else grant.max_uses
        return counted

    def _current(self) -> tuple[Book, str]:
        """With its digest. Built anew after a change, and when the links in denials may lead elsewhere by now."""
        with self._lock:
            stale = time.monotonic() - self._looked > _LOOK_AGAIN_S
            if self._book is None or stale:
                grants = [*self._fixed, *self._made.values()]
                again = [moved for grant in grants if grant.decision != "allow" and (moved := _moved(grant))]
                if self._book is None or again:
                    self._book = Book.of([*grants, *again], self._used, self.later)
                    self._policy = hashlib.sha256("\n".join(map(str, grants)).encode("utf-8", "replace")).hexdigest()
                self._looked = time.monotonic()
            return self._book, self._policy


def _moved(grant: Grant) -> Grant | None:
    """The same for where its path leads now, if that is elsewhere: what was denied stays so when its folder is moved."""
    try:
        pattern = parse(grant.spelled)
    except RequestError:
        return None
    return replace(grant, pattern=pattern) if pattern != grant.pattern else None


def _told(grant: Grant) -> dict[str, str]:
    return {"grant": grant.id, "rule": str(grant)}
