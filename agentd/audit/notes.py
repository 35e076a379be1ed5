"""Signed notes and checkpoints of a log, as https://c2sp.org/signed-note and https://c2sp.org/tlog-checkpoint say.

A checkpoint is three lines, who, how many events, and the root of the tree over them, and a signature below. Anybody who has
the public key can check one; whoever has kept one can prove that the log was cut or changed since.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from agentd.errors import Reason, StoreError
from agentd.store import arriving

if TYPE_CHECKING:
    from pathlib import Path

_ED25519 = b"\x01"
_KEY_BYTES = 32
_LONGEST_NOTE = 64 << 10
_NUMBER = re.compile("/[0-9]+$")  # of a log that began when one before it was closed


class BadNote(Exception):
    """It is no checkpoint, or not signed by the key; the message says which."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`size` events of the log `origin` have this root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises BadNote."""
        lines = text.split("\n")
        try:
            origin, size, root = lines[0], lines[1], base64.b64decode(lines[2], validate=True)
        except (IndexError, ValueError):
            raise BadNote("it is no checkpoint") from None
        if lines[-1] or not origin or not size.isascii() or not size.isdigit() or (size != "0" and size[0] == "0"):
            raise BadNote("it is no checkpoint")
        if len(root) != hashlib.sha256().digest_size:
            raise BadNote("its root is no SHA-256")
        return cls(origin, int(size), root)


def key_hash(name: str, algorithm: bytes, public: bytes) -> bytes:
    """Which of several keys of the same name made a signature."""
    return hashlib.sha256(f"{name}\n".encode() + algorithm + public).digest()[:4]


def key_text(name: str, algorithm: bytes, public: bytes) -> str:
    """Name, hash and key in one line."""
    return f"{name}+{key_hash(name, algorithm, public).hex()}+{base64.b64encode(algorithm + public).decode()}"


def parsed_key(text: str, algorithm: bytes, what: str) -> tuple[str, bytes]:
    """Name and public key of such a line. Raises BadNote, saying that it is no `what`."""
    try:
        name, given, key = text.strip().split("+", 2)  # base64 may have more of them
        decoded = base64.b64decode(key, validate=True)
    except ValueError:
        raise BadNote("it is no verifier key (NAME+HASH+KEY)") from None
    found, public = decoded[:1], decoded[1:]
    if found != algorithm or len(public) != _KEY_BYTES or key_hash(name, algorithm, public).hex() != given:
        raise BadNote(f"it is no {what}, or one with a typing mistake")
    return name, public


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key and whose it is."""

    name: str
    public: bytes

    @property
    def hash(self) -> bytes:
        """Which of several keys of the same name made a signature."""
        return key_hash(self.name, _ED25519, self.public)

    def __str__(self) -> str:
        """As `parse` reads it: name, hash and key in one line."""
        return key_text(self.name, _ED25519, self.public)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises BadNote."""
        return cls(*parsed_key(text, _ED25519, "Ed25519 verifier key"))

    def open(self, note: str) -> Checkpoint:
        """The checkpoint of a note that this key has signed. Raises BadNote."""
        if len(note) > _LONGEST_NOTE:
            raise BadNote("it is too long")
        text, gap, signatures = note.rpartition("\n\n")
        if not gap or not signatures.endswith("\n"):
            raise BadNote("it has no signature")
        text += "\n"
        for line in signatures.splitlines():
            dash, _, rest = line.partition(" ")
            name, _, encoded = rest.partition(" ")
            if dash != "\u2014" or name != self.name:
                continue
            try:
                blob = base64.b64decode(encoded, validate=True)
            except ValueError:
                raise BadNote("a signature of it is damaged") from None
            if blob[:4] != self.hash:
                continue
            try:
                Ed25519PublicKey.from_public_bytes(self.public).verify(blob[4:], text.encode())
            except InvalidSignature:
                raise BadNote("its signature is not by this key, or it was changed") from None
            return Checkpoint.parse(text)
        raise BadNote(f"it is not signed by {self.name}")


class Signer:
    """The log's own key."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verifier = Verifier(name, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def raw(self, message: bytes) -> bytes:
        """An Ed25519 signature."""
        return self._key.sign(message)

    def sign(self, checkpoint: Checkpoint) -> str:
        """The note."""
        signature = self.verifier.hash + self._key.sign(checkpoint.text.encode())
        return f"{checkpoint.text}\n\u2014 {self.verifier.name} {base64.b64encode(signature).decode()}\n"


def load_signer(file: Path, origin: str = "") -> Signer:
    """The key in `file`, which only its owner may read, with the name of its log; a new one if there is none.

    A log keeps the name it had first: `origin`, or one made from the host's. Raises StoreError.
    """
    if not file.exists():
        return make_signer(file, origin or _default_origin())
    try:
        kept = file.read_bytes()
    except OSError as e:
        raise _unusable(file, str(e.strerror)) from None
    secret, name = kept[:_KEY_BYTES], kept[_KEY_BYTES:].decode("ascii", "replace").strip()
    if len(secret) != _KEY_BYTES or not name:
        raise _unusable(file, "it is damaged")
    if origin not in ("", name, _NUMBER.sub("", name)):
        raise _unusable(file, f"it is that of the log {name}, and audit.origin in agentd.toml says {origin}")
    return Signer(name, Ed25519PrivateKey.from_private_bytes(secret))


def _default_origin() -> str:
    return f"agentd.local/{re.sub('[^A-Za-z0-9.-]', '-', socket.gethostname()) or 'device'}"


def _unusable(file: Path, why: str) -> StoreError:
    return StoreError(
        Reason.AUDIT_UNAVAILABLE,
        f"The key of the audit log, {file}, can't be used: {why}.",
        hint="Put it back from a copy. If it is moved away a new one is made, which can't check what was signed before.",
        metadata={"path": str(file)},
    )


def make_signer(file: Path, name: str) -> Signer:
    """A new key for a log of this name, kept in `file`. Raises StoreError."""
    key = Ed25519PrivateKey.generate()
    try:
        with arriving(file) as writing:
            writing.write(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()) + name.encode() + b"\n")
    except OSError as e:
        raise _unusable(file, str(e.strerror)) from None
    return Signer(name, key)
