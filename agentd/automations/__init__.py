"""Automations: what starts runs by itself, exactly once for each file, time or call that triggers one."""

from agentd.automations.automation import Automation, When, read_all
from agentd.automations.conditions import unmet
from agentd.automations.events import Event, Events, State
from agentd.automations.service import Automations, Checked, Told, rules

__all__ = ["Automation", "Automations", "Checked", "Event", "Events", "State", "Told", "When", "read_all", "rules", "unmet"]
