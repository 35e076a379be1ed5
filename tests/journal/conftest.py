"""A block device of its own, where the user is root and the machine has one to lend."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def mount(image: Path, at: Path) -> None:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True, capture_output=True)


@contextlib.contextmanager
def lent(tmp_path: Path, size: int, *make: str) -> Iterator[Path]:
    """A new file system, mounted; the image is beside it."""
    if os.geteuid() != 0 or not shutil.which(make[0]):
        pytest.skip(f"only root can mount a file system, and {make[0]} must be there")
    image, at = tmp_path / "image", tmp_path / "device"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*make, image], check=True, capture_output=True)
    try:
        mount(image, at)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop device can be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=False, capture_output=True)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    with lent(tmp_path, 96 << 20, "mkfs.ext4", "-q", "-F") as at:
        yield at


@pytest.fixture
def cloning_device(tmp_path: Path) -> Iterator[Path]:
    """One on which files can share their blocks."""
    with lent(tmp_path, 400 << 20, "mkfs.btrfs", "-q") as at:
        yield at
