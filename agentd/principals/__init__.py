"""Who asks: owners of processes, holders of tokens, names in certificates; what each may do, and how it is told apart."""

from agentd.principals.principal import ROLES, Principal, Role
from agentd.principals.roster import Roster
from agentd.principals.tokens import Token, Tokens

__all__ = ["ROLES", "Principal", "Role", "Roster", "Token", "Tokens"]
