"""Devices that the daemon operates for tools: lines of the GPIO header, this device's screen, a phone by Termux:API.

What a worker can't be given (a line that must stay set after it has ended, a D-Bus session, Android's services) it asks for by
name; the broker lets the names of the call's scopes through, and this room does it. Nothing a tool says is ever a program or a
path: it is one of the requests below, checked, and text goes to programs on their standard input.
"""

from agentd.devices.devices import Devices
from agentd.devices.program import Programs
from agentd.devices.risk import Risk, is_known, is_node, risk
from agentd.devices.screen import Screen

__all__ = ["Devices", "Programs", "Risk", "Screen", "is_known", "is_node", "risk"]
