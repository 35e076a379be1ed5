"""Names of runs and calls: ULIDs, so that they sort by time and say nothing else."""

from __future__ import annotations

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32, https://github.com/ulid/spec


_lock = threading.Lock()
_last = [0]


def new_id() -> str:
    """26 characters: 48 bits of milliseconds, 80 bits of chance. Later ones of this process sort behind earlier ones."""
    with _lock:
        value = _last[0] = max(time.time_ns() // 1_000_000 << 80 | secrets.randbits(80), _last[0] + 1)
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))
