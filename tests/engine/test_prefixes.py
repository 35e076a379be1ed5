"""States of prompts on disk: only what is exactly the same is ever used, and nothing that happens to a file does harm."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd import models
from agentd.engine.prefixes import PrefixFiles, identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = list(range(100, 400))
STATE = memoryview(bytearray(os.urandom(5000)))


def files(folder: Path, identity: str = "model a", quota: int = 1 << 20) -> PrefixFiles:
    return PrefixFiles(folder, identity, quota)


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_a_state_is_found_again_by_the_next_process(tmp_path: Path):
    """For prompts that go on behind it, and for no others; not to its last token, as the logits behind that are wanted."""
    assert files(tmp_path).save(TOKENS, lambda: STATE, session=False)
    again = files(tmp_path)
    assert again.longest([*TOKENS, 1, 2], len(TOKENS) + 1) == len(TOKENS)
    assert again.load(TOKENS) == STATE
    assert again.longest(TOKENS, len(TOKENS) - 1) == 0
    assert again.longest([*TOKENS[:-1], 7, 8], len(TOKENS) + 1) == 0
    assert again.load(TOKENS[:-1]) is None


def test_the_longest_beginning_is_found(tmp_path: Path):
    there = files(tmp_path)
    for length in (64, 200, 130):
        assert there.save(TOKENS[:length], lambda: STATE, session=True)
    assert [there.longest(TOKENS, most) for most in (299, 199, 129, 63)] == [200, 130, 64, 0]


def test_what_another_model_or_library_has_left_is_not_used(tmp_path: Path):
    files(tmp_path).save(TOKENS, lambda: STATE, session=False)
    other = files(tmp_path, "model b")
    assert (other.longest(TOKENS, 300), other.load(TOKENS)) == (0, None)


def test_a_file_under_a_wrong_name_is_not_used(tmp_path: Path):
    """The description in it counts: a name can be given by anybody."""
    files(tmp_path).save(TOKENS, lambda: STATE, session=False)
    mine = the_file(tmp_path)
    files(tmp_path, "model b").save(TOKENS, lambda: memoryview(b"other"), session=False)
    (theirs,) = set(tmp_path.iterdir()) - {mine}
    theirs.replace(mine)
    assert files(tmp_path).load(TOKENS) is None
    assert not mine.exists()


def damage(how: str, data: bytes) -> bytes:
    tokens = len(data) - len(STATE) - 5
    return {
        "empty": b"",
        "cut": data[:-1],
        "cut in the head": data[:20],
        "longer": data + b"x",
        "a bit of the state": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "a bit of the tokens": data[:tokens] + bytes([data[tokens] ^ 1]) + data[tokens + 1 :],
        "the magic": b"X" + data[1:],
        "no description": data[:16] + b"\xff\xff\xff\xff" + data[20:],
    }[how]


@pytest.mark.parametrize(
    "how",
    ["empty", "cut", "cut in the head", "longer", "a bit of the state", "a bit of the tokens", "the magic", "no description"],
)
def test_a_damaged_file_is_deleted_and_not_used(tmp_path: Path, how: str):
    files(tmp_path).save(TOKENS, lambda: STATE, session=False)
    file = the_file(tmp_path)
    known = files(tmp_path)
    file.write_bytes(damage(how, file.read_bytes()))
    for each in (known, files(tmp_path)):
        assert each.load(TOKENS) is None
    assert known.save(TOKENS, lambda: STATE, session=False)
    assert known.load(TOKENS) == STATE


@given(st.binary(max_size=300))
def test_nothing_that_lies_in_the_folder_is_believed(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    folder = tmp_path_factory.mktemp("prefixes")
    files(folder).save(TOKENS, lambda: STATE, session=False)
    the_file(folder).write_bytes(data)
    assert files(folder).load(TOKENS) is None


def test_the_quota_is_kept_and_what_was_not_used_for_longest_goes(tmp_path: Path):
    """What another model has left goes first of all."""
    files(tmp_path, "model b").save(TOKENS, lambda: STATE, session=False)
    there = files(tmp_path, quota=20_000)
    for length in (100, 150, 200):
        assert there.save(TOKENS[:length], lambda: STATE, session=True)
        for age, kept in enumerate(sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)):
            os.utime(kept, (1000 - age, 1000 - age))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20_000
    assert there.load(TOKENS[:100]) == STATE  # and with that it is the newest
    assert there.save(TOKENS[:250], lambda: STATE, session=True)
    left = [length for length in (100, 150, 200, 250) if there.longest(TOKENS[: length + 1], length) == length]
    assert 250 in left
    assert 100 in left
    assert 150 not in left


def test_what_is_larger_than_the_quota_is_not_kept(tmp_path: Path):
    assert not files(tmp_path, quota=1000).save(TOKENS, lambda: STATE, session=False)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_went_back_takes_nothing_away(tmp_path: Path):
    """On a board without a clock of its own older files are from the future."""
    there = files(tmp_path, quota=12_000)
    there.save(TOKENS[:100], lambda: STATE, session=True)
    os.utime(the_file(tmp_path), (2**32, 2**32))
    assert there.save(TOKENS[:150], lambda: STATE, session=True)
    assert there.save(TOKENS[:200], lambda: STATE, session=True)
    assert there.load(TOKENS[:200]) == STATE


def test_a_description_without_end_is_not_read(tmp_path: Path):
    files(tmp_path).save(TOKENS, lambda: STATE, session=False)
    nested = b"[" * 300_000
    the_file(tmp_path).write_bytes(b"agentd-prefix-1\n" + struct.pack("<II", len(nested), len(TOKENS)) + nested)
    assert files(tmp_path).load(TOKENS) is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_has_left_half_written_is_cleared_away(tmp_path: Path):
    (tmp_path / "x.new").write_bytes(b"half")
    files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_sessions_have_said_can_be_forgotten(tmp_path: Path):
    there = files(tmp_path)
    there.save(TOKENS[:100], lambda: STATE, session=False)
    there.save(TOKENS, lambda: STATE, session=True)
    there.forget_sessions()
    assert (there.longest(TOKENS, 299), len(list(tmp_path.iterdir()))) == (100, 1)


def test_only_the_owner_can_read_them(tmp_path: Path):
    """They hold what users have said."""
    folder = tmp_path / "prefixes"
    files(folder).save(TOKENS, lambda: STATE, session=True)
    assert folder.stat().st_mode & 0o077 == 0
    assert the_file(folder).stat().st_mode & 0o077 == 0


def gone(folder: Path) -> None:
    folder.rmdir()


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("in the way")


@pytest.mark.parametrize("happens", [gone, a_file])
def test_a_folder_that_cannot_be_used_does_no_harm(tmp_path: Path, happens: Callable[[Path], None]):
    folder = tmp_path / "prefixes"
    there = files(folder)
    happens(folder)
    assert not there.save(TOKENS, lambda: STATE, session=False)
    assert there.load(TOKENS) is None


def test_another_model_has_another_identity(tmp_path: Path):
    """One changed byte of the metadata, another size: both are seen. A copy is the same model."""
    pocket = models.locate("pocket").read_bytes()
    copy, changed, longer = tmp_path / "copy.gguf", tmp_path / "changed.gguf", tmp_path / "longer.gguf"
    copy.write_bytes(pocket)
    changed.write_bytes(pocket[:100] + bytes([pocket[100] ^ 1]) + pocket[101:])
    longer.write_bytes(pocket + b"\0")
    assert identity(copy) == identity(models.locate("pocket"))
    assert len({identity(file) for file in (copy, changed, longer)}) == 3
