"""An empty file in the place of one that is kept as it is: as if it had been emptied, but without a byte of it touched."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from typing import TYPE_CHECKING

from agentd_sandbox import kernel

if TYPE_CHECKING:
    from agentd_sandbox.paths import Resolved

_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def renewed(old: Resolved, place: Resolved, flags: int, mark: bytes) -> int:
    """A descriptor of the new file, open with `flags`. `place` is where `old` is, with its folder; `mark` is the call's.

    There is no moment without a file by that name. Raises OSError (EAGAIN) if somebody has put another one there.
    """
    temporary = b".agentd-" + mark + b"-" + secrets.token_hex(4).encode()
    opened = os.open(temporary, flags | _NEW, 0o600, dir_fd=place.parent)
    try:
        _make_like(opened, old)
        _take_its_name(old, place, temporary)
    except OSError:
        _remove(temporary, place.parent, (old, opened))
        os.close(opened)
        raise
    _remove(temporary, place.parent, (old, opened))
    return opened


def _remove(temporary: bytes, folder: int, known: tuple[Resolved, int]) -> None:
    """What has the name now: the file that was replaced, or the new one; never somebody's that came in between."""
    old, new = known
    with contextlib.suppress(OSError):
        there = os.stat(temporary, dir_fd=folder, follow_symlinks=False)
        if os.path.samestat(there, old.status) or os.path.samestat(there, os.fstat(new)):
            os.unlink(temporary, dir_fd=folder)


def _take_its_name(old: Resolved, place: Resolved, temporary: bytes) -> None:
    try:
        kernel.exchange(place.parent, temporary, place.name)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # A file system that can't exchange two names: looked at first, and replaced a moment later.
        if not os.path.samestat(os.stat(place.name, dir_fd=place.parent, follow_symlinks=False), old.status):
            raise OSError(errno.EAGAIN, "replaced") from None
        os.rename(temporary, place.name, src_dir_fd=place.parent, dst_dir_fd=place.parent)
        return
    if not os.path.samestat(os.stat(temporary, dir_fd=place.parent, follow_symlinks=False), old.status):
        kernel.exchange(place.parent, temporary, place.name)
        raise OSError(errno.EAGAIN, "replaced")


def _make_like(descriptor: int, model: Resolved) -> None:
    """Owner, mode and attributes. As with O_TRUNC, never set-uid or set-gid."""
    status, there = model.status, f"/proc/self/fd/{model.descriptor}"
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
        os.fchown(descriptor, status.st_uid, status.st_gid)
    os.fchmod(descriptor, status.st_mode & 0o1777)
    try:
        names = os.listxattr(there)
    except OSError:  # a file system that has none
        return
    for name in names:
        if not name.startswith("security."):
            os.setxattr(descriptor, name, os.getxattr(there, name))
