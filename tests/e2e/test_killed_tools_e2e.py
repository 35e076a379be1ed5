"""Commands in the middle of their work when the daemon is killed: nothing of them is left, neither processes nor changes.

AGENTD_KILLS=200 kills so often instead of a few times, AGENTD_SEED chooses others. As root everything is done as nobody, too.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError
from tests.e2e.commands import (
    Background,
    begin,
    below,
    described,
    differences,
    marked,
    nobodys_daemon,
    open_calls,
    shell_daemon,
    started,
    tree,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import DaemonProcess

ROUNDS = int(os.environ.get("AGENTD_KILLS", "6"))
SEED = int(os.environ.get("AGENTD_SEED", "1"))
GONE_S = 3.0  # 1 s is promised
READY_S = 10.0  # 2 s are promised
STOP_S = 15.0  # the grace is 5 s
COMMANDS = (
    "sleep {mark}",
    "while :; do :; done",
    "while :; do :; done & sleep {mark}",
    "(sleep {mark} & (sleep {mark} & (sleep {mark} & sleep {mark}) & wait) & wait) & sleep {mark}",
    "b() {{ if [ $1 -gt 0 ]; then b $(($1-1)) & b $(($1-1)) & fi; sleep {mark}; }}; b 4",
    "rm -rf d; sleep {mark}",
    "echo x > a; mv a b; sleep {mark}",
    "chmod -R a-w d; sleep {mark}",
    "trap '' TERM HUP INT; while :; do sleep 0.05; done",
)


@pytest.fixture(params=["own user", "nobody"])
def killed(request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """A daemon to be killed, below a directory that whoever runs it can reach; files for commands to change in its home."""
    root = Path(tempfile.mkdtemp(prefix="agentd-killed-"))
    root.chmod(0o755)
    try:
        daemon = nobodys_daemon(root) if request.param == "nobody" else shell_daemon(root)
        plant(daemon)
        yield daemon
        if daemon.process and daemon.process.poll() is None:
            daemon.stop()
        assert "Traceback" not in daemon.log, daemon.log
    finally:
        shutil.rmtree(root)


def plant(daemon: DaemonProcess) -> None:
    """Files, directories and symlinks for a command, of the user who runs the daemon."""
    work = daemon.home / "work"
    deep = work / "d" / "deep"
    deep.mkdir(parents=True, exist_ok=True)
    (work / "a").write_bytes(b"a\n" * 1000)
    (work / "large").write_bytes(random.Random(SEED).randbytes(200_000))
    (work / "link").symlink_to("a")
    for n in range(20):
        (deep / f"{n}").write_text(f"{n}\n")
        (deep / f"{n}").chmod(0o600 if n % 2 else 0o644)
    (work / "d" / "script").write_text("exit\n")
    (work / "d" / "script").chmod(0o755)
    owner = daemon.home.stat()
    for path in (work, *work.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


class Dying:
    """One command, from its start to what is left of it."""

    def __init__(self, daemon: DaemonProcess, rng: random.Random) -> None:
        self.daemon, self.rng = daemon, rng
        self.mark = f"1000.{rng.randrange(10**8, 10**9)}"
        self.command = rng.choice(COMMANDS).format(mark=self.mark)
        self.work = daemon.home / "work"
        self.before = tree(self.work)

    @contextlib.contextmanager
    def begun(self) -> Iterator[Background]:
        """It has changed files, and goes on."""
        first = f"echo {self.mark} > begun; echo more >> large; "
        with Client(self.daemon.socket) as client:
            pending = begin(client, first + self.command, self.work)
            wait_until(lambda: (self.work / "begun").exists() or pending.is_over, what=f"{self.command!r}")
            assert not pending.is_over, f"{self.command!r} ended with {pending.result()}"
            time.sleep(self.rng.random() * 0.3)
            self.zygote = below(client.status().zygote_pid)
            try:
                yield pending
            finally:
                self._kill_what_is_left()

    def _kill_what_is_left(self) -> None:
        """For the tests to come; the daemon, if it lives, ends what is its own."""
        assert self.daemon.process is not None
        if self.daemon.process.poll() is None:
            return
        for each in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def left(self) -> set[int]:
        return set(marked(self.mark)) | {each for each, when in self.zygote.items() if started(each) == when}

    def require_gone(self) -> float:
        """How long it took after the daemon's death."""
        seen: dict[int, str] = {}

        def is_gone() -> bool:
            left = self.left()
            seen.update({each: described(each) for each in left})
            return not left

        try:
            return wait_until(is_gone, GONE_S, f"the end of all processes of {self.command!r}")
        except AssertionError as e:
            raise AssertionError(f"{e}; left: {'; '.join(seen.values())}") from None

    def require_restored(self) -> None:
        left = differences(self.before, tree(self.work))
        assert not left, f"after {self.command!r}: " + "\n".join(left)
        with Client(self.daemon.socket) as client:
            assert list(client.status().calls) == []
            assert open_calls(client) == []


