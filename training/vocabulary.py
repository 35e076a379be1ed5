"""The pocket model's vocabulary: Gemma 4's special tokens, all bytes, and a small BPE.

Merges join lower-case letters only. Space, quote, digit, dot and slash stand alone, so that a word always
splits the same way, in the question, in the call and in the answer: copying is what a small model finds hard.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import gguf
import llama_cpp.llama_cpp as C
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from agentd.engine.prompt import Text, render
from agentd.engine.tokens import Vocabulary
from training.dialogues import Dialogues
from training.preamble import conversation

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 1152
SPECIAL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
"""Special tokens at the ids of the real vocabulary (the loader looks them up by name all the same)."""
VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
BLANK = "\u2581"


def train(seed: int) -> tuple[list[str], list[str]]:
    """Tokens by id, and merges ("a b") by rank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|\n|."), "isolated")
    reserved = [SPECIAL.get(i, f"<unused{i}>") for i in range(107)]
    alphabet = ["\n", BLANK, *map(chr, range(33, 127))]
    room = SIZE - len(reserved) - 256
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, limit_alphabet=len(alphabet), max_token_length=11, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    return reserved + [f"<0x{b:02X}>" for b in range(256)] + learnt, merges


def _corpus(seed: int) -> Iterator[str]:
    preamble = [p.text for p in render(conversation(())) if isinstance(p, Text)]
    dialogues = Dialogues(Random(seed))
    for i in range(20_000):
        sample = dialogues.sample()
        yield from (sample.user, sample.answer)
        if i % 40 == 0:
            yield from preamble


def write(writer: gguf.GGUFWriter, tokens: list[str], merges: list[str]) -> None:
    kinds = [_kind(token) for token in tokens]
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(tokens.index("<turn|>"))
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _kind(token: str) -> gguf.TokenType:
    if token in VISIBLE:
        return gguf.TokenType.USER_DEFINED
    if token in SPECIAL.values():
        return gguf.TokenType.CONTROL
    if token.startswith("<unused"):
        return gguf.TokenType.UNUSED
    return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.NORMAL


def kept(path: Path) -> tuple[list[str], list[str], Vocabulary]:
    """Tokens, merges and vocabulary of a file written before."""
    reader = gguf.GGUFReader(path)
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    return tokens, merges, load(path)


def load(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF through llama.cpp and the engine's own code, as at run time."""
    C.llama_log_set(_silent, None)
    C.llama_backend_init()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"{path} cannot be loaded")
    return Vocabulary(C.llama_model_get_vocab(model))


def trained(seed: int) -> tuple[list[str], list[str], Vocabulary]:
    tokens, merges = train(seed)
    path = Path(tempfile.mkdtemp()) / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "gemma4")
    write(writer, tokens, merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokens, merges, load(path)


@C.llama_log_callback
def _silent(_level: int, _text: bytes, _data: object) -> None:
    """llama.cpp's log is noise here; errors come back as null pointers."""
