"""Confinement for one-shot tool workers: default-deny seccomp, and a broker that does the path calls for them.

Stands alone: standard library only, imports nothing of agentd. Linux on x86_64 and aarch64.
"""

from agentd_sandbox.access import Access, PathRule
from agentd_sandbox.broker import Denial, Recorder, Refusal
from agentd_sandbox.errors import OutputTooLarge, SandboxFailure, Unsupported, WorkerCancelled, WorkerDied, WorkerTimeout
from agentd_sandbox.host import Job, Outcome, Sandbox
from agentd_sandbox.levels import Level, probe

__all__ = [
    "Access",
    "Denial",
    "Job",
    "Level",
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
    "WorkerTimeout",
    "probe",
]
