"""What a GGUF file says of itself: read without llama.cpp, and believed in nothing.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3. A file is hostile input: every length is held
against what is left of the file before anything is read or made of it.
"""

from __future__ import annotations

import mmap
import struct
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES, _MOST_TENSORS, _LONGEST_NAME = 10_000, 100_000, 1024
_MOST_STRINGS, _MOST_KEPT = 1 << 22, 64 << 20  # in all; a vocabulary has 262,144 tokens and twice as many merges
_KEPT_ARRAY = 4096  # a vocabulary is counted and not kept
_BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "IQ1_S": (19, 256, 50),
    "IQ1_M": (29, 256, 56),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "BF16": (30, 1, 2),
    "MXFP4": (39, 32, 17),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}
"""Name: (number, weights in a block, bytes of a block), of llama.cpp's ggml.h."""
_KINDS = {number: (name, weights, size) for name, (number, weights, size) in _BLOCKS.items()}
_GROUPS = {
    "per_layer_token_embd": "per-layer embeddings",
    "token_embd": "embeddings",
    "output": "embeddings",
    "attn": "attention",
    "ffn": "feed-forward",
    "per_layer_model_proj": "per-layer projections",
    "inp_gate": "per-layer projections",
    "proj": "per-layer projections",
}
LAZY = "per-layer embeddings"
"""The group that stays on the disk but for the rows of the tokens at hand."""


@dataclass(slots=True)
class Group:
    """Tensors with one job. `spans` are where they lie: first and last byte but one, from the file's beginning."""

    parameters: int = 0
    size: int = 0
    kinds: set[str] = field(default_factory=set)
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Header:
    """`metadata` has what is no large array; `counts` how many entries each array has. Sizes in bytes."""

    metadata: dict[str, Any]
    counts: dict[str, int]
    groups: dict[str, Group]
    size: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        return sum(group.parameters for group in self.groups.values())

    @property
    def hot(self) -> int:
        """Bytes that every token reads."""
        return sum(group.size for name, group in self.groups.items() if name != LAZY)


def read(path: Path) -> Header:
    """Raises EngineError (MODEL_INVALID) saying what is wrong with the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            return _Reader(data).header()
    except (_Broken, struct.error, UnicodeDecodeError) as e:
        why = str(e) if isinstance(e, _Broken) else "its header is damaged"
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or "it is empty"
    hint = "Use a GGUF file of a Gemma 4 text model, downloaded completely."
    raise EngineError(Reason.MODEL_INVALID, f"{path}: {why}.", hint=hint, metadata={"path": str(path)}) from None


class _Broken(Exception):
    """The file is not what it says it is."""


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._end = data, 0, len(data)
        self._counts: dict[str, int] = {}
        self._strings = self._kept = 0

    def header(self) -> Header:
        if self._take(4) != _MAGIC:
            raise _Broken("it is not a GGUF file")
        version, tensors, entries = self._one("I"), self._one("Q"), self._one("Q")
        if version not in _VERSIONS:
            raise _Broken(f"it is GGUF of version {version}, and {_VERSIONS[-1]} is known")
        if entries > _MOST_ENTRIES or tensors > _MOST_TENSORS:
            raise _Broken("it names more tensors than a model can have")
        metadata = {}
        for _ in range(entries):
            name = self._text(_LONGEST_NAME)
            metadata[name] = self._value(name, self._one("I"))
        return Header(metadata, self._counts, self._tensors(tensors, metadata), self._end)

    def _tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, Group]:
        groups: defaultdict[str, Group] = defaultdict(Group)
        end = 0
        for _ in range(count):
            name, dimensions = self._text(_LONGEST_NAME), self._one("I")
            if not 0 < dimensions <= 4:
                raise _Broken(f"the tensor {name!r} has {dimensions} dimensions")
            shape = [self._one("Q") for _ in range(dimensions)]
            kind, weights, size = self._kind(name, self._one("I"))
            parameters = 1
            for length in shape:
                parameters *= length
            taken = parameters // weights * size
            offset = self._one("Q")
            end = max(end, offset + taken)
            group = groups[_group(name)]
            group.spans.append((offset, offset + taken))
            group.parameters += parameters
            group.size += taken
            group.kinds.add(kind)
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment if isinstance(alignment, int) and alignment > 0 else self._at
        if start + end > self._end:
            raise _Broken(f"it is cut off: {(start + end - self._end) / 1e6:,.1f} MB are missing")
        for group in groups.values():
            group.spans = [(start + first, start + last) for first, last in group.spans]
        return dict(groups)

    def _kind(self, name: str, number: int) -> tuple[str, int, int]:
        if number not in _KINDS:
            raise _Broken(f"the tensor {name!r} is of a kind ({number}) that is not known")
        return _KINDS[number]

    def _value(self, name: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._one(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Broken(f"{name!r} is of a kind ({kind}) that is not known")
        inner, count = self._one("I"), self._one("Q")
        self._counts[name] = count
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            raw = self._take(count * size) if count <= _KEPT_ARRAY else self._skip(count * size)
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", raw)) if raw else []
        self._strings += count
        if inner != _STRING or self._strings > _MOST_STRINGS:
            raise _Broken(f"{name!r} is an array of a kind ({inner}) that is not known")
        for _ in range(count):
            self._skip(self._one("Q"))
        return []

    def _one(self, kind: str) -> int:
        value = struct.unpack_from(f"<{kind}", self._data, self._need(struct.calcsize(kind)))[0]
        self._at += struct.calcsize(kind)
        return value  # type: ignore[no-any-return]

    def _text(self, longest: int = 1 << 20) -> str:
        length = self._one("Q")
        if length > longest:
            raise _Broken("a text in its header is too long")
        return self._take(length).decode()

    def _take(self, size: int) -> bytes:
        start = self._need(size)
        self._at += size
        self._kept += size
        if self._kept > _MOST_KEPT:
            raise _Broken("its header is larger than that of any model")
        return self._data[start : self._at]

    def _skip(self, size: int) -> bytes:
        self._need(size)
        self._at += size
        return b""

    def _need(self, size: int) -> int:
        if size > self._end - self._at:
            raise _Broken("it is cut off in its header")
        return self._at


def _group(name: str) -> str:
    part = name.split(".")[2] if name.startswith("blk.") and name.count(".") > 2 else name.split(".", maxsplit=1)[0]
    if part.endswith("norm"):
        return "norms"
    return _GROUPS.get(part, _GROUPS.get(part.split("_")[0], "other"))
