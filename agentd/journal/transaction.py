"""The changes of one call while it runs, and the state of each path before the first of them, taken within bounds."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentd_sandbox import Refusal
from agentd_sandbox.paths import WalkError

from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal.contents import INLINE_BYTES, Contents, TooLarge
from agentd.journal.images import Image
from agentd.journal.places import at
from agentd.journal.state import keep, opened, without_content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from agentd_sandbox import Change
    from agentd_sandbox.nearby import Nearby
    from agentd_sandbox.recorder import Operation

    from agentd.audit import Event, FileTouched
    from agentd.journal.journal import Journal
    from agentd.journal.places import Granting
    from agentd.journal.retention import Keep

_MIB = 1 << 20
_GOES = frozenset({"remove", "replace"})
_LOOKED_AT = 20_000  # names among which other names of a file are looked for
_NAMES = 8  # of those that are noted
_SEVERAL, _NO_MORE = 2, 1 << 30  # commits for names of a directory
_AHEAD = 512  # paths whose states are taken before they are removed, in one commit with that of the first
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_Listed = list[tuple[bytes, os.stat_result]]
Seen = tuple[int, int, int, int]
"""Inode, length, and the times of the last changes of content and of anything: the same ones mean the same state."""


class CannotKeep(JournalError):
    """The former state of a path can't be kept, so it may not be changed; `errno` is what the tool gets."""

    def __init__(self, code: int, path: bytes, message: str, *, hint: str = "", **metadata: str) -> None:
        reason = Reason.DESCRIPTORS_SHORT if code in _NO_DESCRIPTORS else Reason.NOT_UNDOABLE
        super().__init__(reason, message, hint=hint, metadata={"path": os.fsdecode(path), **metadata})
        self.errno = code


@dataclass(slots=True)
class Transaction:
    """Is the recorder of its worker's broker (`before_changes`). `begun` is its place among all calls."""

    _journal: Journal
    call: str
    begun: int
    images: dict[bytes, Image] = field(default_factory=dict)
    size: int = 0
    """Bytes of all contents that were kept for it."""
    roots: tuple[bytes, ...] = ()
    """What it may change, where other names of a file are looked for."""
    limited: bool = True
    """Whether what is kept of it is bounded: not where former states are restored."""
    rows: int = 0
    """How many states are on disk for it."""
    ahead: dict[bytes, tuple[Image, Seen]] = field(default_factory=dict)
    """States that were taken ahead, and how each path was then: they count once the path is removed, unless somebody else has
    changed it since.
    """
    _removed: dict[bytes, int] = field(default_factory=dict)
    """How many commits the removal of names of a directory has taken so far."""
    _names: dict[str, list[bytes]] | None = None
    looked_everywhere: bool = False
    """Whether other names have been looked for in directories that may not be searched, too."""

    @property
    def mark(self) -> bytes:
        """Part of the names of files that take the place of others: nobody else's have it."""
        return os.fsencode(self.call)

    def before_changes(self, changes: Sequence[Change]) -> frozenset[bytes]:
        """Make the pre-images of paths durable, once per path, in one commit. Raises Refusal where that can't be done."""
        wanted: dict[bytes, Operation] = {}
        anew: list[bytes] = []
        for change in changes:
            if (image := self.images.get(change.path)) is not None and image.ahead:
                anew.append(change.path)
            image = image or self._taken_ahead(change)
            if image is None or (image.content.length and change.operation != "append"):
                wanted[change.path] = change.operation
        if not (wanted or anew):
            return frozenset()
        try:
            if anew:
                self._journal.captures.confirm(self, anew)
            if len(changes) == 1 and changes[0].operation == "remove":
                self._take_ahead(changes[0].path)
            self._journal.captures.capture(self, wanted, None)
        except CannotKeep as e:
            raise Refusal(e.errno, str(e)) from None
        except JournalError as e:
            raise Refusal(errno.EFBIG, str(e)) from None
        except AgentdError as e:
            raise Refusal(errno.ENOSPC if e.reason is Reason.STORE_FULL else errno.EIO, str(e)) from None
        return frozenset(path for path in wanted if self.images[path].content.as_it_is)

    def _taken_ahead(self, change: Change) -> Image | None:
        """The state of a path that is about to be removed, if it was taken ahead and nobody has changed it since."""
        image, seen = self.ahead.get(change.path, (None, None))
        if image is None or change.operation != "remove" or seen != _seen(change.path):
            return None
        del self.ahead[change.path]
        self.size += len(image.content.inline or b"")
        self.images[change.path] = image
        return image

    def _take_ahead(self, path: bytes) -> None:
        """Whoever removes several names of a directory often removes them all: each commit takes twice as many as the last.

        One commit for each of thousands of files would take a minute. Only what the call may change is looked at.
        """
        directory = os.path.dirname(path)
        taken = self._removed.get(directory, 0) + 1
        if taken > _NO_MORE or not self._covers(directory):
            return
        self._removed[directory] = taken
        if taken < _SEVERAL:
            return
        wanted = min(_AHEAD, 1 << taken)
        names = _small(directory, self.images.keys() | self.ahead.keys() | {path}, wanted)
        if len(names) < wanted:
            self._removed[directory] = _NO_MORE  # the others are large, and taken one by one
        size = self.size
        with contextlib.suppress(AgentdError):  # each is taken by itself then, or refused
            self._journal.captures.capture_ahead(self, names)
        self.size = size

    def _covers(self, directory: bytes) -> bool:
        return any(directory == root or directory.startswith(root.rstrip(b"/") + b"/") for root in self.roots)

    def other_names(self, path: bytes, inode: str) -> tuple[str, ...]:
        """Of a file with several, some that are not `path`: what is removed can then come back as a name of the same file."""
        if self._names is None:
            self._names = _linked(self.roots, _as_it_is)
        return tuple(os.fsdecode(name) for name in self._names.get(inode, ()) if name != path)[:_NAMES]

    def look_for_names(self, granting: Granting) -> None:
        """Also in directories that may not be searched: they are known to `other_names` from then on."""
        self.looked_everywhere = True
        self._names = _linked(self.roots, granting.reading)

    def keep_only(self, paths: frozenset[bytes]) -> None:
        """Nothing was done to any other path."""
        self.images = {path: image for path, image in self.images.items() if path in paths}

    def finish(self, event: Event) -> tuple[FileTouched, ...]:
        """Record the end of the call with what it changed; durable when it returns."""
        return self._journal.finish(self, event)

    def rehearse(self, event: Event) -> tuple[FileTouched, ...]:
        """Keep what the call has made of each path, restore everything, and record that."""
        return self._journal.rehearse(self, event)

    def roll_back(self, event: Event) -> None:
        """Restore everything and record that the call had no effect."""
        self._journal.roll_back(self, event)


