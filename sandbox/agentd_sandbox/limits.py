"""What one call may take of the device: by process, kept by the kernel, and all its processes together, kept by the broker."""

from __future__ import annotations

import resource
from dataclasses import dataclass

_MIB = 1 << 20
LARGEST_FILE = 64 * _MIB
_BY_PROCESS = {
    resource.RLIMIT_AS: 512 * _MIB,
    resource.RLIMIT_CPU: 60,
    resource.RLIMIT_FSIZE: LARGEST_FILE,
    resource.RLIMIT_NOFILE: 256,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_SIGPENDING: 256,  # timers, too: they count against all that the user runs
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one call, all its processes together. `memory_mib` is looked at every half second."""

    processes: int = 64
    forks: int = 10_000
    refused: int = 100_000
    memory_mib: int = 768
    threads: int = 512
    socket_pairs: int = 128
    watches: int = 16
    """Lists of watched descriptors (epoll)."""
    connections: int = 8
    """At a time: to the proxy, being made, being waited for in the worker's place, and counted."""
    written_mib: int = 1024
    """What it may add to files, holes and what is set aside with fallocate(2) included."""


def limit_resources() -> None:
    """To be called in the process itself, before it is locked."""
    for limit, value in _BY_PROCESS.items():
        hard = resource.getrlimit(limit)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))
