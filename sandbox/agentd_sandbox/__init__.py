"""Confinement for one-shot tool workers: default-deny seccomp, and a broker that does the path calls for them.

Stands alone: standard library only, imports nothing of agentd. Linux on x86_64, aarch64 and 32-bit arm.
"""

from agentd_sandbox.access import Access, PathRule
from agentd_sandbox.errors import (
    BrokerStuck,
    DeviceFailure,
    OutputTooLarge,
    SandboxFailure,
    Unsupported,
    WorkerCancelled,
    WorkerDied,
    WorkerOffence,
    WorkerRevoked,
    WorkerTimeout,
)
from agentd_sandbox.host import Job, Sandbox
from agentd_sandbox.levels import Level, no_level, probe
from agentd_sandbox.limits import Limits
from agentd_sandbox.outcome import Contact, Denial, Operation, Outcome
from agentd_sandbox.proxy import Credential
from agentd_sandbox.recorder import Change, Recorder, Refusal

__all__ = [
    "Access",
    "BrokerStuck",
    "Change",
    "Contact",
    "Credential",
    "Denial",
    "DeviceFailure",
    "Job",
    "Level",
    "Limits",
    "Operation",
    "Outcome",
    "OutputTooLarge",
    "PathRule",
    "Recorder",
    "Refusal",
    "Sandbox",
    "SandboxFailure",
    "Unsupported",
    "WorkerCancelled",
    "WorkerDied",
    "WorkerOffence",
    "WorkerRevoked",
    "WorkerTimeout",
    "no_level",
    "probe",
]
