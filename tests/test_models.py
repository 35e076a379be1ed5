"""The digest of a model file: right, read once, and never an error."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from agentd.models import Digests, digest, identity

if TYPE_CHECKING:
    from pathlib import Path


def test_it_is_that_of_the_file_and_kept(tmp_path: Path):
    model, known = tmp_path / "model", tmp_path / "known"
    model.write_bytes(os.urandom(3_000_000))
    right = hashlib.sha256(model.read_bytes()).hexdigest()
    assert digest(model, known) == right
    known.write_text(known.read_text().replace(right, "kept"))
    assert digest(model, known) == "kept"  # not read again
    model.write_bytes(b"another")
    assert digest(model, known) == hashlib.sha256(b"another").hexdigest()


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", json.dumps({"file": 1, "sha256": 2})])
def test_what_was_kept_may_be_damaged(tmp_path: Path, text: str):
    model, known = tmp_path / "model", tmp_path / "known"
    model.write_bytes(b"m")
    known.write_text(text)
    assert digest(model, known) == hashlib.sha256(b"m").hexdigest()


def test_a_file_that_is_not_there_has_none(tmp_path: Path):
    assert digest(tmp_path / "none", tmp_path / "known") == ""


def test_the_digest_is_that_of_what_was_loaded_and_not_of_what_took_its_place(tmp_path: Path):
    model = tmp_path / "model"
    model.write_bytes(b"first")
    digests = Digests(model, tmp_path / "known")
    loaded = identity(model)
    assert digests.of(loaded) == hashlib.sha256(b"first").hexdigest()
    (tmp_path / "new").write_bytes(b"second")
    (tmp_path / "new").rename(model)
    assert digests.of(loaded) == hashlib.sha256(b"first").hexdigest()
    assert digests.of(identity(model)) == hashlib.sha256(b"second").hexdigest()
    assert digests.of(None) == ""
    model.unlink()
    assert identity(model) is None


def test_of_what_was_replaced_before_it_could_be_read_nothing_is_said(tmp_path: Path):
    """Better than the digest of another file."""
    model = tmp_path / "model"
    model.write_bytes(b"first")
    digests, loaded = Digests(model, tmp_path / "known"), identity(model)
    model.write_bytes(b"second")
    assert digests.of(loaded) == ""


def test_a_large_file_is_read_behind_whoever_asks(tmp_path: Path):
    model = tmp_path / "model"
    with model.open("wb") as file:
        file.truncate(40 << 20)
    digests, loaded = Digests(model, tmp_path / "known"), identity(model)
    assert digests.of(loaded) == ""
    deadline = time.monotonic() + 30
    while not digests.of(loaded):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert digests.of(loaded) == hashlib.sha256(bytes(40 << 20)).hexdigest()
    assert Digests(model, tmp_path / "known").of(loaded) == digests.of(loaded)  # without reading it again
