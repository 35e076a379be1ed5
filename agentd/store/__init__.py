"""The SQLite store: one writer thread, durable before it answers."""

from agentd.store.ids import new_id
from agentd.store.store import Store

__all__ = ["Store", "new_id"]
