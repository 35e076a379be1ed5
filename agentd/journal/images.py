"""Kept states of paths: as they come out of the store, with their contents checked against their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentd.errors import JournalError, Reason
from agentd.journal.contents import Kept, first
from agentd.journal.state import PathState, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from agentd.journal.contents import Contents
    from agentd.store import Store

_OF_CALL = """SELECT n, path, before, content, object, length, after, result, result_object, ahead FROM pre_image WHERE call = ?
              ORDER BY n"""
_LATER = """SELECT before, content, object FROM journal JOIN pre_image USING (call)
            WHERE path = ?1 AND begun > (SELECT begun FROM journal WHERE call = ?2) AND coalesce(content, object) IS NOT NULL
            ORDER BY begun"""
GIVE_UP = "UPDATE pre_image SET content = NULL, object = NULL, result = NULL, result_object = NULL WHERE call = ?"
"""The contents of a call; which paths it changed, and how, stays on record."""
_NOTHING = Kept()
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """A path before the first change of a call, and after its end, each with its content as far as that is kept."""

    call: str
    path: bytes
    before: PathState
    content: Kept = _NOTHING
    after: PathState | None = None
    result: Kept = _NOTHING
    n: int = 0
    """Its place among those of the call."""
    ahead: bool = False
    """Whether it was taken before anybody was about to change the path."""

    @property
    def changed(self) -> bool:
        return self.after is not None and self.after.differs_from(self.before)

    def reversed(self) -> Image:
        """The change the other way round: from what the call has made to what was there."""
        assert self.after is not None
        return Image(self.call, self.path, self.after, self.result, self.before, self.content, self.n)


class Images:
    """Reads them, and the contents behind them."""

    def __init__(self, store: Store, contents: Contents) -> None:
        self._store, self._contents = store, contents

    def of(self, call: str) -> list[Image]:
        """In the order they were taken; of a rehearsed call, what is to become of each path comes first."""
        state = self._store.read(lambda db: db.execute("SELECT state FROM journal WHERE call = ?", (call,)).get)
        rows = self._store.read(lambda db: list(db.execute(_OF_CALL, (call,))))
        images = [_image(call, *row) for row in rows]
        return [image.reversed() if image.after else image for image in images] if state == "rehearsed" else images

    def chunks(self, image: Image) -> Iterator[bytes]:
        """A file as it was before, in pieces. Raises JournalError (NOT_UNDOABLE) if that is missing or not what it was."""
        if image.before.kind != "file" or not image.before.digest:
            return
        shown = os.fsdecode(image.path)
        if image.content.length:
            yield from self._first(image)
            return
        if image.content.inline is None and image.content.object is None:
            message = f"The former content of {shown} was given up to make room, so it can't be put back."
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown})
        try:
            yield from self._contents.chunks(image.content)
        except JournalError as e:
            message = (
                f"The kept content of {shown} is missing or damaged ({image.before.digest[:12]}), so it can't be put back."
            )
            raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown, **e.metadata}) from e

    def _first(self, image: Image) -> Iterator[bytes]:
        """Of a file that was appended to: its first bytes as they are now, or as a later call has found them."""
        for source in self._sources(image):
            found = hashlib.sha256()
            with contextlib.suppress(OSError, JournalError):
                for chunk in first(source(), image.content.length):
                    found.update(chunk)
            if found.hexdigest() == image.before.digest:
                try:
                    yield from first(source(), image.content.length)
                except OSError as e:  # it could be read a moment ago
                    message = f"{os.fsdecode(image.path)} can't be read now, so it can't be put back: {e.strerror}."
                    raise JournalError(Reason.NOT_UNDOABLE, message, hint="Check the disk.") from e
                return
        shown = os.fsdecode(image.path)
        message = f"{shown} was only appended to, and what it began with is not there any more, so it can't be put back."
        raise JournalError(Reason.NOT_UNDOABLE, message, metadata={"path": shown})

    def _sources(self, image: Image) -> Iterator[Callable[[], Iterator[bytes]]]:
        yield lambda: _content_of(image.path)
        rows = self._store.read(lambda db: list(db.execute(_LATER, (image.path, image.call))))
        for before, content, name in rows:
            kept = Kept(PathState.from_json(before).digest, content, name)
            yield lambda kept=kept: self._contents.chunks(kept)  # type: ignore[misc]

    def check(self, image: Image) -> None:
        """Raises JournalError (NOT_UNDOABLE) if `chunks` would."""
        for _ in self.chunks(image):
            pass

    def text(self, image: Image, longest: int) -> bytes | None:
        """A file as it was before; None if it is longer, missing or damaged."""
        text = b""
        try:
            for chunk in self.chunks(image):
                text += chunk
                if len(text) > longest:
                    return None
        except JournalError:
            return None
        return text

    def result(self, image: Image) -> bytes | None:
        """A file as the call left it, if that is kept in the store."""
        if image.after is None or image.after.kind != "file" or image.result.inline is None:
            return None
        try:
            return self._contents.read(image.result)
        except JournalError:
            return None


def _content_of(path: bytes) -> Iterator[bytes]:
    """Raises OSError."""
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _image(
    call: str,
    n: int,
    path: bytes,
    before: str,
    content: bytes | None,
    name: str | None,
    length: int,
    after: str | None,
    result: bytes | None,
    result_name: str | None,
    ahead: int,
) -> Image:
    was, became = PathState.from_json(before), PathState.from_json(after) if after else None
    kept = Kept(was.digest, content, name, length)
    return Image(call, path, was, kept, became, Kept(became.digest if became else "", result, result_name), n, bool(ahead))


def times_around(images: Iterable[Image], *, left: bool = False) -> dict[bytes, int]:
    """When directories had been changed before the first of these changes in each; with `left`, after the last of them.

    A directory's time is changed by each name that comes or goes in it, so it is noted with every path.
    """
    times: dict[bytes, int] = {}
    own: dict[bytes, int] = {}
    for image in images:
        state = image.after if left else image.before
        if state is None:
            continue
        around = os.path.dirname(image.path)
        if state.kind == "folder":
            (own if left else times).setdefault(image.path, state.mtime_ns)
        if state.around_ns and (left or around not in times):
            times[around] = state.around_ns
    return own | times
