"""How many files the daemon may have open, and what that is enough for: being short is found out at the start.

The soft limit is raised as far as the hard one allows. What is left after the daemon's own decides how many calls may run at
once: one that ran out in the middle could not be rolled back.
"""

from __future__ import annotations

import contextlib
import resource

from agentd.errors import DaemonError, Reason

_OWN = 64  # counted: 32 at rest; clients, readers of the log and the engine come to it
_BY_CALL = 48  # counted: up to 12, and 32 directories of a deep path
_ENOUGH = 4096


def calls_at_once(most: int) -> int:
    """How many calls the limit of open files is enough for, `most` at best. Raises DaemonError (DESCRIPTORS_SHORT)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    least = _OWN + _BY_CALL
    if 0 <= soft < least:
        raise DaemonError(
            Reason.DESCRIPTORS_SHORT,
            f"agentd needs {least} file descriptors, and the limit is {soft}: no call could be undone.",
            hint="Raise it: `ulimit -n 1024`, or LimitNOFILE= in the unit.",
            metadata={"needed": str(least), "limit": str(soft)},
        )
    return most if soft < 0 else min(most, (soft - _OWN) // _BY_CALL)
