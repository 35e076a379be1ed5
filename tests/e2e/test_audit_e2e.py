"""The audit log as an admin meets it: found, followed, verified against what was kept elsewhere, after somebody was at it."""

from __future__ import annotations

import contextlib
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
    db.execute("DELETE FROM event WHERE seq > 6; DELETE FROM checkpoint")
    db.close()
    running.start()
    with Client(running.socket) as client:
        assert client.verify().first_bad_sequence == 0
        assert client.verify(kept).first_bad_sequence or client.verify(kept).lost_events
        assert "gap" in {event.kind for event in client.audit_events()}
    assert running.command("audit", "verify", "--anchor", str(anchor), check=False).returncode in (3, 4)
    assert "are lost" in running.log
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
