"""The reader of GGUF headers: right about real files, and never more than an error about any other."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd import models
from agentd.cli import cli
from agentd.errors import EngineError, Reason
from agentd.models import gguf

if TYPE_CHECKING:
    from pathlib import Path

POCKET = models.locate("pocket").read_bytes()
HEADER = POCKET[: 200 << 10]


def written(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def test_a_real_file_is_what_llama_cpp_says_it_is():
    """Parameters, sizes, kinds of the pocket model."""
    header = gguf.read(models.locate("pocket"))
    assert header.architecture == "gemma4"
    assert header.metadata["general.name"] == "agentd pocket"
    assert header.size == len(POCKET)
    assert 4_000_000 < header.parameters < 6_000_000
    assert header.hot < sum(group.size for group in header.groups.values()) < header.size
    assert header.groups[gguf.LAZY].parameters > 0
    assert header.counts["tokenizer.ggml.tokens"] > 1000


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"GG", "cut off"),
        (b"ggml" + bytes(100), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 9, 1, 1), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "more tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60), "more tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "too long"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 1 << 62), "not known"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 62), "cut off"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1 << 40), "not known"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 64, 99, 0), "not known"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 7), "7 dimensions"),
        (POCKET[:-1000], "cut off: 0.0 MB are missing"),
        (POCKET[:1000], "cut off"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_reason(tmp_path: Path, data: bytes, why: str):
    with pytest.raises(EngineError) as raised:
        gguf.read(written(tmp_path, data))
    assert raised.value.reason is Reason.MODEL_INVALID
    assert why in raised.value.message


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(EngineError, match="No such file"):
        gguf.read(tmp_path / "none.gguf")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, len(HEADER) - 9), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, len(HEADER)),
)
def test_whatever_is_in_a_file_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], end: int
):
    """Bytes changed anywhere in the header, and cut anywhere: nothing but a header or an error comes of it."""
    data = bytearray(HEADER[:end] + b"\0" * (len(HEADER) // 4))
    for position, new in changes:
        data[position : position + len(new)] = new
    with contextlib.suppress(EngineError):
        assert gguf.read(written(tmp_path_factory.mktemp("gguf"), bytes(data))).parameters >= 0


def test_inspect_tells_what_a_model_takes():
    """As a table for people, as JSON for programs."""
    said = CliRunner().invoke(cli, ["models", "inspect", "pocket", "--json"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.output)
    assert found["memory_mib"]["resident"] < 100
    assert found["context"] == 4096
    assert sum(group["bytes"] for group in found["groups"].values()) < found["bytes"]
    table = CliRunner().invoke(cli, ["models", "inspect", "pocket", "--context", "512"])
    assert "per-layer embeddings" in table.output
    assert "512 tokens of context" in table.output


def test_inspect_of_a_file_that_kills_llama_cpp_says_so(tmp_path: Path):
    """The header is whole, the tensors' shapes make no sense: the process that reckons may die, the command does not."""
    changed = POCKET.replace(b"gemma4.embedding_length_per_layer_input", b"gemma4.embedding_length_per_layer_inpux", 1)
    said = CliRunner().invoke(cli, ["models", "inspect", str(written(tmp_path, changed)), "--json"])
    assert isinstance(said.exception, EngineError)
    assert said.exception.reason is Reason.MODEL_INVALID
