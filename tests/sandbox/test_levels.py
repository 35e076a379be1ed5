"""The same tool on every level of confinement, and on kernels that lack a feature: it works, and nothing else does."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import (
    Access,
    DeviceFailure,
    Job,
    Outcome,
    PathRule,
    Sandbox,
    Unsupported,
    WorkerTimeout,
    kernel,
    no_level,
    probe,
)
from agentd_sandbox.filters import profile
from agentd_sandbox.levels import WITHOUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change, Level

PROGRAM = b'''
import os, shutil, socket, subprocess, time
from pathlib import Path
from agentd_sandbox.sdk import ToolFailure, operate, tool

@tool("everything")
def everything(folder):
    """All that a Python tool does with files."""
    here = Path(folder)
    (here / "sub").mkdir()
    (here / "sub" / "a.txt").write_text("one\\n")
    with open(here / "sub" / "a.txt", "a") as file:
        file.write("two\\n")
    os.rename(here / "sub" / "a.txt", here / "b.txt")
    os.truncate(here / "b.txt", 4)
    os.chmod(here / "b.txt", 0o600)
    told = {
        "names": sorted(os.listdir(here)),
        "scanned": sorted(entry.name for entry in os.scandir(here)),
        "walked": sorted(name for _, folders, files in os.walk(here) for name in folders + files),
        "text": (here / "b.txt").read_text(),
        "size": (here / "b.txt").stat().st_size,
        "mode": oct((here / "b.txt").stat().st_mode & 0o777),
        "link": os.readlink(here / "link"),
        "missing": (here / "none").exists(),
        "writable": os.access(here / "b.txt", os.W_OK),
        "free": shutil.disk_usage(".").total > 0,
    }
    (here / "b.txt").unlink()
    (here / "sub").rmdir()
    return told

@tool("read")
def read(path):
    return {"text": Path(path).read_text()}

@tool("write")
def write(path):
    Path(path).write_text("owned")
    return {}

@tool("connect")
def connect(port):
    with socket.create_connection(("127.0.0.1", port), 5) as made:
        made.sendall(b"hello")
    return {}

@tool("operate")
def have_operated(device, **request):
    return operate(device, **request)

@tool("often")
def often(devices, times):
    done = 0
    for n in range(times):
        try:
            operate(devices[n % 2], n=n)
            done += 1
        except ToolFailure as e:
            refused = str(e)
    return {"done": done, "refused": refused}

@tool("ask")
def ask(head, body):
    with socket.create_connection(("198.19.255.254", 3128), 5) as made:
        made.sendall(f"{head} HTTP/1.1\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
        return {"said": made.makefile().readline().strip()}

@tool("start")
def start():
    return {"output": subprocess.run(["/bin/echo", "hi"], stdout=subprocess.PIPE, check=True).stdout.decode()}

@tool("signalled")
def signalled(folder, count):
    """A timer signal every 20 milliseconds, while files are made and renamed."""
    import signal
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    for n in range(count):
        os.mkdir(f"{folder}/d{n}")
        os.close(os.open(f"{folder}/d{n}/f", os.O_CREAT | os.O_WRONLY))
        os.rename(f"{folder}/d{n}/f", f"{folder}/f{n}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"held": len(os.listdir(folder))}
'''


def lamp(name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What devices there are."""
    if name == "slow":
        threading.Event().wait(1.5)
    if name != "lamp/1 ü":
        raise DeviceFailure(f"there is no {name}")
    return {"lamp": asked}


