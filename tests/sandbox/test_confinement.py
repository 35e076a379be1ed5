"""Attacks from inside a real worker. The attack program is hostile; every case says what it must not get."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import (
    Access,
    Contact,
    Job,
    Limits,
    Outcome,
    OutputTooLarge,
    PathRule,
    Refusal,
    Sandbox,
    WorkerCancelled,
    WorkerDied,
    WorkerOffence,
    WorkerTimeout,
    probe,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change

PROGRAM = Path(__file__).with_name("attack.py").read_bytes()
SECRET = "agentd-test-canary"


@dataclass
class Recorded:
    """Notes what would be changed, with the content at that moment; refuses if told to."""

    changes: list[tuple[str, bytes, bytes | None]] = field(default_factory=list)
    refuse: bool = False

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        if self.refuse:
            raise Refusal(28, "no space for the pre-image")
        for change in changes:
            path = Path(os.fsdecode(change.path))
            self.changes.append((change.operation, change.path, path.read_bytes() if path.is_file() else None))


@dataclass
class Arena:
    """A folder `inside` that the scopes cover and one `outside` that they do not."""

    sandbox: Sandbox
    root: Path
    recorder: Recorded = field(default_factory=Recorded)

    @property
    def inside(self) -> Path:
        return self.root / "inside"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    def access(self, *, write: bool = False, peers: frozenset[tuple[str, int]] = frozenset()) -> Access:
        rule = (PathRule(os.fsencode(self.inside)),)
        return Access(read=rule, write=rule if write else (), connect=peers)

    def run(self, tool: str, access: Access | None = None, *, deadline_s: float = 10, **arguments: Any) -> Outcome:
        job = Job("attack", tool, arguments, {}, deadline_s, 4096)
        return self.sandbox.run(job, access or self.access(), self.recorder, threading.Event())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    level = probe()
    if not level.confines:
        pytest.skip(f"this kernel can't confine: {level.missing}")
    os.environ["AGENTD_TEST_SECRET"] = SECRET
    made = Sandbox({"attack": PROGRAM}, tmp_path_factory.mktemp("work"))
    made.start()
    yield made
    made.stop()
    del os.environ["AGENTD_TEST_SECRET"]


@pytest.fixture
def arena(sandbox: Sandbox, tmp_path: Path) -> Arena:
    root = tmp_path.resolve()
    for name in ("inside", "outside"):
        (root / name).mkdir()
        (root / name / "file").write_text(f"{name}\n")
    return Arena(sandbox, root)


def test_what_the_scopes_cover_can_be_read(arena: Arena):
    """The control: the attack program reads when it may."""
    assert arena.run("read", path=str(arena.inside / "file")).result == {"text": "inside\n"}


READS = [
    "{outside}/file",
    "{inside}/../outside/file",
    "{inside}/link",
    "{inside}/folder-link/file",
    "{inside}/absolute-link",
    "/etc/passwd",
    "/etc/shadow",
    "/proc/self/environ",
    "/proc/self/mem",
    "/proc/self/root/etc/passwd",
    "/proc/self/cwd/../../etc/passwd",
    "/proc/thread-self/environ",
    "/proc/{daemon}/environ",
    "/proc/{daemon}/mem",
    "/proc/{daemon}/root/etc/passwd",
    "/dev/fd/0",
    "/dev/mem",
    "/dev/kmsg",
    "{outside}",
    "/",
]


@pytest.mark.parametrize("path", READS)
def test_nothing_outside_the_scopes_is_read(arena: Arena, path: str):
    """By name, by dots, by links, by /proc: it does not exist, and the attempt is on record."""
    (arena.inside / "link").symlink_to("../outside/file")
    (arena.inside / "folder-link").symlink_to("../outside")
    (arena.inside / "absolute-link").symlink_to(arena.outside / "file")
    full = path.format(inside=arena.inside, outside=arena.outside, daemon=os.getpid())
    outcome = arena.run("read", path=full)
    assert outcome.result is None
    assert "outside" not in str(outcome.result)
    assert outcome.denied > 0


def test_a_scope_over_everything_still_does_not_open_processes(arena: Arena):
    """`read:/` is much; other processes' memory and environment are not in it."""
    everything = Access(read=(PathRule(b"/"),))
    assert arena.run("read", everything, path=str(arena.outside / "file")).result == {"text": "outside\n"}
    for path in (f"/proc/{os.getpid()}/environ", "/proc/self/environ", f"/proc/{os.getpid()}/root/etc/passwd"):
        assert arena.run("read", everything, path=path).result is None


@pytest.mark.parametrize("tool", ["stat", "access", "readlink", "listdir"])
def test_what_is_hidden_cannot_be_told_from_what_is_not_there(arena: Arena, tool: str):
    """Metadata calls give the same error for both."""
    (arena.outside / "link").symlink_to("file")
    there = arena.run(tool, path=str(arena.outside / "link"))
    missing = arena.run(tool, path=str(arena.outside / "missing"))
    assert (there.error or "").replace("link", "X") == (missing.error or "").replace("missing", "X")


