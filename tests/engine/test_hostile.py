"""Model files that were not meant well: the engine's process may die of one, whoever asked is told why, and nothing hangs."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from agentd import models
from agentd.engine.client import Engine
from agentd.engine.generation import Generation
from agentd.engine.grammar import Grammars
from agentd.engine.link import Done, Generate
from agentd.engine.prompt import Conversation, Turn
from agentd.engine.settings import EngineSettings
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.engine.tokens import Vocabulary

POCKET = models.locate("pocket").read_bytes()
TENSORS = POCKET.index(b"token_embd.weight") - 8
ENDS = {"stop", "tool", "length", "context", "MODEL_INVALID", "ENGINE_CRASHED", "MODEL_TOO_LARGE", "ENGINE_TIMEOUT"}


def mutated(seed: int) -> bytes:
    """A few bytes of the header changed, most of them where tensors are described."""
    random, data = np.random.default_rng(seed), bytearray(POCKET)
    for _ in range(int(random.integers(1, 4))):
        low, high = (TENSORS, TENSORS + 4000) if random.random() < 0.6 else (8, TENSORS)
        at = int(random.integers(low, high))
        if random.random() < 0.5:
            data[at] ^= int(random.integers(1, 256))
        else:
            data[at : at + 8] = struct.pack("<Q", int(random.choice([0, 1, 2**31, 2**32 - 1, 2**62])))
    return bytes(data)


async def outcome(path: Path) -> str:
    """What a prompt to this model comes to."""
    engine = Engine(EngineSettings(path, 512, 32, 1, "off", 20, parallel=2))
    try:
        conversation = Conversation("You are agentd.", (), (Turn("hello"),))
        async for output in engine.generate(conversation, max_tokens=4, temperature=0.0, seed=0):
            if isinstance(output, Done):
                return output.reason
    except EngineError as e:
        return e.reason.name if e.message else "no word"
    finally:
        await engine.stop()
    return "nothing"


def test_files_changed_at_random_end_in_an_answer_or_a_reason(tmp_path: Path):
    """Twenty of them, the very same each time."""

    async def go() -> list[str]:
        found = []
        for seed in range(20):
            path = tmp_path / f"{seed}.gguf"
            path.write_bytes(mutated(seed))
            found.append(await asyncio.wait_for(outcome(path), 60))
            path.unlink()
        return found

    found = asyncio.run(go())
    assert set(found) <= ENDS
    assert "MODEL_INVALID" in found


def test_weights_that_are_no_numbers_are_refused_when_they_are_loaded(tmp_path: Path):
    """Its tensors are not a number throughout: the first pass shows it."""
    path = tmp_path / "nan.gguf"
    data = bytearray(POCKET)
    start = len(data) - 3_000_000
    data[start:] = np.full((len(data) - start) // 2 + 1, np.nan, np.float16).tobytes()[: len(data) - start]
    path.write_bytes(data)
    assert asyncio.run(asyncio.wait_for(outcome(path), 60)) == "MODEL_INVALID"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_a_generation_with_the_place(words: Vocabulary, bad: float):
    """In the middle of an answer."""
    said: list[object] = []
    request = Generate(id=1, prompt=(), max_tokens=9)
    generation = Generation(request, [2, 300, 301], 0, words, Grammars(words), said.append)
    logits = np.zeros(words.size, np.float32)
    logits[400] = 5
    assert generation.go_on(logits, 100) is None
    logits[77] = bad
    with pytest.raises(EngineError, match="behind token 4") as raised:
        generation.go_on(logits, 100)
    assert raised.value.reason is Reason.MODEL_INVALID
