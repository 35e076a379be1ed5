"""Undo as a person has it: what it takes, how far it is, and what could not be restored."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import run_pb2
from tests.e2e.commands import begin, run, shell_daemon, small_disk, tree, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import DaemonProcess


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with shell_daemon(tmp_path_factory.mktemp("agentd")).running() as running:
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.socket) as client:
        yield client


@pytest.fixture
def work(daemon: DaemonProcess, tmp_path: Path) -> Path:
    directory = daemon.home / tmp_path.name
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_text(f"{name}\n")
    return directory


def test_a_long_undo_says_how_far_it_is(client: Client, work: Path):
    """Counts that only grow, up to all there are; the answer counts what it does not name."""
    for n in range(1500):
        (work / f"f{n}").write_text("x")
    before = tree(work)
    done = run(client, "rm f*", work)
    assert (done.changed_count, len(done.changed_paths)) == (1500, 1000)
    steps: list[tuple[int, int]] = []
    undone = client.undo(done.name, progress=lambda *step: steps.append(step))
    assert tree(work) == before
    assert steps == sorted(steps)
    assert len(steps) > 3
    assert {total for _, total in steps} == {1500}
    assert (undone.restored_count, len(undone.restored_paths)) == (1500, 1000)


@pytest.mark.parametrize(("flag", "there"), [("--partial", ("mine\n", "b\n")), ("--force", ("a\n", "b\n"))])
def test_undo_takes_what_rollback_takes(daemon: DaemonProcess, client: Client, work: Path, flag: str, there: tuple[str, str]):
    """Somebody has changed one of two files since: undone is the other one, or both."""
    done = run(client, "echo new > a; echo new > b", work)
    (work / "a").write_text("mine\n")
    call = done.name.removeprefix("calls/")
    refused = daemon.command("undo", call, check=False)
    assert refused.returncode == 1
    assert "somebody changed it since" in refused.stderr
    daemon.command("undo", call, flag)
    assert ((work / "a").read_text(), (work / "b").read_text()) == there


def test_an_error_is_one_before_anything_is_done(client: Client):
    with pytest.raises(AgentdError) as caught:
        client.undo("calls/01kz5t3q8m0v9r6w2e4y7x1abc")
    assert caught.value.reason is Reason.CALL_NOT_FOUND


def test_nothing_is_left_where_all_is_well(daemon: DaemonProcess):
    assert "nothing is left" in daemon.command("recover").stdout
    assert daemon.command("recover", "--list", "--json").stdout == ""


def test_a_run_that_waits_for_a_call_says_so(client: Client, work: Path):
    """In its own stream, with the call that it waits for; so does the status."""
    pending = begin(client, "sleep 1.5; echo first > a", work)
    wait_until(lambda: len(client.status().calls) == 1, what="the first call")
    path = work / "a"
    other = begin(client, "echo second > a", work)
    wait_until(lambda: any(call.waits_for for call in client.status().calls), what="the second one's wait")
    waits = next(call for call in client.status().calls if call.waits_for)
    assert list(waits.waits_for) == [call.name for call in client.status().calls if not call.waits_for]
    wait_until(lambda: pending.is_over and other.is_over, what="both")
    assert path.read_text() == "second\n"
    assert run_pb2.WatchRunResponse.DESCRIPTOR.fields_by_name["waiting"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_what_cannot_be_restored_is_seen_everywhere_and_restored_later(tmp_path: Path):
    """A disk that turns read-only under a call: its path is left, with the reason, until it can be written to again."""
    daemon = shell_daemon(tmp_path, "[journal]\nlow_space_mib = 0\n")
    disk = daemon.home / "disk"
    with small_disk(disk, 8, "tmpfs"), daemon.running(), Client(daemon.socket) as client:
        (disk / "a").write_text("old\n")
        pending = begin(client, "echo new > a; sleep 2; exit 3", disk)
        wait_until(lambda: (disk / "a").read_text() == "new\n" or pending.is_over, what="the change")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        wait_until(lambda: client.status().leftovers > 0, what="what is left")
        assert "is not restored" in daemon.command("doctor", check=False).stdout
        left = daemon.command("recover", "--list", check=False)
        assert left.returncode == 1
        assert "Read-only file system" in left.stdout
        assert daemon.command("recover", check=False).returncode == 1
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert daemon.command("recover").returncode == 0
        assert (disk / "a").read_text() == "old\n"
        assert client.status().leftovers == 0
