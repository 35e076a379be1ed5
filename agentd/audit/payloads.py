"""Payloads: what people, models and tools have written. The log commits to them and does not have them in it.

An event says SHA-256(0x02 || 32 random bytes || field || 0x00 || value); the bytes and the value stand in a table beside it.
Once they are taken out nobody can find the value again by guessing, and the chain still verifies. The idea, and that the name
of the field is part of what is hashed, is that of RFC 9901 (SD-JWT), 4.2.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
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

    @classmethod
    def of(cls, seq: int, field: bytes, salt: bytes, value: bytes | None) -> Kept:
        """From a row of the store, whose texts somebody may have made into none."""
        return cls(seq, field.decode("utf-8", "replace"), salt, None if value is None else value.decode("utf-8", "replace"))

    @property
    def said(self) -> Any:
        """The value; None where it is not kept, or is damaged."""
        try:
            return json.loads(self.value) if self.value is not None else None
        except ValueError:
            return None


def text_of(value: Any) -> str:
    """The JSON that is committed to: sorted, without spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def commitment(salt: bytes, field: str, text: str) -> str:
    """As it stands in the event, in hexadecimal."""
    return hashlib.sha256(b"\x02" + salt + f"{field}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()


def seal(payload: Payload, seq: int, field: str) -> tuple[dict[str, Any], Kept]:
    """What the event says, and what is kept beside it."""
    text, salt = text_of(payload.value), secrets.token_bytes(SALT_BYTES)
    told: dict[str, Any] = {"$commitment": commitment(salt, field, text), "$bytes": len(text)}
    if len(text) > LONGEST:
        return told | {"$kept": False, "$salt": hashlib.sha256(salt).hexdigest()}, Kept(seq, field, salt, None)
    return told, Kept(seq, field, salt, text)


def commitments(body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those in an event, by field: `arguments.text`, `error`."""
    fields: dict[str, Any] = dict(body)
    for name, value in body.items():
        fields |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {}
    return {
        field: each for field, each in fields.items() if isinstance(each, dict) and isinstance(each.get("$commitment"), str)
    }


def is_of(kept: Kept, body: bytes) -> bool:
    """Whether the event with this body commits to what is kept. As text, as parsing each event would take twice as long."""
    if kept.value is not None:
        return MARK + commitment(kept.salt, kept.field, kept.value).encode() in body
    try:
        said = commitments(json.loads(body)).get(kept.field, {})
    except (ValueError, AttributeError):
        return False
    return said.get("$kept") is False and said.get("$salt") == hashlib.sha256(kept.salt).hexdigest()
