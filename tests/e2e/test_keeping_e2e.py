"""What is kept beside the log, taken out, and what becomes of a log that was tampered with: a real daemon, as an admin meets it."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import apsw
import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import audit_pb2, token_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

JSONL = audit_pb2.ExportAuditEventsRequest.FORMAT_JSONL
TAMPERED, TRUNCATED = 3, 4


def word() -> str:
    return "s" + secrets.token_hex(10)


def reason_of(do: Callable[[], Any]) -> Reason:
    with pytest.raises(AgentdError) as caught:
        do()
    return caught.value.reason


def holding(folder: Path, secret: str) -> list[str]:
    """The files below `folder` that have it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file.name for file in files if secret.encode() in file.read_bytes().lower()]


def answers(client: Client) -> str:
    """All that the audit and run services give out to somebody who may read everything."""
    said = [str(event) for event in client.audit_events(with_payloads=True)]
    said += client.export_audit_events(audit_pb2.ExportAuditEventsRequest(format=JSONL, with_payloads=True))
    said += [str(client.audit_sql("SELECT seq, body FROM events"))]
    for run in client.list_runs():
        said += [str(run), *map(str, client.watch_run(run.name))]
    return "\n".join(said).lower()


def sequence(client: Client, *matches: str) -> int:
    """The number of the newest event of a kind."""
    found = client.audit_events(newest_first=True, which=audit_pb2.AuditFilter(matches=matches))
    return next(event.sequence for event in found)


def searched(client: Client, text: str) -> int:
    """A call that has this in what it is asked for, and leaves it nowhere else: the number of its intent."""
    (client.socket.parent / "home" / "notes").mkdir(exist_ok=True)
    call = client.call("files.search", {"path": "notes", "text": text}).name.removeprefix("calls/")
    return sequence(client, "kind=call.intent", f"call={call}")


def closed(running: DaemonProcess) -> str:
    """Why the log is closed; waits until the daemon has looked through it."""
    deadline = time.monotonic() + 20
    with Client(running.socket) as client:
        while not (why := client.status().audit_closed):
            assert time.monotonic() < deadline, "the log was not closed"
            time.sleep(0.02)
    return why


def edited(running: DaemonProcess, statement: str) -> None:
    with apsw.Connection(str(running.state / "agentd.db")) as db:
        db.execute(statement)
    db.close()


# -- reading, and who may


@pytest.mark.parametrize("value", ["", "ü\u202e\x1b\n", '"$commitment":"' + "ab" * 32, '{"kind":"redact"}', "x" * 20_000])
def test_what_was_asked_for_reads_back_and_the_log_verifies(daemon: DaemonProcess, value: str):
    """Through the daemon's door and back: the value, or that it was too long; no event has it."""
    with Client(daemon.socket) as client:
        event = client.audit_event(searched(client, value), with_payloads=True)
        (kept,) = event.payloads
        assert kept.field == "arguments.text"
        assert (json.loads(kept.value) == value) if len(value) < 16_000 else not kept.HasField("value")
        assert not value or value not in event.text
        assert client.verify().first_bad_sequence == 0
    assert daemon.command("audit", "verify").returncode == 0


def test_that_somebody_has_read_is_on_record_before_they_have(daemon: DaemonProcess):
    """One event, a list, an export: each names who, and what; without payloads nothing is recorded of a list."""
    with Client(daemon.socket) as client:
        seq = searched(client, word())
        before = sequence(client)
        client.audit_event(seq)
        list(client.audit_events(after=seq - 1))
        assert sequence(client) == before
        client.audit_event(seq, with_payloads=True)
        read = client.audit_event(before + 1)
        body = json.loads(read.text)
        assert (read.kind, body["detail"]["events"]) == ("payload.read", [seq])
        assert body["principal"].startswith("unix:")
        assert body["origin"]["pid"] > 0
        request = audit_pb2.ExportAuditEventsRequest(format=JSONL, with_payloads=True, after_sequence=seq - 1)
        first = next(client.export_audit_events(request))
        assert json.loads(first)["payloads"][0]["field"] == "arguments.text"
        exported = client.audit_event(sequence(client, "kind=export"))
        assert json.loads(exported.text)["detail"]["payloads"] is True


