"""A loaded model and its context: llama.cpp's low-level interface, with the settings that matter on a small device.

Weights stay mapped from the file; `lazy_mode=ON` leaves the per-layer embeddings on flash (by default the loader
faults all 1.3 GB of them in); a small `n_outputs_max` saves half a gigabyte of logits workspace; no repacked second copy
of the weights unless asked (it doubles memory, and on CPUs with AMX it crashes in the first decode). Source of the
figures: measured with llama-cpp-python 0.3.36 on a file with Gemma 4 E2B's shapes.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as C
import numpy as np

from agentd.engine.drafting import LONGEST
from agentd.engine.pace import Aborted
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
_NO_ROOM, _ABORTED = 1, 2  # llama_decode
_KEPT_SEQUENCES = 4  # beside those at work: prefixes, and sessions that have nothing to do
_FULL_WINDOW = 8192  # tokens of context
_log: deque[str] = deque(maxlen=20)


@C.llama_log_callback
def keep_complaints(level: int, text: bytes, _data: object) -> None:
    if level >= _WARNING and (line := text.decode("utf-8", "replace").strip().strip(".")):
        _log.append(line)


class NoRoom(Exception):
    """The cache has no cells left for these tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """One token to decode: where in which sequence, and whether the logits behind it are wanted."""

    token: int
    sequence: int
    position: int
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a context: tokens in all, tokens in a pass, sequences, rows of logits in a pass (one for each sequence at least, or
    llama.cpp ends the process).
    """

    context: int
    batch: int
    sequences: int = 1
    outputs: int = 1

    @classmethod
    def of(cls, context: int, batch: int, parallel: int) -> Shape:
        """For so many generations at a time, with what is kept beside them, and drafts."""
        sequences = parallel + _KEPT_SEQUENCES
        return cls(context, batch, sequences, max(sequences, LONGEST + 1))

    @property
    def full_window(self) -> bool:
        """Whether layers with a sliding window keep all cells, too: 12 KiB a token more, and any rollback is exact."""
        return self.context <= _FULL_WINDOW


class Model:
    """One model and its cache of several sequences. Use from one thread.

    Raises EngineError (MODEL_INVALID) naming what is wrong with the file.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        *,
        threads: int,
        repack: bool,
        should_stop: Callable[[], bool],
        pacer: Pacer,
        fit: Callable[[Model, int], int] = lambda _model, context: context,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """`fit` is asked how large the context may be once all but that is loaded; `done` is called after each pass."""
        _check_file(path)
        C.llama_log_set(keep_complaints, None)
        C.llama_backend_init()
        self._model = _load(path, repack=repack)
        self.name = _metadata(self._model, "general.name") or path.stem
        self.parameters = int(C.llama_model_n_params(self._model))
        self.size = int(C.llama_model_size(self._model))
        self.words = Vocabulary(C.llama_model_get_vocab(self._model))
        self.window = int(C.llama_model_n_swa(self._model))
        # Keep a reference: the C side holds only the pointer. It is asked about 900 times in a decode.
        self._abort = C.ggml_abort_callback(lambda _data: should_stop())
        self._pacer, self._done, self._most = pacer, done, threads or os.cpu_count() or 1
        self._threads = self._most
        self._asked = shape
        self.shape = replace(shape, context=fit(self, shape.context))
        self._context = self._new_context()
        self._memory = C.llama_get_memory(self._context)
        self._batch = C.llama_batch_init(shape.batch, 0, 1)
        self.decoded = self.passes = 0
        """Tokens, and passes over the weights, since it was loaded."""
        self._check_logits()

    def close(self) -> None:
        C.llama_batch_free(self._batch)
        C.llama_free(self._context)
        C.llama_model_free(self._model)

    def decode(self, rows: Sequence[Row]) -> float:
        """One pass; afterwards `logits` gives those that were wanted. Seconds that it took.

        Raises NoRoom, Aborted: nothing of it stays; OutOfBudget; EngineError (ENGINE_CRASHED).
        """
        self._pacer.ready()
        self._keep_pace()
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row.sequence
        begun = time.monotonic()
        code = C.llama_decode(self._context, batch)
        took = time.monotonic() - begun
        if code == _NO_ROOM:
            raise NoRoom
        if code == _ABORTED:
            for sequence in {row.sequence for row in rows}:
                self.keep(sequence, min(row.position for row in rows if row.sequence == sequence))
            raise Aborted
        if code != 0:
            raise EngineError(Reason.ENGINE_CRASHED, f"The model could not be evaluated (code {code}).")
        self.decoded += len(rows)
        self.passes += 1
        self._pacer.rest(took)
        self._done()
        return took

    def logits(self, row: int) -> NDArray[np.float32]:
        """A view (no copy) of the logits behind that row of the last pass, shape [vocabulary]."""
        pointer = C.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.words.size,))

    def keep(self, sequence: int, length: int) -> None:
        """Drop what the sequence holds behind its first `length` tokens. Exact only where `reaches` says so."""
        C.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target`, which is empty, share the first `length` tokens of `source`."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def reaches(self, sequence: int, length: int) -> bool:
        """Whether the sequence can go on behind its first `length` tokens.

        Layers with a sliding window forget what lies before it. llama.cpp goes back "successfully" all the same, and the
        logits are silently wrong (measured with 0.3.36): all cells that the window needs at that point must be there.
        """
        first = int(C.llama_memory_seq_pos_min(self._memory, sequence))
        return 0 <= first <= max(0, length - self.window) if length else True

    def state(self, sequence: int) -> memoryview:
        """What the cache holds of a sequence, to be restored in another process. 10 KiB a token, with E2B."""
        size = C.llama_state_seq_get_size(self._context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        taken = C.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return memoryview(buffer).cast("B")[:taken]

    def restore(self, sequence: int, state: memoryview) -> bool:
        """Fill an empty sequence with a state of the very same model and kind of cache; False if it does not fit. `state`
        is of memory that can be written: it is not copied.
        """
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        if C.llama_state_seq_set_data(self._context, buffer, len(state), sequence):
            return True
        self.keep(sequence, 0)
        return False

    def _keep_pace(self) -> None:
        """As many threads as there may be now: they count from the next decode on."""
        threads = min(self._pacer.threads or self._most, self._most)
        if threads != self._threads:
            C.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads

    def parameters_of_context(self, context: int) -> C.llama_context_params:
        """Of a context of the kind that was asked for: a smaller one in short memory has its window in full, too."""
        params = context_parameters(replace(self._asked, context=context), full_window=self._asked.full_window)
        params.n_threads = params.n_threads_batch = self._most
        params.abort_callback = self._abort
        return params

    def _new_context(self) -> C.llama_context_p:
        context = self.shape.context
        made = C.llama_init_from_model(self._model, self.parameters_of_context(context))
        if not made:
            raise EngineError(
                Reason.MODEL_INVALID,
                f"No context of {context} tokens can be made for this model: {_complaints()}.",
                hint="Make engine.context smaller in agentd.toml.",
                metadata={"context": str(context)},
            )
        self.shape = replace(self.shape, context=int(C.llama_n_ctx(made)))
        return made

    def _check_logits(self) -> None:
        """One decode at load: structures move between releases, and a wrong field shows here."""
        self.decode([Row(self.words.special["<bos>"], 0, 0, wanted=True)])
        if not np.isfinite(self.logits(0)).all() or float(np.ptp(self.logits(0))) == 0:
            raise EngineError(Reason.MODEL_INVALID, "The model gives no usable probabilities.", hint=_USE_ANOTHER)
        self.keep(0, 0)


def context_parameters(shape: Shape, *, full_window: bool) -> C.llama_context_params:
    params = C.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = shape.context, shape.batch, shape.batch
    params.n_seq_max, params.kv_unified = shape.sequences, True
    params.n_outputs_max = shape.outputs
    params.type_k = params.type_v = _GGML_TYPE_Q8_0
    params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_ENABLED  # a quantised V cache needs it
    params.swa_full = full_window
    params.no_perf = True
    return params


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
