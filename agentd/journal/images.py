"""Kept states of paths: as they come out of the store, with their contents checked against their digests."""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.errors import JournalError, Reason
from agentd.journal.state import PathState

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.store import Store

RESULT_BYTES = 32 << 10
"""Results up to this size are kept, too: longer ones can be shown and merged only while nobody has changed them."""


@dataclass(frozen=True, slots=True)
class Image:
    """A path before the first change of a call, and after its end; `object` names a large content."""

    call: str
    path: bytes
    before: PathState
    content: bytes | None = None
    object: str | None = None
    after: PathState | None = None
    result: bytes | None = None

    @property
    def changed(self) -> bool:
        return self.after is not None and not self.after.same_as(self.before)


class Images:
    """Reads them, and the contents behind them."""

    def __init__(self, store: Store, objects: Path) -> None:
        self._store, self._objects = store, objects

    def of(self, call: str) -> list[Image]:
        """In the order they were taken."""
        query = "SELECT path, before, content, object, after, result FROM pre_image WHERE call = ? ORDER BY n"
        rows = self._store.read(lambda db: list(db.execute(query, (call,))))
        return [
            Image(call, path, PathState.from_json(before), content, name, PathState.from_json(after) if after else None, result)
            for path, before, content, name, after, result in rows
        ]

    def content(self, image: Image) -> bytes:
        """Of a file, as it was before. Raises JournalError (NOT_UNDOABLE) if it is missing or not what it was."""
        if image.before.kind != "file":
            return b""
        content = image.content
        if content is None and image.object is None:
            shown = os.fsdecode(image.path)
            message = f"The former content of {shown} was given up to make room, so it can't be put back."
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown})
        if image.object is not None:
            try:
                content = (self._objects / image.object[:2] / image.object).read_bytes()
            except OSError:
                content = None
        if content is None or hashlib.sha256(content).hexdigest() != image.before.digest:
            shown = os.fsdecode(image.path)
            message = (
                f"The kept content of {shown} is missing or damaged ({image.before.digest[:12]}), so it can't be put back."
            )
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown, "object": image.before.digest})
        return content

    def result(self, image: Image) -> bytes | None:
        """Of a file, as the call left it, if that is kept."""
        if image.after is None or image.after.kind != "file" or image.result is None:
            return None
        content = zlib.decompress(image.result)
        return content if hashlib.sha256(content).hexdigest() == image.after.digest else None


def packed(content: bytes) -> bytes:
    return zlib.compress(content)
