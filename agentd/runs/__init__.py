"""The agent loop: a run is prompt -> (generate -> tool calls -> results)* -> answer."""

from agentd.runs.run import Direct, Run, RunEvent, RunRequest, State, StopReason
from agentd.runs.service import Limits, ModelSettings, Runs

__all__ = ["Direct", "Limits", "ModelSettings", "Run", "RunEvent", "RunRequest", "Runs", "State", "StopReason"]
