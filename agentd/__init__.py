"""agentd: a small language model on the device, whose tool calls are permitted, confined, recorded and reversible."""

__version__ = "0.1.0"
