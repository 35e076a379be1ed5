"""Permissions: what a call's scopes are matched against, and the decision."""

from agentd.grants.decide import Decision, Grants, Rule
from agentd.grants.scopes import PATH_KINDS, Scope, normalise

__all__ = ["PATH_KINDS", "Decision", "Grants", "Rule", "Scope", "normalise"]
