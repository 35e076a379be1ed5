"""The decode loop: passes over the model, each with the next tokens of every generation at work.

The weights are read once for all of them: where that is most of a pass, four generations in one take little longer than one
(E2B's shapes: 1.2 to 1.7 times the tokens a second on two cores that are bound by arithmetic, 2.5 times on a processor with
AMX). A long prompt is decoded slice by slice between the tokens of the others: a newcomer waits for no answer, and no answer
for a newcomer's prompt.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from agentd.engine.drafting import LONGEST, Costs
from agentd.engine.model import NoRoom, Row
from agentd.engine.pace import Aborted, OutOfBudget
from agentd.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.engine.cache import Cache
    from agentd.engine.generation import Ending, Generation
    from agentd.engine.model import Model

SLICE = 32
"""Tokens of a prompt in a pass that others are in, or wait for: about a second on a Raspberry Pi 5."""


class Decoder:
    """Up to `parallel` generations at a time; the others wait in their order. Use from the thread of the model."""

    def __init__(
        self,
        model: Model,
        cache: Cache,
        parallel: int,
        *,
        cancelled: Callable[[Generation], bool],
        failed: Callable[[Generation, EngineError], None],
        drafts: bool = True,
    ) -> None:
        """`failed` tells whoever asked for a generation that it can't be."""
        self._model, self._cache, self._parallel = model, cache, parallel
        self._cancelled, self._failed = cancelled, failed
        self._drafts = drafts and model.shape.full_window  # else what is drafted in vain can't be taken back
        self._waiting: deque[Generation] = deque()
        self._at_work: list[Generation] = []
        self._in_pass: list[Generation] = []
        self._costs = Costs()
        self._crowded = False  # until one of those at work has ended, no other fits beside them
        self.written = 0
        """Tokens since the start."""

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._at_work)

    def given_up(self) -> bool:
        """Whether nobody waits for what the pass under way gives. The work of others is not thrown away with it: they wait
        for the end of the pass, of at most a slice of a prompt.
        """
        return bool(self._in_pass) and all(map(self._cancelled, self._in_pass))

    def knows(self, request: int) -> bool:
        return any(each.request.id == request for each in (*self._at_work, *self._waiting))

    def add(self, generation: Generation) -> None:
        self._waiting.append(generation)

    def step(self) -> None:
        """One pass, for all that are at work."""
        for each in [each for each in (*self._at_work, *self._waiting) if self._cancelled(each)]:
            self._end(each, "cancelled")
        self._place()
        if not self._at_work:
            return
        rows, taken, drafted = self._rows()
        self._in_pass = [each for each, _ in taken]
        took = self._decode(rows)
        if took is None:
            return
        first = 0
        for each, count in taken:
            each.busy_s += took * count / len(rows)
            self._take(each, rows[first : first + count], first, drafted)
            first += count

    def _decode(self, rows: list[Row]) -> float | None:
        """Seconds of a pass; None if it was not made, and what that means for those at work is done."""
        try:
            took = self._model.decode(rows)
        except NoRoom:
            self._make_room()
        except Aborted:
            pass  # what was given up, or has no budget any more, ends with the next step
        except OutOfBudget:
            for each in (*self._at_work, *self._waiting):
                self._end(each, "budget")
        except EngineError as e:
            for each in list(self._at_work):
                self._fail(each, e)
        else:
            if len(rows) <= LONGEST + 1:
                self._costs.told(len(rows), took)
            return took
        return None

    def _place(self) -> None:
        for each in list(self._waiting):
            if len(self._at_work) >= self._parallel or (self._crowded and self._at_work):
                return
            if not any(map(each.is_preceded_by, self._at_work)):
                self._waiting.remove(each)
                sequence = self._cache.open(each.tokens)
                each.placed(sequence)
                self._at_work.append(each)
                if len(sequence.tokens) >= each.prefix:
                    self._cache.keep_prefix(sequence, each.prefix)

    def _rows(self) -> tuple[list[Row], list[tuple[Generation, int]], list[int]]:
        """The rows of the next pass, how many each generation has of them, and what is drafted behind the only one."""
        batch = self._model.shape.batch
        if len(self._at_work) == 1:
            (only,) = self._at_work
            part = self._part(only, batch)
            drafted = self._drafted(only, batch - len(part)) if len(part) == only.ahead() else []
            return self._as_rows(only, part, drafted), [(only, len(part) + len(drafted))], drafted
        writing = [each for each in self._at_work if each.ahead() <= SLICE]
        reading = [each for each in self._at_work if each.ahead() > SLICE]
        rows: list[Row] = []
        taken: list[tuple[Generation, int]] = []
        for n, each in enumerate(writing):
            part = self._part(each, max(1, (batch - len(rows)) // (len(writing) - n)))
            rows += self._as_rows(each, part, [])
            taken.append((each, len(part)))
        if reading and (room := min(batch - len(rows), SLICE)):
            # By turns the one that has least left, which will be the first to write, and the oldest, or it would never be read.
            each = reading[0] if self._model.passes % 2 else min(reading, key=lambda each: each.ahead())
            part = self._part(each, room)
            rows += self._as_rows(each, part, [])
            taken.append((each, len(part)))
        return rows, taken, []

    def _part(self, generation: Generation, most: int) -> list[int]:
        """Its next tokens; what many prompts have in common ends with a pass, so that its state can be kept."""
        assert generation.sequence is not None
        held = len(generation.sequence.tokens)
        end = min(len(generation.tokens), held + most)
        if held < generation.prefix < end:
            end = generation.prefix
        return generation.tokens[held:end]

    def _as_rows(self, generation: Generation, part: list[int], drafted: list[int]) -> list[Row]:
        assert generation.sequence is not None
        number, held = generation.sequence.number, len(generation.sequence.tokens)
        complete, last = held + len(part) == len(generation.tokens), len(part) - 1
        return [Row(token, number, held + i, wanted=complete and i >= last) for i, token in enumerate([*part, *drafted])]

    def _drafted(self, generation: Generation, room: int) -> list[int]:
        if not self._drafts or not generation.writes:
            return []
        proposed = generation.drafter.propose(generation.tokens)
        most = min(len(proposed), room, self._model.shape.context - len(generation.tokens))
        return proposed[: self._costs.best_draft(generation.drafter.chance, most)]

    def _take(self, generation: Generation, rows: list[Row], first: int, drafted: list[int]) -> None:
        """What a pass has given one of its generations."""
        sequence = generation.sequence
        assert sequence is not None
        sequence.tokens += [row.token for row in rows]
        if len(sequence.tokens) == generation.prefix:
            self._cache.keep_prefix(sequence, generation.prefix)
        if not rows[-1].wanted:
            return
        before, ended = len(generation.tokens), None
        row = first + len(rows) - 1 - len(drafted)
        try:
            while ended is None:
                ended = generation.go_on(self._model.logits(row), self._model.shape.context)
                written = generation.tokens[before:]
                if not written or len(written) > len(drafted) or drafted[: len(written)] != written:
                    break
                row = first + len(rows) - 1 - len(drafted) + len(written)
        except EngineError as e:
            self._fail(generation, e)
            return
        self._settle(generation, before, drafted)
        if ended:
            self._end(generation, ended)

    def _settle(self, generation: Generation, before: int, drafted: list[int]) -> None:
        """What was drafted in vain leaves the cache."""
        sequence = generation.sequence
        assert sequence is not None
        written = generation.tokens[before:]
        self.written += len(written)
        came_true = next((n for n, (one, other) in enumerate(zip(drafted, written, strict=False)) if one != other), None)
        held = before + (min(len(drafted), len(written)) if came_true is None else came_true)
        if held < len(sequence.tokens):
            self._cache.cut(sequence, held)
        generation.drafter.compare(written)

    def _make_room(self) -> None:
        """What is idle goes first; then the youngest waits until another one has ended."""
        if self._cache.evict():
            return
        youngest = self._at_work[-1]
        if len(self._at_work) == 1:
            self._end(youngest, "context")
            return
        self._leave(youngest)
        self._waiting.appendleft(youngest)
        self._crowded = True

    def _leave(self, generation: Generation) -> None:
        if generation.sequence:
            self._cache.close(generation.sequence)
            generation.sequence = None
        (self._at_work if generation in self._at_work else self._waiting).remove(generation)
        self._crowded = False

    def _end(self, generation: Generation, reason: Ending) -> None:
        self._leave(generation)
        generation.end(reason)

    def _fail(self, generation: Generation, error: EngineError) -> None:
        self._leave(generation)
        self._failed(generation, error)
