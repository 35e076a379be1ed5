"""The audit log as an admin meets it: found, followed, verified against what was kept elsewhere, after somebody was at it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import apsw
import pytest

from agentd.audit.anchors import read_notes
from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import audit_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    running = DaemonProcess(tmp_path_factory.mktemp("agentd")).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log, running.log


def wrote(client: Client, path: str, text: str = "x") -> str:
    return client.call("files.write", {"path": path, "text": text}).name.removeprefix("calls/")


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def test_events_are_found_by_fields_words_and_time(daemon: DaemonProcess):
    with Client(daemon.socket) as client:
        call = wrote(client, "found.txt", "strawberry jam")
    assert kinds(daemon.json("audit", "list", f"call={call}")) == ["call.intent", "call.end"]
    (intent,) = daemon.json("audit", "list", "--grep", "jam STRAWBERRY", "kind=call.intent")
    assert intent["body"]["call"] == call
    assert daemon.json("audit", "list", "--grep", "raspberry") == []
    assert daemon.json("audit", "list", f"call={call}", "--since", "1h") != []
    assert daemon.json("audit", "list", f"call={call}", "--until", "1h") == []
    assert kinds(daemon.json("audit", "list", f"call={call}", "-r")) == ["call.end", "call.intent"]
    first = daemon.json("audit", "list", f"call={call}")[0]["sequence"]
    assert int(daemon.json("audit", "list", "--after", first, "-n", "1")[0]["sequence"]) == int(first) + 1
    assert call in daemon.command("audit", "list", "-o", "table").stdout
    refused = daemon.command("audit", "list", "colour=red", check=False)
    assert refused.returncode == 1
    assert "can't be found by 'colour'" in refused.stderr


def test_who_has_changed_a_file_and_what_became_of_it(daemon: DaemonProcess):
    """The calls with the newest first; the whole story of one with its diff."""
    with Client(daemon.socket) as client:
        calls = [wrote(client, "mine.txt", text) for text in ("first", "second")]
    said = daemon.command("audit", "who", str(daemon.home / "mine.txt")).stdout
    assert said.index(calls[1]) < said.index(calls[0])
    story = daemon.command("audit", "show", calls[1]).stdout
    for part in ("-first", "+second", "every scope is covered", "call.end"):
        assert part in story
    assert "no call on record" in daemon.command("audit", "who", "/nowhere").stdout


def test_events_come_as_they_are_recorded(daemon: DaemonProcess):
    """Within a moment, filtered, from a given place; and the stream ends with the client."""
    with Client(daemon.socket) as client, Client(daemon.socket) as other:
        start = max(event.sequence for event in client.audit_events(newest_first=True))
        seen: list[tuple[float, str]] = []

        def follow() -> None:
            which = audit_pb2.AuditFilter(matches=["kind=call.end"])
            for event in other.follow_audit_events(after=start, which=which):
                seen.append((time.monotonic(), event.body["call"]))
                if len(seen) == 3:
                    return

        following = threading.Thread(target=follow)
        following.start()
        calls, done = [], []
        for n in range(3):
            calls.append(wrote(client, f"followed{n}.txt"))
            done.append(time.monotonic())
            time.sleep(0.05)
        following.join(20)
    assert [call for _, call in seen] == calls
    with Client(daemon.socket) as client, pytest.raises(AgentdError, match="can't be found by"):
        next(client.follow_audit_events(which=audit_pb2.AuditFilter(matches=["colour=red"])))
    late = max(at - then for (at, _), then in zip(seen, done, strict=True))
    print(f"an event reached its follower {late * 1000:.0f} ms after the call had returned, at most")


def test_who_follows_is_let_go_of_when_the_daemon_stops(tmp_path: Path):
    running = DaemonProcess(tmp_path / "d").start()
    ended = threading.Event()

    def follow() -> None:
        with Client(running.socket) as client:
            with contextlib.suppress(AgentdError):
                list(client.follow_audit_events())
            ended.set()

    following = threading.Thread(target=follow)
    following.start()
    time.sleep(0.3)
    assert running.stop() == 0
    assert ended.wait(20)
    following.join()


def test_a_log_that_somebody_was_at_is_found_out(tmp_path: Path):
    """The end cut off with the checkpoints: the chain fits, the anchor knows; the daemon says so at its start, too."""
    anchor = tmp_path / "anchor"
    running = DaemonProcess(tmp_path / "d", extra=f'[audit]\nanchor_file = "{anchor}"\njournald = false\n').start()
    with Client(running.socket) as client:
        for n in range(5):
            wrote(client, f"f{n}.txt")
    assert running.command("audit", "verify").returncode == 0
    assert running.command("audit", "verify", "--anchor", str(anchor), check=False).returncode == 5
    assert running.stop() == 0
    kept = read_notes(anchor.read_text())
    assert len(kept) == 2
    running.start()
    assert running.json("audit", "verify", "--anchor", str(anchor), check=False)[0]["anchored_events"] != "0"
    with Client(running.socket) as client:
        assert client.verify(kept).lost_events == 0
        point = client.checkpoint()
        assert "agentd.local/" in point.note
    assert running.command("audit", "prove", "2").returncode == 0
    assert running.stop() == 0

    db = apsw.Connection(str(running.state / "agentd.db"))
    db.execute("DELETE FROM event WHERE seq > 6; DELETE FROM payload WHERE seq > 6; DELETE FROM checkpoint")
    db.close()
    running.start()
    with Client(running.socket) as client:
        assert client.verify().first_bad_sequence == 0
        assert client.verify(kept).first_bad_sequence or client.verify(kept).lost_events
        assert "gap" in {event.kind for event in client.audit_events()}
    assert running.command("audit", "verify", "--anchor", str(anchor), check=False).returncode in (3, 4)
    assert "are missing at its end" in running.log
    running.stop()


def test_no_tool_gets_to_the_key_or_the_anchor(tmp_path: Path):
    """Whatever the grants say."""
    anchor = tmp_path / "d" / "home" / "anchor"
    running = DaemonProcess(tmp_path / "d", extra=f'[audit]\nanchor_file = "{anchor}"\n').start()
    try:
        with Client(running.socket) as client:
            for path in (anchor, running.state / "audit.key", running.state / "index.db"):
                with pytest.raises(AgentdError) as caught:
                    client.call("files.read", {"path": str(path)})
                assert caught.value.reason is Reason.GRANT_REQUIRED
    finally:
        running.stop()


def test_events_are_exported_as_they_were_hashed(daemon: DaemonProcess, tmp_path: Path):
    """Each line of jsonl has its leaf and continues the chain; the other formats have as many lines."""
    with Client(daemon.socket) as client:
        wrote(client, "exported.txt", "=1+1")
    lines = daemon.command("audit", "export").stdout.splitlines()
    chain = bytes(32)
    for line in lines:
        text = line[line.index('"event":') + len('"event":') : -1]
        chain = hashlib.sha256(chain + hashlib.sha256(b"\0" + text.encode()).digest()).digest()
        assert json.loads(line)["chain"] == chain.hex()
    for before, (output, extra) in enumerate((("csv", 1), ("syslog", 0), ("cef", 0), ("ocsf", 0)), 1):  # each is an event
        said = daemon.command("audit", "export", "-o", output, "--until", "now").stdout.splitlines()
        assert len(said) == len(lines) + before + extra, output
    spans = json.loads(daemon.command("audit", "export", "-o", "otlp", "tool=files.write").stdout.splitlines()[0])
    assert spans["resourceSpans"]
    file = tmp_path / "events.csv"
    daemon.command("audit", "export", "-o", "csv", "--to", str(file), "--grep", "exported")
    assert "exported.txt" in file.read_text()
    assert daemon.command("audit", "export", "-o", "parquet", check=False).returncode == 2


def test_an_sqlite_file_for_other_programs(daemon: DaemonProcess, tmp_path: Path):
    """Events and paths, and nothing else of the store; a file that is there is not written over."""
    with Client(daemon.socket) as client:
        wrote(client, "tabled.txt")
    file = tmp_path / "audit.db"
    daemon.command("audit", "export", "-o", "sqlite", "--to", str(file))
    with contextlib.closing(apsw.Connection(str(file))) as db:
        assert {name for (name,) in db.execute("SELECT name FROM sqlite_schema")} == {"events", "paths"}
        query = "SELECT tool, decision FROM events JOIN paths USING (seq) WHERE path LIKE '%/tabled.txt'"
        assert next(iter(db.execute(query)))[0] == "files.write"
    assert daemon.command("audit", "export", "-o", "sqlite", "--to", str(file), check=False).returncode == 2


def test_what_tools_give_back_is_kept_where_that_is_wanted(tmp_path: Path):
    """As a payload; otherwise its digest is all there is."""
    with DaemonProcess(tmp_path, extra="[audit]\noutputs = true\n").running() as running, Client(running.socket) as client:
        (running.home / "a.txt").write_text("what it says")
        client.call("files.read", {"path": "a.txt"})
        event = next(iter(client.audit_events(newest_first=True, with_payloads=True)))
    assert [(each.field, json.loads(each.value)) for each in event.payloads] == [("detail.output", {"text": "what it says"})]


def test_parquet_where_it_is_installed(daemon: DaemonProcess, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    daemon.command("audit", "export", "-o", "parquet", "--to", str(tmp_path / "events.parquet"))
    assert parquet.read_table(tmp_path / "events.parquet").column("kind")[0].as_py() == "boot"


def test_a_question_in_sql(daemon: DaemonProcess):
    with Client(daemon.socket) as client:
        wrote(client, "asked.txt")
    path = daemon.home / "asked.txt"
    found = daemon.json("audit", "sql", f"SELECT principal, tool FROM events JOIN paths USING (seq) WHERE path = '{path}'")
    assert found[0]["tool"] == "files.write"
    assert "files.write" in daemon.command("audit", "sql", "SELECT DISTINCT tool FROM events").stdout
    refused = daemon.command("audit", "sql", "SELECT * FROM token", check=False)
    assert refused.returncode == 1
    assert "events" in refused.stderr


def test_events_are_shipped_over_a_kill(tmp_path: Path):
    """At least once: nothing is missing after the daemon was killed and started again."""
    file = tmp_path / "shipped"
    extra = f'[[audit.ship]]\nname = "lines"\nto = "file://{file}"\n'
    running = DaemonProcess(tmp_path / "d", extra=extra).start()
    with Client(running.socket) as client:
        for n in range(3):
            wrote(client, f"f{n}.txt")
    running.kill()
    running.start()
    with Client(running.socket) as client:
        wrote(client, "last.txt")
        newest = max(event.sequence for event in client.audit_events())
    deadline = time.monotonic() + 20
    while newest not in (got := {json.loads(line)["event"]["seq"] for line in file.read_text().splitlines()}):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert got >= set(range(1, newest + 1))
    assert running.stop() == 0


@pytest.mark.parametrize("line", ['to = "ftp://x:1"', 'to = "tcp://x"', 'to = "tcp://x:1"\nformat = "otlp"'])
def test_a_receiver_that_is_none_is_said_at_the_start(tmp_path: Path, line: str):
    running = DaemonProcess(tmp_path / "d", extra=f'[[audit.ship]]\nname = "r"\n{line}\n')
    assert running.start(wait=False).ended() == 1
    assert "audit.ship" in running.log


def test_the_oldest_events_are_moved_away_and_verify(tmp_path: Path):
    """Up to a checkpoint; who has only the role auditor may not."""
    running = DaemonProcess(tmp_path / "d").start()
    with Client(running.socket) as client:
        for n in range(3):
            wrote(client, f"f{n}.txt")
    running.stop()
    running.start()
    with Client(running.socket) as client:
        for n in range(3):
            wrote(client, f"g{n}.txt")
    (moved,) = running.json("audit", "prune", "--keep", "6")
    assert (running.state / "archive" / moved["archive"]).exists()
    assert running.command("audit", "prune", "--keep", "6", check=False).returncode == 1
    left = running.json("audit", "list", "-n", "1000")
    assert int(left[0]["sequence"]) == int(moved["last_sequence"]) + 1
    assert "prune" in kinds(left)
    found = running.json("audit", "verify")[0]
    assert int(found["valid_events"]) == int(left[-1]["sequence"])
    assert running.command("audit", "prove", "1").returncode == 0
    (running.state / "archive" / moved["archive"]).unlink()
    done = running.command("audit", "verify", check=False)
    assert (done.returncode, "missing or damaged" in done.stdout) == (6, True)
    assert running.stop() == 0


def test_a_run_is_on_record_with_prompt_model_and_end(daemon: DaemonProcess):
    """By commitments: the log is no copy of what people ask. Its calls name the run."""
    prompt = "what time is it"
    with Client(daemon.socket) as client:
        list(client.run("how much memory is free?"))  # the model is loaded then, and its file read
        run = list(client.run(prompt))[-1].run.name.removeprefix("runs/")
    events = daemon.json("audit", "list", f"run={run}")
    assert [events[n]["kind"] for n in (0, 1, -1)] == ["run.queue", "run.start", "run.end"]
    start, end = events[1]["body"]["detail"], events[-1]["body"]["detail"]
    with Client(daemon.socket) as client:
        (kept,) = client.audit_event(int(events[1]["sequence"]), with_payloads=True).payloads
    assert (kept.field, json.loads(kept.value)) == ("detail.prompt", prompt)
    assert (
        start["prompt"]["$commitment"]
        == hashlib.sha256(b"\x02" + kept.salt + b"detail.prompt\0" + kept.value.encode()).hexdigest()
    )
    assert len(start["model"]["sha256"]) == 64
    assert start["model"]["file"].endswith("pocket.gguf")
    assert (end["state"], end["stop_reason"]) == ("succeeded", "answered")
    assert {event["body"]["cause"] for event in events[2:-1]} == {run}
    assert prompt not in str(events)


def test_a_witness_of_another_machine(tmp_path: Path):
    """Its key from the command, its signature under the log's checkpoints; it ends when it is told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    office = [sys.executable, "-m", "agentd", "witness", "--state", str(tmp_path / "witness")]
    key = subprocess.run([*office, "--key"], capture_output=True, text=True, check=True).stdout.strip()
    extra = f'[[audit.witness]]\nkey = "{key}"\nurl = "http://127.0.0.1:{port}"\n'
    running = DaemonProcess(tmp_path / "d", extra=extra).start()
    log_key = running.command("audit", "key").stdout.strip()
    running.stop()  # it was not there then: the log has signed by itself
    with subprocess.Popen([*office, "--listen", f"127.0.0.1:{port}", "--log", log_key]) as serving:
        running.start()
        deadline = time.monotonic() + 20
        try:
            while not (signed := running.json("audit", "verify")[0]["witnesses"]) or int(signed[0]["events"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert signed[0]["witness"] == key.partition("+")[0]
            assert f"witnessed by {signed[0]['witness']}" in running.command("audit", "verify").stdout
            assert key.partition("+")[0] in running.command("audit", "checkpoint").stdout
            assert running.stop() == 0
        finally:
            serving.terminate()
        assert serving.wait(20) == 0
    refused = subprocess.run([*office, "--log", "nonsense"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "verifier key" in refused.stderr
