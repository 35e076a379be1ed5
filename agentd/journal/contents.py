"""Contents that the journal keeps: small ones within the store's own commit, large ones as files named by their SHA-256.

A large one is cloned where the file system can do that (ioctl_ficlonerange(2)). Of a file that goes away, a second name is
enough: what is kept is the file itself, and nothing is copied. All others are copied, compressed if that pays, with their
holes if not. Whatever is read is checked against its digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import signal
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import zstandard

from agentd.errors import JournalError, Reason, StoreError
from agentd.store import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

INLINE_BYTES = 32 << 10
"""Contents up to this size go into the store's own commit; larger ones into a file of their own."""
_CHUNK = 1 << 20
_BLOCK = 4096
_PACKED = ".zst"
_LEVEL = 3  # zstd's own choice: at 300 MB/s and more faster than any card writes
_WORTH_PACKING = 256  # bytes: below that it takes more time than it saves space
_LONG = 256 << 20  # more than any call may change
_PATIENCE_S = (120.0, 5.0)  # for one file, and for one that is so long
_PAYS = 0.9  # of its size; measured on the first chunk
_FICLONE = 0x4004_9409  # _IOW(0x94, 9, int), linux/fs.h
_SETSIG, _SETLEASE, _GETLEASE = 10, 1024, 1025  # linux/fcntl.h; the same on all architectures
_OWN_ATTRIBUTES = ("user.", "system.posix_acl_", "security.selinux")


class TooLarge(Exception):
    """The content is larger than the journal keeps."""


