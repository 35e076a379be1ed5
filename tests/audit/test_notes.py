"""Checkpoints as C2SP writes them: read back, refused when anything about them was changed, and never read as something else."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from agentd.audit.notes import BadNote, Checkpoint, Signer, Verifier, load_signer
from agentd.errors import AgentdError, Reason

if TYPE_CHECKING:
    from pathlib import Path

SIGNER = Signer("agentd.local/pi", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
POINT = Checkpoint("agentd.local/pi", 42, bytes(range(32)))
NOTE = SIGNER.sign(POINT)


def test_a_checkpoint_is_three_lines_and_a_signature():
    text, signature = NOTE.split("\n\n")
    assert text == f"agentd.local/pi\n42\n{base64.b64encode(bytes(range(32))).decode()}"
    assert signature.startswith("\u2014 agentd.local/pi ")
    assert signature.endswith("\n")
    assert SIGNER.verifier.open(NOTE) == POINT


def test_a_note_that_others_have_signed_is_checked():
    """The example of golang.org/x/mod/sumdb/note: key and signature hold, its text is no checkpoint."""
    verifier = Verifier.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    note = (
        "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
        "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    with pytest.raises(BadNote, match="no checkpoint"):
        verifier.open(note)
    with pytest.raises(BadNote, match="changed"):
        verifier.open(note.replace("think", "thank"))


@given(st.integers(0, len(NOTE) - 1), st.characters(codec="utf-8"))
def test_a_note_with_any_character_changed_is_refused(at: int, other: str):
    changed = NOTE[:at] + other + NOTE[at + 1 :]
    if changed != NOTE:
        try:
            assert SIGNER.verifier.open(changed) == POINT  # a character of the signature that base64 does not need
            assert at > NOTE.index("\n\n")
        except BadNote:
            pass


def test_notes_of_others_are_refused():
    stranger = Signer("agentd.local/pi", Ed25519PrivateKey.generate())
    with pytest.raises(BadNote, match="not signed"):
        SIGNER.verifier.open(stranger.sign(POINT))
    both = stranger.sign(POINT) + NOTE.split("\n\n")[1]  # other signatures beside ours are no matter: witnesses add theirs
    assert SIGNER.verifier.open(both) == POINT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "a\n\n",
        "a\n1\nAA==\n\n\u2014 agentd.local/pi AAAA\n",
        "x" * 100_000,
        NOTE.rstrip("\n"),
        NOTE.replace("\n", "\r\n"),
    ],
)
def test_what_is_no_note_is_refused(text: str):
    with pytest.raises(BadNote):
        SIGNER.verifier.open(text)


@pytest.mark.parametrize(
    "text", ["a\n01\n{r}\n", "a\n-1\n{r}\n", "a\n1\nAAAA\n", "a\n1\n{r}", "\n1\n{r}\n", "a\n\u0661\n{r}\n", "a\n1\n!\n"]
)
def test_what_is_no_checkpoint_is_refused(text: str):
    with pytest.raises(BadNote):
        Checkpoint.parse(text.format(r=base64.b64encode(bytes(32)).decode()))


@given(st.integers(0, 1 << 60), st.binary(min_size=32, max_size=32))
def test_any_checkpoint_reads_back(size: int, root: bytes):
    point = Checkpoint("o", size, root)
    assert Checkpoint.parse(point.text) == point


@pytest.mark.parametrize(
    "text", ["", "a+b", "a+00000000+AAAA", "a+b+c+d", str(SIGNER.verifier)[:-1], "b" + str(SIGNER.verifier)]
)
def test_a_verifier_key_with_a_mistake_is_none(text: str):
    with pytest.raises(BadNote):
        Verifier.parse(text)


def test_a_verifier_key_reads_back():
    assert Verifier.parse(f" {SIGNER.verifier}\n") == SIGNER.verifier


def test_a_key_is_made_once_and_is_its_owners(tmp_path: Path):
    first = load_signer(tmp_path / "audit.key", "o")
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    assert load_signer(tmp_path / "audit.key", "o").verifier == first.verifier
    assert os.listdir(tmp_path) == ["audit.key"]


def test_a_log_keeps_its_name(tmp_path: Path):
    """Whatever the host is called later; another name in the configuration is an error and no new log."""
    first = load_signer(tmp_path / "audit.key")
    assert load_signer(tmp_path / "audit.key").verifier == first.verifier
    named = load_signer(tmp_path / "other.key", "example.org/kitchen")
    assert load_signer(tmp_path / "other.key").verifier == named.verifier
    with pytest.raises(AgentdError, match=r"example\.org/kitchen"):
        load_signer(tmp_path / "other.key", "example.org/cellar")


def test_a_damaged_key_is_a_named_error_and_not_a_new_one(tmp_path: Path):
    (tmp_path / "audit.key").write_bytes(b"short")
    with pytest.raises(AgentdError) as caught:
        load_signer(tmp_path / "audit.key", "o")
    assert caught.value.reason is Reason.AUDIT_UNAVAILABLE
    assert (tmp_path / "audit.key").read_bytes() == b"short"
