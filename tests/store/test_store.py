"""The store: one writer, durable before it answers, shared commits, and honest errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import apsw
import pytest

from agentd.errors import Reason, StoreError
from agentd.store import Store, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

WAIT_S = 10


def add(text: str) -> Callable[[apsw.Connection], None]:
    def insert(db: apsw.Connection) -> None:
        db.execute("INSERT INTO run (id, session, state, body) VALUES (?, 's', 'x', ?)", (new_id(), text))

    return insert


def texts(store: Store) -> list[str]:
    return store.read(lambda db: [str(body) for (body,) in db.execute("SELECT body FROM run ORDER BY rowid")])


class Held:
    """Keeps the writer busy inside a commit of its own until `go`, so that what comes meanwhile shares the next one."""

    def __init__(self, store: Store) -> None:
        self._entered, self._may_go = threading.Event(), threading.Event()
        self.future: Future[None] = store.submit(self._hold)
        assert self._entered.wait(WAIT_S)

    def _hold(self, _db: apsw.Connection) -> None:
        self._entered.set()
        assert self._may_go.wait(WAIT_S)

    def go(self) -> None:
        self._may_go.set()
        self.future.result(WAIT_S)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state")
    yield opened
    opened.close()


def test_every_commit_is_synced(store: Store):
    """WAL and synchronous=FULL on the connection that writes."""
    settings = store.write(lambda db: [db.execute(f"PRAGMA {name}").get for name in ("journal_mode", "synchronous")])
    assert settings == ["wal", 2]


def test_only_the_owner_may_read_the_files(store: Store, tmp_path: Path):
    """Folder 0700, database 0600."""
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "agentd.db").stat().st_mode & 0o777 == 0o600


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path):
    """A process that writes and is killed with SIGKILL has lost nothing that it reported."""
    code = """
