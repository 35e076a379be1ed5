"""Space that is set aside: whole, in part, or given up."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from agentd.store import Reserve

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def test_it_is_set_aside_once_and_given_up_once(tmp_path: Path):
    reserve = Reserve(tmp_path)
    assert reserve.hold()
    assert reserve.hold()
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= 8 * MIB
    assert not reserve.release_if_full()
    assert reserve.release()
    assert not reserve.release()


@pytest.mark.parametrize(("left", "held"), [(0, 0), (3 * MIB, 2 * MIB), (5 * MIB, 4 * MIB), (100 * MIB, 8 * MIB)])
def test_on_a_full_disk_it_is_what_can_be_had_and_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, held: int
):
    real = os.posix_fallocate

    def allocate(descriptor: int, offset: int, length: int) -> None:
        if length > left:
            raise OSError(errno.ENOSPC, "full")
        real(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert Reserve(tmp_path).hold() == (held == 8 * MIB)
    assert (tmp_path / "reserve").stat().st_blocks * 512 == pytest.approx(held, abs=MIB // 4)


def test_a_file_system_that_cannot_set_space_aside_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert Reserve(tmp_path).hold()
