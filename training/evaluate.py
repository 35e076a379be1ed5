"""How reliable the pocket model is, through the real engine: held-out phrasings, unseen words, paths and texts.

    python -m training.evaluate agentd/models/pocket.gguf --samples 500

Greedy, with the daemon's own prompt and grammar. A call counts if tool and arguments are exactly right (or if no
call is made where no tool fits); an answer counts if it says exactly what the tool's result says. A third of the
requests come second in a conversation. Exit status 1 below 95 % in either.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from agentd.engine.client import Engine
from agentd.engine.link import Delta, Done, ToolCall
from agentd.engine.prompt import Generated, Part, Responded, Turn
from agentd.engine.settings import EngineSettings
from training.dialogues import Dialogues, Sample
from training.preamble import conversation

if TYPE_CHECKING:
    from agentd.engine.prompt import Called

WANTED = 0.95
MAX_TOKENS = 300


@dataclass(slots=True)
class Score:
    calls: int = 0
    answers: int = 0
    asked: int = 0
    answered: int = 0
    misses: list[str] = field(default_factory=list)


async def step(engine: Engine, turns: tuple[Turn, ...]) -> tuple[list[ToolCall], str, tuple[int, ...]]:
    """One generation: calls, text, tokens."""
    calls: list[ToolCall] = []
    text, ids = "", ()
    async for output in engine.generate(conversation(turns), max_tokens=MAX_TOKENS, temperature=0.0, seed=0):
        match output:
            case Delta(thought=False):
                text += output.text
            case ToolCall():
                calls.append(output)
            case Done():
                ids = output.ids
    return calls, text.strip(), ids


def right(calls: list[ToolCall], wanted: Called | None) -> bool:
    if wanted is None:
        return not calls
    return [(call.tool, call.arguments) for call in calls] == [(wanted.tool, dict(wanted.arguments))]


async def judge(engine: Engine, sample: Sample, before: tuple[Turn, ...], score: Score) -> None:
    calls, text, ids = await step(engine, (*before, Turn(sample.user)))
    score.asked += 1
    if not right(calls, sample.call):
        made = [(call.tool, call.arguments) for call in calls]
        score.misses.append(f"call    {sample.user!r}\n        wanted {sample.call}\n        made   {made or text!r}")
        return
    score.calls += 1
    score.answered += 1
    if sample.call is not None:
        parts: tuple[Part, ...] = (Generated(ids), Responded(sample.call.tool, sample.result))
        _, text, _ = await step(engine, (*before, Turn(sample.user, parts)))
    if text == sample.answer:
        score.answers += 1
    else:
        score.misses.append(f"answer  {sample.user!r}\n        wanted {sample.answer!r}\n        said   {text!r}")


async def evaluate(path: Path, samples: int, seed: int) -> Score:
    engine = Engine(EngineSettings(path, 4096, 128, 0, "off", 60))
    dialogues, random = Dialogues(Random(seed), held_out=True), Random(seed)
    score = Score()
    try:
        for n in range(1, samples + 1):
            before = (dialogues.sample().turn(),) if random.random() < 1 / 3 else ()
            await judge(engine, dialogues.sample(), before, score)
            print(f"\r{n}/{samples}  calls {score.calls}  answers {score.answers}", end="", flush=True)
    finally:
        await engine.stop()
    print()
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--misses", type=int, default=10, help="how many misses to show")
    args = parser.parse_args()
    score = asyncio.run(evaluate(args.model.absolute(), args.samples, args.seed))
    for miss in score.misses[: args.misses]:
        print(miss)
    calls, answers = score.calls / score.asked, score.answers / max(1, score.answered)
    print(f"tool and arguments exactly right: {score.calls}/{score.asked} = {calls:.1%}")
    print(f"answer faithful to the result:    {score.answers}/{score.answered} = {answers:.1%}")
    return 0 if calls >= WANTED and answers >= WANTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
