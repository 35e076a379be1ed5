"""The undo journal: what a path was before a call changed it, and bringing it back."""

from agentd.journal.journal import Journal
from agentd.journal.places import parents
from agentd.journal.plan import PathPlan, Permit, Plan, Selection, Verdict, Ways
from agentd.journal.recovery import Left
from agentd.journal.retention import Keep
from agentd.journal.rollback import Difference, Rehearsal, Rollbacks, Undone
from agentd.journal.transaction import Transaction

__all__ = [
    "Difference",
    "Journal",
    "Keep",
    "Left",
    "PathPlan",
    "Permit",
    "Plan",
    "Rehearsal",
    "Rollbacks",
    "Selection",
    "Transaction",
    "Undone",
    "Verdict",
    "Ways",
    "parents",
]