class Silent:
    """A recorder that agrees to everything."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        pass


LEVELS = {
    "L1": ("broker",),
    "L2": ("namespaces", "landlock"),
    "L2 of Linux 5.9": ("namespaces", "landlock", "wait_killable", "addfd_send"),
    "L3": ("landlock",),
    "L4": (),
}


def level_without(missing: tuple[str, ...]) -> Level:
    """As the probe finds it on a kernel that lacks these."""
    os.environ[WITHOUT] = ",".join(missing)
    try:
        found = probe()
    finally:
        del os.environ[WITHOUT]
    return found


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    level = level_without(LEVELS[request.param])
    if level.name != request.param[:2]:
        pytest.skip(f"this kernel reaches {level.name}: {'; '.join(level.missing)}")
    made = Sandbox({"tool": PROGRAM}, tmp_path_factory.mktemp("work"), level, operate=lamp)
    made.start()
    yield made
    made.stop()


def run(sandbox: Sandbox, tool: str, access: Access, **arguments: Any) -> Outcome:
    return sandbox.run(Job("tool", tool, arguments, {}, 20, 8192), access, Silent(), threading.Event())


def scope(folder: Path) -> Access:
    rule = (PathRule(os.fsencode(folder)),)
    return Access(rule, rule)


def test_a_tool_can_do_all_that_tools_do(sandbox: Sandbox, tmp_path: Path):
    """Files, folders, links, sizes: through the broker, or by message where the kernel has none."""
    here = tmp_path.resolve()
    (here / "link").symlink_to("b.txt")
    outcome = run(sandbox, "everything", scope(here), folder=str(here))
    assert outcome.error is None
    assert outcome.result == {
        "names": ["b.txt", "link", "sub"],
        "scanned": ["b.txt", "link", "sub"],
        "walked": ["b.txt", "link", "sub"],
        "text": "one\n",
        "size": 4,
        "mode": "0o600",
        "link": "b.txt",
        "missing": False,
        "writable": True,
        "free": True,
    }
    assert os.listdir(here) == ["link"]


@pytest.mark.parametrize("path", ["{outside}", "{inside}/../outside", "{inside}/link", "/etc/passwd", "/proc/self/environ"])
def test_nothing_outside_is_read_or_written(sandbox: Sandbox, tmp_path: Path, path: str):
    """On the lowest level as on the highest."""
    here = tmp_path.resolve()
    (here / "inside").mkdir()
    (here / "outside").write_text("precious")
    (here / "inside" / "link").symlink_to("../outside")
    spelled = path.format(inside=here / "inside", outside=here / "outside")
    for tool in ("read", "write"):
        assert run(sandbox, tool, scope(here / "inside"), path=spelled).error
    assert (here / "outside").read_text() == "precious"


def test_a_granted_peer_can_be_connected_to(sandbox: Sandbox):
    """And no other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(sandbox, "connect", Access(), port=port).error
        granted = Access(connect=frozenset({("127.0.0.1", port)}))
        assert run(sandbox, "connect", granted, port=port).error is None
        connection, _ = server.accept()
        assert connection.recv(16) == b"hello"
        connection.close()


def test_a_device_of_the_scopes_is_operated_for_the_call(sandbox: Sandbox):
    """It answers, or says why not; a device without a scope is refused before anybody is asked, and counted."""
    granted = Access(operate=frozenset({"lamp/1 ü", "lamp/2"}))
    assert run(sandbox, "operate", granted, device="lamp/1 ü", on=True, text="ü\n").result == {
        "lamp": {"on": True, "text": "ü\n"}
    }
    assert run(sandbox, "operate", granted, device="lamp/2").error == "there is no lamp/2"
    for device in ("lamp/3", "lamp/1", "", "lamp/1 ü\r\nX: y"):
        outcome = run(sandbox, "operate", granted, device=device)
        assert "has no scope for the device" in (outcome.error or "")
        assert [denial.target for denial in outcome.denials] == ["proxy"]
    outcome = run(sandbox, "operate", Access(), device="lamp/1 ü")
    assert "can't be reached by this call" in (outcome.error or "")
    assert outcome.denied


def test_what_was_done_with_devices_is_told_and_has_an_end(sandbox: Sandbox):
    """With what was asked and what came of it; a call that never stops asking is stopped."""
    granted = Access(operate=frozenset({"lamp/1 ü", "lamp/2"}))
    outcome = run(sandbox, "often", granted, devices=["lamp/1 ü", "lamp/2"], times=20)
    assert outcome.result == {"done": 8, "refused": "a call may have devices operated 16 times"}
    first, second, *more = outcome.operations
    assert (first.device, first.asked, first.answer, first.error) == ("lamp/1 ü", {"n": 0}, {"lamp": {"n": 0}}, "")
    assert (second.device, second.answer, second.error) == ("lamp/2", None, "there is no lamp/2")
    assert len(more) == 14


def test_what_goes_on_at_the_end_of_a_call_is_told_as_unfinished(sandbox: Sandbox):
    """Nobody can call it back; whoever reads the record is not to take it for done, or for not begun."""
    job = Job("tool", "operate", {"device": "slow"}, {}, 0.3, 8192)
    with pytest.raises(WorkerTimeout) as caught:
        sandbox.run(job, Access(operate=frozenset({"slow"})), Silent(), threading.Event())
    assert caught.value.outcome is not None
    assert [(each.device, each.answer, each.error) for each in caught.value.outcome.operations] == [("slow", None, "")]


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("GET device:lamp/2", "{}", "405"),
        ("POST device:lamp/2", "[]", "400"),
        ("POST device:lamp/2", "", "400"),
        ("POST device:lamp/2", "[" * 60_000, "400"),
        ("POST device:lamp/2", '{"a":"' + "x" * 70_000 + '"}', "502"),
        ("POST device:lamp/2", '{"a":"' + "x" * (1 << 20) + '"}', "413"),
        ("POST device:lamp/2", '{"a": 1}', "502"),
        ("POST device:lamp/2", '{"a": NaN}', "400"),
        ("POST device:lamp/2", '{"a": -Infinity}', "400"),
        ("POST device:lamp/2", '{"a":' * 8 + "1" + "}" * 8, "400"),
        ("POST device:lamp/2", '{"a":' * 7 + "1" + "}" * 7, "502"),
        ("POST device:lamp/2", '{"a":' + "[" * 700 + "]" * 700 + "}", "400"),
        ("POST device:lamp/%32", "{}", "502"),
        ("CONNECT lamp/2:80", "", "400"),
        ("POST http://lamp/2", "{}", "403"),
    ],
)
def test_a_device_takes_one_json_object(sandbox: Sandbox, head: str, body: str, status: str):
    """Whatever else a tool sends is answered with what is wrong with it. (502: the device said no.)"""
    granted = Access(operate=frozenset({"lamp/2"}))
    outcome = run(sandbox, "ask", granted, head=head, body=body)
    assert outcome.error is None
    assert (outcome.result or {})["said"].split(" ")[1] == status


