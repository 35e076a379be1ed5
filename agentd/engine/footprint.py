"""What a context takes before it is made: llama.cpp itself reckons it, without allocating anything.

    python -I -m agentd.engine.footprint FILE CONTEXT BATCH PARALLEL      prints MiB as JSON

A model loaded with `no_alloc` gives contexts whose buffers have a size and no memory. The sizes are only in the library's
log; tests compare them with what a real context takes, as the wording may change between releases.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as C

from agentd.engine.link import Footprint
from agentd.engine.model import Shape, context_parameters, keep_complaints
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

_CACHE = re.compile(r"llama_kv_cache: +size = +([0-9.]+) MiB")
_COMPUTE = re.compile(r"compute buffer size = +([0-9.]+) MiB")
_OUTPUT = re.compile(r"output buffer size = +([0-9.]+) MiB")


def footprint(path: Path, parameters: Callable[[int], C.llama_context_params], context: int, least: int) -> Footprint:
    """`parameters` are those of a context of so many tokens. Takes as long as reading the vocabulary: a second for 262,144
    words on a PC. Raises EngineError (MODEL_INVALID).
    """
    lines: list[str] = []
    listen = C.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    asked = C.llama_model_default_params()
    asked.n_gpu_layers, asked.use_extra_bufts = 0, False
    # Nothing is read, so nothing is to be mapped: with a mapping llama.cpp ends the process (an assertion in load_tensors).
    asked.no_alloc, asked.load_mode, asked.lazy_mode = True, C.LLAMA_LOAD_MODE_NONE, C.LLAMA_LAZY_MODE_OFF
    C.llama_log_set(listen, None)
    try:
        model = C.llama_model_load_from_file(os.fsencode(path), asked)
        taken = [_taken(model, parameters(tokens), lines) for tokens in (context, least)] if model else []
        if model:
            C.llama_model_free(model)
    finally:
        C.llama_log_set(keep_complaints, None)  # the library has kept a pointer to ours, which ends here
    if not all(taken) or not taken:
        message = f"What a context of {context} tokens takes of memory can't be reckoned for {path}."
        raise EngineError(Reason.MODEL_INVALID, message, hint="Make engine.context smaller in agentd.toml.")
    return Footprint(context=context, mib=taken[0], least=least, least_mib=taken[1])


def _taken(model: C.llama_model_p, parameters: C.llama_context_params, lines: list[str]) -> float:
    """0 if the library does not say."""
    lines.clear()
    context = C.llama_init_from_model(model, parameters)
    if not context:
        return 0.0
    C.llama_free(context)
    log = "".join(lines)
    caches, computes = _CACHE.findall(log), _COMPUTE.findall(log)
    return sum(map(float, caches + computes + _OUTPUT.findall(log))) if caches and computes else 0.0


def main() -> int:
    whole = Shape.of(*map(int, sys.argv[2:]))

    def parameters(tokens: int) -> C.llama_context_params:
        return context_parameters(replace(whole, context=tokens), full_window=whole.full_window)

    try:
        found = footprint(Path(sys.argv[1]), parameters, whole.context, min(whole.context, 256))
    except EngineError as e:
        print(json.dumps({"error": e.message}))
        return 1
    print(json.dumps({"mib": found.mib}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
