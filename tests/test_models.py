"""The digest of a model file: right, read once, and never an error."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

import pytest

from agentd.models import digest

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