def _methods(seq: int) -> dict[str, Callable[[Client], Any]]:
    return {
        "get": lambda client: client.audit_event(seq, with_payloads=True),
        "list": lambda client: next(client.audit_events(with_payloads=True)),
        "export": lambda client: list(client.export_audit_events(audit_pb2.ExportAuditEventsRequest())),
        "verify": lambda client: client.verify(),
        "redact": lambda client: client.redact(seq, "arguments.text", "r"),
        "prune": lambda client: client.prune_audit_log(1),
        "renew": lambda client: client.renew_audit_log("r"),
    }


@pytest.mark.parametrize(
    ("role", "may"),
    [("user", ()), ("approver", ()), ("auditor", ("get", "list", "export", "verify")), ("admin", tuple(_methods(0)))],
)
def test_a_role_may_what_it_is_for_and_no_more(tmp_path: Path, role: str, may: tuple[str, ...]):
    """An auditor reads, exports and verifies; taking out, putting away and beginning anew is an admin's."""
    with DaemonProcess(tmp_path).running() as running, Client(running.socket) as owner:
        seq = searched(owner, word())
        made = owner.create_token(token_pb2.Token(label="other", roles=[role]))
        size = sequence(owner)
        with Client(running.socket, token=made.secret) as client:
            for name, do in _methods(seq).items():
                if name in may:
                    do(client)
                else:
                    assert reason_of(lambda do=do: do(client)) is Reason.ROLE_REQUIRED, name
        if not may:
            assert sequence(owner) == size
        assert owner.checkpoint().verifier_key.partition("+")[0].endswith("/2") == ("renew" in may)


# -- taking out


def test_what_was_taken_out_is_in_no_file_and_no_answer(tmp_path: Path):
    """Searched for, found by its word, shown and exported before: afterwards nothing in the state folder has it."""
    secret = word()
    with DaemonProcess(tmp_path).running() as running, Client(running.socket) as client:
        seq = searched(client, secret)
        assert [event["sequence"] for event in running.json("audit", "list", "--grep", secret)] == [str(seq)]
        assert secret in answers(client)
        running.command("audit", "redact", f"{seq}.arguments.text", "--reason", "a password")
        assert secret not in answers(client)
        call = json.loads(client.audit_event(seq).text)["call"]
        assert "taken out" in running.command("audit", "show", call).stdout
        assert running.json("audit", "list", "--grep", secret) == []
        assert running.command("audit", "verify").returncode == 0
        again = running.command("audit", "redact", f"{seq}.arguments.text", "--reason", "again", check=False)
        assert (again.returncode, "already" in again.stderr) == (1, True)
        assert holding(running.state, secret) == []
    assert holding(tmp_path, secret) == []
    running.start()
    assert running.command("audit", "verify").returncode == 0
    assert running.stop() == 0


def test_what_was_said_in_a_run_goes_with_it(tmp_path: Path):
    """A call of the model repeats the prompt: once its argument is taken out, prompt, answer and transcript are gone, too."""
    secret = word()
    with DaemonProcess(tmp_path).running() as running, Client(running.socket) as client:
        (running.home / "notes").mkdir()
        list(client.run(f"search for '{secret}' in notes"))
        begun = sequence(client, "kind=run.start")
        intents = [event for event in client.audit_events(after=begun, with_payloads=True) if event.kind == "call.intent"]
        asked = [event.sequence for event in intents if any(secret in each.value for each in event.payloads)]
        seq, field = (asked[0], "arguments.text") if asked else (begun, "detail.prompt")
        assert client.redact(seq, field, "a password").run
        assert secret not in answers(client)
        assert holding(running.state, secret) == []
        assert client.verify().first_bad_sequence == 0


