"""Random trees with all that a file system has, and what is in a tree: looked at without a trace, and compared.

The same random numbers make the same tree. Whoever looks must own the tree, or be root: what its owner may not read is opened
up for the moment, and closed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

_NAMES = (
    *(
        b"a",
        b"b",
        b"c.txt",
        b"notes",
        b"d",
        b"e",
        b".hidden",
        b"with space",
        b"new\nline",
        b"quo'te\"s",
        b"-dash",
        b"bad\xff\xfe",
    ),
    *(b".agentd-0123456789abcdef", b"$HOME", b"star*", b"trailing "),
)
_DIRECTORY_MODES = (*(0o755,) * 8, 0o700, 0o775, 0o555, 0o555, 0o000, 0o2755, 0o1777)
_FILE_MODES = (*(0o644,) * 5, 0o755, 0o400, 0o444, 0o000, 0o600, 0o4755, 0o2644)
_KINDS = (*("file",) * 10, *("symlink",) * 3, *("link",) * 3, "fifo", "socket")
_BLOCK = 4096
_OLD_NS = (10**18, 16 * 10**17)  # between 2001 and 2020
_DEEP = 8  # directories in a deep one


@dataclass(frozen=True, slots=True)
class Node:
    """What is to be planted at a path. `text` is where a symlink leads, or the other name of a hard link."""

    path: bytes
    kind: str
    mode: int
    mtime_ns: int
    text: bytes = b""
    size: int = 0
    form: str = "text"
    attributes: tuple[tuple[str, bytes], ...] = ()

    @property
    def content(self) -> bytes:
        """Lines; bytes that can't be compressed; or a few among holes."""
        lines = b"".join(b"line %d of %s\n" % (n, self.path.replace(b"\n", b" ")) for n in range(self.size // 8 + 1))
        match self.form:
            case "noise":
                return hashlib.shake_128(self.path).digest(self.size)
            case "sparse":
                middle = self.size // 2
                return bytes(middle) + lines[:_BLOCK] + bytes(self.size - middle - len(lines[:_BLOCK]))
        return lines[: self.size]

    def __str__(self) -> str:
        told = [f"{self.kind:9}", f"{self.mode:04o}", str(self.mtime_ns), repr(self.path)]
        told += [f"-> {self.text!r}"] if self.text else []
        told += [f"{self.size} bytes ({self.form})"] if self.kind == "file" else []
        return " ".join((*told, *(f"{name}={value!r}" for name, value in self.attributes)))


# -- making one up


def imagine(chance: random.Random) -> tuple[Node, ...]:
    """The nodes of a tree, those above others first; the top is the empty path."""
    nodes = {b"": _directory(chance, b"", top=True)}
    for _ in range(chance.randint(1, 5)):
        _add(nodes, _directory(chance, _place(chance, nodes)))
    if chance.random() < 0.2:
        deep = _place(chance, nodes)
        for n in range(_DEEP):
            _add(nodes, _directory(chance, deep + b"/deep" * n))
    for _ in range(chance.randint(3, 10)):
        _add(nodes, _thing(chance, _place(chance, nodes), nodes))
    return tuple(nodes.values())


def _add(nodes: dict[bytes, Node], node: Node) -> None:
    parent = nodes.get(os.path.dirname(node.path))
    if node.path not in nodes and parent and parent.kind == "directory":
        nodes[node.path] = node


def _place(chance: random.Random, nodes: dict[bytes, Node]) -> bytes:
    directories = [node.path for node in nodes.values() if node.kind == "directory"]
    return os.path.join(chance.choice(directories), chance.choice(_NAMES))


def _directory(chance: random.Random, path: bytes, *, top: bool = False) -> Node:
    mode = 0o755 if top and chance.random() < 0.9 else chance.choice(_DIRECTORY_MODES)
    return Node(path, "directory", mode or 0o700 * top, _time(chance), attributes=_attributes(chance))


def _thing(chance: random.Random, path: bytes, nodes: dict[bytes, Node]) -> Node:
    kind, time = chance.choice(_KINDS), _time(chance)
    files = [node for node in nodes.values() if node.kind == "file"]
    if kind == "symlink":
        end = chance.choice(
            [b"nowhere", b"../nowhere/else", *(os.path.relpath(p or b".", os.path.dirname(path) or b".") for p in nodes)]
        )
        return Node(path, kind, 0o777, time, end)
    if kind == "link" and files:
        one = chance.choice(files)
        return Node(path, kind, one.mode, one.mtime_ns, one.path)
    if kind in ("fifo", "socket"):
        return Node(path, kind, chance.choice((0o600, 0o644, 0o000)), time)
    size, form = chance.choice(
        ((0, "text"), (20, "text"), (500, "text"), (500, "noise"), (40_000, "text"), (90_000, "noise"), (400_000, "sparse"))
    )
    return Node(path, "file", chance.choice(_FILE_MODES), time, b"", size, form, _attributes(chance))


def _time(chance: random.Random) -> int:
    return chance.randrange(*_OLD_NS)


def _attributes(chance: random.Random) -> tuple[tuple[str, bytes], ...]:
    return (("user.note", b"old"), ("user.\u00e4", b"\0\xff"))[: chance.choice((0, 0, 0, 1, 2))]


# -- making one


def plant(top: bytes, nodes: Sequence[Node]) -> None:
    """The tree below `top`, which is made. Modes and times come last, from the leaves up."""
    for node in nodes:
        _make(os.path.join(top, node.path) if node.path else top, node, top)
    for node in sorted(nodes, key=lambda node: -len(node.path)):
        path = os.path.join(top, node.path) if node.path else top
        if node.kind == "link":
            continue
        if node.kind != "symlink":
            _give_attributes(path, node)
            os.chmod(path, node.mode)
        os.utime(path, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)


def _make(path: bytes, node: Node, top: bytes) -> None:
    match node.kind:
        case "directory":
            os.mkdir(path)
        case "symlink":
            os.symlink(node.text, path)
        case "link":
            os.link(os.path.join(top, node.text), path)
        case "fifo":
            os.mkfifo(path)
        case "socket":
            _bind(path)
        case _:
            with open(path, "wb") as file:
                _write(file.fileno(), node.content)


def _write(descriptor: int, content: bytes) -> None:
    """Blocks of zeroes become holes."""
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        if block.strip(b"\0"):
            os.pwrite(descriptor, block, start)
    os.ftruncate(descriptor, len(content))


def _bind(path: bytes) -> None:
    """By way of its directory's descriptor: the name of a socket has room for 107 bytes."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(b"/proc/self/fd/%d/%s" % (directory, os.path.basename(path)))
    finally:
        os.close(directory)


def _give_attributes(path: bytes, node: Node) -> None:
    try:
        for name, value in node.attributes:
            os.setxattr(path, name, value)
    except OSError as e:
        if e.errno != errno.ENOTSUP:
            raise


# -- looking at one


@dataclass(frozen=True, slots=True)
class Entry:
    """What is at a path. `room` is how much of a file is no hole."""

    kind: str
    mode: int
    mtime_ns: int
    content: bytes = field(default=b"", repr=False)
    target: bytes = b""
    attributes: tuple[tuple[str, bytes], ...] = ()
    room: int = 0

    @property
    def has_holes(self) -> bool:
        """Whether it clearly takes less room than its length says."""
        return self.room < len(self.content) * 3 // 4 and len(self.content) > _BLOCK

    def __str__(self) -> str:
        told = [self.kind, f"{self.mode:04o}", f"mtime {self.mtime_ns}"]
        told += [f"-> {self.target!r}"] if self.kind == "symlink" else []
        told += [f"{len(self.content)} bytes {_digest(self.content)}"] if self.kind == "file" else []
        return " ".join((*told, *(f"{name}={value!r}" for name, value in self.attributes)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All paths below a top, itself included, and for each file with several names all of these."""

    entries: dict[bytes, Entry]
    links: dict[bytes, frozenset[bytes]]


def look(top: bytes) -> Snapshot:
    """Opens up what its owner may not read, and closes it again: nothing but ctime and atime is another afterwards."""
    entries: dict[bytes, Entry] = {}
    names: dict[tuple[int, int], set[bytes]] = {}
    _look(top, b"", entries, names)
    links = {path: frozenset(group) for group in names.values() if len(group) > 1 for path in group}
    return Snapshot(entries, links)


def _look(path: bytes, shown: bytes, entries: dict[bytes, Entry], names: dict[tuple[int, int], set[bytes]]) -> None:
    status = os.lstat(path)
    kind = _kind(status.st_mode)
    mode, time = stat.S_IMODE(status.st_mode), status.st_mtime_ns
    if kind in ("directory", "file"):
        with _opened_up(path, mode, 0o700 if kind == "directory" else 0o400):
            content, room = _read(path) if kind == "file" else (b"", 0)
            entries[shown] = Entry(kind, mode, time, content, b"", attributes_of(path), room)
            if kind == "directory":
                for name in sorted(os.listdir(path)):
                    _look(os.path.join(path, name), os.path.join(shown, name), entries, names)
    else:
        entries[shown] = Entry(kind, mode, time, target=os.readlink(path) if kind == "symlink" else b"")
    if kind != "directory":
        names.setdefault((status.st_dev, status.st_ino), set()).add(shown)


def _kind(mode: int) -> str:
    known = {
        stat.S_IFDIR: "directory",
        stat.S_IFREG: "file",
        stat.S_IFLNK: "symlink",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
    }
    return known.get(stat.S_IFMT(mode), "device")


@contextlib.contextmanager
def _opened_up(path: bytes, mode: int, needed: int) -> Iterator[None]:
    if mode & needed == needed:
        yield
        return
    os.chmod(path, mode | needed)
    try:
        yield
    finally:
        os.chmod(path, mode)


def _read(path: bytes) -> tuple[bytes, int]:
    """The content, and how much of it is no hole: blocks on the disk may come later than that."""
    with open(path, "rb", buffering=0) as file:
        content, room, at = file.readall(), 0, 0
        while at < len(content):
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            room += at - start
    return content, room


def attributes_of(path: bytes) -> tuple[tuple[str, bytes], ...]:
    """Those of users; none where the file system has none."""
    try:
        return tuple((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)) if name.startswith("user."))
    except OSError:
        return ()


def clear(top: bytes) -> None:
    """Remove a tree, whatever its modes."""
    os.chmod(top, 0o700)
    for entry in list(os.scandir(top)):
        if entry.is_dir(follow_symlinks=False):
            clear(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(top)


# -- comparing two


@dataclass(frozen=True, slots=True)
class Difference:
    """`what` is other at a path: missing, extra, kind, mode, content, target, mtime, attributes, holes or links."""

    path: bytes
    what: str
    kind: str
    was: str
    became: str

    def __str__(self) -> str:
        return f"  {self.path or b'.'!r}: {self.what} of {self.kind}\n    was    {self.was}\n    became {self.became}"


def compare(before: Snapshot, after: Snapshot) -> list[Difference]:
    """Everything in which two trees differ, path by path."""
    found: list[Difference] = []
    for path in sorted(before.entries.keys() | after.entries.keys()):
        was, became = before.entries.get(path), after.entries.get(path)
        if was and became:
            found += _differ(path, was, became)
            found += _links_differ(path, was, before, after)
        else:
            there = was or became
            assert there
            found.append(Difference(path, "missing" if was else "extra", there.kind, str(was or "-"), str(became or "-")))
    return found


def _differ(path: bytes, was: Entry, became: Entry) -> Iterator[Difference]:
    if was.kind != became.kind:
        yield Difference(path, "kind", was.kind, str(was), str(became))
        return
    if was.content != became.content:
        yield Difference(path, "content", was.kind, _excerpt(was, became), _excerpt(became, was))
    elif was.has_holes and not became.has_holes:
        told = [f"{each.room} bytes of room for {len(each.content)}" for each in (was, became)]
        yield Difference(path, "holes", was.kind, *told)
    for what, one, other in (
        ("mode", f"{was.mode:04o}", f"{became.mode:04o}"),
        ("mtime", str(was.mtime_ns), str(became.mtime_ns)),
        ("target", repr(was.target), repr(became.target)),
        ("attributes", repr(was.attributes), repr(became.attributes)),
    ):
        if one != other:
            yield Difference(path, what, was.kind, one, other)


def _links_differ(path: bytes, was: Entry, before: Snapshot, after: Snapshot) -> Iterator[Difference]:
    one, other = (each.links.get(path, frozenset({path})) for each in (before, after))
    if one != other:
        yield Difference(path, "links", was.kind, repr(sorted(one)), repr(sorted(other)))


def _excerpt(entry: Entry, other: Entry) -> str:
    """From the first byte that differs."""
    at = len(os.path.commonprefix([entry.content, other.content]))  # noqa: RUF071 # of bytes, not of paths
    return f"{len(entry.content)} bytes {_digest(entry.content)}, from byte {at}: {entry.content[at : at + 40]!r}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