import itertools, pathlib, sys
from agentd.store import Store
store = Store(pathlib.Path(sys.argv[1]))
for n in itertools.count(1):
    store.write(lambda db: db.execute("INSERT INTO run (id, session, state, body) VALUES (?, 's', 'x', '')", (str(n),)).get)
    print(n, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 20:
                child.send_signal(signal.SIGKILL)
                break
        reported = max([20, *(int(line) for line in child.stdout if line.endswith("\n"))])
    store = Store(tmp_path)
    kept = store.read(lambda db: db.execute("SELECT count(*) FROM run").get)
    store.close()
    assert reported <= kept <= reported + 1


def test_work_that_arrives_during_a_commit_shares_the_next(tmp_path: Path):
    """Twenty pieces of two threads behind a busy writer: two commits, not twenty-one."""
    commits: list[int] = []

    def watched(path: str) -> apsw.Connection:
        db = apsw.Connection(path)
        db.set_wal_hook(lambda _db, _name, pages: commits.append(pages) or apsw.SQLITE_OK)
        return db

    store = Store(tmp_path, watched)
    held = Held(store)
    commits.clear()
    futures: list[Future[None]] = []
    lock = threading.Lock()

    def submit(who: str) -> None:
        for n in range(10):
            with lock:
                futures.append(store.submit(add(f"{who}{n}")))

    threads = [threading.Thread(target=submit, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held.go()
    for future in futures:
        future.result(WAIT_S)
    assert sorted(texts(store)) == sorted(f"{who}{n}" for who in "ab" for n in range(10))
    store.close()
    assert len(commits) == 1  # the held piece wrote nothing, so SQLite had nothing to commit for it


def test_a_piece_that_fails_takes_back_its_own_and_nothing_else(store: Store):
    """In the same commit: its rows are gone, its error is its own, the neighbours stand."""

    def fail(db: apsw.Connection) -> None:
        add("gone")(db)
        raise LookupError("mine")

    def break_a_rule(db: apsw.Connection) -> None:
        add("gone too")(db)
        db.execute("INSERT INTO journal (call, state) VALUES ('c', 'no such state')")

    held = Held(store)
    before, failing, breaking, after = (store.submit(do) for do in (add("one"), fail, break_a_rule, add("two")))
    held.go()
    before.result(WAIT_S)
    after.result(WAIT_S)
    with pytest.raises(LookupError, match="mine"):
        failing.result(WAIT_S)
    with pytest.raises(StoreError, match="NOT NULL"):
        breaking.result(WAIT_S)
    assert texts(store) == ["one", "two"]


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_cancelled_piece_does_not_stop_the_writer(store: Store, when: str):
    """`asyncio.wrap_future` cancels the future when its task is cancelled: the next piece is written all the same."""
    held = Held(store)
    (held.future if when == "running" else store.submit(add("cancelled"))).cancel()
    held._may_go.set()
    store.submit(add("next")).result(2)
    assert "next" in texts(store)


def test_readers_see_one_moment_and_change_nothing(store: Store):
    """A commit during a read is not seen by it; writing through a read is an error."""
    store.write(add("one"))

    def look_twice(db: apsw.Connection) -> list[int]:
        first = db.execute("SELECT count(*) FROM run").get
        store.write(add("two"))
        return [first, db.execute("SELECT count(*) FROM run").get]

    assert store.read(look_twice) == [1, 1]
    assert texts(store) == ["one", "two"]
    with pytest.raises(StoreError):
        store.read(add("three"))
    assert texts(store) == ["one", "two"]


def test_a_second_store_on_the_folder_is_refused(store: Store, tmp_path: Path):
    """STORE_LOCKED names the process that has it; when that one is closed, the folder is free."""
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "state")
    assert caught.value.reason is Reason.STORE_LOCKED
    assert str(os.getpid()) in caught.value.message
    store.write(add("still works"))


def test_a_closed_store_frees_its_folder(tmp_path: Path):
    """What was written is there for the next one, in one file."""
    first = Store(tmp_path)
    first.write(add("kept"))
    first.close()
    assert not (tmp_path / "agentd.db-wal").exists()
    second = Store(tmp_path)
    assert texts(second) == ["kept"]
    second.close()


def test_close_waits_for_what_was_submitted(tmp_path: Path):
    """Nothing in the queue is lost."""
    store = Store(tmp_path)
    futures = [store.submit(add(str(n))) for n in range(200)]
    store.close()
    assert all(future.done() and future.exception() is None for future in futures)


def fill(store: Store) -> int:
    """Write until the disk is full; how many were acknowledged."""
    for n in range(1000):
        try:
            store.write(add("x" * 3000))
        except StoreError as e:
            assert e.reason is Reason.STORE_FULL  # noqa: PT017 - the number of those before it counts
            return n
    raise AssertionError("the disk is not full")


def test_a_full_disk_is_an_error_until_there_is_space_again(tmp_path: Path):
    """STORE_FULL from SQLite itself: what was acknowledged is readable, later writes work, nothing is half there."""

    def small(path: str) -> apsw.Connection:
        db = apsw.Connection(path)
        db.execute("PRAGMA max_page_count = 60")
        return db

    store = Store(tmp_path, small)
    acknowledged = fill(store)
    assert acknowledged > 0
    assert len(texts(store)) == acknowledged
    held = Held(store)
    group = [store.submit(add("y" * 5000)) for _ in range(3)]
    held.go()
    for future in group:
        with pytest.raises(StoreError) as caught:
            future.result(WAIT_S)
        assert caught.value.reason is Reason.STORE_FULL
    assert len(texts(store)) == acknowledged
    store.write(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall())
    store.write(add("after"))
    assert texts(store)[-1] == "after"
    assert len(texts(store)) == acknowledged + 1
    store.close()


DAMAGE = {
    "no database": b"this is no database at all " * 50,
    "a header and nothing": b"SQLite format 3\0" + b"\xff" * 5000,
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_an_error_and_stays_as_it_is(tmp_path: Path, content: bytes):
    """It is named, and not written over."""
    (tmp_path / "agentd.db").write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    assert caught.value.reason is Reason.STORE_DAMAGED
    assert str(tmp_path / "agentd.db") in caught.value.message
    assert (tmp_path / "agentd.db").read_bytes() == content


def test_a_store_that_could_not_be_opened_lets_go_of_its_folder(tmp_path: Path):
    """When the damaged file is out of the way the same process can open the folder."""
    (tmp_path / "agentd.db").write_bytes(DAMAGE["no database"])
    with pytest.raises(StoreError):
        Store(tmp_path)
    (tmp_path / "agentd.db").unlink()
    Store(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path):
    """A file is in its place."""
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "state")
    assert caught.value.reason is Reason.AUDIT_UNAVAILABLE
    assert str(tmp_path / "state") in caught.value.message


def test_ids_are_unique_and_sort_by_time():
    """26 characters; those of a later millisecond come later."""
    many = [new_id() for _ in range(2000)]
    assert len(set(many)) == len(many)
    assert {len(name) for name in many} == {26}
    assert sorted(name[:10] for name in many) == [name[:10] for name in many]
