"""Taking out what was written: the value goes, for good, and the chain still verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.audit.events import Event
from agentd.audit.index import Wanted
from agentd.audit.payloads import commitments
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    import apsw

    from agentd.audit.index import Index
    from agentd.audit.log import AuditLog, Entry
    from agentd.store import Store

_OF_ONE_CALL = 64  # events
LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Redacted:
    """The events whose value is gone, and the run whose transcript went with it, if there was one."""

    events: tuple[int, ...]
    run: str


class Redaction:
    """`forget(db, run)` takes the words of a run out of the store; raises RequestError while it is going on."""

    def __init__(self, store: Store, audit: AuditLog, index: Index, forget: Callable[[apsw.Connection, str], None]) -> None:
        self._store, self._audit, self._index, self._forget = store, audit, index, forget

    def redact(self, seq: int, field: str, reason: str, principal: str) -> Redacted:
        """Take out one value, wherever the log has it for the same call, and the transcript of its run, which repeats it.

        What the store deletes is overwritten, and gone from its write-ahead log; the index is made anew. Not for the event
        loop. Raises RequestError: BAD_FIELD, RUN_GOING_ON; StoreError.
        """
        if not reason.strip() or len(reason) > LONGEST_REASON:
            raise _bad("reason", f"A reason has 1 to {LONGEST_REASON} characters.", "It is recorded for whoever asks later.")
        entry = next(iter(self._audit.numbered([seq])), None)
        if entry is None:
            raise _bad(
                "name", f"There is no event {seq} in the store.", "What is in an archive has no values beside it any more."
            )
        known = commitments(entry.body)
        if field not in known:
            named = f"It has {', '.join(known)}." if known else "It has none."
            raise _bad("field", f"Event {seq} has no value {field!r} that could be taken out.", named)
        events = tuple(each.seq for each in self._same(entry) if field in commitments(each.body))
        run = str(entry.body.get("run", ""))

        def redact(db: apsw.Connection) -> Redacted:
            db.execute("PRAGMA secure_delete=ON")  # https://sqlite.org/pragma.html#pragma_secure_delete
            try:
                gone = tuple(
                    each
                    for each in events
                    if db.execute("DELETE FROM payload WHERE seq = ? AND field = ? RETURNING 1", (each, field)).get
                )
                if not gone:
                    raise _bad("field", f"The value {field} of event {seq} was taken out already.", "")
                if run:
                    self._forget(db, run)
                detail = {"events": list(gone), "field": field, "reason": reason}
                self._audit.append(db, Event(kind="redact", principal=principal, run=run, detail=detail))
            finally:
                db.execute("PRAGMA secure_delete=OFF")
            return Redacted(gone, run)

        done = self._store.write(redact)
        self._store.empty_wal()
        self._index.start_anew()
        return done

    def _same(self, entry: Entry) -> list[Entry]:
        call = str(entry.body.get("call", ""))
        if not call:
            return [entry]
        return self._audit.numbered(self._index.find(Wanted(fields={"call": (call,)}), _OF_ONE_CALL))


def _bad(field: str, message: str, hint: str) -> RequestError:
    return RequestError(Reason.BAD_FIELD, message, hint=hint, field=field, metadata={"field": field})