def _as_it_is(do: Callable[[], _Listed], _directory: bytes) -> _Listed:
    return do()


def _linked(roots: Iterable[bytes], reading: Callable[[Callable[[], _Listed], bytes], _Listed]) -> dict[str, list[bytes]]:
    """Files that have several names, by device and inode, as far as a look of bounded length finds them."""
    found: dict[str, list[bytes]] = {}
    count, todo = 0, list(roots)
    while todo and count <= _LOOKED_AT:
        directory = todo.pop()
        with contextlib.suppress(OSError, AgentdError):
            for path, status in reading(functools.partial(_listed, directory), directory):
                count += 1
                if stat.S_ISDIR(status.st_mode):
                    todo.append(path)
                elif status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
                    found.setdefault(f"{status.st_dev}:{status.st_ino}", []).append(path)
    return found


def _listed(directory: bytes) -> _Listed:
    """What is in a directory, which is no symlink. Raises OSError."""
    with at(directory) as place:
        if not place.is_folder:
            return []
        with os.scandir(f"/proc/self/fd/{place.descriptor}") as entries:
            listed: _Listed = []
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                    path = directory.rstrip(b"/") + b"/" + os.fsencode(entry.name)
                    listed.append((path, entry.stat(follow_symlinks=False)))
            return listed


def _seen(path: bytes) -> Seen | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _small(directory: bytes, known: Iterable[bytes], count: int) -> Mapping[bytes, Seen]:
    """Files and symlinks in a directory whose content goes into the store itself, and how each is now."""
    found: dict[bytes, Seen] = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            path = os.path.join(directory, entry.name)
            if path in known or not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                continue
            status = entry.stat(follow_symlinks=False)
            if status.st_size <= INLINE_BYTES and (entry.is_symlink() or status.st_mode & stat.S_IRUSR):
                found[path] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if len(found) >= count:
                break
    return found


