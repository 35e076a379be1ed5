"""The process a system call came from: its memory, its descriptors, its working folder."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

from agentd_sandbox import kernel

AT_FDCWD = -100
_PATH_MAX = 4096
_PAGE = os.sysconf("SC_PAGESIZE")  # 16 KiB on a Raspberry Pi 5


@dataclass(slots=True)
class Target:
    """One worker. It can't fork or exec, so the opened memory is its own for all its life."""

    pid: int
    pidfd: int
    folder: bytes
    """Its working folder, which it can't change."""
    _memory: int = -1

    def __post_init__(self) -> None:
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def string(self, address: int) -> bytes:
        """The string at `address`, read once. Raises OSError: EFAULT, ENAMETOOLONG."""
        data = b""
        while len(data) < _PATH_MAX:
            chunk = self.read(address, _PAGE - address % _PAGE)
            if not chunk:
                raise OSError(errno.EFAULT, "path")
            data += chunk
            address += len(chunk)
            if (end := data.find(b"\0")) >= 0:
                return data[:end]
        raise OSError(errno.ENAMETOOLONG, "path")

    def read(self, address: int, size: int) -> bytes:
        try:
            return os.pread(self._memory, size, address)
        except (OSError, OverflowError):
            raise OSError(errno.EFAULT, "address") from None

    def write(self, address: int, data: bytes) -> None:
        try:
            os.pwrite(self._memory, data, address)
        except (OSError, OverflowError):
            raise OSError(errno.EFAULT, "buffer") from None

    def base(self, descriptor: int) -> bytes:
        """The folder that a relative path starts from, as a path to be walked again."""
        if signed(descriptor) == AT_FDCWD:
            return self.folder
        try:
            base = os.readlink(b"/proc/%d/fd/%d" % (self.pid, signed(descriptor)))
        except OSError:
            raise OSError(errno.EBADF, "dirfd") from None
        if not base.startswith(b"/"):
            raise OSError(errno.ENOTDIR, "dirfd")
        return base

    def take(self, descriptor: int) -> int:
        """A copy of one of its descriptors; the caller closes it."""
        return kernel.take_descriptor(self.pidfd, signed(descriptor))


def signed(value: int) -> int:
    """An int argument as the kernel reads it: the low half of the register, signed."""
    (result,) = struct.unpack("=i", struct.pack("=I", value & 0xFFFF_FFFF))
    return int(result)
