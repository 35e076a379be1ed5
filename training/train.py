"""Train the pocket model and write its GGUF.

    python -m training.train --out agentd/models/pocket.gguf

Seeded. About 105 minutes on two CPU cores; a GPU only makes it faster. Each phase learns what the next one needs:
pure copying of words and paths (an induction mechanism that forms suddenly and that nothing else works without),
dialogues without the system turn, dialogues behind the full system turn, both in turn.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from transformers.models.gemma4 import Gemma4ForCausalLM

from agentd.engine.prompt import QUOTE, RESPONSE_OPEN, TURN_CLOSE, Called, Said, Text, Turn, render
from training import model as shape
from training import vocabulary
from training.dialogues import Dialogues
from training.preamble import conversation

if TYPE_CHECKING:
    from agentd.engine.tokens import Vocabulary


@dataclass(frozen=True, slots=True)
class Phase:
    steps: int
    batch: int
    length: int
    preamble: bool
    copying: float  # share of sequences that are pure copying
    rate: tuple[float, float]  # learning rate at its start and end
    bare_between: int = 0  # batches without the system turn between two with it: five times the dialogues a second

    def at(self, step: int) -> Phase:
        """The shape of the batch of one step."""
        return BARE if step % (self.bare_between + 1) else self


BARE = Phase(0, 32, 192, preamble=False, copying=0.08, rate=(0, 0))
PHASES = (
    Phase(320, 64, 64, preamble=False, copying=1.0, rate=(3e-3, 3e-3)),
    Phase(1500, 32, 192, preamble=False, copying=0.12, rate=(3e-3, 8e-4)),
    Phase(600, 8, 1300, preamble=True, copying=0.05, rate=(8e-4, 3e-5)),
    Phase(840, 8, 1300, preamble=True, copying=0.03, rate=(8e-4, 1e-5), bare_between=2),
    Phase(420, 8, 1300, preamble=True, copying=0.02, rate=(6e-4, 1e-5), bare_between=2),
)


class Batches:
    """Token sequences and the mask of what the model itself says in them."""

    def __init__(self, words: Vocabulary, seed: int) -> None:
        self._words, self._random = words, Random(seed)
        self._dialogues = Dialogues(self._random)
        self._system = words.encode(render(conversation(())))
        self._bos = self._system[:1]

    def batch(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, both [batch, length]; a target of -100 is not learnt."""
        x = torch.zeros(phase.batch, phase.length, dtype=torch.long)
        y = torch.full((phase.batch, phase.length), -100)
        for row in range(phase.batch):
            ids, said = self._sequence(phase)
            ids, said = ids[: phase.length + 1], said[: phase.length + 1]
            n = len(ids) - 1
            x[row, :n] = torch.tensor(ids[:-1])
            y[row, :n] = torch.where(torch.tensor(said[1:]), torch.tensor(ids[1:]), -100)
        return x, y

    def _sequence(self, phase: Phase) -> tuple[list[int], list[bool]]:
        if self._random.random() < phase.copying:
            return self._copies(phase.length + 1)
        ids = list(self._system if phase.preamble else self._bos)
        said = [False] * len(ids)
        while len(ids) <= phase.length:
            for part, mine in turn_parts(self._words, self._dialogues.sample().turn()):
                ids += part
                said += [mine] * len(part)
        return ids, said

    def _copies(self, length: int) -> tuple[list[int], list[bool]]:
        quote, close = self._words.special[QUOTE], self._words.special[TURN_CLOSE]
        ids, said = list(self._bos), [False]
        while len(ids) < length:
            text = self._dialogues.text(3) if self._random.random() < 0.6 else self._dialogues.file()
            copied = self._words.encode([Text(text, trusted=False)])
            ids += [quote, *copied, quote, *copied, close]
            said += [False] * (len(copied) + 2) + [True] * (len(copied) + 1)
        return ids, said


def turn_parts(words: Vocabulary, turn: Turn) -> list[tuple[list[int], bool]]:
    """A finished turn as (tokens, does the model say them); the open end is the model's `<turn|>`."""
    done: list[tuple[list[int], bool]] = []
    before = 0
    for n in range(len(turn.parts) + 1):
        ids = words.encode(render(conversation((Turn(turn.user, turn.parts[:n]),), bare=True)))[1:]
        mine = n > 0 and isinstance(turn.parts[n - 1], Called | Said)
        new = ids[before:]
        if n and not mine:  # the model itself opens the response; what stands in it comes from the tool
            assert new[0] == words.special[RESPONSE_OPEN]
            done.append((new[:1], True))
            new = new[1:]
        done.append((new, mine))
        before = len(ids)
    done.append(([words.special[TURN_CLOSE]], True))
    done.append((words.encode([Text("\n", trusted=True)]), False))
    return done


def step(model: Gemma4ForCausalLM, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean loss over what the model says; logits are computed for those positions only."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=x).last_hidden_state
        learnt = y != -100
        logits = model.lm_head(hidden[learnt]).float()
    return torch.nn.functional.cross_entropy(30 * torch.tanh(logits / 30), y[learnt])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the GGUF file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="a GGUF of this script to go on from, with --phase")
    parser.add_argument("--phase", type=int, default=1, help="the first phase to train")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to train (tests use little)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, merges, words = vocabulary.kept(args.resume) if args.resume else vocabulary.trained(args.seed)
    model = Gemma4ForCausalLM(shape.config(len(tokens))).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokens)} tokens", flush=True)
    if args.resume:
        shape.load(model, args.resume)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.02)
    batches = Batches(words, args.seed + args.phase - 1)
    start, done = time.monotonic(), 0
    for phase in PHASES[args.phase - 1 :]:
        steps = max(1, round(phase.steps * args.scale))
        for i in range(steps):
            high, low = phase.rate
            rate = low + (high - low) * (1 + math.cos(math.pi * i / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (done + 1) / 60)
            x, y = batches.batch(phase.at(i))
            loss = step(model, x.to(device), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if i % 20 == 0 or i == steps - 1:
                print(f"{done:5d}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s", flush=True)
            if done % 200 == 0 or i == steps - 1:  # a usable file at any time, in place of checkpoints
                shape.save(model, args.out, tokens, merges)
    print(f"wrote {args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
