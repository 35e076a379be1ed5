"""What one call may touch: path rules and peers, matched on real paths only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class PathRule:
    """One path and all below it. With `glob`, `*` stands for a part of one name and `**` for whole branches.

    Paths are absolute, real (no symlinks, no `..`) and bytes: file names need not be UTF-8.
    """

    path: bytes
    glob: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        return _expression(self.path)

    @cached_property
    def _below(self) -> bytes:
        return self.path.rstrip(b"/") + b"/"

    @cached_property
    def _ways(self) -> tuple[re.Pattern[bytes], ...]:
        """The folders that lead to a glob: one expression for each of its names, up to a `**`."""
        names = self.path.split(b"/")[1:]
        deep = next((n for n, name in enumerate(names) if b"**" in name), len(names) - 1)
        ways = [_expression(b"/" + b"/".join(names[:n])) for n in range(deep + 1)]
        if deep < len(names) - 1:
            ways.append(_expression(b"/" + b"/".join((*names[:deep], b"**"))))
        return tuple(ways)

    def covers(self, path: bytes) -> bool:
        if self.glob:
            return self._pattern.fullmatch(path) is not None
        return path.startswith(self._below) or path == self.path

    def lies_below(self, folder: bytes) -> bool:
        """Whether `folder` is on the way to this path: it may be seen to exist, nothing more."""
        if folder == b"/":
            return True
        if self.glob:
            return any(way.fullmatch(folder) for way in self._ways)
        return self._below.startswith(folder + b"/")


def _expression(glob: bytes) -> re.Pattern[bytes]:
    parts = re.split(rb"(\*\*|\*)", glob)
    expressions = {b"**": rb".*", b"*": rb"[^/]*"}
    return re.compile(b"".join(expressions.get(part, re.escape(part)) for part in parts), re.DOTALL)


_FEW = 16  # rules that are compared one after another


@dataclass(frozen=True)
class Rules:
    """Many rules asked at once: most are plain paths, and those cost one comparison for all."""

    rules: tuple[PathRule, ...]

    @cached_property
    def _exact(self) -> frozenset[bytes]:
        return frozenset(rule.path.rstrip(b"/") or b"/" for rule in self.rules if not rule.glob)

    @cached_property
    def _below(self) -> tuple[bytes, ...]:
        return tuple(rule._below for rule in self.rules if not rule.glob)

    @cached_property
    def _alone(self) -> frozenset[bytes]:
        """Globs without a wildcard: that very path, and nothing below it."""
        return frozenset(rule.path for rule in self.rules if rule.glob and b"*" not in rule.path)

    @cached_property
    def _globs(self) -> tuple[PathRule, ...]:
        return tuple(rule for rule in self.rules if rule.glob and rule.path not in self._alone)

    @cached_property
    def _ways(self) -> frozenset[bytes]:
        steps = (way.split(b"/") for way in (*self._below, *(path + b"/" for path in self._alone)))
        return frozenset({b"/"} | {b"/".join(names[:n]) for names in steps for n in range(2, len(names) - 1)})

    def cover(self, path: bytes) -> bool:
        if path in self._exact or path in self._alone or self._lies_in(path):
            return True
        return bool(self._globs) and any(rule.covers(path) for rule in self._globs)

    def _lies_in(self, path: bytes) -> bool:
        if len(self._below) <= _FEW:
            return path.startswith(self._below)
        at = len(path)
        while (at := path.rfind(b"/", 0, at)) > 0:
            if path[:at] in self._exact:
                return True
        return b"/" in self._exact

    def lie_below(self, folder: bytes) -> bool:
        return folder in self._ways or (bool(self._globs) and any(rule.lies_below(folder) for rule in self._globs))


_NONE = Rules(())


@dataclass(frozen=True)
class Access:
    """The scopes of one call. `write` does not include `read`.

    `connect` holds (host, port): a host is a literal address, or a name that the broker resolves to public addresses.
    `execute` names the programs that may be started; with any, what programs need to run at all may be read.
    `use` names the credentials that the broker may add to requests of this call. `devices` are nodes that may be opened
    to read and to write, `operate` names those that the broker itself has operated for the call; what is done to either
    can't be undone. What is `hidden` does not exist, whatever the other rules say. So doesn't what is `absent`, by device and
    inode: a bind mount or another mount of its file system is no way to it. What is `protected` may not be changed, nor what
    runs `later`, unless it is `named`.
    """

    read: tuple[PathRule, ...] = ()
    write: tuple[PathRule, ...] = ()
    connect: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    execute: tuple[PathRule, ...] = ()
    use: frozenset[str] = field(default_factory=frozenset)
    devices: tuple[PathRule, ...] = ()
    operate: frozenset[str] = field(default_factory=frozenset)
    hidden: tuple[PathRule, ...] = ()
    absent: frozenset[tuple[int, int]] = frozenset()
    protected: frozenset[tuple[int, int]] = frozenset()
    later: tuple[PathRule, ...] = ()
    named: tuple[PathRule, ...] = ()
    system: Rules = field(default_factory=lambda: _NONE)
    """What may be read beside `read`: the same for all calls, so made once."""

    @cached_property
    def _reading(self) -> Rules:
        return Rules(self.read)

    @cached_property
    def _writing(self) -> Rules:
        return Rules(self.write)

    @cached_property
    def _executing(self) -> Rules:
        return Rules(self.execute)

    @cached_property
    def _devices(self) -> Rules:
        return Rules(self.devices)

    @cached_property
    def _hidden(self) -> Rules:
        return Rules(self.hidden)

    @cached_property
    def _later(self) -> Rules:
        return Rules(self.later)

    @cached_property
    def _named(self) -> Rules:
        return Rules(self.named)

    @cached_property
    def _all(self) -> Rules:
        return Rules((*self.read, *self.write, *self.execute, *self.devices))

    def may_read(self, path: bytes) -> bool:
        readable = self._reading.cover(path) or self.system.cover(path)
        return readable and not (self.hidden and self._hidden.cover(path))

    def may_write(self, path: bytes) -> bool:
        if not self._writing.cover(path) or (self.hidden and self._hidden.cover(path)):
            return False
        return not self.runs_later(path)

    def runs_later(self, path: bytes) -> bool:
        """Whether a program that is not confined will run it, or be told by it what to run."""
        return bool(self.later) and self._later.cover(path) and not self._named.cover(path)

    def may_execute(self, path: bytes) -> bool:
        return self._executing.cover(path) and not (self.hidden and self._hidden.cover(path))

    def leads_later(self, path: bytes) -> bool:
        """Whether a symlink of this name would lead to what runs later, which could then be written elsewhere."""
        return bool(self.later) and self._later_alone.lie_below(path) and not self._named.cover(path)

    @cached_property
    def _later_alone(self) -> Rules:
        return Rules(tuple(rule for rule in self.later if not rule.glob))

    def is_device(self, path: bytes) -> bool:
        return self._devices.cover(path) and not (self.hidden and self._hidden.cover(path))

    def may_see(self, path: bytes) -> bool:
        """Whether the call may know if `path` exists and what kind of thing it is."""
        seen = self._all.cover(path) or self._all.lie_below(path) or self.system.cover(path) or self.system.lie_below(path)
        return seen and not (self.hidden and self._hidden.cover(path))
