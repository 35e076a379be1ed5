"""The audit log's service: listed, read, exported, verified, proved; pruned and redacted by an admin."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format, struct_pb2

from agentd.api import convert
from agentd.api.identity import caller
from agentd.audit import Event, Wanted
from agentd.audit.formats import COLUMNS, LINES, Record, otlp
from agentd.errors import Reason, RequestError
from agentd.v1 import audit_pb2, audit_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from agentd.audit import Archive, AuditLog, Checkpoints, Entry, Index, Redaction, Renewal, Verification
    from agentd.audit.payloads import Kept

_PAGE = 200  # events of one page of a stream
_FORMATS = {
    number: name.removeprefix("FORMAT_").lower() if number else "jsonl"
    for name, number in audit_pb2.ExportAuditEventsRequest.Format.items()
}


@dataclass(frozen=True, slots=True)
class AuditParts:
    """What the service speaks for."""

    log: AuditLog
    checkpoints: Checkpoints
    index: Index
    archive: Archive
    redaction: Redaction
    renewal: Renewal


class _Left(Exception):
    """Nobody waits for the answer any more."""


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, parts: AuditParts) -> None:
        self._log, self._checkpoints, self._index = parts.log, parts.checkpoints, parts.index
        self._archive, self._redaction, self._renewal = parts.archive, parts.redaction, parts.renewal

    # -- reading

    async def GetAuditEvent(  # noqa: N802
        self, request: audit_pb2.GetAuditEventRequest, context: Any
    ) -> audit_pb2.AuditEvent:
        seq = _sequence(request.name)
        entries = await asyncio.to_thread(self._log.numbered, [seq])
        if not entries:
            message, hint = f"There is no event {seq} in the store.", "Older ones are in the folder `archive`."
            raise RequestError(Reason.EVENT_NOT_FOUND, message, hint=hint, field="name", metadata={"event": str(seq)})
        (event,) = await self._messages(entries, with_payloads=request.with_payloads)
        return event

    async def ListAuditEvents(  # noqa: N802
        self, request: audit_pb2.ListAuditEventsRequest, context: Any
    ) -> audit_pb2.ListAuditEventsResponse:
        size, after = convert.page_size(request.page_size), convert.page_number(request.page_token) or request.after_sequence
        _require_positive(after)
        call = convert.identifier(request.call, "calls") if request.call else ""
        wanted = replace(_wanted(request.filter, call=call), after=after, newest_first=request.newest_first)
        await self._searching(wanted)
        entries = await asyncio.to_thread(self._entries, wanted, size + 1)
        token = convert.page_token(str(entries[size - 1].seq)) if len(entries) > size else ""
        events = await self._messages(entries[:size], with_payloads=request.with_payloads)
        return audit_pb2.ListAuditEventsResponse(audit_events=events, next_page_token=token)

    async def FollowAuditEvents(  # noqa: N802
        self, request: audit_pb2.FollowAuditEventsRequest, context: Any
    ) -> AsyncIterator[audit_pb2.AuditEvent]:
        _require_positive(request.after_sequence)
        wanted, after = _wanted(request.filter), request.after_sequence
        wanted.fits({})  # an unknown field is said now, and not at the first event
        await self._searching(wanted)
        with self._log.announcements() as more:
            while not self._log.ended:
                more.clear()
                while entries := await asyncio.to_thread(self._log.entries, after=after, limit=_PAGE):
                    for entry in await asyncio.to_thread(self._fitting, wanted, entries):
                        yield _message(entry, ())
                    after = entries[-1].seq
                await more.wait()

    def _fitting(self, wanted: Wanted, entries: list[Entry]) -> list[Entry]:
        """One by one, new events would cost the disk more in the index than in the log: so they are not asked for there."""
        written = self._log.payloads([entry.seq for entry in entries]) if wanted.words else {}
        return [entry for entry in entries if wanted.fits(entry.body, written.get(entry.seq, ()))]

    def _entries(self, wanted: Wanted, limit: int) -> list[Entry]:
        if wanted.everything:
            return self._log.entries(after=wanted.after, limit=limit, newest_first=wanted.newest_first)
        return self._log.numbered(self._index.find(wanted, limit))

    async def _searching(self, wanted: Wanted) -> None:
        """Who looks for words can read what was written one by one: that is on record, the words themselves are not."""
        if wanted.words:
            looked = Event(kind="payload.read", principal=caller().name, detail={"words": len(wanted.words.split())})
            await asyncio.to_thread(self._log.record, looked)

    async def _messages(self, entries: Sequence[Entry], *, with_payloads: bool) -> list[audit_pb2.AuditEvent]:
        """That somebody reads what was written is durable before they get it."""
        found = await asyncio.to_thread(self._log.payloads, [entry.seq for entry in entries]) if with_payloads else {}
        if found:
            read = Event(kind="payload.read", principal=caller().name, detail={"events": sorted(found)})
            await asyncio.to_thread(self._log.record, read)
        return [_message(entry, found.get(entry.seq, ())) for entry in entries]

    async def QueryAuditSql(  # noqa: N802
        self, request: audit_pb2.QueryAuditSqlRequest, context: Any
    ) -> audit_pb2.QueryAuditSqlResponse:
        answer = await asyncio.to_thread(self._index.ask, request.sql)
        rows = [_cells(row) for row in answer.rows]
        return audit_pb2.QueryAuditSqlResponse(columns=convert.valid(answer.columns), rows=rows, more=answer.more)

    # -- taking away

    async def ExportAuditEvents(  # noqa: N802
        self, request: audit_pb2.ExportAuditEventsRequest, context: Any
    ) -> AsyncIterator[audit_pb2.ExportAuditEventsResponse]:
        _require_positive(request.after_sequence)
        form = _FORMATS.get(request.format)
        if form is None:
            raise RequestError(Reason.BAD_FIELD, f"There is no format {request.format}.", field="format")
        if request.with_payloads and form != "jsonl":
            raise RequestError(Reason.BAD_FIELD, f"{form} has no place for payloads; jsonl has.", field="with_payloads")
        wanted = replace(_wanted(request.filter), after=request.after_sequence)
        wanted.fits({})
        sought = json_format.MessageToDict(request.filter)
        if "words" in sought:  # they may be the very ones that were to be taken out
            sought["words"] = True
        asked = {"format": form, "payloads": request.with_payloads, "filter": sought}
        exported = Event(kind="export", principal=caller().name, detail=asked)
        last = await asyncio.to_thread(self._log.record, exported)
        if form == "csv":
            yield audit_pb2.ExportAuditEventsResponse(lines=[",".join(COLUMNS)])
        while entries := await asyncio.to_thread(self._entries, wanted, _PAGE):
            entries = [entry for entry in entries if entry.seq < last]
            if not entries:
                return
            lines = await asyncio.to_thread(self._lines, entries, form, with_payloads=request.with_payloads)
            yield audit_pb2.ExportAuditEventsResponse(lines=lines)
            wanted = replace(wanted, after=entries[-1].seq)

    def _lines(self, entries: list[Entry], form: str, *, with_payloads: bool) -> list[str]:
        found = self._log.payloads([entry.seq for entry in entries]) if with_payloads else {}
        records = [Record(entry.seq, entry.text, entry.chain, tuple(found.get(entry.seq, ()))) for entry in entries]
        if form == "otlp":
            spans = otlp(records)
            return [spans] if spans else []
        return [LINES[form](record) for record in records]

    # -- proving

    async def VerifyAuditLog(  # noqa: N802
        self, request: audit_pb2.VerifyAuditLogRequest, context: Any
    ) -> AsyncIterator[audit_pb2.VerifyAuditLogResponse]:
        total = await asyncio.to_thread(self._log.size)
        loop, left = asyncio.get_running_loop(), threading.Event()
        steps = asyncio.Queue[int]()

        def progress(checked: int) -> None:
            if left.is_set():
                raise _Left
            loop.call_soon_threadsafe(steps.put_nowait, checked)

        verifying = asyncio.ensure_future(asyncio.to_thread(self._checkpoints.verify, list(request.anchors), progress))

        def end(done: asyncio.Future[Verification]) -> None:
            if not done.cancelled():
                done.exception()  # of one that nobody waits for any more
            steps.put_nowait(-1)

        verifying.add_done_callback(end)
        try:
            while (checked := await steps.get()) >= 0:
                yield audit_pb2.VerifyAuditLogResponse(checked_events=checked, total_events=total)
            found = self._verification(await verifying)
            yield audit_pb2.VerifyAuditLogResponse(checked_events=found.valid_events, total_events=total, verification=found)
        finally:
            left.set()

    def _verification(self, found: Verification) -> audit_pb2.Verification:
        made = audit_pb2.Verification(
            valid_events=found.valid,
            head=found.head,
            first_bad_sequence=found.bad or 0,
            why=found.why,
            attested_events=found.attested,
            anchored_events=found.anchored,
            lost_events=found.lost,
            absent_events=found.absent,
            attested_by=self._checkpoints.verifier.name if found.attested else "",
            witnesses=[
                audit_pb2.Witnessing(witness=each.name, events=each.size, time=convert.timestamp(each.time_s * 10**9))
                for each in found.witnessed
            ],
        )
        if found.attested_ns:
            made.attested_time.CopyFrom(convert.timestamp(found.attested_ns))
        return made

    async def GetCheckpoint(  # noqa: N802
        self, request: audit_pb2.GetCheckpointRequest, context: Any
    ) -> audit_pb2.Checkpoint:
        note = await asyncio.to_thread(self._checkpoints.latest)
        return audit_pb2.Checkpoint(note=note, verifier_key=str(self._checkpoints.verifier))

    async def ProveInclusion(  # noqa: N802
        self, request: audit_pb2.ProveInclusionRequest, context: Any
    ) -> audit_pb2.InclusionProof:
        leaf, hashes = await asyncio.to_thread(self._checkpoints.prove_inclusion, request.sequence, request.size)
        return audit_pb2.InclusionProof(leaf=leaf, hashes=hashes)

    async def ProveConsistency(  # noqa: N802
        self, request: audit_pb2.ProveConsistencyRequest, context: Any
    ) -> audit_pb2.ConsistencyProof:
        hashes = await asyncio.to_thread(self._checkpoints.prove_consistency, request.old_size, request.size)
        return audit_pb2.ConsistencyProof(hashes=hashes)

    # -- taking out

    async def RedactAuditEvent(  # noqa: N802
        self, request: audit_pb2.RedactAuditEventRequest, context: Any
    ) -> audit_pb2.RedactAuditEventResponse:
        seq = _sequence(request.name)
        done = await asyncio.to_thread(self._redaction.redact, seq, request.field, request.reason, caller().name)
        return audit_pb2.RedactAuditEventResponse(sequences=done.events, run=f"runs/{done.run}" if done.run else "")

    async def PruneAuditLog(  # noqa: N802
        self, request: audit_pb2.PruneAuditLogRequest, context: Any
    ) -> audit_pb2.PruneAuditLogResponse:
        if request.keep_events < 1:
            raise RequestError(Reason.BAD_FIELD, "keep_events is at least 1.", field="keep_events")
        moved = await asyncio.to_thread(self._archive.prune, request.keep_events, caller().name, 1)
        if moved is None:
            return audit_pb2.PruneAuditLogResponse()
        await asyncio.to_thread(self._index.forget, moved.last)
        return audit_pb2.PruneAuditLogResponse(first_sequence=moved.first, last_sequence=moved.last, archive=moved.name)

    async def RenewAuditLog(  # noqa: N802
        self, request: audit_pb2.RenewAuditLogRequest, context: Any
    ) -> audit_pb2.RenewAuditLogResponse:
        done = await asyncio.to_thread(self._renewal.renew, request.reason, caller().name)
        return audit_pb2.RenewAuditLogResponse(origin=done.origin, archive=done.archive, archived_events=done.events)


def _sequence(name: str) -> int:
    """Raises RequestError (BAD_FIELD)."""
    text = convert.identifier(name, "auditEvents")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise RequestError(Reason.BAD_FIELD, f"name must look like auditEvents/17, not {name!r}.", field="name")
    return int(text)


def _require_positive(after: int) -> None:
    if after < 0:
        raise RequestError(Reason.BAD_FIELD, "after_sequence is negative.", field="after_sequence")


def _wanted(message: audit_pb2.AuditFilter, *, call: str = "") -> Wanted:
    """Raises RequestError (BAD_FIELD)."""
    fields: dict[str, tuple[str, ...]] = {"call": (call,)} if call else {}
    for match in message.matches:
        name, equals, value = match.partition("=")
        if not equals:
            raise RequestError(Reason.BAD_FIELD, f"{match!r} is not FIELD=VALUE.", field="filter.matches")
        fields[name] = (*fields.get(name, ()), value)
    return Wanted(
        fields,
        message.words,
        os.fsencode(message.path),
        message.since.ToNanoseconds() if message.HasField("since") else 0,
        message.until.ToNanoseconds() if message.HasField("until") else 0,
    )


def _cells(row: tuple[Any, ...]) -> struct_pb2.ListValue:
    """Of a table; numbers that JSON would round are text."""
    values = struct_pb2.ListValue()
    for cell in row:
        exact = not isinstance(cell, int) or abs(cell) < 1 << 53
        values.append(cell.hex() if isinstance(cell, bytes) else convert.valid(cell) if exact else str(cell))
    return values


def _message(entry: Entry, written: Sequence[Kept]) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(
        name=f"auditEvents/{entry.seq}",
        sequence=entry.seq,
        event_time=convert.timestamp(int(entry.body["time_ns"])),
        kind=entry.body["kind"],
        body=convert.struct(entry.body),
        chain=entry.chain,
        text=entry.text,
        payloads=[audit_pb2.AuditPayload(field=each.field, salt=each.salt, value=each.value) for each in written],
    )