def test_words_that_somebody_looks_for_are_not_recorded_as_they_are(tmp_path: Path):
    """An export by a word, after which that word is taken out: nothing has it in plain."""
    secret = word()
    with DaemonProcess(tmp_path).running() as running, Client(running.socket) as client:
        seq = searched(client, secret)
        running.command("audit", "export", "--grep", secret)
        client.redact(seq, "arguments.text", "a password")
        assert not any(secret in event.text for event in client.audit_events())


# -- a log that is not what was signed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> DaemonProcess:
    """A daemon that has written a file and a few hundred events, and has stopped: signed to the last one."""
    running = DaemonProcess(tmp_path_factory.mktemp("stopped"))
    with running.running(), Client(running.socket) as client:
        client.call("files.write", {"path": "kept.txt", "text": "old\n"})
        client.call("files.write", {"path": "kept.txt", "text": "new\n"})
        for n in range(120):
            searched(client, f"text {n}")
    return running


@pytest.fixture
def copied(stopped: DaemonProcess, tmp_path: Path) -> Iterator[DaemonProcess]:
    """The same with its state and files, for somebody to be at."""
    shutil.copytree(stopped.state, tmp_path / "state")
    shutil.copytree(stopped.home, tmp_path / "home")
    copy = DaemonProcess(tmp_path)
    yield copy
    if copy.process and copy.process.poll() is None:
        assert copy.stop() == 0
    assert "Traceback" not in copy.log, copy.log


def renewed(running: DaemonProcess) -> None:
    """By an admin, with a reason: everything works again, also after another start."""
    (done,) = running.json("audit", "renew", "--reason", "a test")
    assert done["origin"].endswith("/2")
    assert (running.state / "archive" / done["archive"]).stat().st_mode & 0o777 == 0o600
    for again in (False, True):
        if again:
            assert running.stop() == 0
            running.start()
        with Client(running.socket) as client:
            assert client.status().audit_closed == ""
            client.undo(client.call("files.write", {"path": "after.txt", "text": "written\n"}).name)
            assert client.checkpoint().verifier_key.startswith(done["origin"] + "+")
            assert "gap" not in [event.kind for event in client.audit_events()]
        assert running.command("audit", "verify").returncode == 0


def test_a_closed_daemon_changes_nothing_and_tells_everything(copied: DaemonProcess):
    """Its newest events were cut off: no write, no undo, no rollback; reading, listing and verifying go on until it is renewed."""
    edited(copied, "DELETE FROM event WHERE seq > (SELECT max(seq) - 3 FROM event)")
    copied.start()
    assert "missing" in closed(copied)
    with Client(copied.socket) as client:
        last = client.audit_events(newest_first=True, which=audit_pb2.AuditFilter(matches=["tool=files.write"]))
        call = json.loads(next(last).text)["call"]
        write = {"path": "kept.txt", "text": "changed"}
        assert reason_of(lambda: client.call("files.write", write)) is Reason.AUDIT_CLOSED
        assert reason_of(lambda: client.call("files.write", write, rehearse=True)) is Reason.AUDIT_CLOSED
        assert "new" in str(client.call("files.read", {"path": "kept.txt"}))
        assert client.audit_event(1).kind == "boot"
        assert list(client.audit_events(with_payloads=True))
        undo = copied.command("undo", call, check=False)
        assert (undo.returncode, "renew" in undo.stderr) == (1, True)
        assert copied.command("rollback", call, "--yes", check=False).returncode != 0
    assert (copied.home / "kept.txt").read_text() == "new\n"
    assert copied.command("audit", "verify", check=False).returncode in (TAMPERED, TRUNCATED)
    copied.stop()
    copied.start()
    assert closed(copied)
    renewed(copied)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET body = replace(body, 'files.search', 'files.sneeze') WHERE seq = 60",
        "UPDATE event SET body = '{}' WHERE seq = 60",
        'UPDATE event SET body = \'{"kind":7,"time_ns":"x","files":[1],"tool":1}\' WHERE seq = 60',
        'UPDATE event SET body = \'{"time_ns":"x"}\' WHERE seq = (SELECT max(seq) FROM event)',
        "UPDATE payload SET value = '\"changed\"'",
        "UPDATE payload SET value = CAST(x'22ff22' AS TEXT)",
        "DELETE FROM payload",
    ],
)
def test_a_tampered_log_is_closed_listed_and_renewed(copied: DaemonProcess, statement: str):
    """Found in the background after the start, whatever was written there; it can still be looked at, event by event."""
    edited(copied, statement)
    copied.start()
    assert closed(copied)
    assert copied.command("audit", "verify", check=False).returncode == TAMPERED
    assert len(copied.json("audit", "list", "-n", "1000")) > 200
    with Client(copied.socket) as client:
        assert list(client.audit_events(which=audit_pb2.AuditFilter(matches=["kind=boot"])))
        assert list(client.export_audit_events(audit_pb2.ExportAuditEventsRequest(format=JSONL, with_payloads=True)))
        write = {"path": "kept.txt", "text": "changed"}
        assert reason_of(lambda: client.call("files.write", write)) is Reason.AUDIT_CLOSED
    renewed(copied)