class Taker:
    """Takes images of paths, as much as may be kept."""

    def __init__(self, contents: Contents, bounds: Keep) -> None:
        self._contents, self._bounds = contents, bounds

    def take(self, transaction: Transaction, path: bytes, operation: Operation, nearby: Nearby | None = None) -> Image:
        """Raises OSError (EACCES) if something of ours has to be made accessible first, CannotKeep, StoreError."""
        how = {"goes": operation in _GOES, "grows": operation == "append", "ours": not transaction.limited}
        limit = self._bounds.file_bytes if transaction.limited else None
        known = transaction.images.get(path)
        try:
            if known and known.content.length:
                return self._in_full(known)
            state, kept = keep(path, self._contents, limit=limit, nearby=nearby, **how)
            if state.links > 1:
                state = replace(state, twins=transaction.other_names(path, state.inode))
            if state.kind == "folder" and state.attributes is None and os.lstat(path).st_uid == os.geteuid():
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except TooLarge:
            raise self._too_large(path) from None
        except OSError as e:
            if e.errno == errno.EACCES and _is_ours(path, e):
                raise
            raise unreadable(path, e) from e
        if state.kind == "other":
            message = f"{os.fsdecode(path)} is a device, so changing it could not be undone."
            raise CannotKeep(errno.EPERM, path, message)
        transaction.size += self._contents.size(kept.object) if kept.object else len(kept.inline or b"")
        if transaction.limited and transaction.size > self._bounds.call_bytes:
            limit_mib = self._bounds.call_bytes // _MIB
            raise CannotKeep(
                errno.EFBIG,
                path,
                f"The call has changed more than the {limit_mib} MiB the journal keeps of one; the rest could not be undone.",
                hint="Raise journal.call_limit_mib in agentd.toml if it must be.",
                limit_mib=str(limit_mib),
            )
        return Image(transaction.call, path, state, kept, n=known.n if known else 0)

    def note(self, transaction: Transaction, path: bytes) -> Image | None:
        """Of a file that can't be read yet: all but its content. None if not even its directory may be searched."""
        try:
            return Image(transaction.call, path, without_content(path))
        except OSError:
            return None

    def _in_full(self, image: Image) -> Image:
        """Of a file that was only appended to so far: its first bytes, before something else happens to them."""
        with opened(image.path) as descriptor:
            kept = self._contents.keep_first(descriptor, image.content.length)
        if kept.digest != image.before.digest:
            raise OSError(errno.EIO, "somebody else changed it meanwhile")
        return replace(image, content=kept)

    def at_once(self, paths: Iterable[bytes]) -> dict[bytes, Operation]:
        """Those of the declared paths whose state is best taken with the intent: large files wait until something happens to
        them, as that says whether they must be copied. Raises CannotKeep if one is larger than is kept.
        """
        small: dict[bytes, Operation] = {}
        for path in paths:
            size = _size(path)
            if size > self._bounds.file_bytes:
                raise self._too_large(path)
            if size <= INLINE_BYTES:
                small[path] = "write"
        return small

    def foresee(self, paths: Iterable[bytes]) -> str:
        """Why changing these paths could not be undone, as far as can be said beforehand; empty if it could."""
        whole = 0
        for path in paths:
            size = _size(path)
            whole += size
            if size > self._bounds.file_bytes:
                limit = self._bounds.file_bytes // _MIB
                return f"{os.fsdecode(path)} has {size // _MIB} MiB, more than the {limit} MiB the journal keeps of a file"
        if whole > self._bounds.call_bytes:
            limit = self._bounds.call_bytes // _MIB
            return f"it would change {whole // _MIB} MiB, more than the {limit} MiB the journal keeps of a call"
        return ""

    def _too_large(self, path: bytes) -> CannotKeep:
        shown, limit = os.fsdecode(path), self._bounds.file_bytes // _MIB
        return CannotKeep(
            errno.EFBIG,
            path,
            f"{shown} is larger than the {limit} MiB the journal keeps, so changing it could not be undone.",
            hint="Raise journal.file_limit_mib in agentd.toml if it must be changed.",
            limit_mib=str(limit),
        )


def unreadable(path: bytes, error: OSError) -> CannotKeep:
    shown, code = os.fsdecode(path), error.errno or errno.EIO
    if code in _NO_DESCRIPTORS:
        message = f"agentd has no file descriptor left to keep {shown}, so it may not be changed now."
        return CannotKeep(code, path, message, hint="Raise the limit of open files: `ulimit -n`, or LimitNOFILE= in the unit.")
    message = f"{shown} can't be read for the journal: {error.strerror}."
    return CannotKeep(errno.EACCES, path, message, hint="Check the path and its permissions.")


def _is_ours(path: bytes, error: OSError) -> bool:
    """Whether what may not be read, or the directory that may not be searched, is the daemon's own user's."""
    closed = os.path.dirname(error.reached) if isinstance(error, WalkError) else path
    with contextlib.suppress(OSError):
        return os.lstat(closed).st_uid == os.geteuid()
    return isinstance(error, WalkError)  # below another one that may not be searched, either


def _size(path: bytes) -> int:
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0
