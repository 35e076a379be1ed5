"""The changes of one call while it runs, and the state of each path before the first of them, taken within bounds."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentd_sandbox import Refusal

from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal.contents import INLINE_BYTES, Contents, TooLarge
from agentd.journal.images import Image
from agentd.journal.state import keep, opened

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agentd_sandbox import Change
    from agentd_sandbox.recorder import Operation

    from agentd.audit import Event, FileTouched
    from agentd.journal.journal import Journal
    from agentd.journal.retention import Keep

_MIB = 1 << 20
_GOES = frozenset({"remove", "replace"})


@dataclass(slots=True)
class Transaction:
    """Is the recorder of its worker's broker (`before_changes`). `begun` is its place among all calls."""

    _journal: Journal
    call: str
    begun: int
    images: dict[bytes, Image] = field(default_factory=dict)
    size: int = 0
    """Bytes of all contents that were kept for it."""

    def before_changes(self, changes: Sequence[Change]) -> frozenset[bytes]:
        """Make the pre-images of paths durable, once per path, in one commit. Raises Refusal where that can't be done."""
        wanted: dict[bytes, Operation] = {}
        for change in changes:
            image = self.images.get(change.path)
            if image is None or (image.content.length and change.operation != "append"):
                wanted[change.path] = change.operation
        if not wanted:
            return frozenset()
        try:
            self._journal.capture(self, wanted, None)
        except JournalError as e:
            raise Refusal(errno.EFBIG, str(e)) from None
        except AgentdError as e:
            raise Refusal(errno.ENOSPC if e.reason is Reason.STORE_FULL else errno.EIO, str(e)) from None
        return frozenset(path for path in wanted if self.images[path].content.as_it_is)

    def finish(self, event: Event) -> tuple[FileTouched, ...]:
        """Record the end of the call with what it changed; durable when it returns."""
        return self._journal.finish(self, event)

    def rehearse(self, event: Event) -> tuple[FileTouched, ...]:
        """Keep what the call has made of each path, put everything back, and record that."""
        return self._journal.rehearse(self, event)

    def roll_back(self, event: Event) -> None:
        """Put everything back and record that the call had no effect."""
        self._journal.roll_back(self, event)


class Taker:
    """Takes images of paths, as much as may be kept."""

    def __init__(self, contents: Contents, bounds: Keep) -> None:
        self._contents, self._bounds = contents, bounds

    def take(self, transaction: Transaction, path: bytes, operation: Operation) -> Image:
        """Raises JournalError (NOT_UNDOABLE), StoreError."""
        shown = os.fsdecode(path)
        how = {"goes": operation in _GOES, "grows": operation == "append"}
        try:
            if path in transaction.images:
                return self._in_full(transaction.images[path])
            state, kept = keep(path, self._contents, limit=self._bounds.file_bytes, **how)
        except TooLarge:
            raise self._too_large(path) from None
        except OSError as e:
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"{shown} can't be read for the journal: {e.strerror}.",
                hint="Check the path and its permissions.",
                metadata={"path": shown},
            ) from e
        if state.kind == "other":
            message = f"{shown} is neither a file nor a folder nor a link, so changing it could not be undone."
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown})
        transaction.size += self._contents.size(kept.object) if kept.object else len(kept.inline or b"")
        if transaction.size > self._bounds.call_bytes:
            limit = self._bounds.call_bytes // _MIB
            raise JournalError(
                Reason.NOT_UNDOABLE,
                f"The call has changed more than the {limit} MiB the journal keeps of one, so the rest could not be undone.",
                hint="Raise journal.call_limit_mib in agentd.toml if it must be.",
                metadata={"limit_mib": str(limit)},
            )
        return Image(transaction.call, path, state, kept)

    def _in_full(self, image: Image) -> Image:
        """Of a file that was only appended to so far: its first bytes, before something else happens to them."""
        with opened(image.path) as descriptor:
            kept = self._contents.keep_first(descriptor, image.content.length)
        if kept.digest != image.before.digest:
            raise OSError(errno.EIO, "somebody else changed it meanwhile")
        return replace(image, content=kept)

    def at_once(self, paths: Iterable[bytes]) -> dict[bytes, Operation]:
        """Those of the declared paths whose state is best taken with the intent: large files wait until something happens to
        them, as that says whether they must be copied. Raises JournalError (NOT_UNDOABLE) if one is larger than is kept.
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

    def _too_large(self, path: bytes) -> JournalError:
        shown, limit = os.fsdecode(path), self._bounds.file_bytes // _MIB
        return JournalError(
            Reason.NOT_UNDOABLE,
            f"{shown} is larger than the {limit} MiB the journal keeps, so changing it could not be undone.",
            hint="Raise journal.file_limit_mib in agentd.toml if it must be changed.",
            metadata={"path": shown, "limit_mib": str(limit)},
        )


def _size(path: bytes) -> int:
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0
