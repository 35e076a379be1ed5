"""Who is who: from what a connection shows of itself to a principal. Wrong tokens cost time, and are recorded."""

from __future__ import annotations

import pwd
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentd.errors import Reason, RequestError
from agentd.principals.principal import ROLES, Principal, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentd.principals.tokens import Tokens

FREE_ATTEMPTS = 5  # wrong tokens of one peer in a minute that are recorded one by one
_WINDOW_S = 60.0
_PEERS = 1024  # that are remembered for wrong tokens


@dataclass(slots=True)
class _Attempts:
    count: int = 0
    until: float = 0.0


@dataclass(slots=True)
class Roster:
    """`roles` are those of the configuration, by principal; the user `owner` may do everything.

    `record(peer, why)` is told of each wrong token that the limit still lets through, and when the limit is reached.
    """

    owner: int
    roles: Mapping[str, frozenset[Role]]
    tokens: Tokens
    record: Callable[[str, str], None]
    clock: Callable[[], float] = time.monotonic
    _attempts: dict[str, _Attempts] = field(default_factory=dict)

    def unix(self, uid: int) -> Principal:
        """The user at the other end of a socket, as the kernel says. Raises RequestError (UNAUTHENTICATED)."""
        name = f"unix:{user_name(uid)}"
        return self._listed(name, ROLES if uid == self.owner else frozenset())

    def certificate(self, name: str) -> Principal:
        """The name in a certificate that our own CA has signed. Raises RequestError (UNAUTHENTICATED)."""
        return self._listed(f"tls:{name}", frozenset())

    def bearer(self, secret: str, peer: str) -> Principal:
        """The holder of a token. A right one is taken however many wrong ones came from there: nobody can lock others out.

        Raises RequestError: UNAUTHENTICATED, TOO_MANY_ATTEMPTS.
        """
        if (holder := self.tokens.holder(secret)) is not None:
            return holder
        attempts = self._attempts.get(peer)
        if attempts and attempts.count >= FREE_ATTEMPTS and self.clock() < attempts.until:
            wait = max(1, round(attempts.until - self.clock()))
            raise RequestError(
                Reason.TOO_MANY_ATTEMPTS,
                f"Too many wrong tokens came from here; try again in {wait} s.",
                metadata={"wait_s": str(wait)},
            )
        self._count(peer)
        raise nobody("This token is not one that agentd knows: it was revoked, has expired, or never was.")

    def knows(self, name: str, token: str = "") -> bool:
        """Whether a principal may still have runs: its token (by id) was not revoked, its role not taken away."""
        if token:
            holder = self.tokens.by_id(token)
            return holder is not None and holder.name == name and holder.has("user")
        own = ROLES if name == f"unix:{user_name(self.owner)}" else frozenset[Role]()
        return bool({"user", "admin"} & (own | self.roles.get(name, frozenset())))

    def _count(self, peer: str) -> None:
        now = self.clock()
        attempts = self._attempts.get(peer)
        if attempts is None or now >= attempts.until:
            while len(self._attempts) >= _PEERS:
                self._attempts.pop(next(iter(self._attempts)))
            attempts = self._attempts[peer] = _Attempts(0, now + _WINDOW_S)
        attempts.count += 1
        more = "; no more are looked at for a minute" if attempts.count == FREE_ATTEMPTS else ""
        self.record(peer, f"a wrong token, the {attempts.count}. in a minute{more}")

    def _listed(self, name: str, own: frozenset[Role]) -> Principal:
        roles = own | self.roles.get(name, frozenset())
        if not roles:
            raise nobody(f"{name} has no role here.", f'An admin gives one in agentd.toml: [[principals]] name = "{name}".')
        return Principal(name, roles)


def nobody(why: str, hint: str = "Send `authorization: Bearer SECRET`; `agentd token create` makes one.") -> RequestError:
    return RequestError(Reason.UNAUTHENTICATED, why, hint=hint)


def user_name(uid: int) -> str:
    """A user without a name (containers, Android) is known by number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
