"""Witnesses: somebody else's machine that signs each checkpoint of a log, if it continues the one before.

As https://c2sp.org/tlog-witness and https://c2sp.org/tlog-cosignature say, so that any such witness will do; `agentd witness`
is one. A log whose end was cut off, or that was put back to an older copy, gets no signature any more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agentd.audit.notes import BadNote, Checkpoint, Verifier, key_hash, key_text, parsed_key
from agentd.audit.tree import is_consistent
from agentd.store import arriving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from agentd.audit.notes import Signer

COSIGNATURE = b"\x04"  # timestamped Ed25519
LONGEST_BODY = 64 << 10
_TIMEOUT_S = 10.0
_LONGEST_PROOF = 63  # c2sp.org/tlog-witness


@dataclass(frozen=True, slots=True)
class Witness:
    """Who cosigns: a name and a public key. `url` is where it is asked, if it is."""

    name: str
    public: bytes
    url: str = ""

    @property
    def hash(self) -> bytes:
        return key_hash(self.name, COSIGNATURE, self.public)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return key_text(self.name, COSIGNATURE, self.public)

    @classmethod
    def parse(cls, text: str, url: str = "") -> Self:
        """Raises BadNote."""
        name, public = parsed_key(text, COSIGNATURE, "key of a witness")
        if url and urlsplit(url).scheme not in ("http", "https"):
            raise BadNote("a witness is asked over http or https")
        return cls(name, public, url)

    def has_signed(self, note: str) -> int:
        """When this witness has signed a note, in seconds since 1970; 0 if it has not."""
        text, gap, signatures = note.rpartition("\n\n")
        for line in signatures.splitlines() if gap else ():
            dash, _, rest = line.partition(" ")
            name, _, encoded = rest.partition(" ")
            if dash == "\u2014" and name == self.name and (at := self._checked(f"{text}\n", encoded)):
                return at
        return 0

    def _checked(self, text: str, encoded: str) -> int:
        try:
            blob = base64.b64decode(encoded, validate=True)
            at = int.from_bytes(blob[4:12], "big")
            Ed25519PublicKey.from_public_bytes(self.public).verify(blob[12:], _message(at, text))
        except (ValueError, InvalidSignature):
            return 0
        return at if blob[:4] == self.hash else 0

    def ask(self, note: str, size: int, prove: Callable[[int], Sequence[bytes]]) -> str:
        """The note with its cosignature. `prove` gives the proof from a smaller size. Raises OSError."""
        old = 0
        for _ in range(2):  # it may know of another size than we think: then it says so
            proof = [base64.b64encode(each).decode() for each in (prove(old) if old else ())]
            body = "\n".join([f"old {old}", *proof, "", note])
            status, answer = _post(f"{self.url.rstrip('/')}/add-checkpoint", body)
            if status != 409:
                break
            old = int(answer) if answer.strip().isdigit() else size + 1
            if old > size:
                raise OSError(0, f"it has seen {answer.strip()[:20]} events of this log, which has {size}: its end was cut off")
        if status != 200:
            raise OSError(0, f"it answered {status}: {answer.strip()[:100]}")
        cosigned = note + answer
        if not self.has_signed(cosigned):
            raise OSError(0, "its signature is not by the key that it is known by")
        return cosigned


def _message(at: int, text: str) -> bytes:
    return f"cosignature/v1\ntime {at}\n{text}".encode()


def _post(url: str, body: str) -> tuple[int, str]:
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "text/plain"}, method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - http or https: `Witness.parse`
            return int(answer.status), answer.read(LONGEST_BODY).decode("utf-8", "replace")
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read(1000).decode("utf-8", "replace")


class Cosigner:
    """The other side: signs checkpoints of the logs that it knows, each if it continues the one that it signed before."""

    def __init__(self, signer: Signer, logs: Iterable[Verifier], folder: Path) -> None:
        self._signer, self._folder = signer, folder
        self._logs: Mapping[str, Verifier] = {log.name: log for log in logs}
        self._signing = threading.Lock()
        self.witness = Witness(signer.verifier.name, signer.verifier.public)

    def add(self, body: str) -> tuple[int, str]:
        """HTTP status and answer to a request of add-checkpoint."""
        try:
            old, proof, note = _request(body)
        except ValueError as e:
            return 400, f"{e}\n"
        log = self._logs.get(note.partition("\n")[0])
        if log is None:
            return 404, "this log is not known here\n"
        try:
            point = log.open(note)
        except BadNote as e:
            return 403, f"{e}\n"
        with self._signing:
            return self._decide(old, proof, point)

    def _decide(self, old: int, proof: Sequence[bytes], point: Checkpoint) -> tuple[int, str]:
        size, root = self._seen(point.origin)
        if old > point.size:
            return 400, "the old size is larger than the checkpoint's\n"
        if old != size:
            return 409, f"{size}\n"
        if size == point.size and size:
            if root != point.root:
                return 409, f"{size}\n"
        elif size and not is_consistent(size, root, point.size, point.root, proof):
            return 422, "the proof does not hold: this log does not continue the one that was signed before\n"
        self._remember(point)
        at = int(time.time())
        signature = self.witness.hash + at.to_bytes(8, "big") + self._signer.raw(_message(at, point.text))
        return 200, f"\u2014 {self.witness.name} {base64.b64encode(signature).decode()}\n"

    def _file(self, origin: str) -> Path:
        return self._folder / f"{hashlib.sha256(origin.encode()).hexdigest()}.json"

    def _seen(self, origin: str) -> tuple[int, bytes]:
        try:
            kept = json.loads(self._file(origin).read_text())
        except FileNotFoundError:
            return 0, b""
        return int(kept["size"]), bytes.fromhex(kept["root"])

    def _remember(self, point: Checkpoint) -> None:
        """Durable before anything is signed: a witness that forgets is none."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with arriving(self._file(point.origin)) as file:
            file.write(json.dumps({"origin": point.origin, "size": point.size, "root": point.root.hex()}).encode())


def _request(body: str) -> tuple[int, list[bytes], str]:
    """Old size, proof and note. Raises ValueError."""
    head, gap, note = body.partition("\n\n")
    first, *proof = head.split("\n")
    word, _, old = first.partition(" ")
    if not gap or word != "old" or not (old.isascii() and old.isdigit()) or len(proof) > _LONGEST_PROOF:
        raise ValueError("it is no request to add a checkpoint")
    hashes = [base64.b64decode(line, validate=True) for line in proof]
    if any(len(each) != 32 for each in hashes):
        raise ValueError("a hash of the proof is no SHA-256")
    return int(old), hashes, note