@pytest.mark.parametrize(
    ("tool", "target"),
    [
        ("write", "{outside}/file"),
        ("write", "{outside}/new"),
        ("write", "{inside}/link"),
        ("write", "{inside}/dangling"),
        ("write", "{inside}/hard"),
        ("append", "{inside}/hard"),
        ("truncate", "{inside}/hard"),
        ("truncate", "{outside}/file"),
        ("unlink", "{outside}/file"),
        ("mkdir", "{outside}/new"),
        ("mkdir", "{inside}/../outside/new"),
        ("rmdir", "{outside}/empty"),
        ("rename_from", "{outside}/file"),
        ("rename_to", "{outside}/file"),
        ("tmpfile", "{outside}"),
        ("chmod", "{outside}/file"),
        ("symlink", "{inside}/made"),
        ("hardlink", "{outside}/file"),
    ],
)
def test_nothing_outside_the_scopes_is_changed(arena: Arena, tool: str, target: str):
    """Whatever the way: the outside is the same afterwards, byte for byte."""
    (arena.outside / "empty").mkdir()
    (arena.inside / "link").symlink_to("../outside/file")
    (arena.inside / "dangling").symlink_to("../outside/new")
    os.link(arena.outside / "file", arena.inside / "hard")
    before = snapshot(arena.outside)
    full = target.format(inside=arena.inside, outside=arena.outside)
    arena.run(tool, arena.access(write=True), path=full, inside=str(arena.inside))
    assert snapshot(arena.outside) == before


@pytest.mark.parametrize("tool", ["write", "append", "truncate", "unlink", "mkdir", "rename_from"])
def test_a_scope_to_read_is_none_to_write(arena: Arena, tool: str):
    """Read-only scopes leave everything as it is; with a scope to write the same attack works."""
    path = str(arena.inside / ("new" if tool == "mkdir" else "file"))
    before = snapshot(arena.inside)
    assert arena.run(tool, path=path, inside=str(arena.inside)).error
    assert snapshot(arena.inside) == before
    assert arena.run(tool, arena.access(write=True), path=path, inside=str(arena.inside)).error is None
    assert snapshot(arena.inside) != before


@pytest.mark.parametrize("tool", ["write", "append", "truncate", "unlink", "rename_from"])
def test_the_recorder_comes_before_the_change_and_may_refuse_it(arena: Arena, tool: str):
    """It sees the old content; if it refuses, nothing has happened."""
    arena.recorder.refuse = True
    before = snapshot(arena.inside)
    assert arena.run(tool, arena.access(write=True), path=str(arena.inside / "file"), inside=str(arena.inside)).error
    assert snapshot(arena.inside) == before
    arena.recorder.refuse = False
    arena.run(tool, arena.access(write=True), path=str(arena.inside / "file"), inside=str(arena.inside))
    assert arena.recorder.changes[0][2] == b"inside\n"


def test_a_fifo_does_not_hang_the_broker(arena: Arena):
    """It is refused at once, like sockets and devices."""
    os.mkfifo(arena.inside / "fifo")
    start = time.monotonic()
    assert arena.run("read", path=str(arena.inside / "fifo")).error
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "tool",
    ["spawn", "kill_parent", "kill_all", "unix_socket", "udp_socket", "netlink", "set_limits", "chdir", "chroot_late"],
)
def test_calls_that_reach_beyond_are_refused(arena: Arena, tool: str):
    """Processes, signals, other sockets: an error, and the daemon lives."""
    outcome = arena.run(tool, pid=os.getppid() or 1, daemon=os.getpid())
    assert outcome.result is None
    assert outcome.error


@pytest.mark.parametrize("tool", ["ptrace", "unshare", "process_vm_readv", "second_filter", "userfaultfd", "mount"])
def test_calls_that_only_an_attack_makes_are_fatal(arena: Arena, tool: str):
    """The worker dies at once."""
    with pytest.raises(WorkerDied):
        arena.run(tool, daemon=os.getpid())


def test_the_worker_holds_no_secret_and_no_descriptor(arena: Arena):
    """Its environment is its own; beside 0 to 2 there is only the channel it answers on."""
    told = arena.run("inventory").result
    assert told is not None
    assert SECRET not in str(told)
    assert len(told["descriptors"]) == 1
    assert told["no_new_privs"] == "1"


