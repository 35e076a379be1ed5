"""What can go wrong with a worker. Messages name what happened; callers add to what and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentd_sandbox.outcome import Outcome


class SandboxFailure(Exception):
    """Base of all failures of the sandbox itself or of a worker in it."""

    outcome: Outcome | None = None
    """What a call that failed has done until then, where one had begun."""


class Unsupported(SandboxFailure):
    """This kernel or processor cannot confine a worker; `call` and `errno` name what it refused."""

    def __init__(self, call: str, errno: int, why: str) -> None:
        super().__init__(f"{call}: {why}")
        self.call = call
        self.errno = errno


class DeviceFailure(Exception):
    """A device could not be operated; the message says why, to the tool that asked and to people."""


class WorkerDied(SandboxFailure):
    """The worker ended without an answer: killed by the filter, by a limit, or by itself."""


class WorkerTimeout(SandboxFailure):
    """The worker was killed at its deadline."""


class WorkerCancelled(SandboxFailure):
    """The caller gave up on the call; the worker was killed."""


class OutputTooLarge(SandboxFailure):
    """The worker's answer went past the cap; it was killed."""


class WorkerOffence(SandboxFailure):
    """The worker went past a limit of its call, or did what only an attack does; it was killed."""


class WorkerRevoked(WorkerOffence):
    """What the call was allowed to do was taken back while it ran; the worker was killed."""


class BrokerStuck(SandboxFailure):
    """The broker waits for a file system that does not answer; the worker was killed, its call may not be final."""
