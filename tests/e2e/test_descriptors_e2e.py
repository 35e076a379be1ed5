"""A daemon that may open few files: it does everything, or says at its start how many it needs."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.v1 import run_pb2
from tests.e2e.commands import begin, run, shell_daemon, wait_until
from tests.e2e.conftest import START_TIMEOUT_S, DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not shutil.which("prlimit"), reason="needs prlimit (util-linux)")


@pytest.fixture
def limited(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """A daemon with a limit, not yet started: SOFT:HARD."""
    daemon = shell_daemon(tmp_path, before=("prlimit", f"--nofile={request.param}", "--"))
    yield daemon
    if daemon.process and daemon.process.poll() is None:
        daemon.kill()


def starts(daemon: DaemonProcess) -> bool:
    """Whether it gets ready; False if it ends instead."""
    daemon.start(wait=False)
    process = daemon.process
    assert process is not None
    wait_until(lambda: process.poll() is not None or "is ready on" in daemon.log, START_TIMEOUT_S, "a start or an end")
    return process.poll() is None


def refusal(daemon: DaemonProcess) -> str:
    """The one line in which it has said why it does not start."""
    assert daemon.ended() != 0
    assert "Traceback" not in daemon.log, daemon.log
    (line,) = [line for line in daemon.log.splitlines() if "error:" in line]
    return line


def do_everything(daemon: DaemonProcess) -> None:
    """Every kind of call, one after the other and side by side."""
    with Client(daemon.socket) as client:
        client.call("files.write", {"path": "a.txt", "text": "a"})
        client.call("files.append", {"path": "a.txt", "text": "b"})
        assert "b" in client.call("files.read", {"path": "a.txt"}).output_json
        assert not client.call("system.time", {}).failed
        work_in_shells(daemon, client)
        assert list(client.run("what time is it"))[-1].run.state == run_pb2.Run.STATE_SUCCEEDED
        assert client.verify().first_bad_sequence == 0
        assert client.status().pid
    for command in (["audit", "list"], ["runs"], ["tools", "list"], ["budget"], ["automations", "list"]):
        daemon.command(*command)


def work_in_shells(daemon: DaemonProcess, client: Client) -> None:
    """Many files, many processes, a rehearsal, an undo; four at once, while others read."""
    work = daemon.home / "work"
    work.mkdir()
    many = run(client, "for i in $(seq 100); do echo $i > $i; done; cat * | sort | uniq | wc -l", work)
    assert '"100\\n"' in many.output_json, many.output_json
    client.undo(many.name)
    assert not list(work.iterdir())
    assert client.call("shell.run", {"command": "echo x > x", "folder": str(work)}, rehearse=True).rehearsed
    directories = [work / str(n) for n in range(4)]
    for directory in directories:
        directory.mkdir()
    pending = [begin(client, "for i in 1 2 3 4 5; do sleep 0.2 & done; wait; echo x > x", each) for each in directories]
    with ThreadPoolExecutor(4) as threads:
        reads = list(threads.map(lambda _: client.call("files.list", {"path": "work"}).failed, range(16)))
    assert not any(reads)
    assert not any(each.result().failed for each in pending)


@pytest.mark.parametrize("limited", ["16:16", "32:32", "48:48", "64:64", "96:96", "128:128"], indirect=True)
def test_with_few_descriptors_it_does_everything_or_says_how_many_it_needs(
    limited: DaemonProcess, request: pytest.FixtureRequest
) -> None:
    """Nothing in between: it refuses with one line, or no call of any kind fails for want of them."""
    limit = int(request.node.callspec.params["limited"].partition(":")[0])
    if not starts(limited):
        line = refusal(limited)
        assert "descriptor" in line
        assert any(int(number) > limit for number in re.findall(r"\d+", line)), line
        return
    do_everything(limited)
    assert limited.stop() == 0
    assert "Traceback" not in limited.log, limited.log


@pytest.mark.parametrize("limited", ["128:1024", "32:1024"], indirect=True)
def test_a_soft_limit_is_raised_as_far_as_it_may_be(limited: DaemonProcess) -> None:
    """What counts is the hard limit."""
    assert starts(limited), limited.log
    do_everything(limited)
    assert limited.stop() == 0
    assert "Traceback" not in limited.log, limited.log
