"""Permissions: what a call's scopes are matched against, the decision, the people who are asked, and what taints a run."""

from agentd.grants.approvals import Answer, Approval, Approvals, Extent, State, offers_for
from agentd.grants.conditions import Clock, Conditions, Moment, moment
from agentd.grants.decide import Book, Decision, Request
from agentd.grants.file_labels import FileLabels
from agentd.grants.grant import Grant
from agentd.grants.grants import Grants
from agentd.grants.later import Later
from agentd.grants.learn import propose
from agentd.grants.notify import Notifier
from agentd.grants.own import Own, programs
from agentd.grants.patterns import Pattern, parse
from agentd.grants.scopes import PATH_KINDS, Scope, normalise, real
from agentd.grants.taint import Labels, Taint

__all__ = [
    "PATH_KINDS",
    "Answer",
    "Approval",
    "Approvals",
    "Book",
    "Clock",
    "Conditions",
    "Decision",
    "Extent",
    "FileLabels",
    "Grant",
    "Grants",
    "Labels",
    "Later",
    "Moment",
    "Notifier",
    "Own",
    "Pattern",
    "Request",
    "Scope",
    "State",
    "Taint",
    "moment",
    "normalise",
    "offers_for",
    "parse",
    "programs",
    "propose",
    "real",
]
