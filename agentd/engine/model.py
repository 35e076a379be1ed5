"""A loaded model and its context: llama.cpp's low-level interface, with the settings that matter on a small device.

Weights stay mapped from the file; `lazy_mode=ON` leaves the per-layer embeddings on flash (by default the loader
faults all 1.3 GB of them in); `n_outputs_max=1` saves half a gigabyte of logits workspace; no repacked second copy
of the weights unless asked (it doubles memory, and on CPUs with AMX it crashes in the first decode). Source of the
figures: measured with llama-cpp-python 0.3.36 on a file with Gemma 4 E2B's shapes.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as C
import numpy as np

from agentd.engine.tokens import Vocabulary
from agentd.errors import EngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from agentd.engine.pace import Pacer

ARCHITECTURE = "gemma4"
_USE_ANOTHER = "Use a GGUF file of a Gemma 4 text model, downloaded completely."
_GGML_TYPE_Q8_0 = 8
_WARNING = 3  # enum ggml_log_level; 4 is ERROR
_ABORTED = 2  # llama_decode
_log: deque[str] = deque(maxlen=20)


@C.llama_log_callback
def keep_complaints(level: int, text: bytes, _data: object) -> None:
    if level >= _WARNING and (line := text.decode("utf-8", "replace").strip().strip(".")):
        _log.append(line)


class Aborted(Exception):
    """A decode was stopped by `should_stop`."""


class Model:
    """One model with one sequence. Use from one thread.

    Raises EngineError (MODEL_INVALID) naming what is wrong with the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        batch: int,
        threads: int,
        repack: bool,
        should_stop: Callable[[], bool],
        pacer: Pacer,
        fit: Callable[[Model, int], int] = lambda _model, context: context,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """`fit` is asked how large the context may be once all but that is loaded; `done` is called after each piece."""
        _check_file(path)
        C.llama_log_set(keep_complaints, None)
        C.llama_backend_init()
        self._model = _load(path, repack=repack)
        self.name = _metadata(self._model, "general.name") or path.stem
        self.parameters = int(C.llama_model_n_params(self._model))
        self.size = int(C.llama_model_size(self._model))
        self.vocabulary_pointer = C.llama_model_get_vocab(self._model)
        self.words = Vocabulary(self.vocabulary_pointer)
        # Keep a reference: the C side holds only the pointer. It is asked about 900 times in a decode.
        self._abort = C.ggml_abort_callback(lambda _data: should_stop())
        self._pacer, self._done, self._most = pacer, done, threads or os.cpu_count() or 1
        self._threads = self._most
        self._batch = batch
        self._context = self._new_context(fit(self, context))
        self._memory = C.llama_get_memory(self._context)
        self.context: int = C.llama_n_ctx(self._context)
        self.decoded = self.passes = 0
        """Tokens, and passes over the weights, since it was loaded."""
        self.tokens: list[int] = []
        """What the cache holds, position by position."""
        self._check_logits()

    def close(self) -> None:
        C.llama_free(self._context)
        C.llama_model_free(self._model)

    def rewind(self, prompt: Sequence[int]) -> int:
        """Keep what the cache shares with `prompt` and drop the rest; returns how many tokens stay.

        At least the last token of the prompt is left to be decoded, as its logits are wanted.
        """
        shared = 0
        for mine, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        # Exact only because swa_full keeps all cells: a pruned window rolls back "successfully" and wrongly.
        C.llama_memory_seq_rm(self._memory, 0, shared, -1)
        del self.tokens[shared:]
        return shared

    def decode(self, tokens: Sequence[int]) -> None:
        """Append tokens; afterwards `logits` are those behind the last one. Raises Aborted, OutOfBudget, EngineError.

        The pieces are the same at any pace: others could end in other logits.
        """
        for start in range(0, len(tokens), self._batch):
            part = tokens[start : start + self._batch]
            self._pacer.ready()
            self._keep_pace()
            begun = time.monotonic()
            array = (C.llama_token * len(part))(*part)
            code = C.llama_decode(self._context, C.llama_batch_get_one(array, len(part)))
            if code == _ABORTED:
                C.llama_memory_seq_rm(self._memory, 0, len(self.tokens), -1)
                raise Aborted
            if code != 0:
                raise EngineError(Reason.ENGINE_CRASHED, f"The model could not be evaluated (code {code}).")
            self.tokens.extend(part)
            self.decoded += len(part)
            self.passes += 1
            self._pacer.rest(time.monotonic() - begun)
            self._done()

    def _keep_pace(self) -> None:
        """As many threads as there may be now: they count from the next decode on."""
        threads = min(self._pacer.threads or self._most, self._most)
        if threads != self._threads:
            C.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads

    def logits(self) -> NDArray[np.float32]:
        """A view (no copy) of the last token's logits, shape [vocabulary]."""
        pointer = C.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.words.size,))

    def sample(self, sampler: C.llama_sampler_p) -> int:
        return int(C.llama_sampler_sample(sampler, self._context, -1))

    def parameters_of_context(self, context: int) -> C.llama_context_params:
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, self._batch, self._batch, 1
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = self._most
        params.type_k = params.type_v = _GGML_TYPE_Q8_0
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_ENABLED  # a quantised V cache needs it
        params.swa_full = True
        params.no_perf = True
        params.abort_callback = self._abort
        return params

    def _new_context(self, context: int) -> C.llama_context_p:
        params = self.parameters_of_context(context)
        made = C.llama_init_from_model(self._model, params)
        if not made:
            raise EngineError(
                Reason.MODEL_INVALID,
                f"No context of {context} tokens can be made for this model: {_complaints()}.",
                hint="Make engine.context smaller in agentd.toml.",
                metadata={"context": str(context)},
            )
        return made

    def _check_logits(self) -> None:
        """One decode at load: structures move between releases, and a wrong field shows here."""
        self.decode([self.words.special["<bos>"]])
        if not np.isfinite(self.logits()).all() or float(np.ptp(self.logits())) == 0:
            raise EngineError(Reason.MODEL_INVALID, "The model gives no usable probabilities.", hint=_USE_ANOTHER)
        self.rewind([-1, -1])


