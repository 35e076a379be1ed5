"""What the kernel walks for a program (chdir, execve) is what was decided on, and nothing outside the scopes is looked up.

The attacks are those of walks.py; they run unconfined first. What gets through so far is marked, with the cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agentd_sandbox import Access, BrokerStuck, Job, PathRule, Sandbox, kernel, probe, sdk, serving
from agentd_sandbox.levels import WITHOUT
from agentd_sandbox.nearby import Walker
from agentd_sandbox.paths import Sight, WalkError, everything
from agentd_sandbox.walks import Walks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentd_sandbox import Change

PROGRAM = Path(__file__).with_name("walks.py")
LEVELS = {
    "L4": (),
    "L3": ("landlock",),
    "L2": ("namespaces", "landlock"),
    "L2 of Linux 5.9": ("namespaces", "landlock", "wait_killable", "addfd_send"),
}
IS_ROOT = os.geteuid() == 0
NEEDS_ROOT = pytest.mark.skipif(not IS_ROOT, reason="needs a mount")
# An ELF file for x86_64: write(1, "ran\n", 4), exit(0).
STATIC = bytes.fromhex(
    "7f454c46020101000000000000000000" "02003e00010000007800400000000000" "40000000000000000000000000000000"
    "00000000400038000100000000000000" "0100000005000000" "0000000000000000" "0000400000000000" "0000400000000000"
    "a600000000000000" "a600000000000000" "0010000000000000"
    "b801000000" "bf01000000" "488d3511000000" "ba04000000" "0f05" "b83c000000" "31ff" "0f05" "90" "72616e0a" "0000000000000000"
)  # fmt: skip

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="its programs are for x86-64")


def gets_through(why: str) -> pytest.MarkDecorator:
    """What is known not to be kept, and said in docs/sandbox.md."""
    return pytest.mark.xfail(strict=True, reason=why)


class Silent:
    """A recorder that keeps nothing."""

    mark = b"test"

    def before_changes(self, changes: Sequence[Change]) -> None:
        return


@dataclass
class Ground:
    """`w` and `v` are in the scopes, `h` and `k` are not; `w/away` and `v/out` are links of the user's own."""

    root: Path
    sandbox: Sandbox | None = None

    def __post_init__(self) -> None:
        for folder in ("w/it", "w/p/q/b", "w/p/h/it", "w/a", "w/out/it", "v", "h/it", "h/sub", "k/sub"):
            (self.root / folder).mkdir(parents=True)
        for program in ("w/run", "w/p/h/run", "w/out/run", "h/run", "k/run"):
            (self.root / program).write_bytes(STATIC if program[0] in "hk" else STATIC.replace(b"ran\n", b"own\n"))
            (self.root / program).chmod(0o755)
        for folder in "hk":
            (self.root / folder / "file").write_text("canary")
            (self.root / folder / "link").symlink_to("file")
        (self.root / "w/away").symlink_to("../h")
        (self.root / "v/out").symlink_to("../h")

    def access(self, **more: Any) -> Access:
        scopes = tuple(PathRule(os.fsencode(self.root / name)) for name in "wv")
        return Access(**({"read": scopes, "write": scopes, "execute": (*scopes, PathRule(b"/usr"))} | more))

    def run(self, tool: str, access: Access | None = None, *, deadline_s: float = 20, **arguments: Any) -> dict[str, Any]:
        assert self.sandbox
        job = Job("walks", tool, arguments, {}, deadline_s, 65536)
        outcome = self.sandbox.run(job, access or self.access(), Silent(), threading.Event())
        assert outcome.error is None, outcome
        return outcome.result or {}

    def together(self, *calls: tuple[str, Access | None, dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(calls)) as threads:
            running = [threads.submit(self.run, tool, access, **arguments) for tool, access, arguments in calls]
            return [each.result() for each in running]

    def unconfined(self, tool: str, *, timeout: float = 30, **arguments: Any) -> dict[str, Any]:
        command = [sys.executable, str(PROGRAM), tool, json.dumps(arguments)]
        environment = {**os.environ, "PYTHONPATH": str(Path(sdk.__file__).parent.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=True)
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    def names(self) -> list[tuple[str, int, bytes]]:
        """All there is, with modes and contents."""
        found = sorted(path for path in self.root.rglob("*") if not path.is_symlink())
        return [(str(path), path.stat().st_mode, path.read_bytes() if path.is_file() else b"") for path in found]


@contextlib.contextmanager
def started(folder: Path, name: str) -> Iterator[Sandbox]:
    os.environ[WITHOUT] = ",".join(LEVELS[name])
    try:
        level = probe()
    finally:
        del os.environ[WITHOUT]
    if level.name != name[:2]:
        pytest.skip(f"this kernel reaches {level.name}: {'; '.join(level.missing)}")
    made = Sandbox({"walks": PROGRAM.read_bytes()}, folder, level)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with started(tmp_path_factory.mktemp("work"), request.param) as made:
        yield made


@pytest.fixture
def bare(tmp_path: Path) -> Ground:
    return Ground(tmp_path.resolve())


@pytest.fixture
def ground(bare: Ground, sandbox: Sandbox) -> Ground:
    bare.sandbox = sandbox
    return bare


# -- where the kernel walks


FROM_WITHIN = {"begin": "w/p/q/b", "path": "../../h/", "one": "w/p/q/b", "other": "w/b"}
BESIDE_A_LINK = {"begin": "w/a", "path": "../out/", "one": "w/a", "other": "v/a"}
OVER = {"begin": "w", "path": "{root}/w/p/q/b/../../h/", "one": "w/p/q/b", "other": "w/b"}
OVER_AND_A_LINK = {"begin": "w", "path": "a/../out/", "one": "w/a", "other": "v/a"}
ATTACKS = [
    pytest.param("thread_that_ends", {"seconds": 0.6}, id="a thread that ends"),
    pytest.param("orphaned_thread", {"seconds": 5}, id="a thread of a vfork's child"),
    pytest.param("removed_folder", {"seconds": 0.5}, id="a folder that is gone"),
    pytest.param("move_and_walk", FROM_WITHIN | {"seconds": 0.6}, id="from a folder that moves"),
    pytest.param("move_and_walk", BESIDE_A_LINK | {"seconds": 0.6}, id="from a folder that moves beside a link"),
    pytest.param("move_and_walk", OVER | {"seconds": 0.6}, id="over a folder that moves"),
    pytest.param("move_and_walk", OVER_AND_A_LINK | {"seconds": 0.6}, id="over a folder that moves beside a link"),
]


@pytest.mark.parametrize("name", ["it", "run"])
@pytest.mark.parametrize(("tool", "arguments"), [each.values for each in ATTACKS], ids=[each.id for each in ATTACKS])
def test_unconfined_the_kernel_is_led_elsewhere(tool: str, arguments: dict[str, Any], name: str, bare: Ground) -> None:
    """The control. A folder that moves while the kernel is on it is met by chance only: a way over it may need luck."""
    won = bare.unconfined(tool, root=str(bare.root), name=name, **(arguments | {"seconds": 2}))["got"]
    if not won and arguments in (OVER | {"seconds": 0.6}, OVER_AND_A_LINK | {"seconds": 0.6}):
        pytest.skip("not in two seconds")
    assert won


@pytest.mark.parametrize("name", ["it", "run"])
@pytest.mark.parametrize(("tool", "arguments"), ATTACKS)
def test_nothing_hidden_is_entered_or_started(tool: str, arguments: dict[str, Any], name: str, ground: Ground) -> None:
    """Not by chdir, which would tell that it is there, and not by execve."""
    told = ground.run(tool, root=str(ground.root), name=name, **arguments)
    assert told["tries"] > 2 or told["got"]
    assert not told["got"]


@pytest.mark.parametrize("name", ["it", "run"])
@pytest.mark.parametrize("way", [FROM_WITHIN, BESIDE_A_LINK, OVER_AND_A_LINK], ids=["dots", "a link", "over, and a link"])
def test_another_call_that_moves_folders_gains_nothing(way: dict[str, str], name: str, ground: Ground) -> None:
    """Both within their scopes, at the same time."""
    common = {"root": str(ground.root), "seconds": 0.8}
    walking = {key: way[key] for key in ("begin", "path")}
    moving = {key: way[key] for key in ("one", "other")}
    told, _ = ground.together(("walk", None, common | walking | {"name": name}), ("move", None, common | moving))
    assert not told["got"]


@pytest.mark.parametrize("way", [FROM_WITHIN, BESIDE_A_LINK], ids=["dots", "a link"])
def test_a_walk_that_is_about_to_begin_is_waited_for(
    way: dict[str, str], ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, where the broker is held up for 10 ms right before it lets the call through, as by a busy machine."""
    let_through = kernel.let_through

    def late(listener: int, identity: int) -> None:
        time.sleep(0.01)
        let_through(listener, identity)

    monkeypatch.setattr(kernel, "let_through", late)
    common = {"root": str(ground.root), "seconds": 2.5}
    walking = {key: way[key] for key in ("begin", "path")}
    moving = {key: way[key] for key in ("one", "other")}
    told, _ = ground.together(
        ("walk", None, common | walking | {"name": "it"}), ("move", None, common | moving | {"pause": 0.004})
    )
    assert not told["got"]


def test_a_walk_that_waits_for_the_processor_is_waited_for(bare: Ground, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A hundred other threads of the same call want it, too."""
    with started(tmp_path_factory.mktemp("work"), "L4") as bare.sandbox:
        assert not bare.run("starve", root=str(bare.root), name="it", seconds=8, threads=100)["got"]


@pytest.mark.parametrize("name", ["it", "run"])
def test_another_call_does_not_write_the_path(name: str, ground: Ground) -> None:
    """By the file that it is mapped from, which the one call may read and the other one may write."""
    (ground.root / "w/path").write_bytes(os.fsencode(f"{ground.root}/w/{name}").ljust(4096, b"\0"))
    rule = (PathRule(os.fsencode(ground.root / "w")),)
    common = {"root": str(ground.root), "seconds": 2}
    reader = Access(read=rule, execute=rule)
    told, _ = ground.together(("mapped", reader, common | {"name": name}), ("write_in_turn", None, common))
    assert not told["got"]


def test_a_script_does_not_tell_what_is_hidden(ground: Ground) -> None:
    """Where a call may write what it may start: the kernel looks the interpreter up, and starts it."""
    assert not ground.run("interpreter", root=str(ground.root))["got"]


def test_a_vfork_within_a_vfork_is_refused(ground: Ground) -> None:
    """EPERM; unconfined there are three in one memory. Programs are started by one vfork, or in a shell, as ever."""
    assert ground.unconfined("nested")["got"] > 0
    assert ground.run("nested")["got"] == -1
    assert ground.run("ordinary", root=str(ground.root)) == {"spawned": 0, "text": "own\nh\nq\n"}


@pytest.mark.parametrize(("mine", "its", "goes"), [("w", "h", False), ("h", "w", True)], ids=["hidden", "control"])
def test_a_path_is_read_from_whoever_has_the_number_now(mine: str, its: str, goes: bool, ground: Ground) -> None:
    """The next process to be made gets a number that was used before: the test's part, as root."""
    last, stop = Path("/proc/sys/kernel/ns_last_pid"), threading.Event()
    if not (IS_ROOT and last.exists()):
        pytest.skip("numbers come back after 32,768 others only, unless root says otherwise")

    def give() -> None:
        for n in range(20):
            asked = ground.root / f"w/ask{n}"
            while not asked.exists():
                if stop.wait(0.001):
                    return
            last.write_text(str(int(asked.read_text()) - 1))
            (ground.root / f"w/given{n}").touch()

    giving = threading.Thread(target=give)
    giving.start()
    try:
        told = ground.run("recycled", root=str(ground.root), mine=mine, its=its)
    finally:
        stop.set()
        giving.join()
    if not told["times"]:
        pytest.skip("others were quicker to get the numbers")
    assert told["got"] == (told["times"] if goes else 0)


# -- what a call leaves behind


def test_nothing_goes_on_when_the_call_is_over(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process whose first thread has ended writes nothing more."""
    monkeypatch.setattr(serving, "_GONE_TIMEOUT_S", 1.0)
    with contextlib.suppress(BrokerStuck):
        ground.run("outlive", root=str(ground.root), seconds=3)
    log = ground.root / "w/log"
    before = log.stat().st_size
    time.sleep(0.2)
    after = log.stat().st_size
    time.sleep(2.5)  # what goes on ends by itself: the next test is not to meet it
    assert after == before


def test_no_way_is_kept_when_the_call_is_over(ground: Ground) -> None:
    """Of processes that enter a folder and end: five of them cost the daemon hundred megabytes for good."""
    assert ground.sandbox
    before = len(ground.sandbox._walks._walking)
    ground.run("retain", root=str(ground.root), folders=60, links=20, children=5)
    kept = list(ground.sandbox._walks._walking.values())[before:]
    print(sum(len(way) for walk in kept for way in walk.ways), "bytes")
    assert kept == []


# -- what is looked up


SPELLED = ["h", "w/../h", "w//../h", "w/./../h", "w/p/../../h", "w/away", "w/away/../h", "v/out", "w/../v/out", "w/../w/away/."]


class Dead:
    """A file system that never answers, until the block ends: nobody is at the other end of its device."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> Path:
        try:
            self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            pytest.skip(f"no /dev/fuse: {e}")
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if ctypes.CDLL(None, use_errno=True).mount(b"dead", bytes(self.place), b"fuse", 0, options):
            os.close(self.device)
            pytest.skip(f"can't be mounted: {os.strerror(ctypes.get_errno())}")
        return self.place

    def __exit__(self, *_: object) -> None:
        os.close(self.device)
        subprocess.run(["umount", "-l", str(self.place)], check=True)


@NEEDS_ROOT
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_hidden_is_looked_up(level: str, bare: Ground, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By all calls, however it is spelled: what is there never answers, and whoever asks waits for good."""
    with Dead(bare.root / "h"), started(tmp_path_factory.mktemp("work"), level) as bare.sandbox:
        with pytest.raises(subprocess.TimeoutExpired):
            bare.unconfined("read", path=f"{bare.root}/w/away/file", timeout=1)
        for spelled in SPELLED:
            told = bare.run("use", folder=f"{bare.root}/{spelled}", begin=str(bare.root / "w"), deadline_s=5)
            assert results(told) == {"ENOENT"}, (spelled, told)


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_walker_asks_for_nothing_that_it_can_not_see(spelled: str, bare: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one component of it is opened, by any of its ways; by one that sees everything it is."""
    asked: set[str] = set()
    real = os.open

    def recorded(path: Any, *arguments: Any, **more: Any) -> int:
        asked.update(os.fsdecode(path).split("/"))
        return real(path, *arguments, **more)

    def walk(sight: Sight) -> bool:
        asked.clear()
        walker = Walker(sight, steady=everything)
        path = os.fsencode(f"{bare.root}/{spelled}/file")
        for find in (walker.named, lambda p: walker.existing(p, follow=True), lambda p: walker.walked(p, follow=False)):
            with contextlib.suppress(WalkError), find(path):
                pass
        walker.close()
        return "h" in asked

    monkeypatch.setattr(os, "open", recorded)
    assert walk(Sight())
    assert not walk(Sight(bare.access().may_see))


@NEEDS_ROOT
def test_calls_that_hang_hold_up_no_others(
    bare: Ground, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty-two of them, on a dead file system in their own scope."""
    monkeypatch.setattr(serving, "_GONE_TIMEOUT_S", 0.2)
    with started(tmp_path_factory.mktemp("work"), "L4") as bare.sandbox, Dead(bare.root / "w/a"):
        with ThreadPoolExecutor(32) as threads:
            calls = [threads.submit(bare.run, "read", path=f"{bare.root}/w/a/file", deadline_s=0.5) for _ in range(32)]
            assert {type(call.exception()) for call in calls} == {BrokerStuck}
        assert bare.run("read", path=f"{bare.root}/w/run", deadline_s=2) == {"size": len(STATIC)}


# -- what is absent or protected, whatever it is called


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    target.mkdir(exist_ok=True)
    if subprocess.run(["mount", "--bind", str(source), str(target)], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def identity(path: Path) -> frozenset[tuple[int, int]]:
    return frozenset({(path.stat().st_dev, path.stat().st_ino)})


def results(told: dict[str, dict[str, str]], *kinds: str) -> set[str]:
    return {each for kind in kinds or told for each in told[kind].values()}


@NEEDS_ROOT
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_absent_or_protected_is_so_by_a_bind_mount(
    level: str, bare: Ground, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By every call; without that, all of them work. A protected folder can be read."""
    k, alias = bare.root / "k", bare.root / "w/alias"
    asked: dict[str, Any] = {"folder": str(alias), "begin": str(bare.root / "w")}
    with bound(k, alias), started(tmp_path_factory.mktemp("work"), level) as bare.sandbox:
        told = bare.run("use", **asked)
        assert results(told) == {"done"}, told
        told = bare.run("use", bare.access(absent=identity(k)), **asked)
        assert results(told) == {"ENOENT"}, told
        before = bare.names()
        told = bare.run("use", bare.access(protected=identity(k)), **asked)
        assert results(told, "look") == {"done"}, told
        assert "done" not in results(told, "change"), told
        assert bare.names() == before


@NEEDS_ROOT
@gets_through("a folder is listed by the kernel, with the names of what is absent")
def test_what_is_absent_is_not_listed(bare: Ground, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In the folder that it is mounted in."""
    with bound(bare.root / "k", bare.root / "w/alias"), started(tmp_path_factory.mktemp("work"), "L4") as bare.sandbox:
        access = bare.access(absent=identity(bare.root / "k"))
        assert "alias" not in bare.run("names", access, folder=str(bare.root / "w"))["names"]


@NEEDS_ROOT
@gets_through("Sight.absent and Sight.protected know the folder itself, not what lies in it")
@pytest.mark.parametrize("right", ["absent", "protected"])
def test_a_part_of_it_is_as_the_whole(right: str, bare: Ground, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A bind mount of a folder within it."""
    (bare.root / "k/sub/file").write_text("canary")
    with bound(bare.root / "k/sub", bare.root / "w/alias"), started(tmp_path_factory.mktemp("work"), "L4") as bare.sandbox:
        access = bare.access(**{right: identity(bare.root / "k")})
        told = bare.run("use", access, folder=str(bare.root / "w/alias"), begin=str(bare.root / "w"))
    assert told["look"]["open"] == "ENOENT" if right == "absent" else told["change"]["write"] == "EACCES"


@pytest.mark.parametrize("right", ["absent", "protected"])
@pytest.mark.parametrize("thing", ["p/h", "p/h/run"])
def test_a_folder_with_something_absent_or_protected_in_it_stays(right: str, thing: str, ground: Ground) -> None:
    """It can't be moved away, by any of the folders that it is in, for another one to be put in its place."""
    access = ground.access(**{right: identity(ground.root / "w" / thing)})
    with contextlib.suppress(AssertionError):
        ground.run("rename", access, one=f"{ground.root}/w/p", other=f"{ground.root}/w/n")
    assert (ground.root / "w" / thing).exists()


@pytest.mark.parametrize("right", ["absent", "protected"])
def test_a_file_is_absent_or_protected_by_its_other_name(right: str, ground: Ground) -> None:
    """A hard link in the scope."""
    os.link(ground.root / "k/file", ground.root / "w/file")
    access = ground.access(**{right: identity(ground.root / "k/file")})
    told = ground.run("use", access, folder=str(ground.root / "w"), begin=str(ground.root))
    lookups = {name: told["look"][name] for name in ("lstat", "access", "open", "attributes")}
    assert set(lookups.values()) == ({"ENOENT"} if right == "absent" else {"done"})
    assert {told["change"][name] for name in ("append", "truncate", "chmod", "link", "rename")} <= {"ENOENT", "EACCES"}
    assert (ground.root / "k/file").read_text() == "canary"


def test_a_call_that_may_write_to_the_path_begins_once_the_walk_is_over() -> None:
    """And once it has begun, no walk does by what it may write to."""
    walks, begun = Walks(), threading.Event()
    assert walks.begin(1, 1, 59, [b"/w/run"], walks.changes, [b"/w/path"])
    walks.enter(2, lambda path: path == b"/w/other")
    writer = threading.Thread(target=lambda: (walks.enter(3, lambda path: path == b"/w/path"), begun.set()))
    writer.start()
    assert not begun.wait(0.2)
    walks.end(1)
    assert begun.wait(2)
    writer.join()
    assert not walks.begin(1, 1, 59, [b"/w/run"], walks.changes, [b"/w/path"])
    walks.leave(3)
    assert walks.begin(1, 1, 59, [b"/w/run"], walks.changes, [b"/w/path"])
