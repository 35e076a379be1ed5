"""The undo journal: what a path was before a call changed it, and putting it back."""

from agentd.journal.journal import Journal
from agentd.journal.plan import PathPlan, Plan, Selection, Verdict, Ways
from agentd.journal.retention import Keep
from agentd.journal.rollback import Difference, Rehearsal, Rollbacks, Undone
from agentd.journal.transaction import Transaction

__all__ = [
    "Difference",
    "Journal",
    "Keep",
    "PathPlan",
    "Plan",
    "Rehearsal",
    "Rollbacks",
    "Selection",
    "Transaction",
    "Undone",
    "Verdict",
    "Ways",
]
