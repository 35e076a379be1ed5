"""A daemon that runs shell commands in the background of a test, and what a test sees of them from outside."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest
from google.protobuf import struct_pb2

from agentd.client.transport import error_of
from agentd.errors import AgentdError
from agentd.v1 import tool_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agentd.client import Client

TOOLS = 'bundled = ["files", "system", "shell"]\n'
GRANT = '[[grants]]\ntool = "shell.run"\nscope = "exec:/usr"\n'
NOBODY = 65534
BY_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
_ANOTHER_PYTHON = 'shift; exec "$0" "$@"'
_ROOT_MAY = '[[principals]]\nname = "unix:root"\nroles = ["user", "approver", "auditor", "admin"]\n'
ENDS = frozenset({"call.end", "call.abort", "call.recovered"})


def shell_daemon(root: Path, extra: str = "", before: tuple[str, ...] = ()) -> DaemonProcess:
    """One that runs commands in its home directory."""
    return DaemonProcess(root, GRANT + extra, TOOLS, before=before)


def nobodys_daemon(root: Path) -> DaemonProcess:
    """The same run by nobody, who owns `root`; the test's own user may ask it for everything. Skips where that can't be."""
    if os.geteuid() != 0:
        pytest.skip("only root can be nobody")
    python = _nobodys_python(root)
    daemon = shell_daemon(root, _ROOT_MAY, (*BY_NOBODY, "sh", "-c", _ANOTHER_PYTHON, str(python)))
    daemon.environment = {"HOME": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    os.chown(root, NOBODY, NOBODY)
    daemon.home.mkdir()
    os.chown(daemon.home, NOBODY, NOBODY)
    return daemon


def _nobodys_python(root: Path) -> Path:
    """With the packages of this one. The environment's own may lie where nobody can't go: then it is the system's."""
    version = "python{}.{}".format(*sys.version_info)
    for candidate in (Path(sys.executable).resolve(), Path("/usr/bin", version)):
        environment = root / f"environment-{candidate.parent.name}"
        made = environment / "bin" / "python"
        made.parent.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        made.symlink_to(candidate)
        (environment / "pyvenv.cfg").write_text(f"home = {candidate.parent}\n")
        (environment / "lib" / version).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (environment / "lib" / version / "site-packages").symlink_to(sysconfig.get_path("purelib"))
        starts = [*BY_NOBODY, "sh", "-c", 'exec "$0" -c "import agentd.daemon"', str(made)]  # setpriv may still go anywhere
        if subprocess.run(starts, check=False, capture_output=True, cwd="/").returncode == 0:
            return made
    pytest.skip("there is no Python that nobody may start")


def wait_until(condition: Callable[[], object], seconds: float = 10, what: str = "it") -> float:
    """How long it took. Fails if the condition does not come true in time."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"{what} did not happen in {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - begun


@dataclass
class Background:
    """A call of `shell.run` that somebody waits for."""

    client: Client
    future: Any

    @property
    def is_over(self) -> bool:
        return bool(self.future.done())

    def cancel(self) -> None:
        self.future.cancel()

    def code(self, seconds: float = 30) -> grpc.StatusCode:
        """The status it ends with."""
        return self.future.code() if self._ended(seconds) else grpc.StatusCode.UNKNOWN

    def result(self, seconds: float = 60) -> tool_pb2.ToolCall:
        """What it gave back. Raises AgentdError."""
        self._ended(seconds)
        try:
            done: tool_pb2.ToolCall = self.future.result()
        except grpc.RpcError as e:
            raise error_of(e, str(self.client.socket)) from None
        return done

    def _ended(self, seconds: float) -> bool:
        wait_until(lambda: self.is_over, seconds, "the end of the call")
        return True


def begin(client: Client, command: str, directory: Path | str, deadline_s: float | None = None, **more: Any) -> Background:
    """Start a command and go on."""
    arguments = struct_pb2.Struct()
    arguments.update({"command": command, "folder": str(directory), **more})
    request = tool_pb2.CallToolRequest(name="tools/shell.run", arguments=arguments)
    return Background(client, client._tools.CallTool.future(request, timeout=deadline_s))


def run(client: Client, command: str, directory: Path | str, **more: Any) -> tool_pb2.ToolCall:
    return client.call("shell.run", {"command": command, "folder": str(directory), **more})


def failure(client: Client, command: str, directory: Path | str, tool: str = "shell.run", **more: Any) -> str:
    """What a command that has to fail says: of an error, or of a result that is one."""
    try:
        done = client.call(tool, {"command": command, "folder": str(directory), **more})
    except AgentdError as e:
        return str(e)
    assert done.failed, f"this is no failure: {done.output_json}"
    return done.output_json


# -- what is on the disk


class Entry(NamedTuple):
    mode: int
    """With the type."""
    content: bytes
    """Of a file; of a symlink its target."""
    mtime_ns: int
    """Of a file; changes in a directory are nobody's to put back."""


