"""Space set aside on the store's disk: with it, what has begun can be ended when the disk is full, and the daemon can start."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_WHOLE = 8 * _MIB
"""A start takes up to one, a recovery more. Of a small disk an eighth."""
_NEEDED = 2 * _MIB
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """A file in the state directory that holds nothing but space."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "reserve"

    def hold(self) -> bool:
        """Set it aside, or what can be had of it. False if the disk is too full for all of it: nothing may begin then."""
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            return e.errno not in _FULL
        try:
            held, whole = os.fstat(descriptor).st_size, self._whole()
            for size in (whole, whole * 3 // 4, whole // 2, whole // 4):
                if size <= held:
                    break
                try:
                    os.posix_fallocate(descriptor, 0, size)
                    break
                except OSError as e:
                    os.ftruncate(descriptor, 0)
                    if e.errno not in _FULL:  # a file system that can't do it: all works without, but for that
                        return True
            return os.fstat(descriptor).st_size >= whole
        finally:
            os.close(descriptor)

    def release(self) -> bool:
        """Whether there was any."""
        try:
            held = self._file.stat().st_size
            self._file.unlink()
        except OSError:
            return False
        return held > 0

    def release_if_full(self) -> bool:
        """Before the store is opened: that takes some space, too. Whether it was given up."""
        try:
            space = os.statvfs(self._folder)
        except OSError:  # it is made in a moment
            return False
        return space.f_bavail * space.f_frsize < min(_NEEDED, self._whole()) and self.release()

    def _whole(self) -> int:
        space = os.statvfs(self._folder)
        return min(_WHOLE, space.f_blocks * space.f_frsize // 8)
