"""What a call takes of what all share: locks, timers, watches, threads, connections of the daemon; and a device's memory."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, Job, Level, Limits, Outcome, PathRule, Sandbox, WorkerOffence, probe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from agentd_sandbox import Change

PROGRAM = b"""
import errno, fcntl, os, select, socket, threading
from agentd_sandbox.sdk import tool

def code(do):
    try:
        do()
    except OSError as e:
        return errno.errorcode[e.errno]
    return ""

@tool("lock")
def lock(path, how, flags):
    descriptor = os.open(path, flags)
    return {"code": code(lambda: fcntl.flock(descriptor, how))}

@tool("locks_wait")
def locks_wait(path):
    one = os.open(path, os.O_RDWR)
    fcntl.flock(one, fcntl.LOCK_EX)
    threading.Timer(0.2, lambda: os.close(one)).start()
    other = os.open(path, os.O_RDWR)
    return {"code": code(lambda: fcntl.flock(other, fcntl.LOCK_EX))}

@tool("map")
def map(path, device, flags):
    import mmap
    if device:
        os.open(device, os.O_RDWR)
    descriptor = os.open(path, os.O_RDWR)
    return {"code": code(lambda: mmap.mmap(descriptor, 4096, flags=flags).close())}

@tool("timers")
def timers():
    import ctypes
    libc, count, made = ctypes.CDLL(None, use_errno=True), 0, ctypes.c_void_p()
    while count < 5000 and libc.timer_create(1, None, ctypes.byref(made)) == 0:
        count += 1
    return {"count": count}

@tool("watches")
def watches(keep):
    kept = []
    for n in range(100):
        try:
            made = select.epoll()
        except OSError:
            return {"count": n}
        kept.append(made) if keep else made.close()
    return {"count": 100}

@tool("start")
def start(path):
    import subprocess
    try:
        return {"code": subprocess.run([path], stdout=subprocess.PIPE).returncode}
    except OSError as e:
        return {"code": errno.errorcode[e.errno]}

@tool("threads")
def threads(count):
    threading.stack_size(65536)
    stop = threading.Event()
    for _ in range(count):
        threading.Thread(target=stop.wait, daemon=True).start()
    stop.wait(3)
    return {}

@tool("proxies")
def proxies(host, port):
    held = []
    for n in range(100):
        made = socket.socket()
        if (c := code(lambda: made.connect((host, port)))):
            return {"count": n, "code": c}
        held.append(made)
    return {"count": 100, "code": ""}
