"""A principal: a name and what it may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from agentd.grants import Pattern

Role = Literal["user", "approver", "auditor", "admin"]
ROLES: frozenset[Role] = frozenset(get_args(Role))


@dataclass(frozen=True, slots=True)
class Principal:
    """`name` is what grants and the log know it by: `unix:pi`, `token:phone`, `tls:desk`.

    `within`, where it is not empty, is the most that its calls may touch. An admin may do everything.
    """

    name: str
    roles: frozenset[Role]
    within: tuple[Pattern, ...] = ()
    token: str = ""
    """Id of the token that was shown, if one was."""

    def has(self, role: Role) -> bool:
        return role in self.roles or "admin" in self.roles

    def require(self, role: Role, what: str) -> None:
        """Raises RequestError (ROLE_REQUIRED)."""
        if not self.has(role):
            raise RequestError(
                Reason.ROLE_REQUIRED,
                f"{self.name} may not {what}: that needs the role {role}.",
                hint="An admin gives roles in agentd.toml ([[principals]]) or with a token.",
                metadata={"principal": self.name, "role": role},
            )
