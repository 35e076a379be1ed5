"""The undo journal: the former state of a path is on disk before the path is changed."""

from agentd.journal.journal import Journal, Transaction, Undone
from agentd.journal.state import PathState

__all__ = ["Journal", "PathState", "Transaction", "Undone"]
