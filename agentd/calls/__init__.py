"""One tool call from request to result: validate, decide, journal, execute, record."""

from agentd.calls.credentials import load_credentials
from agentd.calls.manifest import Tool, Toolbox, load
from agentd.calls.permission import Denied, Permission
from agentd.calls.places import Places
from agentd.calls.service import CONCURRENT_CALLS, Calls
from agentd.calls.undoing import Progress, no_progress
from agentd.calls.wanted import NAMED_PATHS, CallRequest, CallResult

__all__ = [
    "CONCURRENT_CALLS",
    "NAMED_PATHS",
    "CallRequest",
    "CallResult",
    "Calls",
    "Denied",
    "Permission",
    "Places",
    "Progress",
    "Tool",
    "Toolbox",
    "load",
    "load_credentials",
    "no_progress",
]