def greedy_or_sampled(temperature: float, seed: int) -> C.llama_sampler_p:
    """Gemma's recommended chain (top-k 64, top-p 0.95), or the most likely token at temperature 0."""
    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    if temperature <= 0:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
        return chain
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_k(64))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_p(0.95, 1))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_temp(temperature))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_dist(seed))
    return chain


def _check_file(path: Path) -> None:
    """What can be told without llama.cpp, said more plainly than it does."""
    metadata = {"path": str(path)}
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as e:
        hint = "Set engine.model in agentd.toml to a GGUF file, or to `pocket`."
        message = f"The model file {path} can't be read: {e.strerror}."
        raise EngineError(Reason.MODEL_INVALID, message, hint=hint, metadata=metadata) from None
    if magic != b"GGUF":
        raise EngineError(Reason.MODEL_INVALID, f"{path} is not a GGUF file.", hint=_USE_ANOTHER, metadata=metadata)


def _load(path: Path, *, repack: bool) -> C.llama_model_p:
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0
    params.lazy_mode = C.LLAMA_LAZY_MODE_ON
    params.use_extra_bufts = repack
    _log.clear()
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    metadata = {"path": str(path)}
    if not model:
        message = f"The model file {path} can't be loaded: {_complaints()}."
        raise EngineError(Reason.MODEL_INVALID, message, hint=_USE_ANOTHER, metadata=metadata)
    architecture = _metadata(model, "general.architecture")
    if architecture != ARCHITECTURE:
        C.llama_model_free(model)
        message = f"{path} holds a model of the architecture {architecture}, not {ARCHITECTURE}."
        raise EngineError(Reason.MODEL_INVALID, message, hint=_USE_ANOTHER, metadata=metadata)
    return model


def _metadata(model: C.llama_model_p, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    n = C.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if n >= 0 else ""


def _complaints() -> str:
    """The first thing llama.cpp complained about: the later ones only follow from it."""
    errors = [line for line in _log if "error" in line or "fail" in line]
    return (errors or list(_log) or ["no reason given"])[0]
