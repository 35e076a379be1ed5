#!/usr/bin/env python3
"""Write a GGUF file with random weights and the exact shapes of a Gemma 4 text model: speed and memory are those of the real
one, its answers are noise. No download is needed.

    scripts/synthetic_model.py /tmp/e2b.gguf                      the published E2B QAT file: Q4_0
    scripts/synthetic_model.py /tmp/e2b.gguf --ffn Q2_0           a mix as for phones: FFN at 2 bit (no fast kernel on PCs)
    scripts/synthetic_model.py /tmp/e2b.gguf --ffn Q2_K           the same, in a kind that PCs are fast with
    scripts/synthetic_model.py /tmp/small.gguf --shape small      400 MiB, for tests of memory

Needs numpy and gguf (extra `dev`). Shapes: the published configuration of google/gemma-4-E2B, and llama.cpp's
conversion/gemma.py, which agree.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """`shared` are the last layers, which use the caches of earlier ones and have a feed-forward twice as wide."""

    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_sliding: int
    head_full: int
    per_layer: int
    vocabulary: int
    shared: int
    window: int
    full_every: int
    context: int = 131072

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.full_every != 0

    def owns_cache(self, layer: int) -> bool:
        return layer < self.layers - self.shared

    def width(self, layer: int) -> int:
        return self.feed_forward * (1 if self.owns_cache(layer) else 2)


SHAPES = {
    "e2b": Shape(35, 1536, 6144, 8, 1, 256, 512, 256, 262144, 20, 512, 5),
    "small": Shape(20, 1024, 4096, 8, 1, 128, 256, 64, 16384, 10, 512, 5),
    "tiny": Shape(10, 256, 512, 4, 1, 64, 128, 64, 8192, 5, 512, 5),
}
Q2_0 = 42
"""64 weights in 18 bytes, of llama.cpp's ggml.h; the package gguf does not know it yet."""
gguf.GGML_QUANT_SIZES[Q2_0] = (64, 18)  # type: ignore[index]
Kind = Type | int
# Where a block of quantised values has its scales (half floats), and what they must be for values of the usual size.
_SCALES = {
    Type.Q4_0: ((0,), 0.004),
    Type.Q8_0: ((0,), 0.0003),
    Type.Q6_K: ((208,), 0.00004),
    Type.Q4_K: ((0, 2), 0.0003),
    Type.Q3_K: ((108,), 0.0005),
    Type.Q2_K: ((80, 82), 0.002),
    Q2_0: ((0,), 0.01),
}
KINDS: dict[str, Kind] = {
    "Q2_0": Q2_0,
    **{kind.name: kind for kind in (*(each for each in _SCALES if isinstance(each, Type)), Type.F16)},
}
_SPECIAL = dict(enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))) | dict(
    enumerate(("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'), 46)
)
_SPECIAL |= {98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>"}
_USER_DEFINED = {46, 47, 48, 49, 50, 51, 52, 100, 101}
_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # gguf.TokenType
_SPACE = "\u2581"
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_WORDS = """call file files path text name list read write move copy delete append edit folder find search time date system
 temperature battery memory disk network http get post json url notes todo home true false null string integer number boolean
 array object type description properties required parameters enum items declaration response value error the of and to in is
 that with for on as this by be not from or which unit celsius days city weather report daily today""".split()
"""One token each, as in the real vocabulary: how many tokens a call has depends on it."""


class Vocabulary:
    """Special tokens, bytes, characters, and then as many made-up words as are wanted, each a merge of two shorter ones."""

    def __init__(self, size: int, random: np.random.Generator) -> None:
        self.tokens = [_SPECIAL.get(i, f"<unused{i}>") for i in range(238)]
        self.kinds = [_USER if i in _USER_DEFINED else _CONTROL if i in _SPECIAL else _UNUSED for i in range(238)]
        self.merges: list[str] = []
        for byte in range(256):
            self._add(f"<0x{byte:02X}>", _BYTE)
        for character in (_SPACE, *map(chr, range(33, 127)), "\n", "\t", *map(chr, range(0xE0, 0x100))):
            self._add(character, _NORMAL)
        self._seen = set(self.tokens)
        for word in (*_WORDS, *(_SPACE + word for word in _WORDS)):
            for end in range(2, len(word) + 1):
                self._merge(word[: end - 1], word[end - 1])
        words = list(_LETTERS)
        for letter in _LETTERS:
            self._merge(_SPACE, letter)
            words.append(_SPACE + letter)
        while len(self.tokens) < size:
            for one, other in random.integers(0, 1 << 31, (32768, 2)):
                left, right = words[int(one) % len(words)], words[int(other) % min(len(words), 600)]
                if len(self.tokens) < size and not right.startswith(_SPACE) and self._merge(left, right):
                    words.append(left + right)

    def _add(self, token: str, kind: int) -> None:
        self.tokens.append(token)
        self.kinds.append(kind)

    def _merge(self, left: str, right: str) -> bool:
        word = left + right
        if word in self._seen or len(word) > 14:
            return False
        self._seen.add(word)
        self._add(word, _NORMAL)
        self.merges.append(f"{left} {right}")
        return True


@dataclass(frozen=True)
class Tensor:
    """`shape` as llama.cpp counts: the fastest dimension first. `values` makes it, where it is not random."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    values: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[1:]))

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]  # type: ignore[index]
        return self.shape[0] // block * size


def tensors(shape: Shape, kinds: dict[str, Kind]) -> Iterator[Tensor]:
    """All of them, in the order of the file."""
    e, per_layer = shape.embedding, shape.per_layer

    def norm(name: str, size: int) -> Tensor:
        return Tensor(f"{name}.weight", (size,), Type.F32, np.ones(size, np.float32))

    yield Tensor("token_embd.weight", (e, shape.vocabulary), kinds["embedding"])
    yield Tensor("per_layer_token_embd.weight", (per_layer * shape.layers, shape.vocabulary), kinds["per_layer"])
    yield Tensor("per_layer_model_proj.weight", (e, per_layer * shape.layers), kinds["projection"])
    yield norm("per_layer_proj_norm", per_layer)
    yield norm("output_norm", e)
    rope = np.full(shape.head_full // 2, 1e30, np.float32)
    rope[: shape.head_full // 8] = 1
    yield Tensor("rope_freqs.weight", (shape.head_full // 2,), Type.F32, rope)
    for layer in range(shape.layers):
        block, head = f"blk.{layer}", shape.head_sliding if shape.slides(layer) else shape.head_full
        attention, ffn, width = kinds["attention"], kinds["ffn"], shape.width(layer)
        yield Tensor(f"{block}.attn_q.weight", (e, head * shape.heads), attention)
        yield Tensor(f"{block}.attn_output.weight", (head * shape.heads, e), attention)
        if shape.owns_cache(layer):
            yield Tensor(f"{block}.attn_k.weight", (e, head * shape.kv_heads), attention)
            yield Tensor(f"{block}.attn_v.weight", (e, head * shape.kv_heads), attention)
            yield norm(f"{block}.attn_k_norm", head)
        yield norm(f"{block}.attn_q_norm", head)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"):
            yield norm(f"{block}.{name}", e)
        yield Tensor(f"{block}.ffn_gate.weight", (e, width), ffn)
        yield Tensor(f"{block}.ffn_up.weight", (e, width), ffn)
        yield Tensor(f"{block}.ffn_down.weight", (width, e), ffn)
        yield Tensor(f"{block}.inp_gate.weight", (e, per_layer), kinds["projection"])
        yield Tensor(f"{block}.proj.weight", (per_layer, e), kinds["projection"])
        yield norm(f"{block}.layer_output_scale", 1)


def randomly(tensor: Tensor, random: np.random.Generator, noise: Bytes) -> NDArray[np.generic]:
    """Values of the usual size. `noise` is used over and over: making new bytes for gigabytes takes minutes."""
    if tensor.values is not None:
        return tensor.values
    if tensor.kind in (Type.F32, Type.F16):
        values = random.standard_normal((tensor.rows, tensor.shape[0]), dtype=np.float32) * 0.02
        return values.astype(np.float16 if tensor.kind is Type.F16 else np.float32)
    whole = np.resize(noise[int(random.integers(0, 1 << 16)) :], tensor.rows * tensor.row_bytes)
    positions, scale = _SCALES[tensor.kind]
    blocks = whole.reshape(-1, gguf.GGML_QUANT_SIZES[tensor.kind][1])  # type: ignore[index]
    for position in positions:
        blocks[:, position : position + 2] = np.array([scale], np.float16).view(np.uint8)
    return whole.reshape(tensor.rows, tensor.row_bytes)


def describe(writer: gguf.GGUFWriter, shape: Shape, name: str, vocabulary: Vocabulary) -> None:
    """The metadata that llama.cpp wants of a Gemma 4."""
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embedding)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_feed_forward_length([shape.width(layer) for layer in range(shape.layers)])
    writer.add_key_length(shape.head_full)
    writer.add_value_length(shape.head_full)
    writer.add_key_length_swa(shape.head_sliding)
    writer.add_value_length_swa(shape.head_sliding)
    writer.add_rope_dimension_count(shape.head_full)
    writer.add_rope_dimension_count_swa(shape.head_sliding)
    writer.add_rope_freq_base(1e6)
    writer.add_float32("gemma4.rope.freq_base_swa", 1e4)
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern([shape.slides(layer) for layer in range(shape.layers)])
    writer.add_shared_kv_layers(shape.shared)
    writer.add_embedding_length_per_layer_input(shape.per_layer)
    writer.add_final_logit_softcapping(30.0)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores([0.0] * len(vocabulary.tokens))
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(106)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def write(path: str, shape: Shape, kinds: dict[str, Kind], name: str, say: Callable[[str], None]) -> None:
    random = np.random.default_rng(7)
    say(f"making {shape.vocabulary} words")
    vocabulary = Vocabulary(shape.vocabulary, random)
    writer = gguf.GGUFWriter(path, "gemma4")
    describe(writer, shape, name, vocabulary)
    made, sizes = list(tensors(shape, kinds)), Counter[str]()
    for tensor in made:
        size = tensor.rows * tensor.row_bytes
        sizes[tensor.name.rsplit(".", 2)[-2]] += size
        if tensor.kind in (Type.F32, Type.F16):
            kind = np.dtype(np.float32 if tensor.kind is Type.F32 else np.float16)
            writer.add_tensor_info(tensor.name, list(reversed(tensor.shape)), kind, size)
        else:
            dimensions = [*reversed(tensor.shape[1:]), tensor.row_bytes]
            writer.add_tensor_info(tensor.name, dimensions, np.dtype(np.uint8), size, raw_dtype=tensor.kind)  # type: ignore[arg-type]
    say(f"writing {sum(sizes.values()) / 2**20:.0f} MiB to {path}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = random.integers(0, 256, 32 << 20, dtype=np.uint8)
    for tensor in made:
        writer.write_tensor_data(randomly(tensor, random, noise))
    writer.close()
    for part, size in sizes.most_common(8):
        say(f"  {size / 2**20:8.1f} MiB  {part}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--shape", choices=SHAPES, default="e2b")
    for part, usual in (
        ("embedding", "Q4_0"),
        ("per_layer", "Q4_0"),
        ("attention", "Q4_0"),
        ("ffn", "Q4_0"),
        ("projection", "F16"),
    ):
        parser.add_argument(f"--{part}", choices=KINDS, default=usual)
    asked = vars(parser.parse_args())
    file, shape = asked.pop("file"), asked.pop("shape")
    begun = time.monotonic()
    kinds = {part: KINDS[name] for part, name in asked.items()}
    write(file, SHAPES[shape], kinds, f"synthetic {shape}, random weights", lambda line: print(line, file=sys.stderr))
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
