"""A hostile tool program: it has the kernel walk elsewhere than was decided on, or has something looked up that is hidden.

`root` holds `w`, which the scopes cover, and `h`, which they do not. Each attack answers {"got": ...}: whether it got there.
The same code runs unconfined with `python walks.py ATTACK ARGUMENTS-AS-JSON`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox.sdk import registered, tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Told = dict[str, Any]

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
VFORK, THREAD = 0x4111, 0x50F00  # flags of clone(2)
CLONE, EXIT, ACCESS, YIELD = 56, 60, 21, 24
# For x86-64, f(block): clone(flags, stack). The child makes one call with two arguments and ends; but if that was a clone and
# this is the new thread, it writes w and h in turn to an address, as often as it is told, and ends.
CODE = bytes.fromhex(
    "534889fbb838000000488b3b488b730831d24531d24531c00f0585c074025bc3488b4310488b7b18488b732031d24531d24531c00f05488b7330"
    "4885f6740485c0740d4889432831ffb83c0000000f05488b4b38c60177c6016848ffce75f5ebe6"
)
kept: list[Any] = []


def memory(size: int = 4096, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    kept.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection))
    return ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))


@functools.cache
def code() -> Callable[[int], int]:
    at = memory(protection=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    ctypes.memmove(at, CODE, len(CODE))
    return ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(at)


def clone(flags: int, number: int, one: int, two: int, *, flips: int = 0, at: int = 0) -> tuple[int, Any]:
    """The new process, and the block that has the result of its call."""
    block = (ctypes.c_longlong * 8)(flags, memory() + 4032, number, one, two, 0, flips, at)
    kept.append(block)
    return code()(ctypes.addressof(block)), block


def nothing() -> None:
    return


def enter(folder: str) -> None:
    """Sooner or later: a thread that has ended may still be counted for a moment, a folder may be away."""
    end = time.monotonic() + 5
    while True:
        try:
            return os.chdir(folder)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.0001)


def start(path: Any) -> None:
    libc.execve(path, (ctypes.c_char_p * 2)(b"run", None), (ctypes.c_char_p * 1)(None))


def go(root: str, name: str, path: Any, seconds: float, arm: Callable[[], Callable[[], Any]], *, times: int = 1) -> Told:
    """Enter (`it`) or start (`run`) what a path leads to, which `arm` has begun to change, until that is what lies in h."""
    end, tries = time.monotonic() + seconds, 0
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    while time.monotonic() < end:
        tries += 1
        enter(root + "/w")
        if name == "it":
            disarm = arm()
            won = any(libc.chdir(path) == 0 and os.getcwd() == root + "/h/it" for _ in range(times))
            disarm()
        else:
            child = os.fork()
            if child == 0:
                os.dup2(writer, 1)
                arm()
                for _ in range(20):
                    start(path)
                os._exit(0)
            os.waitpid(child, 0)
            try:
                won = b"ran" in os.read(reader, 100)
            except BlockingIOError:
                won = False
        if won:
            return {"got": True, "tries": tries}
    return {"got": False, "tries": tries}


def flippable(root: str, name: str) -> tuple[Any, int]:
    """A path in w, and the address of the letter that makes it one in h."""
    path = ctypes.create_string_buffer(f"{root}/w/{name}".encode())
    return path, ctypes.addressof(path) + len(root) + 1


@tool("thread_that_ends")
def thread_that_ends(root: str, name: str, seconds: float) -> Told:
    path, at = flippable(root, name)

    def change() -> None:
        for _ in range(random.randrange(2000)):
            pass
        ctypes.memset(at, ord("h"), 1)

    def arm() -> Callable[[], Any]:
        ctypes.memset(at, ord("w"), 1)
        thread = threading.Thread(target=change)
        thread.start()
        return thread.join

    return go(root, name, path, seconds, arm)


@tool("orphaned_thread")
def orphaned_thread(root: str, name: str, seconds: float) -> Told:
    """The first thread of a vfork's child makes a second one and ends: the parent goes on, beside that one."""
    path, at = flippable(root, name)

    def arm() -> Callable[[], Any]:
        ctypes.memset(at, ord("w"), 1)
        child, _ = clone(VFORK, CLONE, THREAD, memory() + 4032, flips=1 << 23, at=at)
        return functools.partial(os.waitpid, child, 0)

    return go(root, name, path, seconds, arm, times=100)


@tool("removed_folder")
def removed_folder(root: str, name: str, seconds: float) -> Told:
    """The folder that it is in is gone: it is called `x (deleted)` then, and that is a link that leads further down."""
    os.symlink("p/q/b", root + "/w/x (deleted)")

    def arm() -> Callable[[], Any]:
        os.mkdir(root + "/w/x")
        os.chdir(root + "/w/x")
        os.rmdir(root + "/w/x")
        return nothing

    return go(root, name, b"../../h/" + name.encode(), seconds, arm)


