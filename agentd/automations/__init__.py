"""Automations: what starts runs by itself, exactly once for each file, time or call that triggers one."""

from agentd.automations.automation import Automation, When
from agentd.automations.conditions import unmet
from agentd.automations.events import Event, Events, State
from agentd.automations.service import Automations, Checked, Told

__all__ = ["Automation", "Automations", "Checked", "Event", "Events", "State", "Told", "When", "unmet"]
