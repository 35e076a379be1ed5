"""The pocket model's vocabulary, loaded once."""

from __future__ import annotations

import llama_cpp.llama_cpp as C
import pytest

from agentd import models
from agentd.engine.tokens import Vocabulary


@pytest.fixture(scope="session")
def vocabulary_pointer() -> C.llama_vocab_p:
    C.llama_log_set(_silent, None)
    C.llama_backend_init()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(models.locate("pocket")).encode(), params)
    return C.llama_model_get_vocab(model)


@pytest.fixture(scope="session")
def words(vocabulary_pointer: C.llama_vocab_p) -> Vocabulary:
    return Vocabulary(vocabulary_pointer)


@C.llama_log_callback
def _silent(_level: int, _text: bytes, _data: object) -> None: ...
