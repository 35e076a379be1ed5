"""The sequences of the model's cache: what each holds, who uses it, and what a new prompt can share with it.

A prompt begins where another one has been before: with the system prompt and the tools, or with all that its session has
said so far. The longest such beginning is shared with the sequence that holds it (that takes no time and no memory), or
restored from the disk, and only the rest is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Tokens

    from agentd.engine.model import Model
    from agentd.engine.prefixes import PrefixFiles

_TOO_MANY = "more generations than sequences"
_WORTH_KEEPING, _OF_A_SESSION = 64, 256
"""Tokens that a state on disk must save to be worth its file: fewer are decoded as fast as it is read from a card; and a
session may never be gone on with (256 tokens are 8 s on a Raspberry Pi 5, and their file is written to its card).
"""


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are what the cache holds of it, position by position. One that is not `busy` may be given up."""

    number: int
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    prefix: bool = False
    """Whether it holds the beginning of many prompts, and nothing else."""
    used: int = 0
    kept: int = 0
    """How many of its tokens are on disk."""


class Cache:
    """Use from the thread of the model."""

    def __init__(self, model: Model, files: PrefixFiles | None = None) -> None:
        self._model, self._files = model, files
        self._sequences = [Sequence(number) for number in range(model.shape.sequences)]
        self._clock = 0

    def open(self, prompt: Tokens[int]) -> Sequence:
        """A busy sequence that holds as much of the beginning of `prompt` as there is, but not its last token: the logits
        behind that are wanted. There must be one that is not busy.
        """
        most = len(prompt) - 1
        source, length = self._nearest(prompt, most)
        restored = self._restored(prompt, most, source, length)
        if restored is not None:
            return self._take(restored)
        if source is None:
            return self._take(self._empty())
        if not source.busy and not source.prefix and length == len(source.tokens):
            return self._take(source)
        self._touch(source)
        target = self._empty(but=source)
        if target is None and not source.busy:  # all others are: what it holds beyond is lost
            self.cut(source, length)
            return self._take(source)
        assert target is not None, _TOO_MANY
        self._model.copy(source.number, target.number, length)
        target.tokens, target.kept = list(prompt[:length]), min(source.kept, length)
        return self._take(target)

    def close(self, sequence: Sequence) -> None:
        """Its user has ended; what it holds stays for as long as there is room."""
        sequence.busy = False
        self._touch(sequence)

    def cut(self, sequence: Sequence, length: int) -> None:
        """Drop what lies behind its first `length` tokens; `can_cut` says whether it can go on there."""
        self._model.keep(sequence.number, length)
        del sequence.tokens[length:]
        sequence.kept = min(sequence.kept, length)

    def can_cut(self, sequence: Sequence, length: int) -> bool:
        return length == len(sequence.tokens) or self._model.reaches(sequence.number, length)

    def keep_prefix(self, sequence: Sequence, length: int) -> None:
        """The first `length` tokens of it will be wanted by others: they stay, also past the end of this process."""
        if not length:
            return
        tokens = sequence.tokens[:length]
        if any(each.prefix and each.tokens == tokens for each in self._sequences):
            return
        if not self._model.reaches(sequence.number, length) or (kept := self._empty(but=sequence)) is None:
            return
        self._model.copy(sequence.number, kept.number, length)
        kept.tokens, kept.prefix = tokens, True
        self._touch(kept)
        self._save(kept, session=False)

    def evict(self) -> bool:
        """Give up what was not used for longest, prefixes last; False if all are busy."""
        idle = [each for each in self._sequences if each.tokens and not each.busy]
        if not idle:
            return False
        self._drop(min(idle, key=_age))
        return True

    def save(self) -> None:
        """What is idle goes to the disk: this process is about to end."""
        for each in self._sequences:
            if each.tokens and not each.busy:
                self._save(each, session=not each.prefix)

    def forget(self) -> None:
        """All that sessions have said goes, from the disk, too; what is busy stays."""
        for each in self._sequences:
            if not each.busy and not each.prefix:
                self._clear(each)
        if self._files:
            self._files.forget_sessions()

    def _nearest(self, prompt: Tokens[int], most: int) -> tuple[Sequence | None, int]:
        best: Sequence | None = None
        length = 0
        for each in self._sequences:
            shared = _shared(each.tokens, prompt, most)
            better = shared > length or (shared == length and best is not None and best.busy and not each.busy)
            if shared and better and self.can_cut(each, shared):
                best, length = each, shared
        return best, length

    def _restored(self, prompt: Tokens[int], most: int, source: Sequence | None, beyond: int) -> Sequence | None:
        """A sequence with a state from the disk, if there is one that saves enough."""
        if not self._files or (length := self._files.longest(prompt, most)) < beyond + _WORTH_KEEPING:
            return None
        state = self._files.load(prompt[:length])
        target = self._empty(but=source) if state else None
        if target is None or state is None:
            return None
        if not self._model.restore(target.number, state):
            self._files.refuse(prompt[:length])
            return None
        target.tokens, target.kept = list(prompt[:length]), length
        return target

    def _empty(self, but: Sequence | None = None) -> Sequence | None:
        """A sequence that holds nothing, if need be after giving up the one that was not used for longest."""
        idle = [each for each in self._sequences if not each.busy and each is not but]
        if not idle:
            return None
        chosen = min(idle, key=lambda each: (bool(each.tokens), *_age(each)))
        self._drop(chosen)
        return chosen

    def _drop(self, sequence: Sequence) -> None:
        self._save(sequence, session=not sequence.prefix)
        self._clear(sequence)

    def _clear(self, sequence: Sequence) -> None:
        self._model.keep(sequence.number, 0)
        sequence.tokens, sequence.prefix, sequence.kept = [], False, 0

    def _save(self, sequence: Sequence, *, session: bool) -> None:
        worth = _OF_A_SESSION if session else _WORTH_KEEPING
        if self._files is None or len(sequence.tokens) < sequence.kept + worth:
            return
        if self._files.save(sequence.tokens, lambda: self._model.state(sequence.number), session=session):
            sequence.kept = len(sequence.tokens)

    def _take(self, sequence: Sequence | None) -> Sequence:
        assert sequence is not None, _TOO_MANY
        sequence.busy, sequence.prefix = True, False
        self._touch(sequence)
        return sequence

    def _touch(self, sequence: Sequence) -> None:
        self._clock += 1
        sequence.used = self._clock


def _age(sequence: Sequence) -> tuple[bool, int]:
    return sequence.prefix, sequence.used


def _shared(held: Tokens[int], prompt: Tokens[int], most: int) -> int:
    """How many tokens both begin with, up to `most`."""
    end = min(len(held), most)
    if held[:end] == list(prompt[:end]):
        return end
    return next(n for n in range(end) if held[n] != prompt[n])
