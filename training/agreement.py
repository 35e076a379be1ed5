"""Whether llama.cpp computes what torch computes: the same tokens, the same probabilities.

    python -m training.agreement agentd/models/pocket.gguf

The weights are read back from the file, so that only the two implementations differ (llama.cpp's 8-bit KV cache and
activations among that). Exit status 1 if the cosine of the logits is below 0.999 anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers.models.gemma4 import Gemma4ForCausalLM

from agentd.engine.model import Model
from agentd.engine.pace import Pacer
from agentd.engine.prompt import render
from training import model as shape
from training.dialogues import Dialogues
from training.preamble import conversation

WANTED = 0.999
SAMPLES = 8


def main() -> int:
    path = Path(sys.argv[1])
    served = Model(
        path, context=2048, batch=128, threads=2, repack=False, should_stop=lambda: False, pacer=Pacer(lambda: False)
    )
    trained = Gemma4ForCausalLM(shape.config(served.words.size)).eval()
    shape.load(trained, path)
    dialogues, worst = Dialogues(Random(7)), 1.0
    for _ in range(SAMPLES):
        ids = served.words.encode(render(conversation((dialogues.sample().turn(),))))
        served.decode(ids[served.rewind(ids) :])
        ours = served.logits().astype(np.float64)
        with torch.no_grad():
            theirs = trained(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
        cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
        worst = min(worst, cosine)
        print(f"{len(ids):5d} tokens  cosine {cosine:.6f}  same best token: {int(ours.argmax()) == int(theirs.argmax())}")
    print(f"worst cosine {worst:.6f}")
    return 0 if worst > WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
