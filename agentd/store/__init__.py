"""The SQLite store: one writer thread, durable before it answers."""

from agentd.store.durable import arriving, sync_folder
from agentd.store.ids import new_id
from agentd.store.reserve import Reserve
from agentd.store.store import Store

__all__ = ["Reserve", "Store", "arriving", "new_id", "sync_folder"]
