"""Events reach their receiver at least once: over dead receivers, broken connections, kills and restarts."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.audit import AuditLog, Event
from agentd.audit.ship import Shipper, receiver
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


class Desk:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.audit = AuditLog(self.store)

    def add(self, count: int, kind: Any = "call.end") -> None:
        for _ in range(count):
            self.audit.record(Event(kind=kind, call=new_id()))

    def shipper(self, to: Any, form: str = "jsonl", name: str = "r") -> Shipper:
        made = receiver(to, form) if isinstance(to, str) else to
        return Shipper(name, form, made, self.store, self.audit, first_wait_s=0.02)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "state")
    yield made
    made.store.close()


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sequences(lines: Sequence[str]) -> list[int]:
    return [json.loads(line)["event"]["seq"] for line in lines]


def test_a_file_gets_all_there_was_and_all_that_comes(desk: Desk, tmp_path: Path):
    file = tmp_path / "out"
    desk.add(250)
    shipper = desk.shipper(f"file://{file}")
    shipper.start()
    until(lambda: shipper.cursor() == 250)
    desk.add(3)
    until(lambda: shipper.cursor() == 253)
    shipper.stop()
    assert sequences(file.read_text().splitlines()) == list(range(1, 254))


def test_a_restart_goes_on_where_it_was(desk: Desk, tmp_path: Path):
    """By the receiver's name; one that is killed before its cursor moved sends again."""
    file = tmp_path / "out"
    desk.add(5)
    first = desk.shipper(f"file://{file}")
    first.start()
    until(lambda: first.cursor() == 5)
    first.stop()
    desk.add(5)
    desk.store.write(lambda db: db.execute("UPDATE shipped SET seq = 4"))
    second = desk.shipper(f"file://{file}")
    second.start()
    until(lambda: second.cursor() == 10)
    second.stop()
    assert sequences(file.read_text().splitlines()) == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]


class Flaky:
    """A receiver that fails at times, with what it got before that."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.turn = 0

    def send(self, messages: Sequence[str]) -> None:
        self.turn += 1
        self.got += messages[: len(messages) // 2] if self.turn % 3 else messages
        if self.turn % 3:
            raise OSError(111, "refused")

    def close(self) -> None:
        pass


def test_what_a_receiver_did_not_get_is_sent_again(desk: Desk):
    """In order, and nothing is left out."""
    flaky = Flaky()
    shipper = desk.shipper(flaky)
    shipper.start()
    for _ in range(6):
        desk.add(40)
        time.sleep(0.02)
    until(lambda: shipper.cursor() == 240)
    shipper.stop()
    got = sequences(flaky.got)
    assert set(got) == set(range(1, 241))
    last = {number: place for place, number in enumerate(got)}
    assert [last[n] for n in range(1, 241)] == sorted(last.values())


def test_a_syslog_server_that_goes_and_comes_back(desk: Desk):
    """Octet counting, RFC 6587; a connection that was shut is noticed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        shipper = desk.shipper(f"tcp://127.0.0.1:{port}", "syslog")
        desk.add(3)
        shipper.start()
        connection, _ = server.accept()
        got = b""
        while got.count(b"agentd@") < 3:
            got += connection.recv(1 << 16)
        connection.close()
        time.sleep(0.05)
        desk.add(2)
        connection, _ = server.accept()
        with connection:
            while got.count(b"agentd@") < 5:
                got += connection.recv(1 << 16)
        shipper.stop()
    messages = []
    while got:
        length, _, rest = got.partition(b" ")
        messages.append(rest[: int(length)].decode())
        got = rest[int(length) :]
    assert [re.search(r'seq="(\d+)"', message)[1] for message in messages] == list("12345")  # type: ignore[index]


def test_datagrams(desk: Desk):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        shipper = desk.shipper(f"udp://127.0.0.1:{server.getsockname()[1]}", "cef")
        desk.add(2)
        shipper.start()
        assert [server.recv(10_000)[:6] for _ in range(2)] == [b"CEF:0|"] * 2
        shipper.stop()


def test_a_collector_gets_spans_and_errors_are_tried_again(desk: Desk):
    """OTLP over HTTP: what it answers with 503 it gets once more."""
    bodies: list[Any] = []
    answers = iter([503, 503, 200, 200, 200])

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code = next(answers)
            if code == 200:
                bodies.append((self.path, body))
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    desk.add(1, "boot")  # is no span: nothing is sent for it
    desk.add(3)
    shipper = desk.shipper(f"http://127.0.0.1:{server.server_address[1]}", "otlp")
    shipper.start()
    until(lambda: shipper.cursor() == 4)
    shipper.stop()
    server.shutdown()
    server.server_close()
    path, body = bodies[-1]
    assert path == "/v1/traces"
    assert len(body["resourceSpans"][0]["scopeSpans"][0]["spans"]) == 3


def test_a_receiver_that_never_answers_keeps_nobody_from_stopping(desk: Desk):
    """Nor from recording."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shipper = desk.shipper(f"tcp://127.0.0.1:{port}")  # nobody is there
    shipper.start()
    desk.add(10)
    started = time.monotonic()
    shipper.stop()
    assert time.monotonic() - started < 5
    assert shipper.cursor() == 0


@pytest.mark.parametrize(
    ("to", "form"),
    [
        ("ftp://a:1", "jsonl"), ("tcp://a", "jsonl"), ("tcp://:1", "jsonl"), ("file:relative", "jsonl"), ("file://host/a", "csv"),
        ("http://a:1", "jsonl"), ("tcp://a:1", "otlp"), ("", "jsonl"), ("tcp://a:99999", "cef"),
    ],
)  # fmt: skip
def test_what_is_no_receiver_is_refused(to: str, form: str):
    with pytest.raises(ValueError):
        receiver(to, form)
