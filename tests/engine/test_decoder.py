"""The decode loop with the real library and the pocket model: the same text however it was made."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from agentd import models
from agentd.calls.manifest import load
from agentd.config import SYSTEM
from agentd.engine.cache import Cache
from agentd.engine.decoder import SLICE, Decoder
from agentd.engine.drafting import LONGEST, Costs, Drafter
from agentd.engine.generation import Generation
from agentd.engine.grammar import Grammars, Matcher
from agentd.engine.link import Delta, Done, Generate, ToolCall, pack
from agentd.engine.model import Model, Row, Shape
from agentd.engine.pace import Pacer
from agentd.engine.prefixes import PrefixFiles
from agentd.engine.prompt import Conversation, Text, ToolSpec, Turn, render, render_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic import BaseModel

    from agentd.errors import EngineError

PROMPTS = (
    "read notes/todo.txt",
    "write hello to a.txt",
    "list the folder notes",
    "what time is it",
    "say hello",
    "move a.txt to b.txt",
    "copy notes/a/very/long/path/of/mine.txt to notes/a/very/long/path/of/yours.txt",
)


ENDLESS = "write a poem " + "red " * 100
"""The pocket model has no end with that."""


@functools.cache
def specs() -> tuple[ToolSpec, ...]:
    tools = load([], resources.files("agentd.bundled_tools"), ("files", "http", "shell", "system")).tools.values()
    return tuple(ToolSpec(tool.name, tool.manifest.description, tool.schema()) for tool in tools)


@dataclass
class Bench:
    """A model with its decoder, and what its generations have said, in order."""

    model: Model
    files: PrefixFiles | None = None
    parallel: int = 4
    drafts: bool = True
    said: list[Any] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    failed: list[EngineError] = field(default_factory=list)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.cache, self.grammars = Cache(self.model, self.files), Grammars(self.model.words)
        self.decoder = Decoder(
            *(self.model, self.cache, self.parallel),
            cancelled=lambda generation: generation.request.id in self.cancelled,
            failed=lambda _generation, error: self.failed.append(error),
            drafts=self.drafts,
        )

    def ask(self, prompt: str, tokens: int = 64, *, tools: bool = True, temperature: float = 0.0, seed: int = 0) -> int:
        conversation = Conversation(SYSTEM, specs() if tools else (), (Turn(prompt),))
        self.numbers += 1
        request = Generate(
            id=self.numbers,
            prompt=pack(render(conversation)),
            tools=tuple((tool.name, dict(tool.parameters)) for tool in conversation.tools),
            max_tokens=tokens,
            temperature=temperature,
            seed=seed,
        )
        ids, prefix = self.model.words.encode(render(conversation)), self.model.words.encode(render_prefix(conversation))
        assert ids[: len(prefix)] == prefix
        self.decoder.add(Generation(request, ids, len(prefix), self.model.words, self.grammars, self.hear))
        return self.numbers

    def hear(self, message: BaseModel) -> None:
        self.said.append(message)

    def work(self) -> dict[int, Done]:
        for _ in range(5000):
            if not self.decoder.busy:
                return {each.id: each for each in self.said if isinstance(each, Done)}
            self.decoder.step()
        raise AssertionError("it does not end")


def make(shape: Shape) -> Model:
    return Model(models.locate("pocket"), shape, threads=2, repack=False, should_stop=lambda: False, pacer=Pacer(lambda: False))


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    made = make(Shape(4096, 128, 8, LONGEST + 1))
    yield made
    made.close()


@pytest.fixture
def bench(model: Model) -> Iterator[Bench]:
    yield Bench(model)
    for sequence in range(model.shape.sequences):
        model.keep(sequence, 0)


@pytest.fixture(scope="module")
def wanted(model: Model) -> dict[str, tuple[int, ...]]:
    """The plainest way: one after another, each from its first token on, no drafts, nothing forced."""
    texts = {}
    forced = Matcher.forced
    Matcher.forced = lambda _self: ()  # type: ignore[method-assign]
    try:
        for prompt in PROMPTS:
            for sequence in range(model.shape.sequences):
                model.keep(sequence, 0)
            bench = Bench(model, parallel=1, drafts=False)
            number = bench.ask(prompt)
            texts[prompt] = bench.work()[number].ids
    finally:
        Matcher.forced = forced  # type: ignore[method-assign]
    assert all(len(ids) > 5 for ids in texts.values())
    return texts


def texts_of(bench: Bench) -> dict[str, tuple[int, ...]]:
    numbers = {bench.ask(prompt): prompt for prompt in PROMPTS}
    done = bench.work()
    return {prompt: done[number].ids for number, prompt in numbers.items()}


def test_forced_tokens_change_nothing_but_the_passes(bench: Bench, wanted: dict[str, tuple[int, ...]]):
    bench.decoder._drafts = False
    bench.ask("hello", 2)
    bench.work()  # has decoded what all begin with
    for prompt in PROMPTS:
        before = bench.model.passes
        number = bench.ask(prompt)
        done = bench.work()[number]
        assert done.ids == wanted[prompt]
        if done.reason == "tool":
            assert bench.model.passes - before < len(done.ids)


def test_several_in_one_pass_write_what_each_would_alone(bench: Bench, wanted: dict[str, tuple[int, ...]]):
    assert texts_of(bench) == wanted


def test_drafts_change_nothing(bench: Bench, wanted: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch):
    """As many as possible, whether they pay or not."""
    monkeypatch.setattr(Costs, "best_draft", lambda _costs, _chance, most: most)
    for prompt in PROMPTS:
        number = bench.ask(prompt)
        assert bench.work()[number].ids == wanted[prompt]


def test_what_was_restored_from_disk_changes_nothing(model: Model, wanted: dict[str, tuple[int, ...]], tmp_path: Path):
    """In a process that has decoded nothing before: the whole prefix comes from the disk."""
    first = Bench(model, PrefixFiles(tmp_path, "pocket", 1 << 30))
    assert texts_of(first) == wanted
    for sequence in range(model.shape.sequences):
        model.keep(sequence, 0)
    second, before = Bench(model, PrefixFiles(tmp_path, "pocket", 1 << 30)), model.decoded
    number = second.ask(PROMPTS[0])
    done = second.work()[number]
    assert done.ids == wanted[PROMPTS[0]]
    assert done.cached_tokens > 0.9 * done.prompt_tokens
    assert model.decoded - before < 0.1 * done.prompt_tokens + 2 * len(done.ids)


@pytest.mark.parametrize("seed", [1, 2])
def test_drafts_change_nothing_that_is_drawn_at_random(bench: Bench, seed: int, monkeypatch: pytest.MonkeyPatch):
    """The same draws are made in the same order."""
    texts = []
    for most in (0, LONGEST):
        monkeypatch.setattr(Costs, "best_draft", lambda _costs, _chance, there, most=most: min(there, most))
        number = bench.ask(PROMPTS[6], 48, temperature=0.7, seed=seed)
        texts.append(bench.work()[number].ids)
    assert texts[0] == texts[1]


def test_a_newcomer_does_not_wait_for_a_long_answer(bench: Bench):
    long = bench.ask(ENDLESS, 100, tools=False)
    for _ in range(8):
        bench.decoder.step()
    short = bench.ask("say hello", 3, tools=False)
    assert bench.work()[long].reason == "length"
    assert [each.id for each in bench.said if isinstance(each, Done)] == [short, long]


def test_a_long_prompt_holds_up_nobody(bench: Bench):
    """While it is read, in slices, the other one writes a token in every pass."""
    writer = bench.ask(ENDLESS, 40, tools=False)
    (generation,) = bench.decoder._waiting
    while not generation.writes:
        bench.decoder.step()
    bench.ask("word " * 1000, 2, tools=False)
    passes = 0
    while bench.decoder.knows(writer):
        before, written = bench.model.decoded, len(generation.written)
        bench.decoder.step()
        assert bench.model.decoded - before <= SLICE + LONGEST + 1
        assert len(generation.written) > written
        passes += 1
    assert passes > 5


def test_one_that_is_given_up_leaves_the_others_alone(bench: Bench, wanted: dict[str, tuple[int, ...]]):
    numbers = [bench.ask(prompt) for prompt in PROMPTS[:4]]
    for _ in range(20):
        bench.decoder.step()
    gone = next(number for number in numbers if bench.decoder.knows(number))
    bench.cancelled.add(gone)
    bench.decoder.step()
    assert not bench.decoder.knows(gone)
    done = bench.work()
    assert done[gone].reason == "cancelled"
    for number, prompt in zip(numbers, PROMPTS, strict=False):
        assert number == gone or done[number].ids == wanted[prompt]


def test_a_cache_that_is_too_small_for_all_serves_them_one_after_another():
    """The youngest waits; what it had written stays, and it goes on from there to the same end."""
    prompts = [f"read notes/{name}.txt and tell me everything that is in it " * 5 for name in ("a", "b", "c", "d")]
    texts = []
    for context, parallel in ((4096, 1), (256, 4)):
        small = make(Shape(context, 64, parallel + 4, LONGEST + 1))
        bench = Bench(small, parallel=parallel)
        numbers = [bench.ask(prompt, 40, tools=False) for prompt in prompts]
        done = bench.work()
        texts.append([done[number].ids for number in numbers])
        assert not bench.failed
        small.close()
    assert texts[0] == texts[1]


def test_an_answer_that_fills_the_context_ends_there():
    small = make(Shape(256, 64, 8, LONGEST + 1))
    bench = Bench(small)
    number = bench.ask("one two three four " * 12, 1000, tools=False)
    done = bench.work()[number]
    if done.reason != "stop":
        assert done.reason == "context"
        assert done.prompt_tokens + len(done.ids) == 257
    small.close()


@pytest.fixture(scope="module")
def windowed() -> Iterator[Model]:
    """So large a context that layers with a sliding window forget what lies before it."""
    made = make(Shape(16384, 128, 3, 8))
    assert not made.shape.full_window
    yield made
    made.close()


def logits_behind(model: Model, sequence: int, tokens: list[int], start: int) -> np.ndarray[Any, Any]:
    for first in range(start, len(tokens), 128):
        part = tokens[first : first + 128]
        model.decode([Row(token, sequence, first + i, wanted=i == len(part) - 1) for i, token in enumerate(part)])
    return model.logits(len(part) - 1).copy()


def test_going_back_is_exact_wherever_it_is_said_to_be_possible(windowed: Model):
    """And where it is not, llama.cpp says that it is, and is wrong: the trap that the rule is for."""
    random = np.random.default_rng(3)
    tokens = [int(token) for token in random.integers(300, windowed.words.size - 1, 2800)]
    other = [*tokens[:700], *(int(token) for token in random.integers(300, windowed.words.size - 1, 40))]
    right = logits_behind(windowed, 1, other, 0)
    windowed.keep(1, 0)
    differences = {}
    for length in (760, 2800):
        windowed.keep(0, 0)
        logits_behind(windowed, 0, tokens[:length], 0)
        reaches = windowed.reaches(0, 700)
        windowed.keep(0, 700)
        differences[reaches] = float(np.abs(logits_behind(windowed, 0, other, 700) - right).max())
    assert differences[True] < 0.05
    assert differences[False] > 2 * differences[True]


def test_a_session_beyond_its_window_is_not_gone_back_in(windowed: Model):
    """The cache takes up nothing that it can't go on from: the prompt is decoded anew."""
    for sequence in range(windowed.shape.sequences):
        windowed.keep(sequence, 0)
    cache = Cache(windowed)
    tokens = [5 + n % 900 for n in range(2800)]
    sequence = cache.open([*tokens, 1])
    logits_behind(windowed, sequence.number, tokens, 0)
    sequence.tokens = list(tokens)
    cache.close(sequence)
    going_on = cache.open([*tokens, 1, 2])
    assert len(going_on.tokens) == len(tokens)
    assert cache.open([*tokens[:700], 7, 8, 9]).tokens == []


