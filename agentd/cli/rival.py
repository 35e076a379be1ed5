"""Another server to measure beside: llama-server, Ollama, or anything with OpenAI's chat completions."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentd.config import SYSTEM
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to the first piece and to the end; how many pieces came, which is how many tokens these servers wrote."""

    first_s: float
    end_s: float
    tokens: int

    @property
    def per_s(self) -> float:
        return (self.tokens - 1) / (self.end_s - self.first_s) if self.tokens > 1 and self.end_s > self.first_s else 0.0


@dataclass(frozen=True, slots=True)
class Rival:
    """`url` up to, and without, `/v1`."""

    url: str
    model: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    def check(self) -> None:
        """Raises RequestError (BAD_FIELD) if it does not answer."""
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise _bad(self.url, "is no http address")
        self.ask("Hello", 1)

    def ask(self, prompt: str, tokens: int) -> Answer:
        """Greedy, as agentd decodes. Raises RequestError."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        body |= {"tools": self.tools} if self.tools else {}
        headers = {"Content-Type": "application/json"}
        target = f"{self.url.rstrip('/')}/v1/chat/completions"
        request = urllib.request.Request(target, json.dumps(body).encode(), headers)  # noqa: S310 - checked above
        begun, first, pieces = time.perf_counter(), 0.0, 0
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - checked above
                for _ in _pieces(answer):
                    first = first or time.perf_counter() - begun
                    pieces += 1
        except (OSError, http.client.HTTPException, ValueError) as e:
            why = (
                f"answers {e.code} {e.reason}"
                if isinstance(e, urllib.error.HTTPError)
                else f"does not answer as it should: {e}"
            )
            raise _bad(self.url, why) from None
        end = time.perf_counter() - begun
        return Answer(first or end, end, pieces)

    def together(self, prompts: list[str], tokens: int) -> float:
        """Tokens of all a second. Raises RequestError."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            wrote = sum(answer.tokens for answer in pool.map(lambda prompt: self.ask(prompt, tokens), prompts))
        return wrote / (time.perf_counter() - begun)


def _pieces(lines: Iterable[bytes]) -> Iterable[str]:
    """The text of a stream of server-sent events, piece by piece."""
    for line in lines:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        for choice in json.loads(data).get("choices", ()):
            delta = choice.get("delta", {})
            if text := delta.get("content") or delta.get("reasoning_content"):
                yield text


def _bad(url: str, why: str) -> RequestError:
    hint = (
        "Give the address of a running server, such as http://localhost:8080 (llama-server) or http://localhost:11434 (Ollama)."
    )
    return RequestError(Reason.BAD_FIELD, f"{url} {why}.", field="compare", hint=hint)
