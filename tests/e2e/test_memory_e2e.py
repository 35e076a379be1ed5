"""The daemon in a real cgroup that leaves it little memory: nothing is killed, and it says what does not fit."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentd.budgets.memory import Cgroup, cached_mib, mapped_mib
from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.models import locate
from agentd.v1 import budget_pb2, run_pb2
from tests.e2e.closed_loop import synthetic_model
from tests.e2e.conftest import DaemonProcess
from tests.e2e.device import seen

if TYPE_CHECKING:
    from collections.abc import Iterator

_State = budget_pb2.Budgets.State
QUICK = """
[budgets.states]
poll_s = 0.2
reduced_s = 0.4
paused_s = 0.4
shed_s = 0.4
"""
HOG = "import time\nheld = bytearray({mib} << 20)\nfor i in range(0, len(held), 4096): held[i] = 1\nprint('held', flush=True)\ntime.sleep(600)"


@dataclass
class Group:
    """A memory cgroup of version 1 or 2."""

    folder: Path
    limit_file: str

    def limit(self, mib: int) -> None:
        (self.folder / self.limit_file).write_text(str(mib << 20))

    @property
    def enter(self) -> tuple[str, ...]:
        return ("sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh")

    @property
    def kills(self) -> int:
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError):
                lines = (self.folder / name).read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        raise AssertionError("the kernel does not count its kills")


@pytest.fixture
def group() -> Iterator[Group]:
    """Below our own. Skipped where none can be made: not root, or no memory controller here."""
    ours = [folder for folder, _ in Cgroup(Path("/proc"), Path("/sys/fs/cgroup"))._folders]
    for parent in ours:
        folder = parent / f"agentd-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (folder / name).exists():
                try:
                    yield Group(folder, name)
                finally:
                    _remove(folder)
                return
        folder.rmdir()
    pytest.skip("no memory cgroup can be made here")


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # the kernel takes a moment to let go of what has ended
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)


def settings(context: int = 4096, **memory: float) -> str:
    table = "".join(f"{key} = {value}\n" for key, value in memory.items())
    return f"[engine]\ncontext = {context}\n{QUICK}[budgets.memory]\n{table}"


def readings(client: Client) -> dict[str, float]:
    return {each.name: each.value for each in client.budgets().readings}


def test_a_context_that_does_not_fit_is_made_smaller_before_anything_is_taken(tmp_path: Path, group: Group):
    """Scenario 10 a: the cache of 131,072 tokens would take 100 MiB and more; the kernel would kill for it."""
    group.limit(260)
    extra = settings(131072, max_anon_mib=75, reduce_available_mib=20, shed_available_mib=10, least_context=1024)
    with DaemonProcess(tmp_path, extra=extra, before=group.enter).running() as daemon, Client(daemon.socket) as client:
        assert list(client.run("what time is it"))[-1].run.state == run_pb2.Run.STATE_SUCCEEDED
        assert 1024 <= client.status().model.context < 131072
        assert group.kills == 0


def test_a_model_that_can_never_fit_is_refused_for_good(tmp_path: Path):
    extra = settings(max_anon_mib=20, reduce_available_mib=20, shed_available_mib=10)
    with DaemonProcess(tmp_path, extra=extra).running() as daemon, Client(daemon.socket) as client:
        run = list(client.run("hello"))[-1].run
        assert run.state == run_pb2.Run.STATE_FAILED
        assert run.error.code == 9  # FAILED_PRECONDITION
        assert "max_anon_mib" in run.error.message
        assert "beside its weights" in client.status().model.error


def test_a_hog_makes_it_give_its_memory_back_and_it_comes_again(tmp_path: Path, group: Group):
    """Scenario 10 b: unloaded within 5 s, its file out of the page cache, health still served; the next request reloads."""
    model = tmp_path / "model.gguf"
    shutil.copy(locate("pocket"), model)
    group.limit(400)
    extra = f'[engine]\nmodel = "{model}"\n' + settings(reduce_available_mib=100, shed_available_mib=60).replace(
        "[engine]\n", ""
    )
    with DaemonProcess(tmp_path, extra=extra, before=group.enter).running() as daemon, Client(daemon.socket) as client:
        list(client.run("what time is it"))
        before = readings(client)
        mib = int(before["available_mib"]) - 50
        with subprocess.Popen([*group.enter, sys.executable, "-c", HOG.format(mib=mib)], stdout=subprocess.PIPE) as hog:
            try:
                assert hog.stdout is not None
                hog.stdout.readline()
                full = time.monotonic()
                seen(client, _State.STATE_SHED)
                while client.status().engine_pid:
                    time.sleep(0.02)
                assert time.monotonic() - full < 5
                while (cached_mib(model) or 0) > 0.05 * model.stat().st_size / 2**20:
                    assert time.monotonic() - full < 10
                    time.sleep(0.05)
                with pytest.raises(AgentdError) as caught:
                    client.create_run("what time is it")
                assert caught.value.reason is Reason.BUDGET_MEMORY
            finally:
                hog.kill()
        seen(client, _State.STATE_NOMINAL)
        assert list(client.run("what time is it"))[-1].run.state == run_pb2.Run.STATE_SUCCEEDED
        assert group.kills == 0


def test_the_three_numbers_are_those_of_the_kernel(tmp_path: Path):
    """Anonymous, mapped, cached: within 5 % of what proc says."""
    with DaemonProcess(tmp_path, extra=QUICK).running() as daemon, Client(daemon.socket) as client:
        list(client.run("what time is it"))
        deadline = time.monotonic() + 20
        while "cached_mib" not in (told := readings(client)) and time.monotonic() < deadline:
            time.sleep(0.1)
        pid, weights = client.status().engine_pid, locate("pocket")
        status = Path(f"/proc/{pid}/status").read_text()
        anonymous = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))
        assert told["anonymous_mib"] == pytest.approx(anonymous, rel=0.05)
        assert told["mapped_mib"] == pytest.approx(mapped_mib(Path(f"/proc/{pid}/smaps"), weights), rel=0.05)
        assert told["cached_mib"] == pytest.approx(cached_mib(weights) or -1, rel=0.05)
        assert told["weights_mib"] == pytest.approx(weights.stat().st_size / 2**20, rel=0.01)
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"


def test_weights_that_do_not_fit_are_noticed_and_kill_nobody(tmp_path: Path, group: Group):
    """Scenario 11: the file is larger than what the cgroup leaves for it, so each token reads it again."""
    model = synthetic_model(tmp_path)
    with model.open("rb") as file:  # its pages are charged to whoever brought them in
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    group.limit(320)
    extra = f'[engine]\nmodel = "{model}"\n[runs]\ntokens = 200\nseconds = 60\n{QUICK}'
    extra += "[budgets.memory]\nreduce_available_mib = 20\nshed_available_mib = 10\nmax_anon_mib = 200\nreduce_pressure_some_pct = 100\n"
    with DaemonProcess(tmp_path, extra=extra, before=group.enter).running(), Client(tmp_path / "agentd.sock") as client:
        run = client.create_run("what time is it")
        while not client.status().engine_pid:
            time.sleep(0.02)
        begun = time.monotonic()
        told = seen(client, _State.STATE_REDUCED)[-1]
        assert time.monotonic() - begun < 10
        assert (told.cause, "the weights do not fit" in told.reason) == ("memory", True)
        split = readings(client)
        assert split["mapped_mib"] < split["weights_mib"]
        client.cancel_run(run.name)
        assert group.kills == 0
