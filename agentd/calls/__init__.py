"""One tool call from request to result: validate, decide, journal, execute, record."""

from agentd.calls.credentials import load_credentials
from agentd.calls.manifest import Tool, Toolbox, load
from agentd.calls.service import CallRequest, CallResult, Calls, Denied, Places

__all__ = ["CallRequest", "CallResult", "Calls", "Denied", "Places", "Tool", "Toolbox", "load", "load_credentials"]
