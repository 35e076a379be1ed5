"""Putting back what a shell has done, as a user would: a diff, a plan, a yes; and what came in between."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import journal_pb2, run_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_Path = journal_pb2.RollbackPlan.Path
COMMAND = (
    "mv a.txt renamed.txt; sed -i s/two/2/ b.txt; rm -r old; mkdir new; echo x > new/file; ln -s b.txt link; chmod 600 c.txt"
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    extra = '[[grants]]\ntool = "shell.run"\nscope = "exec:/usr"\n'
    tools = 'bundled = ["files", "system", "shell"]\n'
    with DaemonProcess(tmp_path_factory.mktemp("agentd"), extra, tools).running() as running:
        yield running


@pytest.fixture
def shopping(tmp_path: Path) -> Iterator[tuple[DaemonProcess, Path]]:
    """A list, and a daemon with the tools that are on by default: the pocket model knows no others."""
    with DaemonProcess(tmp_path / "d").running() as running:
        file = running.home / "notes" / "shopping.txt"
        file.parent.mkdir()
        file.write_text("bread\n")
        yield running, file


@pytest.fixture
def work(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Path:
    """A folder of its own, as it was before."""
    folder = daemon.home / request.node.name
    (folder / "old").mkdir(parents=True)
    (folder / "a.txt").write_text("a\n")
    (folder / "b.txt").write_text("one\ntwo\nthree\n")
    (folder / "c.txt").write_text("c\n")
    (folder / "old" / "deep.txt").write_text("deep\n")
    return folder


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def ran(client: Client, work: Path, command: str) -> str:
    done = client.call("shell.run", {"command": command, "folder": str(work)})
    assert not done.failed, done.output_json
    return done.name.removeprefix("calls/")


def test_a_shell_that_renamed_rewrote_and_deleted_is_undone(daemon: DaemonProcess, work: Path):
    """Shown first, path by path; then everything is as it was; and once more the other way."""
    before = tree(work)
    with Client(daemon.socket) as client:
        call = ran(client, work, COMMAND)
    after = tree(work)
    assert after != before
    shown = daemon.command("diff", call).stdout
    assert "-two" in shown
    assert "+2" in shown
    assert re.search(r"mode 644 became 600", shown)
    plan = daemon.command("rollback", call, "--plan").stdout
    for word in ("restore", "recreate-deleted", "delete-created"):
        assert word in plan
    assert tree(work) == after
    done = daemon.json("rollback", call, "--yes")[0]
    assert tree(work) == before
    daemon.command("undo", done["name"].removeprefix("calls/"))
    assert tree(work) == after
    daemon.command("undo", call)
    assert tree(work) == before


def test_a_run_is_put_back_and_shown(shopping: tuple[DaemonProcess, Path]):
    """By its name, with all that it did."""
    running, file = shopping
    with Client(running.socket) as client:
        events = list(client.run('add "buy milk" to notes/shopping.txt'))
    run = events[-1].run.name.removeprefix("runs/")
    assert "buy milk" in file.read_text()
    assert "+buy milk" in running.command("diff", "--run", run).stdout
    running.command("rollback", "--run", run, "--yes")
    assert file.read_text() == "bread\n"
    assert "+buy milk" in running.command("diff", "--run", run).stdout  # what it did is on record all the same


def test_a_rehearsed_shell_command_is_looked_at_and_applied(daemon: DaemonProcess, work: Path):
    """Nothing is changed before somebody says so; then all of it is, and can be undone."""
    before = tree(work)
    with Client(daemon.socket) as client:
        done = client.call("shell.run", {"command": COMMAND, "folder": str(work)}, rehearse=True)
    call = done.name.removeprefix("calls/")
    assert (done.rehearsed, done.undoable) == (True, False)
    assert tree(work) == before
    assert call in daemon.command("rehearsals", "list").stdout
    shown = daemon.command("rehearsals", "show", call).stdout
    for word in ("create", "delete", "change", "-two", "+2"):
        assert word in shown
    assert "was rehearsed and rolled back" in daemon.command("undo", call, check=False).stderr
    (applied,) = daemon.json("rehearsals", "apply", call, "--yes")
    assert (work / "renamed.txt").exists()
    assert "nothing waits" in daemon.command("rehearsals", "list").stdout
    daemon.command("undo", applied["name"].removeprefix("calls/"))
    assert tree(work) == before


def test_what_has_changed_since_it_was_rehearsed_is_not_overwritten(daemon: DaemonProcess, work: Path):
    with Client(daemon.socket) as client:
        call = client.call("shell.run", {"command": "echo theirs > b.txt", "folder": str(work)}, rehearse=True).name
    (work / "b.txt").write_text("mine\n")
    refused = daemon.command("rehearsals", "apply", call, "--yes", check=False)
    assert refused.returncode == 1
    assert "conflict" in refused.stdout
    assert (work / "b.txt").read_text() == "mine\n"
    assert daemon.json("rehearsals", "drop", call)[0]["dropped"]
    assert daemon.command("rehearsals", "apply", call, "--yes", check=False).returncode == 1


def test_a_whole_run_is_rehearsed_and_applied_under_its_name(shopping: tuple[DaemonProcess, Path]):
    """The model answers as if it were done; what is applied later belongs to the run, and goes back with it."""
    running, file = shopping
    with Client(running.socket) as client:
        events = list(client.run('add "buy milk" to notes/shopping.txt', rehearse=True))
    (call,) = [event.call for event in events if event.WhichOneof("event") == "call"]
    assert call.rehearsed
    assert events[-1].run.stop_reason == run_pb2.Run.STOP_REASON_ANSWERED
    assert file.read_text() == "bread\n"
    running.command("rehearsals", "apply", call.name, "--yes")
    assert "buy milk" in file.read_text()
    running.command("rollback", "--run", events[-1].run.name, "--yes")
    assert file.read_text() == "bread\n"


def test_what_a_person_has_edited_since_is_theirs(daemon: DaemonProcess, work: Path):
    """Refused with the way out; merged, both changes are there; by force, theirs is kept as a pre-image."""
    with Client(daemon.socket) as client:
        call = ran(client, work, "sed -i s/one/1/ b.txt; echo y > y.txt")
    (work / "b.txt").write_text("1\ntwo\nthree\nmine\n")
    refused = daemon.command("rollback", call, "--yes", check=False)
    assert refused.returncode == 1
    assert "conflict" in refused.stdout
    assert (work / "y.txt").exists()
    daemon.command("rollback", call, "--merge", "--yes")
    assert (work / "b.txt").read_text() == "one\ntwo\nthree\nmine\n"
    assert not (work / "y.txt").exists()
    with Client(daemon.socket) as client:
        call = ran(client, work, "echo all of it > b.txt")
    (work / "b.txt").write_text("mine again\n")
    forced = daemon.json("rollback", call, "--force", "--yes")[0]
    assert (work / "b.txt").read_text() == "one\ntwo\nthree\nmine\n"
    daemon.command("undo", forced["name"].removeprefix("calls/"))
    assert (work / "b.txt").read_text() == "mine again\n"


def test_one_path_of_many_is_put_back_alone(daemon: DaemonProcess, work: Path):
    """--path, relative to where one stands."""
    with Client(daemon.socket) as client:
        call = ran(client, work, "echo x > b.txt; echo x > c.txt")
    daemon.command("rollback", call, "--path", str(work / "b.txt"), "--yes")
    assert ((work / "b.txt").read_text(), (work / "c.txt").read_text()) == ("one\ntwo\nthree\n", "x\n")


def test_a_plan_that_was_seen_is_the_one_that_is_done(daemon: DaemonProcess, work: Path):
    """PLAN_CHANGED if anything has changed since; without a selection BAD_FIELD."""
    with Client(daemon.socket) as client:
        call = ran(client, work, "echo x > b.txt")
        request = journal_pb2.PlanRollbackRequest(selection=journal_pb2.ChangeSelection(calls=[f"calls/{call}"]))
        plan = client.plan_rollback(request)
        assert [path.verdict for path in plan.paths] == [_Path.VERDICT_RESTORE]
        (work / "b.txt").chmod(0o600)
        with pytest.raises(AgentdError) as caught:
            client.apply_rollback(request, plan.digest)
        assert caught.value.reason is Reason.PLAN_CHANGED
        with pytest.raises(AgentdError) as caught:
            client.plan_rollback(journal_pb2.PlanRollbackRequest())
        assert caught.value.reason is Reason.BAD_FIELD
    assert (work / "b.txt").read_text() == "x\n"


def test_saying_no_does_nothing(daemon: DaemonProcess, work: Path):
    """And without a terminal there is no yes."""
    with Client(daemon.socket) as client:
        call = ran(client, work, "echo x > b.txt")
    assert daemon.command("rollback", call, check=False).returncode != 0
    assert daemon.json("rollback", call)[0]["paths"][0]["verdict"] == "VERDICT_RESTORE"
    assert (work / "b.txt").read_text() == "x\n"


def test_attributes_that_a_tool_has_set_go_with_its_undo(daemon: DaemonProcess, work: Path):
    """By a tool that uses setxattr(2) itself."""
    with Client(daemon.socket) as client:
        done = client.call(
            "shell.run",
            {"command": "python3 -c \"import os; os.setxattr('b.txt', 'user.x', b'1')\" || exit 3", "folder": str(work)},
        )
        if '"exit": 0' not in done.output_json:
            pytest.skip(f"no python or no attributes here: {done.output_json}")
        assert os.listxattr(work / "b.txt") == ["user.x"]
        client.undo(done.name)
        assert os.listxattr(work / "b.txt") == []