@tool("move")
def move(root: str, one: str, other: str, seconds: float, pause: float = 0) -> Told:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for old, new in ((one, other), (other, one)):
            time.sleep(pause)
            try:
                os.rename(f"{root}/{old}", f"{root}/{new}")
            except OSError:
                continue
    return {"got": False}


@tool("walk")
def walk(root: str, name: str, begin: str, path: str, seconds: float) -> Told:
    """From a folder, or over one, that others move."""

    def arm() -> Callable[[], Any]:
        enter(f"{root}/{begin}")
        return nothing

    return go(root, name, (path.format(root=root) + name).encode(), seconds, arm)


@tool("move_and_walk")
def move_and_walk(root: str, name: str, begin: str, path: str, one: str, other: str, seconds: float) -> Told:
    if os.fork() == 0:
        move(root, one, other, seconds)
        os._exit(0)
    return walk(root, name, begin, path, seconds)


def compete(threads: int) -> None:
    for _ in range(threads):
        clone(THREAD, YIELD, 0, 0, flips=1 << 40, at=memory())
    time.sleep(1000)


def rename_as_told(shared: mmap.mmap, one: str, other: str) -> None:
    """As long as the first byte says so, a folder has its other name; the second one says when it has its own again."""
    while True:
        for old, new, wanted in ((one, other, 1), (other, one, 0)):
            while shared[0] != wanted:
                time.sleep(0.0005)
            try:
                os.rename(old, new)
            except OSError:
                continue
        shared[1] = 1


@tool("starve")
def starve(root: str, name: str, seconds: float, threads: int) -> Told:
    """Many want the processor when the kernel is about to walk: who has just had it for long gets it late."""
    if os.fork() == 0:
        compete(threads)
    shared = mmap.mmap(-1, 4096)
    if os.fork() == 0:
        rename_as_told(shared, root + "/w/p/q/b", root + "/w/b")

    def disarm() -> None:
        time.sleep(0.003)
        shared[0] = 0
        while not shared[1]:
            time.sleep(0.001)

    def arm() -> Callable[[], Any]:
        os.chdir(root + "/w/p/q/b")
        used = time.thread_time()
        while time.thread_time() - used < 0.004:
            pass
        shared[1], shared[0] = 0, 1
        return disarm

    return go(root, name, b"../../h/it", seconds, arm)


@tool("nested")
def nested() -> Told:
    """A vfork within a vfork: if the one between is killed, the first goes on in the memory of the last."""
    child, block = clone(VFORK, CLONE, VFORK, memory() + 4032)
    os.waitpid(child, 0)
    return {"got": block[5]}


@tool("ordinary")
def ordinary(root: str) -> Told:
    child = os.posix_spawn(root + "/w/run", ["run"], {})
    spawned = os.waitpid(child, 0)[1]
    command = f"cd {root}/w && cd p && h/run; ls | sort"
    text = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, check=True).stdout.decode()
    return {"spawned": spawned, "text": text}


@tool("recycled")
def recycled(root: str, mine: str, its: str) -> Told:
    """A vfork's child has this memory opened by its number. That another process gets then, whose memory says otherwise."""
    path, at = flippable(root, "it")
    got = times = 0
    for n in range(20):
        child, _ = clone(VFORK, ACCESS, ctypes.addressof(path), 0)
        os.waitpid(child, 0)
        Path(f"{root}/w/new").write_text(str(child))
        Path(f"{root}/w/new").rename(f"{root}/w/ask{n}")
        while not Path(f"{root}/w/given{n}").exists():
            time.sleep(0.001)
        ctypes.memset(at, ord(mine), 1)
        again = os.fork()
        if again == 0:
            ctypes.memset(at, ord(its), 1)
            os._exit(7 if libc.chdir(path) == 0 and os.getcwd() == f"{root}/{its}/it" else 0)
        status = os.waitstatus_to_exitcode(os.waitpid(again, 0)[1])
        times += again == child
        got += again == child and status == 7
    return {"got": got, "times": times}


@tool("mapped")
def mapped(root: str, name: str, seconds: float) -> Told:
    """The path lies in a private mapping of a file that this call may only read, and another one may write."""
    file = os.open(root + "/w/path", os.O_RDONLY)
    at = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_PRIVATE, file, ctypes.c_long(0))
    return go(root, name, ctypes.c_void_p(at), seconds, lambda: nothing)


@tool("write_in_turn")
def write_in_turn(root: str, seconds: float) -> Told:
    file, end = os.open(root + "/w/path", os.O_WRONLY), time.monotonic() + seconds
    while time.monotonic() < end:
        for letter in b"wh" * 50:
            os.pwrite(file, bytes((letter,)), len(root) + 1)
    return {"got": False}