@pytest.mark.parametrize("seq", [2, 120, 240])
def test_damaged_pages_of_the_log_close_it_and_it_is_renewed(copied: DaemonProcess, seq: int):
    """The daemon comes up all the same, says so, refuses to change anything, and begins anew when it is told to."""
    file = copied.state / "agentd.db"
    data = bytearray(file.read_bytes())
    at = data.index(f'"seq":{seq},'.encode()) // 1024 * 1024
    data[at : at + 1024] = bytes(byte ^ 0x55 for byte in data[at : at + 1024])
    file.write_bytes(data)
    copied.start()
    assert closed(copied)
    with Client(copied.socket) as client:
        write = {"path": "kept.txt", "text": "changed"}
        assert reason_of(lambda: client.call("files.write", write)) is Reason.AUDIT_CLOSED
    assert copied.command("audit", "verify", check=False).returncode == TAMPERED
    renewed(copied)


def test_rules_that_were_changed_while_nobody_looked_are_on_record(tmp_path: Path):
    """Those of agentd.toml that came and went since the last start; what people grant by commands has events of its own."""
    grant = '[[grants]]\ntool = "{}"\nscope = "read:/srv/{}"\n'
    running = DaemonProcess(tmp_path, extra=grant.format("files.read", "a") + grant.format("files.list", "b"))
    running.start()
    running.command("grants", "add", "files.read", "read:/srv/other")
    running.stop()
    running.extra = grant.format("files.read", "new") + grant.format("files.read", "a")
    running.start()
    (event,) = running.json("audit", "list", "kind=policy.change")
    assert event["body"]["detail"] == {
        "added": ["allow files.read read:/srv/new"],
        "removed": ["allow files.list read:/srv/b"],
    }
    running.stop()
    running.start()
    assert len(running.json("audit", "list", "kind=policy.change")) == 1
    assert running.stop() == 0


_LOGGED_IN = "echo 1 > /proc/self/loginuid && exec "
_CAN_LOG_IN = subprocess.run(["sh", "-c", f"{_LOGGED_IN} true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _CAN_LOG_IN, reason="only root can be somebody's login, and only where the kernel audits")
def test_who_had_logged_in_is_on_record_whoever_that_is_now(tmp_path: Path):
    """Of calls, of what a run of it does, and of what an admin does; the daemon's own doings have no such origin."""
    with DaemonProcess(tmp_path).running() as running:
        for command in ("tools call files.write path=a.txt text=x", "run 'what time is it'", "grants add files.read read:/srv"):
            agentd = f"{sys.executable} -m agentd --socket {running.socket} {command}"
            subprocess.run(["sh", "-c", _LOGGED_IN + agentd], check=True, capture_output=True)
        bodies = [event["body"] for event in running.json("audit", "list", "-n", "100")]
    told = {body["kind"]: body.get("origin", {}) for body in bodies}
    name = pwd.getpwuid(1).pw_name
    for kind in ("call.intent", "call.end", "run.start", "run.end", "grant.create"):
        assert (told[kind]["login"], told[kind]["uid"]) == (name, os.getuid()), kind
    assert told["boot"] == {}