def test_only_granted_peers_can_be_connected_to(arena: Arena):
    """The control connects and talks; another port is refused; MSG_FASTOPEN delivers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        peer = ("127.0.0.1", server.getsockname()[1])
        assert arena.run("connect", host=peer[0], port=peer[1]).error
        assert arena.run("fastopen", host=peer[0], port=peer[1]).error
        with pytest.raises(TimeoutError):
            server.accept()
        outcome = arena.run("connect", arena.access(peers=frozenset({peer})), host=peer[0], port=peer[1])
        assert outcome.error is None
        assert outcome.contacts == (Contact(*peer, connections=1, sent=5, received=0),)
        connection, _ = server.accept()
        assert connection.recv(16) == b"hello"
        connection.close()


def test_a_path_that_flips_while_it_is_checked_never_leaks(arena: Arena):
    """A second thread swaps the path in memory between an allowed and a forbidden file, thousands of times."""
    outcome = arena.run("flip", good=str(arena.inside / "file"), bad=str(arena.outside / "file"), seconds=2.0)
    assert outcome.result is not None
    assert outcome.result["leaked"] == 0
    calm = arena.run("flip", good=str(arena.inside / "file"), bad=str(arena.inside / "file"), seconds=0.2)
    assert calm.result is not None
    assert calm.result["opened"] > 0  # the control: what flips between two allowed paths is opened


def test_a_folder_that_is_swapped_for_a_link_never_leaks(arena: Arena):
    """Somebody outside swaps an intermediate folder for a link to the forbidden one."""
    (arena.inside / "folder").mkdir()
    (arena.inside / "folder" / "file").write_text("inside\n")
    (arena.inside / "link").symlink_to(arena.outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(arena.inside / "folder", arena.inside / "aside")
            os.rename(arena.inside / "link", arena.inside / "folder")
            os.rename(arena.inside / "folder", arena.inside / "link")
            os.rename(arena.inside / "aside", arena.inside / "folder")

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        outcome = arena.run("reread", path=str(arena.inside / "folder" / "file"), seconds=1.0)
    finally:
        stop.set()
        swapper.join()
    assert outcome.result is not None
    assert set(outcome.result["texts"]) <= {"inside\n"}


def test_a_worker_that_hangs_is_ended_at_its_deadline(arena: Arena):
    """It is gone when the error comes."""
    with pytest.raises(WorkerTimeout):
        arena.run("hang", deadline_s=0.3)


@pytest.mark.parametrize("how", ["written", "holes", "set aside", "moved", "unnamed"])
def test_what_a_call_writes_has_a_bound(arena: Arena, monkeypatch: pytest.MonkeyPatch, how: str):
    """In whatever way it is written; below it, the same call succeeds."""
    monkeypatch.setattr(arena.sandbox, "limits", Limits(written_mib=64))
    access = arena.access(write=True)
    assert arena.run("fills", access, path=str(arena.inside), how=how, mib=32, deadline_s=20).result == {"done": True}
    for file in arena.inside.iterdir():
        file.unlink()
    if how == "set aside":  # refused before it is there
        outcome = arena.run("fills", access, path=str(arena.inside), how=how, mib=160, deadline_s=20)
        assert outcome.error is not None
        assert "full" in outcome.error
        return
    with pytest.raises(WorkerOffence, match="64 MiB"):
        arena.run("fills", access, path=str(arena.inside), how=how, mib=160, deadline_s=20)


def test_a_call_can_be_cancelled(arena: Arena):
    """Long before its deadline."""
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(WorkerCancelled):
        arena.sandbox.run(Job("attack", "hang", {}, {}, 60, 4096), arena.access(), arena.recorder, cancelled)


@pytest.mark.parametrize(
    ("tool", "failure"), [("flood", OutputTooLarge), ("silent_exit", WorkerDied), ("raw_flood", OutputTooLarge)]
)
def test_workers_that_do_not_answer_properly_are_named_errors(arena: Arena, tool: str, failure: type[Exception]):
    """Too much, or nothing at all."""
    with pytest.raises(failure):
        arena.run(tool)


@pytest.mark.parametrize(
    ("tool", "says"), [("raises", "ValueError: broken"), ("returns_text", "returned str"), ("eats_memory", "out of memory")]
)
def test_a_broken_tool_is_an_answer(arena: Arena, tool: str, says: str):
    """The error names what broke."""
    assert says in (arena.run(tool).error or "")


def test_the_next_call_works_after_the_zygote_was_killed(arena: Arena):
    """Like an out-of-memory kill: a new zygote is started."""
    assert arena.sandbox.zygote_pid is not None
    os.kill(arena.sandbox.zygote_pid, 9)
    time.sleep(0.1)
    assert arena.run("read", path=str(arena.inside / "file")).result


def test_calls_leave_nothing_behind(arena: Arena):
    """Fifty calls, good and bad: no descriptor and no process more than before."""
    arena.run("read", path=str(arena.inside / "file"))
    before = len(os.listdir("/proc/self/fd"))
    for n in range(50):
        arena.run("read", path=str((arena.inside if n % 2 else arena.outside) / "file"))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: mode and content by name."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() and not path.is_symlink() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }
