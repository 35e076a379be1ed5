"""Former states of paths, made durable: before a change, ahead of one, and where even their owner may not look."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from agentd_sandbox.nearby import Nearby

from agentd.errors import AgentdError
from agentd.journal.images import Image
from agentd.journal.places import Granting
from agentd.journal.restoring import Failure
from agentd.journal.state import ABSENT, as_it_was
from agentd.journal.transaction import Seen, Taker, Transaction, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import apsw
    from agentd_sandbox.recorder import Operation

    from agentd.audit import AuditLog, Event
    from agentd.journal.contents import Contents, Kept
    from agentd.journal.state import PathState
    from agentd.store import Store

_BEGIN = """INSERT INTO journal (call, state, begun, time_ns, run, session, principal, effect)
            VALUES (?, 'open', ?, ?, ?, ?, ?, ?)"""
_IMAGE = "INSERT INTO pre_image (call, n, path, before, content, object, length, ahead) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_AGAIN = "UPDATE pre_image SET before = ?, content = ?, object = ?, length = ?, ahead = 0 WHERE call = ? AND n = ?"


class Captures:
    """Takes them, and writes them down."""

    def __init__(self, store: Store, audit: AuditLog, taker: Taker, contents: Contents) -> None:
        self._store, self._audit, self._taker, self._contents = store, audit, taker, contents

    def capture(
        self,
        transaction: Transaction,
        paths: Mapping[bytes, Operation],
        intent: Event | None,
        failures: list[Failure] | None = None,
    ) -> None:
        """Add pre-images of paths to a transaction; with `intent`, the event and the transaction itself too.

        A path maps to what is about to happen to it. Raises JournalError (NOT_UNDOABLE, DESCRIPTORS_SHORT), StoreError.
        """
        images: list[Image] = []
        closed: dict[bytes, Operation] = {}
        nearby, gone = Nearby(), set[bytes]()
        try:
            for path, operation in paths.items():
                if os.path.dirname(path) in gone:
                    images.append(Image(transaction.call, path, ABSENT))
                    continue
                with _noting(path, failures):
                    try:
                        images.append(self._taker.take(transaction, path, operation, nearby))
                        if not transaction.limited and images[-1].before.kind == "absent":
                            gone.add(path)
                    except OSError:
                        # Kept as it is, it could not be read later, either.
                        closed[path] = "write" if operation in ("remove", "replace") else operation
                        if noted := self._taker.note(transaction, path):
                            images.append(noted)
            self.write(transaction, images, intent)
        except AgentdError:
            self.part(images)
            raise
        finally:
            nearby.close()
        if closed:
            self._capture_closed(transaction, closed, failures)
        if not transaction.looked_everywhere and any(_lacks_names(image.before) for image in images):
            self._look_for_names(transaction, paths)

    def _look_for_names(self, transaction: Transaction, paths: Iterable[bytes]) -> None:
        """Other names, in directories that may not be searched, of files that are still there. They are on record by now, and
        so is the call: a mode may be changed for a while.
        """
        with Granting(lambda path: self.note_mode(transaction, path)) as granting:
            transaction.look_for_names(granting)
        found: list[Image] = []
        for image in [transaction.images[path] for path in paths if path in transaction.images]:
            if _lacks_names(image.before):
                twins = transaction.other_names(image.path, image.before.inode)
                if len(twins) > len(image.before.twins):
                    found.append(replace(image, before=replace(image.before, twins=twins)))
        if found:
            self.write(transaction, found, None)

    def capture_ahead(self, transaction: Transaction, paths: Mapping[bytes, Seen]) -> None:
        """Take the states of small files and symlinks that may be removed next: they count only if they are. Raises
        AgentdError, and then none of them was taken.
        """
        images: list[Image] = []
        with contextlib.closing(Nearby()) as nearby:
            for path in paths:
                with contextlib.suppress(OSError):
                    images.append(self._taker.take(transaction, path, "write", nearby))
        numbered = [replace(image, n=n, ahead=True) for n, image in enumerate(images, transaction.rows)]
        rows = [(*_row(image), 1) for image in numbered]
        self._store.write(lambda db: db.executemany(_IMAGE, rows))
        transaction.rows += len(rows)
        transaction.ahead.update((image.path, (image, paths[image.path])) for image in numbered)

    def confirm(self, transaction: Transaction, paths: Sequence[bytes]) -> None:
        """States that were taken ahead count whatever is at their paths by now: what was removed is about to be made anew.
        Raises StoreError.
        """
        rows = [(transaction.call, transaction.images[path].n) for path in paths]
        self._store.write(lambda db: db.executemany("UPDATE pre_image SET ahead = 0 WHERE call = ? AND n = ?", rows))
        for path in paths:
            transaction.images[path] = replace(transaction.images[path], ahead=False)

    def _capture_closed(
        self, transaction: Transaction, paths: Mapping[bytes, Operation], failures: list[Failure] | None
    ) -> None:
        """Their modes are on record by now: the owner may be permitted to read them for a while."""
        images: list[Image] = []
        with Granting(lambda path: self.note_mode(transaction, path)) as granting:
            for path, operation in paths.items():
                with _noting(path, failures):
                    try:
                        image = granting.reading(lambda: self._taker.take(transaction, path, operation), path)  # noqa: B023
                    except OSError as e:
                        raise unreadable(path, e) from e
                    images.append(replace(image, before=as_it_was(image.before, path, granting)))
        self.write(transaction, images, None)

    def write(
        self,
        transaction: Transaction,
        images: Sequence[Image],
        intent: Event | None,
        commit_by: Callable[[Callable[[apsw.Connection], object]], object] | None = None,
    ) -> None:
        commit_by = commit_by or self._store.write
        numbered, known = _numbered(transaction, images)
        again = [image for image in numbered if image.n in known]
        new = [image for image in numbered if image.n not in known]

        def commit(db: apsw.Connection) -> None:
            if intent is not None:
                self._audit.append(db, intent)
                who = (intent.run, intent.session, intent.principal, intent.tool.effect if intent.tool else "")
                db.execute(_BEGIN, (transaction.call, transaction.begun, time.time_ns(), *who))
            db.executemany(_IMAGE, ((*_row(image), 0) for image in new))
            db.executemany(_AGAIN, ((i.before.to_json(), *_columns(i.content), i.call, i.n) for i in again))

        commit_by(commit)
        transaction.rows += len(new)
        for image in numbered:
            transaction.ahead.pop(image.path, None)
            transaction.images[image.path] = image

    def part(self, images: Iterable[Image]) -> None:
        """A file that was to be kept as it is, but is still in its place, is somebody's again, and nobody else's."""
        for image in images:
            if image.content.as_it_is and image.content.object:
                with contextlib.suppress(AgentdError):  # the next start does it
                    self._contents.part(image.content.object)

    def note_mode(self, transaction: Transaction, path: bytes) -> None:
        """What is about to be given another mode for a while gets its own again, whatever happens in between."""
        image = transaction.images.get(path)
        if image is None:
            self.capture(transaction, {path: "write"}, None)
            return
        status = os.lstat(path)
        inode = f"{status.st_dev}:{status.st_ino}"
        if status.st_nlink > 1 and image.before.inode != inode:  # what is there now is another file, known by its other names
            names = [os.fsencode(name) for name in transaction.other_names(path, inode)]
            if names and not any(name in transaction.images for name in names):
                self.capture(transaction, {names[0]: "write"}, None)


def _lacks_names(state: PathState) -> bool:
    return state.kind == "file" and state.links > len(state.twins) + 1


def _columns(kept: Kept) -> tuple[bytes | None, str | None, int]:
    return kept.inline, kept.object, kept.length


def _numbered(transaction: Transaction, images: Sequence[Image]) -> tuple[list[Image], set[int]]:
    """Each with its place among those of the call, and the places that were known: a path keeps its own."""
    count = transaction.rows
    numbered: list[Image] = []
    known: set[int] = set()
    for image in images:
        former = transaction.images.get(image.path) or transaction.ahead.get(image.path, (None, None))[0]
        n = former.n if former else count
        if former:
            known.add(n)
        else:
            count += 1
        numbered.append(image if image.n == n else Image(image.call, image.path, image.before, image.content, n=n))
    return numbered, known


def _row(image: Image) -> tuple[object, ...]:
    return image.call, image.n, image.path, image.before.to_json(), *_columns(image.content)


@contextlib.contextmanager
def _noting(path: bytes, failures: list[Failure] | None) -> Iterator[None]:
    """With `failures`, an error of this path is put there."""
    try:
        yield
    except AgentdError as e:
        if failures is None:
            raise
        failures.append(Failure(path, e.message.rstrip(".")))