def test_a_draft_is_what_followed_before():
    drafter = Drafter()
    assert drafter.propose([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6, 1, 2, 3]
    assert drafter.propose([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 9]) == []


def test_drafts_stop_where_they_do_not_come_true_or_do_not_pay():
    drafter, costs = Drafter(), Costs()
    costs.told(1, 0.1)
    for rows, seconds in ((2, 0.12), (4, 0.14), (8, 0.2)):
        costs.told(rows, seconds)
    assert costs.best_draft(0.9, LONGEST) == LONGEST
    assert costs.best_draft(0.05, LONGEST) == 0
    for _ in range(40):
        drafter.propose([1, 2, 3, 4, 5, 6, 1, 2, 3])
        drafter.compare([77])
    assert costs.best_draft(drafter.chance, LONGEST) == 0
    for rows in (2, 4, 8):
        for _ in range(60):
            costs.told(rows, 0.1 * rows)  # where each row costs a pass
    assert costs.best_draft(0.9, LONGEST) == 0


def test_calls_come_whole_and_typed(bench: Bench):
    bench.ask(PROMPTS[0])
    bench.work()
    (call,) = [each for each in bench.said if isinstance(each, ToolCall)]
    assert (call.tool, call.arguments) == ("files.read", {"path": "notes/todo.txt"})
    assert not [each for each in bench.said if isinstance(each, Delta)]


def test_a_long_prompt_is_read_however_many_short_ones_come(bench: Bench):
    """Beside an endless line of newcomers it has its turns."""
    long = bench.ask("word " * 1200, 2, tools=False)
    (generation,) = bench.decoder._waiting
    for n in range(400):
        while len(bench.decoder._at_work) + len(bench.decoder._waiting) < 4:
            bench.ask(f"{n} and " * 40, 2, tools=False)
        bench.decoder.step()
        if not bench.decoder.knows(long):
            return
    raise AssertionError(f"{generation.ahead()} tokens are left")


def test_when_one_that_waits_for_room_is_given_up_others_may_come():
    small = make(Shape(256, 64, 6, LONGEST + 1))
    bench = Bench(small, parallel=2)
    first, second = (bench.ask(f"{name} " + "red " * 100, 60, tools=False) for name in ("write a poem", "write it down"))
    for _ in range(400):
        bench.decoder.step()
        if bench.decoder._crowded:
            break
    assert bench.decoder._crowded
    waiting = second if second in {each.request.id for each in bench.decoder._waiting} else first
    bench.cancelled.add(waiting)
    bench.decoder.step()
    assert not bench.decoder._crowded
    assert bench.work()[waiting].reason == "cancelled"
    small.close()


def test_what_many_prompts_begin_with_is_decoded_once_for_newcomers_at_the_same_time(bench: Bench):
    """The others wait for the one that reads it; if that is given up, another one goes on where it was."""
    numbers = [bench.ask(prompt, 4) for prompt in PROMPTS[:3]]
    for _ in range(3):
        bench.decoder.step()
    assert [each.request.id for each in bench.decoder._at_work] == numbers[:1]
    before = bench.model.decoded
    bench.cancelled.add(numbers[0])
    done = bench.work()
    assert [done[number].reason for number in numbers] == ["cancelled", *(done[number].reason for number in numbers[1:])]
    assert bench.model.decoded - before < done[numbers[1]].prompt_tokens + 100


def test_choices_of_any_characters_come_whole(bench: Bench):
    """Also one that the tokeniser would make another of, as it writes a blank with it."""
    words = bench.model.words
    for choice in ("a\u2581b", "a b", "\u2581", "é\u0301", "🙂", '<|"|>', "line\nend", "\\"):
        schema = {"properties": {"k": {"type": "string", "enum": [choice]}, "n": {"type": "integer"}}, "required": ["k", "n"]}
        matcher, raw = bench.grammars.matcher([("pick", schema)]), b""
        while b"n:" not in raw:
            forced = matcher.forced()
            tokens = list(forced) if forced else [int(token) for token in matcher._allowed()][:1]
            for token in tokens:
                assert matcher._follow(token)
                assert matcher.advance(token)
                raw += words.piece(token)
        assert choice.encode() in raw


def test_what_was_forced_is_not_remembered_without_end(bench: Bench):
    """A list of numbers is as long as the model likes."""
    schema = {"properties": {"k": {"type": "array", "items": {"type": "integer"}}}, "required": ["k"]}
    matcher = bench.grammars.matcher([("pick", schema)])
    digit, comma = (bench.model.words.encode([Text(text, trusted=False)])[0] for text in ("7", ","))
    for token in matcher.forced():
        matcher.advance(token)
    for _ in range(2000):
        for token in (digit, comma):
            assert matcher.advance(token)
            matcher.forced()
    assert sum(len(key[1]) for key in matcher._grammar.forced) < 1000
