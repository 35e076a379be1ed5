"""Whether repacked weights work here: tried in a process of its own, since where they don't it may crash.

    python -I -m agentd.engine.selftest MODEL     exit status 0 if repacking gives the same probabilities

Known: on CPUs with AMX llama.cpp's default build dies of SIGSEGV in the first decode with repacked Q4_0 weights.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

_TIMEOUT_S = 300
_TOKENS = 48
_SIMILAR = 0.999


async def repack_is_usable(model: Path) -> bool:
    """Run the test below. A crash, a wrong result or a time-out all mean no."""
    command = [sys.executable, "-I", "-m", "agentd.engine.selftest", str(model)]
    try:
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    import numpy as np

    from agentd.engine.model import Model, Row, Shape
    from agentd.engine.pace import Pacer

    results = []
    for repack in (False, True):
        model = Model(
            Path(sys.argv[1]),
            Shape(256, 64),
            threads=0,
            repack=repack,
            should_stop=lambda: False,
            pacer=Pacer(lambda: False),
        )
        step = max(1, model.words.size // _TOKENS)
        tokens = [model.words.special["<bos>"], *range(0, model.words.size - 1, step)][:_TOKENS]
        model.decode([Row(token, 0, i, wanted=i == len(tokens) - 1) for i, token in enumerate(tokens)])
        results.append(model.logits(len(tokens) - 1).astype(np.float64))
        model.close()
    plain, repacked = results
    similarity = float(plain @ repacked / (np.linalg.norm(plain) * np.linalg.norm(repacked)))
    print(f"cosine {similarity:.6f}")
    return 0 if similarity > _SIMILAR else 1


if __name__ == "__main__":
    sys.exit(main())