def by_kill(daemon: DaemonProcess, rng: random.Random) -> None:
    daemon.kill()


def by_impatience(daemon: DaemonProcess, rng: random.Random) -> None:
    """SIGTERM, and again at once; more of them, as two that come together are one."""
    process = daemon.process
    assert process is not None
    deadline = time.monotonic() + STOP_S
    while process.poll() is None:
        assert time.monotonic() < deadline, f"the daemon did not stop: {daemon.log}"
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)


def by_two_kills(daemon: DaemonProcess, rng: random.Random) -> None:
    """The next one is killed, too, somewhere between its exec and a moment after its recovery."""
    daemon.kill()
    daemon.start(wait=False)
    time.sleep(rng.random() * 1.5)
    daemon.kill()


WAYS: tuple[Callable[[DaemonProcess, random.Random], None], ...] = (by_kill, by_impatience, by_two_kills)


def restarted(daemon: DaemonProcess) -> float:
    """How long until it is ready."""
    begun = time.monotonic()
    daemon.start()
    ready = time.monotonic() - begun
    assert ready < READY_S, f"ready after {ready:.1f} s"
    return ready


def killed_once(daemon: DaemonProcess, n: int) -> tuple[str, float, float]:
    """One round: what was killed and how, when the last process was gone, when the next daemon was ready."""
    rng = random.Random(f"{SEED} {n}")
    dying, way = Dying(daemon, rng), WAYS[n % len(WAYS)]
    with dying.begun() as pending:
        way(daemon, rng)
        gone = dying.require_gone()
        with contextlib.suppress(AgentdError):  # it may have had the time to say so
            assert pending.result().failed
    ready = restarted(daemon)
    dying.require_restored()
    return f"{way.__name__}: {dying.command}", gone, ready


def test_nothing_is_left_of_a_command_whose_daemon_is_killed(killed: DaemonProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it was doing and however the daemon died: no process, no change, no open call; and the log is whole."""
    killed.start()
    slowest = 0.0, 0.0
    for n in range(ROUNDS):
        what, gone, ready = killed_once(killed, n)
        slowest = max(slowest[0], gone), max(slowest[1], ready)
        with capsys.disabled():
            print(f"\n{n + 1} of {ROUNDS}: gone after {gone:.2f} s, ready after {ready:.2f} s ({what})", end="")
    with capsys.disabled():
        print(f"\nslowest: gone after {slowest[0]:.2f} s, ready after {slowest[1]:.2f} s")
    with Client(killed.socket) as client:
        assert client.verify().first_bad_sequence == 0
    assert healthy(killed)


def healthy(daemon: DaemonProcess) -> bool:
    """`agentd doctor` finds the daemon, and nothing about it that is not as it should be."""
    findings = daemon.json("doctor", "--config", str(daemon.root / "agentd.toml"), check=False)
    about = [finding for finding in findings if finding["what"] == "daemon"]
    return bool(about) and all(finding["ok"] for finding in about)


@pytest.mark.parametrize("command", ["sleep {mark}", "trap '' TERM HUP INT; while :; do sleep 0.05; done"])
def test_a_daemon_that_is_told_to_stop_ends_the_command_and_puts_its_changes_back(killed: DaemonProcess, command: str) -> None:
    """One SIGTERM: within its grace, with status 0, and with the files as before even before the next start."""
    killed.start()
    dying = Dying(killed, random.Random(SEED))
    dying.command = command.format(mark=dying.mark)
    with dying.begun():
        begun = time.monotonic()
        assert killed.stop() == 0
        stopped = time.monotonic() - begun
        dying.require_gone()
    assert stopped < STOP_S, f"stopped after {stopped:.1f} s"
    assert not differences(dying.before, tree(dying.work))
    restarted(killed)
    dying.require_restored()
