"""Payloads: what people, models and tools have written. The log commits to them and does not have them in it.

An event says SHA-256(0x02 || 32 random bytes || value); the bytes and the value stand in a table beside it. Once they are taken
out nobody can find the value again by guessing, and the chain still verifies. The idea is that of RFC 9901 (SD-JWT), 4.2.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SALT_BYTES = 32
LONGEST = 16 << 10
"""Bytes of JSON; of a longer value the salt is kept, so that somebody who has it can show that it was this one."""
MARK = b'"$commitment":"'
"""Begins each commitment in a stored event, and can stand nowhere else in one: within a string its quotes are escaped."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A value that an event only commits to: anything that JSON can say."""

    value: Any


@dataclass(frozen=True, slots=True)
class Kept:
    """What stands beside the log for `field` of event `seq`; `value` is JSON, None if it was too long to be kept."""

    seq: int
    field: str
    salt: bytes
    value: str | None

    @property
    def told_as_text(self) -> str:
        """How the event says this of a value that is kept."""
        text = self.value or ""
        return f'{_key(self.field)}:{{"$bytes":{len(text)},"$commitment":"{commitment(self.salt, text)}"'


@lru_cache
def _key(field: str) -> str:
    """The last part of its name, as JSON has it."""
    return text_of(field.partition(".")[2] or field)


def text_of(value: Any) -> str:
    """The JSON that is committed to: sorted, without spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def commitment(salt: bytes, text: str) -> str:
    """As it stands in the event, in hexadecimal."""
    return hashlib.sha256(b"\x02" + salt + text.encode("ascii")).hexdigest()


def seal(payload: Payload, seq: int, field: str) -> tuple[dict[str, Any], Kept]:
    """What the event says, and what is kept beside it."""
    text, salt = text_of(payload.value), secrets.token_bytes(SALT_BYTES)
    told: dict[str, Any] = {"$commitment": commitment(salt, text), "$bytes": len(text)}
    if len(text) > LONGEST:
        return told | {"$kept": False}, Kept(seq, field, salt, None)
    return told, Kept(seq, field, salt, text)


def commitments(body: dict[str, Any], *, kept_not: bool = False) -> dict[str, str]:
    """Those in an event, by field: `arguments.text`, `error`; with `kept_not` only those of values too long to be kept."""
    found: dict[str, str] = {}
    for name, value in body.items():
        inside = value if isinstance(value, dict) else {}
        for field, each in {name: value, **{f"{name}.{key}": item for key, item in inside.items()}}.items():
            if not isinstance(each, dict) or (kept_not and each.get("$kept") is not False):
                continue
            if isinstance(each.get("$commitment"), str):
                found[field] = each["$commitment"]
    return found
