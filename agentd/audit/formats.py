"""Events in the formats that other programs read: JSON lines, CSV, syslog, CEF, OCSF, OpenTelemetry.

Pure functions of one event. What tools, models and clients have written stays data: each format's own escapes are applied, and
no cell of a table begins like a formula.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentd import __version__
from agentd.audit.events import parsed
from agentd.audit.payloads import Kept, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_ULID = "0123456789abcdefghjkmnpqrstvwxyz"
_REFUSED = frozenset({"call.deny", "call.reject", "auth.fail"})
_FAILED = frozenset({"call.abort", "gap"})
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_AUDIT_FACILITY = 13  # RFC 5424, 6.2.1: log audit
_ENTERPRISE = "32473"  # RFC 5612: for documentation; agentd has no number of its own
_OCSF_VERSION = "1.7.0"
_OTEL_SCHEMA = "https://opentelemetry.io/schemas/1.37.0"  # its GenAI names are in development: pinned
COLUMNS = (
    *("seq", "time", "kind", "principal", "session", "run", "call", "tool", "version", "decision", "reason"),
    *("scopes", "paths", "labels", "error", "undoable", "wall_us", "cpu_us", "denied", "chain"),
)


@dataclass(frozen=True, slots=True)
class Record:
    """An event as it is stored: `text` is what was hashed, `chain` the value that covers it and all before it.

    `payloads` are what it commits to, where whoever reads it is to have that.
    """

    seq: int
    text: str
    chain: bytes
    payloads: tuple[Kept, ...] = ()

    @property
    def body(self) -> dict[str, Any]:
        """A damaged one is shown as such."""
        return parsed(self.text)


def jsonl(record: Record) -> str:
    """The event stands there exactly as it was hashed: SHA-256(0x00 || event) is its leaf."""
    if record.body.get("kind") == "damaged":
        return json.dumps({"chain": record.chain.hex(), "seq": record.seq, "damaged": record.text})
    beside = [{"field": each.field, "salt": each.salt.hex(), "value": each.value} for each in record.payloads]
    also = f',"payloads":{text_of(beside)}' if beside else ""
    return f'{{"chain":"{record.chain.hex()}","event":{record.text}{also}}}'


def row(record: Record) -> tuple[str, ...]:
    """The values of COLUMNS."""
    body = record.body
    tool, decision, sandbox = (_part(body, name) for name in ("tool", "decision", "sandbox"))
    values: Mapping[str, Any] = {
        **{name: body.get(name, "") for name in ("kind", "principal", "session", "run", "call", "error", "wall_us", "cpu_us")},
        "seq": record.seq,
        "time": when(body),
        "tool": tool.get("name", ""),
        "version": tool.get("version", ""),
        "decision": decision.get("verdict", ""),
        "reason": decision.get("reason", ""),
        "scopes": " ".join(map(str, body.get("scopes", ()))),
        "paths": "; ".join(paths(body)),
        "labels": " ".join(map(str, body.get("labels", ()))),
        "undoable": body.get("undoable", ""),
        "denied": sandbox.get("denied", ""),
        "chain": record.chain.hex(),
    }
    return tuple(_one_line(str(values[name])) for name in COLUMNS)


def csv_line(values: Iterable[str]) -> str:
    """RFC 4180. What a spreadsheet would take for a formula gets an apostrophe."""
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow(f"'{value}" if value.startswith(_FORMULA) else value for value in values)
    return file.getvalue()


def syslog(record: Record, host: str = "-") -> str:
    """RFC 5424, with the main fields as structured data and a sentence."""
    body = record.body
    severity = 3 if body.get("kind") in _FAILED else 4 if body.get("kind") in _REFUSED else 6
    named = {"seq": record.seq, "chain": record.chain.hex()[:16], **_main(body)}
    data = " ".join(f'{name}="{_syslog_value(str(value))}"' for name, value in named.items() if value != "")
    kind = str(body.get("kind", "-"))[:32]
    head = f"<{_AUDIT_FACILITY * 8 + severity}>1 {when(body)} {host[:255] or '-'} agentd - {kind}"
    return f"{head} [agentd@{_ENTERPRISE} {data}] {sentence(body)}"


def _syslog_value(text: str) -> str:
    for character in '\\"]':
        text = text.replace(character, f"\\{character}")
    return _one_line(text)


def cef(record: Record, version: str = __version__) -> str:
    """ArcSight's Common Event Format, version 0."""
    body = record.body
    severity = 8 if body.get("kind") in _FAILED else 6 if body.get("kind") in _REFUSED else 3
    main = _main(body)
    extension = {
        "rt": str(_time_ns(body) // 10**6),
        "externalId": str(record.seq),
        "suser": main["principal"],
        "act": main["decision"],
        "outcome": "failure" if body.get("error") else "success",
        "reason": str(_part(body, "decision").get("reason", "") or body.get("error", "")),
        "filePath": (paths(body) or [""])[0],
        "cs1": main["tool"],
        "cs1Label": "tool" if main["tool"] else "",
        "cs2": main["call"],
        "cs2Label": "call" if main["call"] else "",
        "cs3": " ".join(map(str, body.get("scopes", ()))),
        "cs3Label": "scopes" if body.get("scopes") else "",
    }
    header = "|".join(_cef_header(part) for part in ("agentd", "agentd", version, str(body.get("kind")), sentence(body)))
    fields = " ".join(f"{name}={_cef_value(value)}" for name, value in extension.items() if value)
    return f"CEF:0|{header}|{severity}|{fields}"


def _cef_header(text: str) -> str:
    return _one_line(text.replace("\\", "\\\\").replace("|", "\\|"))


def _cef_value(text: str) -> str:
    return _one_line(text.replace("\\", "\\\\").replace("=", "\\=").replace("\n", "\\n").replace("\r", "\\r"))


def ocsf(record: Record, version: str = __version__) -> str:
    """The Open Cybersecurity Schema Framework: API Activity (6003), a line of JSON. What has no place there is `unmapped`."""
    body = record.body
    main, failed = _main(body), bool(body.get("error")) or body.get("kind") in _REFUSED
    activity = 2 if body.get("kind") in ("call.intent", "call.end") and not paths(body) else 3 if paths(body) else 99
    event = {
        "class_uid": 6003,
        "category_uid": 6,
        "activity_id": activity,
        "type_uid": 600300 + activity,
        "severity_id": 4 if body.get("kind") in _FAILED else 3 if body.get("kind") in _REFUSED else 1,
        "status_id": 2 if failed else 1,
        "status_detail": str(body.get("error", "") or _part(body, "decision").get("reason", "")),
        "time": _time_ns(body) // 10**6,
        "message": sentence(body),
        "actor": {"user": {"name": main["principal"]}, "session": {"uid": main["session"]}},
        "api": {"operation": main["tool"] or str(body.get("kind")), "request": {"uid": main["call"]}},
        "resources": [{"name": path, "type": "file"} for path in paths(body)],
        "metadata": {
            "version": _OCSF_VERSION,
            "uid": str(record.seq),
            "product": {"name": "agentd", "vendor_name": "agentd", "version": version},
            "log_name": "audit",
        },
        "unmapped": {"chain": record.chain.hex(), "scopes": body.get("scopes", []), "labels": body.get("labels", [])},
    }
    return json.dumps(event, sort_keys=True)


def span(record: Record) -> dict[str, Any] | None:
    """A call that has ended as a span of OTLP's JSON, `execute_tool` of the GenAI conventions. None for other events."""
    body = record.body
    if body.get("kind") not in ("call.end", "call.abort", "call.deny"):
        return None
    main, end = _main(body), _time_ns(body)
    call = _bits(main["call"])
    attributes = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": main["tool"],
        "gen_ai.tool.call.id": main["call"],
        "gen_ai.conversation.id": main["session"],
        "error.type": str(body.get("kind")) if body.get("error") or body.get("kind") == "call.deny" else "",
        "agentd.principal": main["principal"],
        "agentd.seq": str(record.seq),
        "agentd.paths": "\n".join(paths(body)),
    }
    failed = bool(attributes["error.type"])
    return {
        "traceId": f"{_bits(main['run']) or call:032x}",
        "spanId": f"{call & (1 << 64) - 1 or 1:016x}",
        "name": f"execute_tool {main['tool']}",
        "kind": 1,
        "startTimeUnixNano": str(end - int(body.get("wall_us") or 0) * 1000),
        "endTimeUnixNano": str(end),
        "attributes": [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items() if value],
        "status": {"code": 2, "message": str(body.get("error", ""))} if failed else {"code": 1},
    }


