"""Budgets: sensors, the governor, and what it lets the engine and new work do."""

from agentd.budgets.admission import Admission, OverBudget, Priority, QueueFull, Ticket
from agentd.budgets.budgets import Budgets
from agentd.budgets.policy import Policy, policy_for, this_device, total_mib
from agentd.budgets.programs import Program
from agentd.budgets.quotas import Quota, Quotas, QuotaSpent, Usage
from agentd.budgets.sensors import ZONES, Device
from agentd.budgets.state import Allowance, Readings, State

__all__ = [
    "ZONES",
    "Admission",
    "Allowance",
    "Budgets",
    "Device",
    "OverBudget",
    "Policy",
    "Priority",
    "Program",
    "QueueFull",
    "Quota",
    "QuotaSpent",
    "Quotas",
    "Readings",
    "State",
    "Ticket",
    "Usage",
    "policy_for",
    "this_device",
    "total_mib",
]