def test_programs_start_from_level_2_on(sandbox: Sandbox):
    """Where there is no broker nobody could serve them."""
    outcome = run(sandbox, "start", Access(execute=(PathRule(b"/usr"),)))
    assert sandbox.level is not None
    if sandbox.level.name == "L1":
        assert outcome.error
    else:
        assert outcome.result == {"output": "hi\n"}


def test_signals_do_not_make_a_call_happen_twice(sandbox: Sandbox, tmp_path: Path):
    """A signal may take the answer of a call away; the kernel then asks again for what is done already."""
    assert sandbox.level is not None
    if sandbox.level.name == "L1":
        pytest.skip("messages are not interrupted")
    here = tmp_path.resolve()
    outcome = run(sandbox, "signalled", scope(here), folder=str(here), count=200)
    if "wait_killable" in sandbox.level.without and outcome.error:
        # There the kernel may drop an answer that it has accepted, and nobody can tell: docs/sandbox.md.
        assert outcome.error.endswith(("exists already", "does not exist"))
        return
    assert outcome.error is None
    assert outcome.result == {"held": 400}


def test_the_worker_has_the_layers_of_its_level(sandbox: Sandbox):
    """By the kernel's account: other namespaces than ours from level 3 on."""
    assert sandbox.level is not None
    own, its = (os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", sandbox.zygote_pid))
    assert (own != its) == ("namespaces" in sandbox.level.layers)


@pytest.mark.parametrize("minimum", ["L0", "L1", "L2", "L3", "L4"])
def test_a_level_reaches_itself_and_what_is_below(minimum: str):
    """The order in which a configured minimum is compared."""
    level = replace(probe(), name="L2")
    assert level.reaches(minimum) == (minimum in ("L0", "L1", "L2"))


def test_the_probe_says_why_a_layer_is_missing():
    """Every one that is not there, with a reason."""
    level = level_without(("broker", "namespaces", "landlock"))
    assert level.name == "L1"
    assert [entry.split(":")[0] for entry in level.missing if "cgroup" not in entry] == ["broker"]
    told = [entry.split(": ", 1) for entry in level_without(("namespaces", "landlock")).missing]
    assert {layer for layer, _ in told} >= {"namespaces", "landlock"}
    assert all(why for _, why in told)


def test_a_kernel_without_seccomp_is_a_named_error():
    """A kernel that refuses seccomp(2) for an unknown call number stands for one that has none."""
    profile().numbers["seccomp"] = 9999
    try:
        with pytest.raises(Unsupported):
            kernel.lock_alone()
    finally:
        profile.cache_clear()


def test_a_daemon_of_a_machine_that_confines_nothing_is_told_why():
    """Level 0 has no layer, and a reason."""
    level = no_level("the probe was killed")
    assert not level.confines
    assert level.missing == ("the probe was killed",)


def test_a_cgroup_holds_the_zygote_and_what_it_forks(tmp_path: Path):
    """Where one is ours to divide; with the memory and processes of all workers limited, and gone with the sandbox."""
    level = probe()
    if "cgroup" not in level.layers:
        pytest.skip(next(why for why in level.missing if why.startswith("cgroup")))
    made = Sandbox({"tool": PROGRAM}, tmp_path, level)
    made.start()
    try:
        (group,) = (line[3:] for line in Path(f"/proc/{made.zygote_pid}/cgroup").read_text().split() if line[:3] == "0::")
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        assert folder.name.startswith("agentd-tools-")
        assert int((folder / "memory.max").read_text()) == 4 * made.limits.memory_mib << 20
        assert int((folder / "pids.max").read_text()) == 4 * made.limits.processes
        assert str(made.zygote_pid) in (folder / "cgroup.procs").read_text().split()
    finally:
        made.stop()
    assert not folder.exists()