def otlp(records: Iterable[Record], version: str = __version__) -> str:
    """The body of a POST to /v1/traces, OTLP over HTTP with JSON. Empty if none of the events is a call that has ended."""
    spans = [made for record in records if (made := span(record))]
    if not spans:
        return ""
    service = [{"key": "service.name", "value": {"stringValue": "agentd"}}]
    scope = {"name": "agentd.audit", "version": version}
    scoped = {"scope": scope, "spans": spans, "schemaUrl": _OTEL_SCHEMA}
    return json.dumps({"resourceSpans": [{"resource": {"attributes": service}, "scopeSpans": [scoped]}]})


LINES: dict[str, Callable[[Record], str]] = {
    "jsonl": jsonl,
    "csv": lambda record: csv_line(row(record)),
    "syslog": syslog,
    "cef": cef,
    "ocsf": ocsf,
}
"""A line for each event."""


def sentence(body: Mapping[str, Any]) -> str:
    main = _main(body)
    decision = _part(body, "decision")
    why = str(body.get("error", "") or (decision.get("reason", "") if body.get("kind") == "call.deny" else ""))
    said = " ".join(
        filter(None, (str(body.get("kind", "")), main["tool"], "for" if main["principal"] else "", main["principal"]))
    )
    return _one_line(f"{said}: {why}" if why else said)


def paths(body: Mapping[str, Any]) -> list[str]:
    """Those that the call changed. Names that are no text are shown with question marks."""
    files = body.get("files", [])
    named = [str(file.get("path", "")) for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return [path.encode("utf-8", "replace").decode() for path in named]


def when(body: Mapping[str, Any]) -> str:
    """RFC 3339, in UTC, to the microsecond."""
    seconds, rest = divmod(_time_ns(body), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06}Z"


def _time_ns(body: Mapping[str, Any]) -> int:
    try:
        return min(max(int(body.get("time_ns", 0)), 0), 253402300799 * 10**9)  # up to the year 9999
    except (TypeError, ValueError):
        return 0


def _main(body: Mapping[str, Any]) -> dict[str, str]:
    own = {name: str(body.get(name, "")) for name in ("principal", "session", "run", "call")}
    own |= {"tool": str(_part(body, "tool").get("name", "")), "decision": str(_part(body, "decision").get("verdict", ""))}
    return {name: value.encode("utf-8", "replace").decode() for name, value in own.items()}


def _part(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = body.get(name)
    return part if isinstance(part, dict) else {}


def _one_line(text: str) -> str:
    """Nothing that ends a line or moves a cursor."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown.encode("utf-8", "replace").decode()


def _bits(ulid: str) -> int:
    """The 128 bits of an id; 0 if it is none."""
    value = 0
    for character in ulid.lower():
        if (digit := _ULID.find(character)) < 0:
            return 0
        value = value << 5 | digit
    return value & (1 << 128) - 1
