"""Tokens: access for programs. The secret is shown once; the store has its hash."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from agentd.audit import Event
from agentd.errors import Reason, RequestError
from agentd.grants import parse
from agentd.principals.principal import ROLES, Principal, Role
from agentd.store import new_id

if TYPE_CHECKING:
    from collections.abc import Callable

    import apsw

    from agentd.audit import AuditLog
    from agentd.store import Store

_PREFIX = "agentd"
_SECRET_BYTES = 32
_LABEL = re.compile(r"[a-z][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Token:
    """`scopes` bound what its calls may touch; times are nanoseconds since 1970, 0 for no end."""

    label: str
    roles: tuple[Role, ...] = ("user",)
    scopes: tuple[str, ...] = ()
    expire_ns: int = 0
    id: str = ""
    created_by: str = ""
    create_ns: int = 0

    def principal(self) -> Principal:
        within = tuple(parse(text, resolved=True) for text in self.scopes)
        return Principal(f"token:{self.label}", frozenset(self.roles), within, self.id)


class Tokens:
    """All tokens. `now` is the clock that expiry is held against."""

    def __init__(self, store: Store, audit: AuditLog, now: Callable[[], int]) -> None:
        self._store, self._audit, self._now = store, audit, now
        self._lock = threading.Lock()
        rows = store.read(lambda db: list(db.execute("SELECT hash, body FROM token WHERE revoke_ns IS NULL ORDER BY id")))
        self._kept = {token.id: (hashed, token) for hashed, body in rows for token in [_parsed(body)]}

    def all(self) -> list[Token]:
        """Oldest first."""
        with self._lock:
            return [token for _, token in self._kept.values()]

    def create(self, wanted: Token, by: str) -> tuple[Token, str]:
        """The token and its secret. Not for the event loop. Raises RequestError: TOKEN_INVALID, GRANT_INVALID; StoreError."""
        _check(wanted, {token.label for token in self.all()}, self._now())
        scopes = tuple(parse(text).text for text in wanted.scopes)
        token = replace(wanted, id=new_id(), created_by=by, create_ns=self._now(), scopes=scopes)
        secret = f"{_PREFIX}_{token.id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        hashed = _hash(secret)

        def insert(db: apsw.Connection) -> None:
            db.execute("INSERT INTO token VALUES (?, ?, ?, NULL)", (token.id, hashed, json.dumps(asdict(token))))
            self._audit.append(db, Event(kind="token.create", principal=by, detail=_told(token)))

        self._store.write(insert)
        with self._lock:
            self._kept[token.id] = hashed, token
        return token, secret

    def revoke(self, identity: str, by: str) -> Token:
        """From its next request on its holder is nobody. Not for the event loop. Raises RequestError (TOKEN_NOT_FOUND)."""
        with self._lock:
            _, token = self._kept.get(identity, (b"", None))
        if token is None:
            message = f"There is no token {identity!r}."
            hint = "`agentd token list` shows those that there are."
            raise RequestError(Reason.TOKEN_NOT_FOUND, message, hint=hint, field="name", metadata={"token": identity})
        revoked = token

        def revoke(db: apsw.Connection) -> None:
            db.execute("UPDATE token SET revoke_ns = ? WHERE id = ?", (time.time_ns(), identity))
            self._audit.append(db, Event(kind="token.revoke", principal=by, detail=_told(revoked)))

        self._store.write(revoke)
        with self._lock:
            self._kept.pop(identity, None)
        return token

    def holder(self, secret: str) -> Principal | None:
        """Who has this secret: nobody if there is no such token, or it has expired. A hash of 256 random bits needs no salt."""
        identity = secret.split("_")[1] if secret.count("_") >= 2 else ""
        with self._lock:
            hashed, token = self._kept.get(identity, (b"", None))
        matches = hmac.compare_digest(hashed, _hash(secret))
        return token.principal() if token and matches and self._holds(token) else None

    def by_id(self, identity: str) -> Principal | None:
        """Whom that token stands for, if it still holds."""
        return next((token.principal() for token in self.all() if token.id == identity and self._holds(token)), None)

    def _holds(self, token: Token) -> bool:
        return not token.expire_ns or self._now() < token.expire_ns


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _parsed(body: str) -> Token:
    fields = json.loads(body)
    return Token(**fields | {"roles": tuple(fields["roles"]), "scopes": tuple(fields["scopes"])})


def _told(token: Token) -> dict[str, object]:
    said = asdict(token)
    return {"token": said.pop("id"), **said, "roles": list(token.roles), "scopes": list(token.scopes)}


def _check(wanted: Token, taken: set[str], now_ns: int) -> None:
    def bad(field: str, why: str) -> RequestError:
        return RequestError(Reason.TOKEN_INVALID, f"{field} {why}.", field=field, metadata={"field": field})

    if not _LABEL.fullmatch(wanted.label):
        raise bad("token.label", "is 1 to 64 of a-z, 0-9, `_`, `.` and `-`, a letter first")
    if wanted.label in taken:
        raise bad("token.label", f"{wanted.label!r} is taken: revoke that token first, or choose another name")
    if unknown := set(wanted.roles) - ROLES:
        raise bad("token.roles", f"has {', '.join(sorted(unknown))}; there are {', '.join(sorted(ROLES))}")
    if not wanted.roles:
        raise bad("token.roles", "is empty")
    if wanted.expire_ns and wanted.expire_ns <= now_ns:
        raise bad("token.expire_time", "is not in the future")
