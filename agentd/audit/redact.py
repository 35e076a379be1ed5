"""Taking out what was written: the value goes, for good, and the chain still verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentd.audit.events import Event, require_reason
from agentd.audit.payloads import commitments
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    import apsw

    from agentd.audit.index import Index
    from agentd.audit.log import AuditLog, Entry
    from agentd.store import Store

_OF_ONE_CALL = 64  # events
_OF_ONE_RUN = 10_000
_DECIDED = frozenset({"call.intent", "call.deny"})
_OF_A_RUN = {"run.queue": "detail.prompt", "run.start": "detail.prompt", "run.end": "detail.answer"}


@dataclass(frozen=True, slots=True)
class Redacted:
    """The events whose value is gone, and the run whose words went with it, if there was one."""

    events: tuple[int, ...]
    run: str


class Redaction:
    """`forget(db, run)` takes the words of a run out of the store; raises RequestError while it is going on. `forget_more`
    takes them from where else the daemon has them.
    """

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        index: Index,
        forget: Callable[[apsw.Connection, str], None],
        forget_more: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._audit, self._index, self._forget = store, audit, index, forget
        self._forget_more = forget_more

    def redact(self, seq: int, field: str, reason: str, principal: str) -> Redacted:
        """Take out one value, wherever the log has it for the same call; with it prompt, answer and transcript of its run.

        When it returns, no file of the store has it any more. Not for the event loop. Raises RequestError: BAD_FIELD,
        RUN_GOING_ON; StoreError, after which it is to be asked for again: what is left then are traces in files.
        """
        require_reason(reason)
        entry = next(iter(self._audit.numbered([seq])), None)
        if entry is None:
            raise _bad(
                "name", f"There is no event {seq} in the store.", "What is in an archive has no values beside it any more."
            )
        known = commitments(entry.body)
        if field not in known:
            named = f"It has {', '.join(known)}." if known else "It has none."
            raise _bad("field", f"Event {seq} has no value {field!r} that could be taken out.", named)
        run = str(entry.body.get("run", ""))
        wanted = [(each.seq, field) for each in self._of_call(entry) if field in commitments(each.body)]
        also = [pair for pair in self._of_run(run) if pair not in wanted]
        try:
            return self._store.write(lambda db: self._take_out(db, wanted, also, (run, reason, principal)))
        finally:  # also where it was taken out before: what failed then is tried again
            try:
                self.clean()
            finally:
                self._forget_more()

    def clean(self) -> None:
        """Leave no trace of what was taken out in the write-ahead log or the index. Raises StoreError."""
        try:
            self._store.empty_wal()
        finally:
            self._index.start_anew()

    def finish(self) -> None:
        """At a start: the daemon may have been killed before all was clean. Raises StoreError."""
        last, stopped = self._audit.newest("redact"), self._audit.newest("stop")
        if last and (stopped is None or stopped.seq < last.seq):
            self.clean()
            self._forget_more()

    def _take_out(
        self, db: apsw.Connection, wanted: list[tuple[int, str]], also: list[tuple[int, str]], who: tuple[str, str, str]
    ) -> Redacted:
        run, reason, principal = who
        gone = [seq for seq, field in wanted if _delete(db, seq, field)]
        seq, field = wanted[0]
        if not gone:
            raise _bad("field", f"The value {field} of event {seq} was taken out already.", "")
        detail: dict[str, Any] = {"events": gone, "field": field, "reason": reason}
        if run:
            self._forget(db, run)
            more: dict[str, list[int]] = {}
            for each, name in also:
                if _delete(db, each, name):
                    more.setdefault(name, []).append(each)
            detail |= {"also": more} if more else {}
        self._audit.append(db, Event(kind="redact", principal=principal, run=run, detail=detail))
        return Redacted(tuple(gone), run)

    def _of_call(self, entry: Entry) -> list[Entry]:
        """Raises RequestError (RUN_GOING_ON) for a call that is not decided on yet."""
        call = str(entry.body.get("call", ""))
        if not call:
            return [entry]
        same = self._audit.naming("call", call, _OF_ONE_CALL)
        kinds = {each.body["kind"] for each in same}
        if "approval.request" in kinds and not kinds & _DECIDED and entry.body.get("boot") == self._audit.boot:
            message = f"The call {call} waits for an answer, and would write its words again."
            raise RequestError(Reason.RUN_GOING_ON, message, hint="Answer it, or wait.", metadata={"call": call})
        return same

    def _of_run(self, run: str) -> list[tuple[int, str]]:
        """Its prompt and its answer, which repeat what its calls were asked for."""
        known = self._audit.naming("run", run, _OF_ONE_RUN) if run else []
        named = ((each, _OF_A_RUN.get(each.body["kind"], "")) for each in known)
        return [(each.seq, field) for each, field in named if field in commitments(each.body)]


def _delete(db: apsw.Connection, seq: int, field: str) -> bool:
    return db.execute("DELETE FROM payload WHERE seq = ? AND field = ? RETURNING 1", (seq, field)).get is not None


def _bad(field: str, message: str, hint: str) -> RequestError:
    return RequestError(Reason.BAD_FIELD, message, hint=hint, field=field, metadata={"field": field})
