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
    from collections.abc import Iterable, Iterator

_TIMEOUT_S = 1800.0
_SAID = ("content", "reasoning", "reasoning_content", "tool_calls")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without a proxy: the server is this device's, or a neighbour's."""

_LONGEST_REASON = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to the first piece and to the end; tokens as the server says, or else how many pieces came."""

    first_s: float
    end_s: float
    tokens: int

    @property
    def per_s(self) -> float:
        return (self.tokens - 1) / (self.end_s - self.first_s) if self.tokens > 1 and self.end_s > self.first_s else 0.0


@dataclass(frozen=True, slots=True)
class Rival:
    """`url` with or without `/v1` at its end. `mark` makes its prompts ones that the server has never had."""

    url: str
    model: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    mark: str = ""

    def check(self) -> None:
        """Raises RequestError (BAD_FIELD) if it does not answer."""
        self.ask("Hello", 1)

    def ask(self, prompt: str, tokens: int) -> Answer:
        """Greedy, as agentd decodes. Raises RequestError."""
        messages = [{"role": "system", "content": f"{SYSTEM}{self.mark}"}, {"role": "user", "content": prompt}]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {"tools": self.tools} if self.tools else {}
        begun, first, pieces, counted = time.perf_counter(), 0.0, 0, 0
        try:
            if urlsplit(self.url).scheme not in ("http", "https"):
                raise _NoAnswerError("it is no http address")
            target = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(target, json.dumps(body).encode(), headers)  # noqa: S310 - checked above
            with _direct.open(request, timeout=_TIMEOUT_S) as answer:
                for chunk in _chunks(answer):
                    counted = max(counted, _counted(chunk))
                    if _says(chunk):
                        first = first or time.perf_counter() - begun
                        pieces += 1
            if not pieces:
                raise _NoAnswerError("nothing came")
        except urllib.error.HTTPError as e:
            raise _bad(self.url, f"answers {e.code} {e.reason}{_reason(e)}") from None
        except (OSError, http.client.HTTPException, ValueError, _NoAnswerError) as e:
            raise _bad(self.url, f"does not answer as it should: {e}") from None
        return Answer(first, time.perf_counter() - begun, counted or pieces)

    def together(self, prompts: list[str], tokens: int) -> float:
        """Tokens of all a second. Raises RequestError."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            wrote = sum(answer.tokens for answer in pool.map(lambda prompt: self.ask(prompt, tokens), prompts))
        return wrote / (time.perf_counter() - begun)


class _NoAnswerError(Exception):
    """What came is none."""


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of it, if it says so as OpenAI's protocol has it."""
    try:
        said = json.loads(error.read(_LONGEST_REASON))
        return f": {str(said['error']['message'])[:200]}"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""


def _chunks(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The messages of a stream of server-sent events. Raises ValueError, _NoAnswerError."""
    for line in lines:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise _NoAnswerError(str(chunk)[:200])
        yield chunk


def _says(chunk: dict[str, Any]) -> bool:
    choices = chunk.get("choices")
    deltas = [choice.get("delta") for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    return any(isinstance(delta, dict) and any(delta.get(name) for name in _SAID) for delta in deltas)


def _counted(chunk: dict[str, Any]) -> int:
    usage = chunk.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


def _bad(url: str, why: str) -> RequestError:
    hint = "Give the address of a running llama-server (http://localhost:8080) or Ollama (http://localhost:11434)."
    return RequestError(Reason.BAD_FIELD, f"{url} {why}.", field="compare", hint=hint)
