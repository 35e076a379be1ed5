"""Permission: a decision over 10,000 grants, and how soon somebody who watches is told of a question."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from agentd.client import Client
from agentd.errors import AgentdError
from agentd.grants import Book, Grant, Moment, Request, Scope, parse
from agentd.v1 import approval_pb2
from tests.bench.figures import Figure, milliseconds, percentile

if TYPE_CHECKING:
    from tests.e2e.conftest import DaemonProcess

MANY = 10_000


def decisions(times: int) -> list[Figure]:
    """A tenth of the grants deny or ask; paths, hosts and tools in turn; what is covered, denied, and covered by nothing."""
    now = Moment(time.time_ns(), 720)
    book = Book.of([_grant(n) for n in range(MANY)], {})
    requests = [
        Request("unix:pi", "files.read", (Scope("read", f"/home/u{n % 100}/d{n}/deep/file.txt"),)) for n in range(0, 400, 7)
    ]
    requests += [Request("unix:pi", "http.fetch", (Scope("connect", f"www.h{n}.example.org:443"),)) for n in range(1, 400, 7)]
    requests += [Request("unix:pi", "files.write", (Scope("write", "/srv/nowhere"), Scope("read", "/home")))]
    asked = iter(requests * (1 + times // len(requests)))
    taken = milliseconds(lambda: book.decide(next(asked), now), times, "decisions over 10,000 grants")
    small = Book.of([_grant(n) for n in range(10)], {})
    asked = iter(requests * (1 + times // len(requests)))
    few = milliseconds(lambda: small.decide(next(asked), now), times, "decisions over 10 grants")
    base = percentile(few, 0.5)
    return [
        Figure("decision over 10,000 grants, p50", percentile(taken, 0.5), "ms", None, "over 10, p50", base),
        Figure("decision over 10,000 grants, p99", percentile(taken, 0.99), "ms", 1, "over 10, p50", base),
    ]


def _grant(n: int) -> Grant:
    decision = "deny" if n % 20 == 0 else "ask" if n % 20 == 10 else "allow"
    text = (
        f"read:/home/u{n % 100}/d{n}",
        f"connect:*.h{n}.example.org:443",
        f"write:/home/u{n % 100}/*/f{n}.txt",
        f"call:t{n}",
    )[n % 4]
    return Grant("*" if n % 3 else "unix:pi", "*", parse(text, resolved=True), decision, "config", f"grant {n}")  # type: ignore[arg-type]


def questions(daemon: DaemonProcess, client: Client, times: int) -> list[Figure]:
    """From the request of a call to the question at a client that watches: both ways through gRPC, one durable record."""
    taken = []
    with client.watching_approvals() as watched, Client(daemon.socket) as other:
        for _ in range(times):
            start = time.perf_counter()
            thread = threading.Thread(target=_attempt, args=(other,))
            thread.start()
            question = next(watched)
            taken.append((time.perf_counter() - start) * 1000)
            client.resolve(approval_pb2.ResolveApprovalRequest(name=question.name))
            next(watched)
            thread.join()
    taken.sort()
    return [
        Figure("question at a watching client, p50", percentile(taken, 0.5), "ms", 50),
        Figure("question at a watching client, p99", percentile(taken, 0.99), "ms", 50),
    ]


def _attempt(client: Client) -> None:
    try:
        client.call("files.read", {"path": "/etc/hostname"})
    except AgentdError:
        return