def tree(directory: Path) -> dict[str, Entry]:
    """All that is in a directory, and the directory itself, read by whoever may read everything of it."""
    return {str(path.relative_to(directory)): _entry(path) for path in sorted((directory, *directory.rglob("*")))}


def _entry(path: Path) -> Entry:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return Entry(status.st_mode, os.fsencode(path.readlink()), 0)
    if stat.S_ISREG(status.st_mode):
        return Entry(status.st_mode, path.read_bytes(), status.st_mtime_ns)
    return Entry(status.st_mode, b"", 0)


def differences(before: dict[str, Entry], after: dict[str, Entry]) -> list[str]:
    """Name by name, for a message that can be read."""
    return [
        f"{name}: {before.get(name)} became {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


@contextlib.contextmanager
def small_disk(at: Path, mib: int, kind: str = "tmpfs") -> Iterator[Path]:
    """A file system of its own, tmpfs or ext4. Skips where none can be mounted."""
    at.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=755", "tmpfs", str(at)]
    if kind == "ext4":
        image = at.parent / f"{at.name}.image"
        with image.open("wb") as file:
            file.truncate(mib << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True, capture_output=True)
        command = ["mount", "-o", "loop", str(image), str(at)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip(f"no {kind} can be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=False, capture_output=True)


def fill(file: Path, but: int = 0) -> None:
    """Take all the room there is, to the last byte, and give back `but` of it."""
    with file.open("wb", buffering=0) as full:
        for size in (1 << 16, 4096, 1):
            with contextlib.suppress(OSError):
                while full.write(bytes(size)):
                    pass
        end = max(0, full.tell() - but)
        full.truncate(end)


# -- what is on record


def events(client: Client) -> list[dict[str, Any]]:
    """The bodies of all events, oldest first."""
    from google.protobuf.json_format import MessageToDict

    return [MessageToDict(event.body) | {"kind": event.kind, "text": event.text} for event in client.audit_events()]


def open_calls(client: Client) -> list[str]:
    """Calls with an intent and no end."""
    seen = events(client)
    ended = {event.get("call") for event in seen if event["kind"] in ENDS}
    ended |= {event.get("cause") for event in seen if event["kind"] == "call.recovered"}
    return [event["call"] for event in seen if event["kind"] == "call.intent" and event["call"] not in ended]


# -- processes


def marked(mark: str) -> list[int]:
    """Living processes with this word in their command line, which everything forked by `sh -c` inherits."""
    known = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [each for each in known if mark.encode() in _read(f"/proc/{each}/cmdline")]


def below(process: int) -> dict[int, int]:
    """A process and all its descendants, each with the time it was started, which tells it from a later one."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            parents[int(name)] = int(fields[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {each: when for each in found if (when := started(each))}  # some have ended meanwhile


def started(process: int) -> int:
    """When, in ticks since the boot; 0 if it is gone or only waits to be waited for."""
    fields = _stat(process)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else 0


def described(process: int) -> str:
    """What it runs, its state, and what it waits for."""
    fields, line = _stat(process), _read(f"/proc/{process}/cmdline").replace(b"\0", b" ")
    waits = _read(f"/proc/{process}/wchan") + b" " + _read(f"/proc/{process}/syscall").strip()
    return f"{process} {line!r} {fields[:2]} in {waits!r}"


def _stat(process: int) -> list[bytes]:
    return _read(f"/proc/{process}/stat").rpartition(b")")[2].split()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
