"""The vocabulary of a loaded model: text to tokens with trust kept, tokens to bytes.

llama.cpp turns USER_DEFINED tokens (`<|tool_call>`, `<|"|>`) found in plain text into the real ones even with
parse_special=false (measured with 0.3.36; source: src/llama-vocab.cpp, tokenizer_st_partition). Text of users,
files and tools is therefore cut inside every such string before it is tokenised, and the result is checked.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as C
import numpy as np

from agentd.engine.automaton import UTF8
from agentd.engine.prompt import MARKUP, QUOTE, Piece, Tokens
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

_GUARDED = C.LLAMA_TOKEN_ATTR_CONTROL | C.LLAMA_TOKEN_ATTR_USER_DEFINED | C.LLAMA_TOKEN_ATTR_UNKNOWN


class Vocabulary:
    """Tokenising and detokenising with one model's vocabulary.

    `vocab` is the `llama_vocab *` of a model that outlives this object. Raises EngineError (MODEL_INVALID)
    if a Gemma 4 special token is missing: without them neither turns nor calls can be told apart.
    """

    def __init__(self, vocab: C.llama_vocab_p) -> None:
        self._vocab = vocab
        self.size: int = C.llama_vocab_n_tokens(vocab)
        self._bytes: dict[int, int] = {}
        self._silent: set[int] = set()  # these stand for no bytes at all
        guarded: dict[str, int] = {}
        for token in range(self.size):
            attributes = C.llama_vocab_get_attr(vocab, token)
            if attributes & _GUARDED:
                guarded[self._name(token)] = token
            elif attributes & C.LLAMA_TOKEN_ATTR_UNUSED:
                self._silent.add(token)
            elif attributes & C.LLAMA_TOKEN_ATTR_BYTE:
                self._bytes[int(self._name(token)[3:5], 16)] = token
        missing = [name for name in MARKUP if name not in guarded]
        if missing:
            raise EngineError(
                Reason.MODEL_INVALID,
                f"The model's vocabulary lacks the Gemma 4 token {missing[0]}.",
                hint="Use a GGUF file of a Gemma 4 text model.",
                metadata={"token": missing[0]},
            )
        self.special = {name: guarded[name] for name in MARKUP}
        # Runs of blanks and newlines are ordinary tokens that some files mark USER_DEFINED: harmless.
        self.guarded = {name: token for name, token in guarded.items() if not name.isspace()}
        self.guarded_ids = frozenset(self.guarded.values())
        self._order: tuple[bytes, NDArray[np.uint32], NDArray[np.int32]] | None = None
        self._in_texts: NDArray[np.int64] | None = None
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for name in self.guarded:
            lengths[name[0]].add(len(name))
        self._lengths = dict(lengths)

    def encode(self, pieces: Iterable[Piece]) -> list[int]:
        """Token ids of a prompt: every piece on its own, nothing added between or before them."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, Tokens):
                ids.extend(piece.ids)
            elif piece.trusted:
                ids.extend(self._tokenize(piece.text, parse_special=True))
            else:
                ids.extend(self._encode_untrusted(piece.text))
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; special tokens give their name, byte tokens one raw byte."""
        buffer = ctypes.create_string_buffer(64)
        n = C.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = C.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:n]

    def byte(self, value: int) -> int:
        """The token of one raw byte."""
        return self._bytes[value]

    def in_texts(self) -> NDArray[np.int64]:
        """What may come within a string, between two characters: its end, and no other special token, and no wrong byte."""
        if self._in_texts is None:
            wrong = {token for byte, token in self._bytes.items() if byte not in UTF8[0]} | self.guarded_ids | self._silent
            allowed = np.ones(self.size, bool)
            allowed[list(wrong - {self.special[QUOTE]})] = False
            self._in_texts = np.flatnonzero(allowed)
        return self._in_texts

    def order(self) -> tuple[Callable[[int], bytes], NDArray[np.int32]]:
        """(token to its bytes, all ordinary tokens in the order of these). Made when it is first wanted: 4 MiB, and a second
        of work, for 262,144 tokens.
        """
        if self._order is None:
            pieces = [b"" if token in self.guarded_ids else self.piece(token) for token in range(self.size)]
            ends = np.cumsum([0, *map(len, pieces)], dtype=np.uint32)
            tokens = sorted((token for token in range(self.size) if pieces[token]), key=pieces.__getitem__)
            self._order = b"".join(pieces), ends, np.array(tokens, np.int32)
        whole, ends, tokens_in_order = self._order
        return (lambda token: whole[ends[token] : ends[token + 1]]), tokens_in_order

    def forget(self) -> None:
        """Give back what can be made again."""
        self._order = self._in_texts = None

    def ends_generation(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self._vocab, token))

    def _name(self, token: int) -> str:
        return (C.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace")

    def _encode_untrusted(self, text: str) -> Iterator[int]:
        for part in self._cut(text):
            ids = self._tokenize(part, parse_special=False)
            if self.guarded_ids.isdisjoint(ids):
                yield from ids
            else:  # a guarded token of one character: spell it out
                yield from (self._bytes[byte] for byte in part.encode())

    def _cut(self, text: str) -> Iterator[str]:
        """`text` in parts, cut behind the first character of every string that is a guarded token's name."""
        start = 0
        for i, first in enumerate(text):
            for length in self._lengths.get(first, ()):
                if text[i : i + length] in self.guarded:
                    yield text[start : i + 1]
                    start = i + 1
                    break
        yield text[start:]

    def _tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        data = text.encode()
        buffer = (C.llama_token * (len(data) + 8))()
        n = C.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), False, parse_special)
        if n < 0:
            raise EngineError(Reason.MODEL_INVALID, "The model's vocabulary cannot tokenise this text.")
        return list(buffer[:n])