@tool("interpreter")
def interpreter(root: str) -> Told:
    """Scripts of its own whose first lines name what is hidden and what is not there: can they be told apart?"""
    script, told = root + "/w/script", []
    for name in ("run", "none"):
        Path(script).write_text(f"#!{root}/h/{name}\n")
        os.chmod(script, 0o755)
        child = os.fork()
        if child == 0:
            start(script.encode())
            os._exit(ctypes.get_errno())
        told.append(os.waitpid(child, 0)[1])
    return {"got": told[0] != told[1]}


@tool("outlive")
def outlive(root: str, seconds: float) -> Told:
    """Of a forked process the first thread ends, and the second one goes on."""

    def write() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with open(root + "/w/log", "a") as file:
                file.write("x")
            time.sleep(0.01)
        os._exit(0)

    if os.fork() == 0:
        threading.Thread(target=write).start()
        libc.syscall(ctypes.c_long(EXIT), ctypes.c_long(0))
    time.sleep(0.2)
    return {"done": True}


@tool("retain")
def retain(root: str, folders: int, links: int, children: int) -> Told:
    """A way of many links, each behind many folders, walked by processes that make no call after that."""
    os.chdir(root + "/w")
    for _ in range(folders):
        os.mkdir("n" * 13)
        os.chdir("n" * 13)
    deep = root + "/w" + ("/" + "n" * 13) * folders
    for n in range(links):
        os.symlink(f"{deep}/k{n + 1}", f"k{n}")
    os.mkdir(f"k{links}")
    for _ in range(children):
        child = os.fork()
        if child == 0:
            libc.chdir(f"{deep}/k0".encode())
            os._exit(0)
        os.waitpid(child, 0)
    return {"done": True}


@tool("read")
def read(path: str) -> Told:
    return {"size": len(Path(path).read_bytes())}


@tool("rename")
def rename(one: str, other: str) -> Told:
    os.rename(one, other)
    return {"names": sorted(os.listdir(os.path.dirname(other)))}


@tool("names")
def names(folder: str) -> Told:
    return {"names": sorted(os.listdir(folder))}


def opened(path: str, flags: int) -> None:
    os.close(os.open(path, flags, 0o600))


def started(path: str) -> None:
    child = os.fork()
    if child == 0:
        start(path.encode())
        os._exit(ctypes.get_errno())
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(code, "start")


def ways_to_look(folder: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    file = folder + "/file"
    yield "stat", lambda: os.stat(folder)
    yield "lstat", lambda: os.lstat(file)
    yield "list", lambda: os.listdir(folder)
    yield "access", lambda: os.access(file, os.R_OK) or os.lstat(file + "/none")
    yield "open", lambda: opened(file, os.O_RDONLY)
    yield "readlink", lambda: os.readlink(folder + "/link")
    yield "statfs", lambda: os.statvfs(folder)
    yield "attributes", lambda: os.listxattr(file)
    yield "start", lambda: started(folder + "/run")
    yield "chdir", lambda: os.chdir(folder + "/sub")


def ways_to_change(folder: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """In an order in which all can be done."""
    file, new, sub = folder + "/file", folder + "/new", folder + "/sub"
    yield "write", lambda: opened(file, os.O_WRONLY)
    yield "append", lambda: opened(file, os.O_WRONLY | os.O_APPEND)
    yield "truncate", lambda: os.truncate(file, 3)
    yield "chmod", lambda: os.chmod(file, 0o600)
    yield "utime", lambda: os.utime(folder)
    yield "create", lambda: opened(new, os.O_WRONLY | os.O_CREAT)
    yield "unlink", lambda: os.unlink(new)
    yield "mkdir", lambda: os.mkdir(new)
    yield "rmdir", lambda: os.rmdir(new)
    yield "symlink", lambda: os.symlink("file", new)
    yield "rename link", lambda: os.rename(new, folder + "/other")
    yield "unlink link", lambda: os.unlink(folder + "/other")
    yield "link", lambda: os.link(file, new)
    yield "unlink name", lambda: os.unlink(new)
    yield "rename", lambda: os.rename(file, new)
    yield "rename back", lambda: os.rename(new, file)
    yield "rename folder", lambda: os.rename(sub, new)
    yield "rename folder back", lambda: os.rename(new, sub)


@tool("use")
def use(folder: str, begin: str) -> dict[str, dict[str, str]]:
    """What comes of all that can be done with a folder and what is in it: `done`, or the name of the error."""
    told: dict[str, dict[str, str]] = {}
    for kind, ways in (("look", ways_to_look(folder)), ("change", ways_to_change(folder))):
        told[kind] = {}
        for name, do in ways:
            os.chdir(begin)
            try:
                do()
                told[kind][name] = "done"
            except OSError as e:
                told[kind][name] = errno.errorcode[e.errno or 0]
    return told


if __name__ == "__main__":
    print(json.dumps(registered[sys.argv[1]](**json.loads(sys.argv[2]))))
