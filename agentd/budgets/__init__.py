"""Budgets: sensors, the governor, and what it lets the engine and new work do."""

from agentd.budgets.budgets import Budgets, OverBudget
from agentd.budgets.policy import Policy, policy_for, this_device, total_mib
from agentd.budgets.programs import Program
from agentd.budgets.sensors import ZONES, Device
from agentd.budgets.state import Allowance, Readings, State

__all__ = [
    "ZONES",
    "Allowance",
    "Budgets",
    "Device",
    "OverBudget",
    "Policy",
    "Program",
    "Readings",
    "State",
    "policy_for",
    "this_device",
    "total_mib",
]