def within(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Raises TooLarge if there is more than that, which a file may have come to meanwhile."""
    for chunk in chunks:
        limit -= len(chunk)
        if limit < 0:
            raise TooLarge
        yield chunk


def first(chunks: Iterable[bytes], length: int) -> Iterator[bytes]:
    """As many bytes, or fewer if there are no more."""
    for chunk in chunks:
        if length <= 0:
            return
        yield chunk[:length]
        length -= len(chunk)


@dataclass(frozen=True, slots=True)
class Kept:
    """`inline` is a small content as it is stored, `object` names a large one; with neither there is nothing to keep.

    `length` is that of a file that was only appended to: its first bytes are kept where they are.
    `as_it_is`: the object is the very file that was there, which must be replaced from now on, and never be written to.
    """

    digest: str = ""
    inline: bytes | None = None
    object: str | None = None
    length: int = 0
    as_it_is: bool = False


class Contents:
    """Keeps them in a folder that nobody else gets to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._cannot_clone: set[int] = set()

    def keep(self, source: int, *, limit: int | None, goes: bool = False, grows: bool = False) -> Kept:
        """The content of a file that is open to be read; durable when it returns, except for what is inline.

        `goes` says that this file is about to be removed or replaced, `grows` that it can only be appended to.
        Raises TooLarge past `limit` bytes, OSError.
        """
        status = os.fstat(source)
        if limit is not None and status.st_size > limit:
            raise TooLarge
        head = _head(source, INLINE_BYTES + 1)
        if len(head) <= INLINE_BYTES:
            return Kept(hashlib.sha256(head).hexdigest(), pack(head))
        with open(source, "rb", closefd=False) as file:
            if grows:
                file.seek(0)
                return Kept(_digest(first(_pieces(file), status.st_size)), length=status.st_size)
            kept = self._clone(file, status) or (self._name(file, status) if goes else None)
            return kept or self._copy(file, status.st_size if limit is None else limit)

    def keep_first(self, source: int, length: int) -> Kept:
        """A copy of the first bytes of a file that is open to be read: it may be changed otherwise from now on."""
        with open(source, "rb", closefd=False) as file:
            return self._copy(file, length, first)

    def chunks(self, kept: Kept) -> Iterator[bytes]:
        """A content, piece by piece. Raises JournalError (NOT_UNDOABLE) at its end if it is not what it was."""
        digest = hashlib.sha256()
        try:
            for chunk in self._stored(kept):
                digest.update(chunk)
                yield chunk
        except (OSError, zstandard.ZstdError) as e:
            raise _damaged(kept) from e
        # What is too long to be known by its whole content is checked by the name that it was given.
        known_by = (kept.object or "").removesuffix(_PACKED) if kept.digest.startswith("blocks:") else kept.digest
        if digest.hexdigest() != known_by:
            raise _damaged(kept)

    def read(self, kept: Kept) -> bytes:
        """A whole content. Raises JournalError (NOT_UNDOABLE)."""
        return b"".join(self.chunks(kept))

    def _stored(self, kept: Kept) -> Iterator[bytes]:
        if kept.inline is not None:
            yield unpack(kept.inline, kept.digest)
        elif kept.object is not None:
            with self.place(kept.object).open("rb") as file:
                packed = kept.object.endswith(_PACKED)
                source = zstandard.ZstdDecompressor().stream_reader(file) if packed else file
                while chunk := source.read(_CHUNK):
                    yield chunk

    def place(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def size(self, name: str) -> int:
        """Bytes it takes; 0 if it is not there."""
        try:
            status = self.place(name).stat()
            return min(status.st_size, status.st_blocks * 512)
        except OSError:
            return 0

    def remove_unused(self, used: set[str], older_than_s: float) -> None:
        """Remove files that nothing refers to, if they have been so for a while: the row of a new one comes in a moment."""
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(OSError):
                if path.name not in used and path.stat().st_ctime < older_than_s:
                    path.unlink()
        for path in self._folder.glob("new-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_ctime < older_than_s:
                    path.unlink()

    def part(self, name: str) -> None:
        """Make an object that is still somebody's file one of ours alone: its change did not come about. Raises StoreError."""
        target = self.place(name)
        with self._storing(), contextlib.suppress(FileNotFoundError):
            if target.stat().st_nlink > 1:
                with target.open("rb") as file, self._arriving() as arriving:
                    _write_out(_pieces(file), arriving, packed=False)
                    os.fsync(arriving.fileno())
                    os.rename(arriving.name, target)

    def part_all(self) -> None:
        """The same for all of them, after a kill."""
        for path in self._folder.glob("??/*"):
            self.part(path.name)

    # -- the three ways

    def _clone(self, file: IO[bytes], status: os.stat_result) -> Kept | None:
        """The file system shares the blocks: costs nothing, however large."""
        if status.st_dev in self._cannot_clone:
            return None
        with self._arriving() as arriving:
            try:
                fcntl.ioctl(arriving.fileno(), _FICLONE, file.fileno())
            except OSError:
                self._cannot_clone.add(status.st_dev)
                return None
            with open(arriving.name, "rb") as clone:
                digest = _digest(_pieces(clone))
            return Kept(digest, object=self._arrived(arriving, digest, packed=False))

    def _name(self, file: IO[bytes], status: os.stat_result) -> Kept | None:
        """A second name for the file itself; only if nobody can write to it meanwhile, and its like can replace it."""
        if status.st_nlink != 1 or not _can_be_remade(file.fileno(), status):
            return None
        with _nobody_writes(file.fileno()) as alone:
            if not alone:
                return None
            file.seek(0)
            digest = _digest(_pieces(file))
            with self._storing():
                os.fsync(file.fileno())
                target = self._room(digest)
                try:
                    _link(file.fileno(), target)
                except FileExistsError:
                    return Kept(digest, object=digest)
                except OSError:  # another file system, or one without links; Android refuses them to programs
                    return None
                if fcntl.fcntl(file.fileno(), _GETLEASE) != fcntl.F_RDLCK:  # somebody wants to write
                    target.unlink()
                    return None
                sync_folder(target.parent)
            # Nobody will read it soon: its pages are for what replaces it (rewriting 16 MiB here: 70 ms became 37).
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return Kept(digest, object=digest, as_it_is=True)

    def _copy(self, file: IO[bytes], limit: int, bounded: Callable[[Iterable[bytes], int], Iterator[bytes]] = within) -> Kept:
        file.seek(0)
        packed = _pays(_read(file, _CHUNK))
        file.seek(0)
        with self._arriving() as arriving:
            digest = _write_out(bounded(_pieces(file), limit), arriving, packed=packed)
            return Kept(digest, object=self._arrived(arriving, digest, packed=packed))

    def _room(self, name: str) -> Path:
        """The place of a new object, in a folder that is there for good."""
        target = self.place(name)
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(self._folder)
        return target

    @contextlib.contextmanager
    def _arriving(self) -> Iterator[IO[bytes]]:
        """A new file without a proper name; gone afterwards unless it got one."""
        with self._storing():
            path = self._folder / f"new-{secrets.token_hex(8)}"
            with path.open("xb") as file:
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """Raises StoreError."""
        try:
            yield
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(
                Reason.STORE_FULL if full else Reason.AUDIT_UNAVAILABLE,
                f"A former content can't be kept in {self._folder}: {e.strerror}. Nothing was changed.",
                hint="Free some space." if full else "Check the disk.",
                metadata={"path": str(self._folder)},
            ) from e

    def _arrived(self, file: IO[bytes], digest: str, *, packed: bool) -> str:
        name = digest + _PACKED if packed else digest
        target = self._room(name)
        if not target.exists():
            os.fsync(file.fileno())
            os.rename(file.name, target)
            sync_folder(target.parent)
        return name


def pack(content: bytes) -> bytes:
    if len(content) < _WORTH_PACKING:
        return content
    return zstandard.ZstdCompressor(level=_LEVEL).compress(content)


def unpack(stored: bytes, digest: str) -> bytes:
    """What `pack` has made, or a content stored as it is, as before 2026-11-21. Raises ZstdError."""
    if hashlib.sha256(stored).hexdigest() == digest:
        return stored
    return zstandard.ZstdDecompressor().decompress(stored, max_output_size=INLINE_BYTES)


def write_with_holes(chunks: Iterable[bytes], file: IO[bytes]) -> None:
    """Blocks of zeroes are left out: a file that had holes has them again."""
    size = 0
    for chunk in chunks:
        for start in range(0, len(chunk), _BLOCK):
            block = chunk[start : start + _BLOCK]
            if block.count(0) != len(block):
                file.seek(size + start)
                file.write(block)
        size += len(chunk)
    file.truncate(size)


def _write_out(chunks: Iterable[bytes], file: IO[bytes], *, packed: bool) -> str:
    """Returns the digest."""
    digest = hashlib.sha256()

    def digested() -> Iterator[bytes]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    if packed:
        with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(file, closefd=False) as writer:
            for chunk in digested():
                writer.write(chunk)
    else:
        write_with_holes(digested(), file)
    file.flush()
    return digest.hexdigest()


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Raises OSError (ETIMEDOUT) if it takes too long: a file of holes can be longer than any disk."""
    long = os.fstat(file.fileno()).st_size > _LONG
    deadline = time.monotonic() + (_PATIENCE_S[1] if long else _PATIENCE_S[0])
    while chunk := file.read(_CHUNK):
        yield chunk
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, "reading it takes too long")


def _head(source: int, size: int) -> bytes:
    data = os.pread(source, size, 0)
    while data and len(data) < size and (more := os.pread(source, size - len(data), len(data))):
        data += more
    return data


def _read(file: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _pays(sample: bytes) -> bool:
    return len(pack(sample[:_CHUNK])) < len(sample[:_CHUNK]) * _PAYS


def _can_be_remade(descriptor: int, status: os.stat_result) -> bool:
    """Whether a new file can have its owner, group and attributes."""
    groups = {os.getegid(), *os.getgroups()}
    if status.st_uid != os.geteuid() or not (status.st_gid in groups or os.geteuid() == 0):
        return False
    try:
        return all(name.startswith(_OWN_ATTRIBUTES) for name in os.listxattr(descriptor))
    except OSError:  # a file system that has none
        return True


@contextlib.contextmanager
def _nobody_writes(descriptor: int) -> Iterator[bool]:
    """A read lease, fcntl(2): granted only if nobody has the file open to write; whoever wants to then waits until it ends."""
    try:
        fcntl.fcntl(descriptor, _SETSIG, signal.SIGURG)  # told when somebody waits: a signal that does nothing
        fcntl.fcntl(descriptor, _SETLEASE, fcntl.F_RDLCK)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, _SETLEASE, fcntl.F_UNLCK)


def _link(descriptor: int, target: Path) -> None:
    """Only with a folder given does Python follow the link in procfs: linkat(2). Raises OSError."""
    folder = os.open(target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{descriptor}", target.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _damaged(kept: Kept) -> JournalError:
    message = f"The kept content is missing or damaged ({kept.digest[:12]}), so it can't be put back."
    return JournalError(Reason.NOT_UNDOABLE, message, metadata={"object": kept.digest})
