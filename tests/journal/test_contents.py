"""Contents: each of the three ways keeps what was there, says so when it can't, and never gives back anything else."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.errors import AgentdError, JournalError, Reason
from agentd.journal.contents import INLINE_BYTES, Contents, Kept, TooLarge, unpack, write_with_holes

LARGE = INLINE_BYTES * 3
LIMIT = 1 << 20


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "objects")


def kept(contents: Contents, path: Path, *, goes: bool = False, limit: int = LIMIT) -> Kept:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return contents.keep(descriptor, limit=limit, goes=goes)
    finally:
        os.close(descriptor)


def objects(contents: Contents) -> list[Path]:
    return [path for path in contents.place("ab").parent.parent.rglob("*") if path.is_file()]


blocks = st.lists(
    st.sampled_from([b"\0" * 4096, b"text\n" * 900, b"\xff", b"x" * 40_000]) | st.binary(max_size=5000), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(blocks, st.booleans())
def test_whatever_was_there_comes_back(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], goes: bool):
    folder = tmp_path_factory.mktemp("c")
    contents = Contents(folder / "objects")
    content = b"".join(parts)
    (folder / "f").write_bytes(content)
    found = kept(contents, folder / "f", goes=goes)
    if goes:
        (folder / "f").unlink()
    assert contents.read(found) == content
    assert (found.inline is not None) is (len(content) <= INLINE_BYTES)


def test_text_is_compressed_and_noise_is_not(contents: Contents, tmp_path: Path):
    (tmp_path / "text").write_bytes(b"a line of text\n" * 10_000)
    (tmp_path / "noise").write_bytes(os.urandom(LARGE))
    text, noise = kept(contents, tmp_path / "text"), kept(contents, tmp_path / "noise")
    assert text.object
    assert contents.size(text.object) < 5000
    assert noise.object == noise.digest


@pytest.mark.parametrize("size", [INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, LIMIT, LIMIT + 1])
def test_sizes_at_the_borders(contents: Contents, tmp_path: Path, size: int):
    (tmp_path / "f").write_bytes(os.urandom(size))
    if size > LIMIT:
        with pytest.raises(TooLarge):
            kept(contents, tmp_path / "f")
        assert objects(contents) == []
    else:
        assert contents.read(kept(contents, tmp_path / "f")) == (tmp_path / "f").read_bytes()


def test_a_file_with_holes_takes_no_more_room_when_kept_and_put_back(contents: Contents, tmp_path: Path):
    with (tmp_path / "f").open("wb") as file:
        file.write(os.urandom(8192))
        file.truncate(900_000)
    found = kept(contents, tmp_path / "f")
    assert found.object
    assert contents.place(found.object).stat().st_blocks * 512 < 40_000
    with (tmp_path / "again").open("wb") as file:
        write_with_holes(contents.chunks(found), file)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "f").read_bytes()
    assert (tmp_path / "again").stat().st_blocks * 512 < 40_000


# -- a file that goes away is kept as it is


def test_a_file_that_goes_is_not_copied(contents: Contents, tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x" * LARGE)
    was = (tmp_path / "f").stat().st_ino
    found = kept(contents, tmp_path / "f", goes=True)
    assert found.as_it_is
    assert found.object
    assert contents.place(found.object).stat().st_ino == was
    (tmp_path / "f").unlink()
    assert contents.read(found) == b"x" * LARGE


@pytest.mark.parametrize("why", ["written to", "two names", "stays"])
def test_a_file_that_somebody_still_uses_is_copied(contents: Contents, tmp_path: Path, why: str):
    """Open to be written, or known by another name: what happens to it then must not happen to what is kept."""
    file = tmp_path / "f"
    file.write_bytes(os.urandom(LARGE))
    before = file.read_bytes()
    if why == "two names":
        os.link(file, tmp_path / "other")
    with file.open("r+b") if why == "written to" else file.open("rb") as held:
        found = kept(contents, file, goes=why != "stays")
        assert not found.as_it_is
        if why == "written to":
            held.write(b"changed")
            held.flush()
    assert contents.read(found) == before


def test_nobody_who_wants_to_write_waits_after_it_is_kept(contents: Contents, tmp_path: Path):
    """The lease ends; no signal comes to whoever held it."""
    (tmp_path / "f").write_bytes(b"x" * LARGE)
    assert kept(contents, tmp_path / "f", goes=True).as_it_is
    with (tmp_path / "f").open("r+b") as file:
        assert fcntl.fcntl(file.fileno(), 1025) == fcntl.F_UNLCK


def test_on_another_file_system_it_is_copied(tmp_path: Path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev or not os.access(other, os.W_OK):
        pytest.skip("there is no other file system here")
    contents = Contents(tmp_path / "objects")
    file = other / f"agentd-test-{os.getpid()}"
    file.write_bytes(b"y" * LARGE)
    try:
        found = kept(contents, file, goes=True)
        assert not found.as_it_is
        assert contents.read(found) == b"y" * LARGE
    finally:
        file.unlink()


def test_a_file_whose_change_did_not_come_about_is_its_owners_alone_again(contents: Contents, tmp_path: Path):
    file = tmp_path / "f"
    file.write_bytes(b"x" * LARGE)
    found = kept(contents, file, goes=True)
    assert found.object
    assert file.stat().st_nlink == 2
    contents.part_all()
    assert file.stat().st_nlink == 1
    file.write_bytes(b"new")
    assert contents.read(found) == b"x" * LARGE


# -- what is damaged is found


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "other"])
@pytest.mark.parametrize("text", [True, False])
def test_what_is_damaged_is_an_error_and_never_a_content(contents: Contents, tmp_path: Path, damage: str, text: bool):
    (tmp_path / "f").write_bytes(b"some text\n" * 9000 if text else os.urandom(LARGE))
    found = kept(contents, tmp_path / "f")
    assert found.object
    place = contents.place(found.object)
    data = place.read_bytes()
    half = len(data) // 2
    match damage:
        case "gone":
            place.unlink()
        case "cut":
            place.write_bytes(data[:half])
        case "flipped":
            place.write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
        case _:
            place.write_bytes(b"")
    with pytest.raises(JournalError) as caught:
        contents.read(found)
    assert caught.value.reason is Reason.NOT_UNDOABLE


def test_nothing_is_kept_where_there_is_no_room(tmp_path: Path):
    """A folder that can't be written to any more is an error of the store, and nothing half is left."""
    contents = Contents(tmp_path / "objects")
    (tmp_path / "f").write_bytes(os.urandom(LARGE))
    (tmp_path / "objects").rmdir()
    with pytest.raises(AgentdError) as caught:
        kept(contents, tmp_path / "f")
    assert caught.value.reason is Reason.AUDIT_UNAVAILABLE


def test_contents_of_before_compression_are_read(contents: Contents):
    content = b"as it was stored then"
    assert unpack(content, hashlib.sha256(content).hexdigest()) == content
    assert contents.read(Kept(hashlib.sha256(content).hexdigest(), content)) == content
