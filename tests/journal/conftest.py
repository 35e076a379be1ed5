"""A block device of its own, where the user is root and the machine has one to lend."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 96 << 20


def mount(image: Path, at: Path) -> None:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True, capture_output=True)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A new file system, mounted; the image is beside it."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("only root can mount a file system, and mkfs.ext4 must be there")
    image, at = tmp_path / "image", tmp_path / "device"
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    try:
        mount(image, at)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop device can be mounted here")
    yield at
    subprocess.run(["umount", "-l", at], check=False, capture_output=True)
