"""Commands that end badly: a failed call whose changes are put back, and an error that says how the command ended and what it said."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.commands import GRANT, TOOLS, differences, events, failure, run, tree
from tests.e2e.conftest import BUNDLES, DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentd.client import Client

SHELL = Path(__file__).parents[2] / "tools" / "shell"
QUICK_S = 3
SLOW = pytest.mark.skipif(not os.environ.get("AGENTD_SLOW"), reason="waits for a minute: AGENTD_SLOW=1")
CHANGES = "echo changed > a; rm b; mkdir new; echo x > new/file; "


def quick_bundle(at: Path) -> None:
    """The bundle `shell` with a deadline that a test can wait for, as `quick`."""
    shutil.copytree(SHELL, at / "quick", ignore=shutil.ignore_patterns("__pycache__"))
    manifest = at / "quick" / "tool.toml"
    text = manifest.read_text().replace('bundle = "shell"', 'bundle = "quick"')
    manifest.write_text(re.sub(r"deadline_s = \d+", f"deadline_s = {QUICK_S}", text))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    root = tmp_path_factory.mktemp("agentd")
    quick_bundle(root / "bundles")
    daemon = DaemonProcess(root, GRANT + GRANT.replace("shell.run", "quick.run"), TOOLS)
    config = daemon.write_config()
    config.write_text(config.read_text().replace(f'bundles = ["{BUNDLES}"]', f'bundles = ["{root / "bundles"}"]'))
    daemon.write_config = lambda: config  # type: ignore[method-assign]
    with daemon.running() as running:
        yield running


@pytest.fixture
def work(daemon: DaemonProcess, tmp_path: Path) -> Path:
    """A directory of its own with two files."""
    directory = daemon.home / tmp_path.name
    directory.mkdir()
    (directory / "a").write_text("a\n")
    (directory / "b").write_text("b\n")
    return directory


@pytest.mark.parametrize("status", [1, 3, 127, 255])
def test_a_status_that_is_not_0_is_a_failure_and_nothing_of_it_stays(client: Client, work: Path, status: int) -> None:
    """The error names the status, and has what the command wrote to both of its streams."""
    before = tree(work)
    said = failure(client, CHANGES + f"echo to-output; echo to-errors >&2; exit {status}", work)
    for word in (str(status), "to-output", "to-errors"):
        assert re.search(rf"\b{word}\b", said), said
    assert not differences(before, tree(work))


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (15, "SIGTERM"), (11, "SIGSEGV")])
def test_a_signal_is_a_failure_and_nothing_of_it_stays(client: Client, work: Path, number: int, name: str) -> None:
    """The error names the signal, and has what the command wrote before."""
    before = tree(work)
    said = failure(client, CHANGES + f"echo to-output; kill -{number} $$; sleep 5", work)
    assert name in said
    assert "to-output" in said
    assert not differences(before, tree(work))


def test_a_failure_is_on_record_as_one_that_was_put_back(client: Client, work: Path) -> None:
    """An intent and an abort; the next command is none the worse for it."""
    failure(client, CHANGES + "exit 3", work)
    last = [event["kind"] for event in events(client) if event["kind"].startswith("call.")][-2:]
    assert last == ["call.intent", "call.abort"]
    assert not run(client, "echo next > a", work).failed
    assert (work / "a").read_text() == "next\n"


def test_only_the_status_of_the_whole_command_counts(client: Client, work: Path) -> None:
    """As in any shell: what fails in the middle is the command's own business."""
    assert not run(client, "false; grep nothing a; echo done > a", work).failed
    assert (work / "a").read_text() == "done\n"


@pytest.mark.parametrize("status", [0, 3])
def test_a_status_that_was_expected_is_a_success_and_its_changes_stay(client: Client, work: Path, status: int) -> None:
    """`ok` names those that are; the result has the status, and the call can be undone."""
    before = tree(work)
    done = run(client, CHANGES + f"exit {status}", work, ok=[0, 3])
    assert not done.failed, done.output_json
    assert re.search(rf'"exit": ?{status}\b', done.output_json)
    assert (work / "a").read_text() == "changed\n"
    client.undo(done.name)
    assert not differences(before, tree(work))


@pytest.mark.parametrize(("ok", "status"), [([0, 3], 4), ([3], 0)])
def test_a_status_that_was_not_expected_is_a_failure_whatever_else_was(
    client: Client, work: Path, ok: list[int], status: int
) -> None:
    """Also 0, if it is not among those that were named."""
    before = tree(work)
    said = failure(client, CHANGES + f"exit {status}", work, ok=ok)
    assert re.search(rf"\b{status}\b", said), said
    assert not differences(before, tree(work))


def test_a_signal_is_a_failure_even_if_its_number_was_expected_as_a_status(client: Client, work: Path) -> None:
    said = failure(client, CHANGES + "kill -9 $$; sleep 5", work, ok=[0, 9, 137])
    assert "SIGKILL" in said
    assert (work / "a").read_text() == "a\n"


@pytest.mark.parametrize(("tool", "seconds"), [("quick.run", QUICK_S), pytest.param("shell.run", 60, marks=SLOW)])
@pytest.mark.parametrize("end", ["sleep 1000", "while :; do :; done", "(sleep 1000 & wait)"])
def test_what_a_command_said_before_its_deadline_is_in_the_error(
    client: Client, work: Path, tool: str, seconds: float, end: str
) -> None:
    """Put back, with the output so far: who reads it sees how far it came."""
    before, begun = tree(work), time.monotonic()
    said = failure(client, CHANGES + f"echo to-output; echo to-errors >&2; {end}", work, tool)
    assert time.monotonic() - begun < seconds + 10
    assert "to-output" in said
    assert "to-errors" in said
    assert not differences(before, tree(work))