"""


class Unrecorded:
    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> frozenset[bytes]:
        return frozenset()


class Bench:
    def __init__(self, folder: Path, level: Level) -> None:
        self.folder = folder
        self.sandbox = Sandbox({"shares": PROGRAM}, folder, level, limits=Limits(threads=50))
        self.sandbox.start()

    def run(self, tool: str, access: Access | None = None, **arguments: Any) -> Outcome:
        rule = (PathRule(os.fsencode(self.folder)),)
        job = Job("shares", tool, arguments, {}, 20, 65536)
        return self.sandbox.run(job, access or Access(read=rule, write=rule), Unrecorded(), threading.Event())

    def code(self, tool: str, access: Access | None = None, **arguments: Any) -> Any:
        outcome = self.run(tool, access, **arguments)
        assert outcome.error is None, outcome.error
        assert outcome.result is not None
        return outcome.result.get("code", outcome.result)


@pytest.fixture(params=["L1", "broker"])
def level(request: pytest.FixtureRequest) -> Level:
    found = probe()
    if not found.confines or (request.param == "broker" and "broker" not in found.layers):
        pytest.skip("this kernel can't do that")
    return replace(found, name="L1", layers=()) if request.param == "L1" else found


@pytest.fixture
def bench(tmp_path: Path, level: Level) -> Iterator[Bench]:
    made = Bench(tmp_path.resolve(), level)
    (made.folder / "file").write_bytes(bytes(4096))
    yield made
    made.sandbox.stop()


SHARED, EXCLUSIVE, AT_ONCE = 1, 2, 4
LOCKS = [
    (EXCLUSIVE | AT_ONCE, os.O_RDONLY, "EBADF"),
    (EXCLUSIVE, os.O_RDONLY, "EBADF"),
    (EXCLUSIVE | AT_ONCE, os.O_RDWR, ""),
    (SHARED | AT_ONCE, os.O_RDONLY, ""),
]


@pytest.mark.parametrize(("how", "flags", "code"), LOCKS)
def test_what_may_only_be_read_is_not_locked_against_others(bench: Bench, level: Level, how: int, flags: int, code: str):
    if level.name == "L1" and how & EXCLUSIVE:
        code = "EACCES"  # there is nobody to ask
    assert bench.code("lock", path=str(bench.folder / "file"), how=how, flags=flags) == code


def test_a_lock_is_waited_for(bench: Bench, level: Level):
    if level.name != "L1":
        assert bench.code("locks_wait", path=str(bench.folder / "file")) == ""


@pytest.mark.parametrize(
    ("device", "flags", "code"), [("/dev/zero", 1, "EACCES"), ("/dev/zero", 2, ""), ("", 1, ""), ("", 33, "")]
)
def test_nothing_is_mapped_to_be_shared_beside_a_device(bench: Bench, level: Level, device: str, flags: int, code: str):
    """Its memory could be written to without a call. Private memory, and that of no file, can be had."""
    if level.name == "L1":
        pytest.skip("it has no module that maps files there, and no file may be mapped to be shared")
    rule = (PathRule(os.fsencode(bench.folder)),)
    access = Access(read=rule, write=rule, devices=(PathRule(b"/dev/zero"),))
    path = device or str(bench.folder / "file")
    assert bench.code("map", access, path=path, device=device, flags=flags) == code


def test_a_program_may_be_granted_alone(bench: Bench, level: Level):
    """Its loader, and the interpreter of a script, are parts of the system, which need no grant; another program does."""
    if level.name == "L1":
        pytest.skip("no program is started there")
    script = bench.folder / "script"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    hidden = bench.folder / "hidden"
    hidden.write_text(f"#!{bench.folder.parent}/nothing\n")
    hidden.chmod(0o755)
    programs = tuple(PathRule(os.fsencode(path)) for path in (os.path.realpath("/usr/bin/true"), script, hidden))
    access = Access(read=(PathRule(os.fsencode(bench.folder)),), execute=programs)
    assert bench.code("start", access, path="/usr/bin/true") == 0
    assert bench.code("start", access, path=str(script)) == 7
    assert bench.code("start", access, path="/usr/bin/false") == "EACCES"
    assert bench.code("start", access, path=str(hidden)) == "ENOENT"


def test_timers_leave_those_of_others_alone(bench: Bench, level: Level):
    """Each takes a signal of all that the user may have waiting."""
    if level.name == "L1":
        pytest.skip("it has no ctypes there")
    count = bench.code("timers")["count"]
    assert 10 < count <= 256


def test_lists_of_watched_descriptors_are_counted_together(bench: Bench, level: Level):
    most = 100 if level.name == "L1" else 16
    assert bench.code("watches", keep=True)["count"] == most
    assert bench.code("watches", keep=False)["count"] == 100


def test_too_many_threads_end_a_call(bench: Bench, level: Level):
    assert bench.run("threads", count=20).error is None
    if level.name == "L1":
        with pytest.raises(WorkerOffence, match="threads"):
            bench.run("threads", count=100)
    else:
        assert "can't start new thread" in str(bench.run("threads", count=100).error)


@pytest.mark.parametrize("scope", ["connect", "device"])
def test_connections_to_the_proxy_have_a_bound_and_leave_the_daemon_what_it_needs(bench: Bench, level: Level, scope: str):
    """Whatever gives a call the proxy, a peer that can't be reached, too."""
    if level.name == "L1":
        pytest.skip("sockets can't be connected there, but by the SDK, one at a time")
    rule = (PathRule(os.fsencode(bench.folder)),)
    granted = frozenset({("192.0.2.1", 80)})
    access = Access(read=rule, connect=granted) if scope == "connect" else Access(read=rule, operate=frozenset({"gpio/1"}))
    before = threading.active_count()
    result = bench.code("proxies", access, host="198.19.255.254", port=3128)
    assert result == "EAGAIN"
    assert bench.code("lock", path=str(bench.folder / "file"), how=SHARED, flags=os.O_RDONLY) == ""
    assert threading.active_count() - before < 20
