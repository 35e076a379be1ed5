"""Each format is read back by its own rules; nothing that a tool or a model wrote ends a line, a cell or a field."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.audit import Event, FileTouched, ToolIdentity, Verdict
from agentd.audit.formats import COLUMNS, LINES, Record, cef, csv_line, jsonl, ocsf, otlp, row, span, syslog
from agentd.store import new_id

NASTY = st.text(st.sampled_from("a =\\|\"]'\n\r\t\0\x1b[;,+-@\u202eü\udcff"), max_size=12)


def record(seq: int = 7, **fields: Any) -> Record:
    event = Event(**({"kind": "call.end", "call": new_id(), "principal": "unix:pi"} | fields))
    return Record(seq, event.sealed(seq=seq, time_ns=1_763_700_000_123_456_789, boot="b").body, bytes(range(32)))


def nasty(text: str) -> Record:
    shown = text.encode("utf-8", "replace").decode()
    return record(
        principal=text,
        tool=ToolIdentity(name=text, version=text, digest="d", effect="files"),
        error=text,
        scopes=(f"read:{text}",),
        files=(FileTouched(operation="change", path=f"/{text}"),),
        decision=Verdict(verdict="deny", reason=shown),
        arguments={text: text},
    )


def test_a_line_of_json_has_the_event_as_it_was_hashed():
    """Whoever has the line can compute the leaf."""
    one = record()
    line = jsonl(one)
    parsed = json.loads(line)
    assert parsed["chain"] == one.chain.hex()
    assert parsed["event"] == one.body
    assert set(parsed) == {"chain", "event"}
    verbatim = line[line.index('"event":') + len('"event":') : -1]
    assert hashlib.sha256(b"\0" + verbatim.encode()).digest() == hashlib.sha256(b"\0" + one.text.encode()).digest()


@settings(max_examples=200, deadline=None)
@given(NASTY)
def test_every_line_is_one_line_that_a_terminal_can_show(text: str):
    one = nasty(text)
    for name, made in LINES.items():
        line = made(one)
        assert line.isprintable(), (name, line)
        line.encode()
    assert otlp([one]).isprintable()


@settings(max_examples=200, deadline=None)
@given(NASTY)
def test_csv_reads_back_and_holds_no_formula(text: str):
    (cells,) = csv.reader(io.StringIO(csv_line(row(nasty(text)))))
    assert len(cells) == len(COLUMNS)
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)


@settings(max_examples=200, deadline=None)
@given(NASTY)
def test_syslog_is_as_the_rfc_says(text: str):
    """RFC 5424, section 6: header, one structured element whose values are quoted, message."""
    line = syslog(nasty(text), "pi")
    found = re.fullmatch(
        r"<(\d+)>1 (\S+) pi agentd - (\S+) \[agentd@32473((?: [a-z]+=\"(?:[^\"\\\]]|\\.)*\")*)\] (.*)", line, re.DOTALL
    )
    assert found, line
    assert found[1] == str(13 * 8 + 6)
    assert found[2] == "2025-11-21T04:40:00.123456Z"


@settings(max_examples=200, deadline=None)
@given(NASTY)
def test_cef_has_seven_parts_and_fields(text: str):
    line = cef(nasty(text), "0.1")
    found = re.fullmatch(r"CEF:0((?:\|(?:[^|\\]|\\.)*){5})\|(\d)\|(.*)", line)
    assert found, line
    fields = re.findall(r"(?:^| )([A-Za-z0-9]+)=((?:[^=\\]|\\.)*?)(?= [A-Za-z0-9]+=|$)", found[3])
    assert dict(fields)["externalId"] == "7"


def test_ocsf_has_what_its_class_requires():
    event = json.loads(
        ocsf(
            record(
                files=(FileTouched(operation="change", path="/a"),),
                tool=ToolIdentity(name="t", version="1", digest="", effect=""),
            ),
            "0.1",
        )
    )
    for name in ("class_uid", "category_uid", "activity_id", "type_uid", "severity_id", "time", "metadata", "actor", "api"):
        assert name in event
    assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
    assert event["resources"] == [{"name": "/a", "type": "file"}]


def test_a_call_is_a_span_of_its_run():
    """Trace and span ids are those of run and call; only what has ended is one."""
    run, call = new_id(), new_id()
    tool = ToolIdentity(name="files.write", version="1", digest="", effect="")
    made = span(record(run=run, call=call, tool=tool, wall_us=1500))
    assert made is not None
    assert re.fullmatch("[0-9a-f]{32}", made["traceId"])
    assert re.fullmatch("[0-9a-f]{16}", made["spanId"])
    assert int(made["endTimeUnixNano"]) - int(made["startTimeUnixNano"]) == 1_500_000
    named = {each["key"]: each["value"]["stringValue"] for each in made["attributes"]}
    assert named["gen_ai.operation.name"] == "execute_tool"
    assert named["gen_ai.tool.name"] == "files.write"
    assert named["gen_ai.tool.call.id"] == call
    other = span(record(run=run, call=new_id(), tool=tool))
    assert other is not None
    assert other["traceId"] == made["traceId"]
    assert other["spanId"] != made["spanId"]
    assert span(record(kind="call.intent")) is None
    assert otlp([record(kind="boot")]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        '{"time_ns":"x"}',
        '{"tool":5,"files":7,"decision":[],"scopes":[1]}',
        '{"time_ns":"99999999999999999999999"}',
    ],
)
def test_a_damaged_event_is_shown_as_far_as_it_goes(text: str):
    one = Record(3, text, b"c" * 32)
    for made in LINES.values():
        assert made(one)
    span(one)
