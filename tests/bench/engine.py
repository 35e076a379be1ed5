"""The engine with a file of E2B's shapes: every figure beside what llama.cpp alone does with it in the same run."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as C
import numpy as np

from agentd.calls import load
from agentd.client import Client
from agentd.config import SYSTEM
from agentd.engine.cache import Cache
from agentd.engine.client import Engine
from agentd.engine.decoder import Decoder
from agentd.engine.generation import Generation
from agentd.engine.grammar import Grammars, Matcher
from agentd.engine.link import Delta, Done, Generate
from agentd.engine.model import Model, Row, Shape
from agentd.engine.pace import Pacer
from agentd.engine.prompt import CALL_CLOSE, CALL_OPEN, QUOTE, Conversation, Text, ToolSpec, Turn
from agentd.engine.sampler import Sampler
from agentd.engine.settings import EngineSettings
from agentd.v1 import run_pb2
from tests.bench.figures import Figure, console, show
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXT, BATCH, PARALLEL = 4096, 32, 4
_WRITER = Path(__file__).parent.parent.parent / "scripts" / "synthetic_model.py"
_TOKENS = 48
_SMALL = ("--ffn", "Q2_0", "--projection", "Q4_0")
_STATUS = re.compile(r"(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB")


def synthetic(folder: Path, *kinds: str) -> Path:
    """Takes 20 s, and 2.6 GB of the disk."""
    path = folder / f"e2b{''.join(kinds)}.gguf"
    with console.status(f"writing a model with the shapes of E2B {' '.join(kinds)}"):
        subprocess.run([sys.executable, str(_WRITER), str(path), *kinds], check=True, capture_output=True)
    return path


def specs() -> tuple[ToolSpec, ...]:
    tools = load([], resources.files("agentd.bundled_tools"), ("files", "http", "shell", "system")).tools.values()
    return tuple(ToolSpec(tool.name, tool.manifest.description, tool.schema()) for tool in tools)


def memory_mib(pid: int) -> dict[str, float]:
    return {name: int(kib) / 1024 for name, kib in _STATUS.findall(Path(f"/proc/{pid}/status").read_text())}


@contextmanager
def model_of(path: Path, *, repack: bool = False) -> Iterator[Model]:
    made = Model(
        path,
        Shape.of(CONTEXT, BATCH, PARALLEL),
        threads=0,
        repack=repack,
        should_stop=lambda: False,
        pacer=Pacer(lambda: False),
    )
    try:
        yield made
    finally:
        made.close()


def bare_ms(model: Model, tokens: int = _TOKENS) -> float:
    """Of llama.cpp for a token: nothing but decoding, as its own tool does it; the median."""
    taken, random = [], np.random.default_rng(0)
    for position in range(tokens):
        row = Row(int(random.integers(1000, model.words.size)), 0, position, wanted=True)
        taken.append(model.decode([row]) * 1000)
    model.keep(0, 0)
    return statistics.median(taken)


class Scripted:
    """Stands in for a model that knows what to say: the passes are real, and what comes of them is not looked at."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def pick(self, _logits: object, _among: object = None) -> int:
        return self.tokens.pop(0)


@dataclass
class Direct:
    """The decoder without the process around it."""

    model: Model
    said: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache, self.grammars = Cache(self.model), Grammars(self.model.words)
        self.decoder = Decoder(
            *(self.model, self.cache, PARALLEL),
            cancelled=lambda _: False,
            failed=lambda _, error: print(error, file=sys.stderr),
        )

    def add(self, text: str, tokens: int, tools: tuple[ToolSpec, ...] = ()) -> Generation:
        request = Generate(
            id=len(self.said) + 1,
            prompt=(),
            tools=tuple((tool.name, dict(tool.parameters)) for tool in tools),
            max_tokens=tokens,
        )
        words = self.model.words
        generation = Generation(request, words.encode([Text(text, trusted=False)]), 0, words, self.grammars, self.said.append)
        self.decoder.add(generation)
        return generation

    def seconds(self) -> float:
        begun = time.perf_counter()
        while self.decoder.busy:
            self.decoder.step()
        return time.perf_counter() - begun


def call_tokens(model: Model) -> list[int]:
    """A typical call, of one argument that stands in the prompt."""
    words = model.words

    def text(value: str) -> list[int]:
        return words.encode([Text(value, trusted=False)])

    quote, tokens = words.special[QUOTE], [words.special[CALL_OPEN], *text("call:files.read{path:")]
    return [*tokens, quote, *text("notes/todo.txt"), quote, *text("}"), words.special[CALL_CLOSE]]


def tool_call(model: Model) -> list[Figure]:
    """With and without what the grammar forces and the prompt suggests, in turns."""
    tools, script = specs(), call_tokens(model)
    taken: dict[bool, list[float]] = {True: [], False: []}
    forced, passes = Matcher.forced, {}
    for _ in range(3):
        for plain in (True, False):
            direct = Direct(model)
            direct.decoder._drafts = not plain
            generation = direct.add("read the file notes/todo.txt and tell me what is in it", len(script), tools)
            Matcher.forced = (lambda _self: ()) if plain else forced  # type: ignore[method-assign]
            generation._sampler = _follow(generation, list(script))  # type: ignore[assignment]
            while not generation.writes:
                direct.decoder.step()
            before = model.passes
            taken[plain].append(direct.seconds())
            passes[plain] = model.passes - before
            for sequence in range(model.shape.sequences):
                model.keep(sequence, 0)
    Matcher.forced = forced  # type: ignore[method-assign]
    fast, slow = statistics.median(taken[False]), statistics.median(taken[True])
    what = f"a tool call of {len(script)} tokens, {passes[False]} passes instead of {passes[True]}"
    return [Figure(what, fast, "s", slow / 1.8, "plain constrained sampling", slow)]


def _follow(generation: Generation, script: list[int]) -> Scripted:
    """The script's next token, whatever was forced before it."""

    class Following(Scripted):
        def pick(self, _logits: object, _among: object = None) -> int:
            return script[len(generation.written)]

    return Following([])


def sharing(model: Model) -> list[Figure]:
    """A second session with the same 1,500 tokens before it."""
    cache, tokens = Cache(model), [5000 + n for n in range(1500)]
    first = cache.open([*tokens, 1])
    for start in range(0, len(tokens), BATCH):
        part = tokens[start : start + BATCH]
        model.decode([Row(token, first.number, start + n) for n, token in enumerate(part)])
    first.tokens = list(tokens)
    begun = time.perf_counter()
    second = cache.open([*tokens, 2, 3])
    taken = (time.perf_counter() - begun) * 1000
    assert len(second.tokens) == len(tokens)
    for sequence in range(model.shape.sequences):
        model.keep(sequence, 0)
    return [Figure("1,500 tokens of preamble in a second session", taken, "ms", 50.0)]


def together(model: Model) -> list[Figure]:
    """Four generations in a pass against one, by turns: the median of the ratios."""
    found = []
    for _ in range(3):
        taken = {}
        for count in (1, PARALLEL):
            direct = Direct(model)
            direct.decoder._drafts = False
            for n in range(count):
                direct.add(f"{n} go on and on", 16)
            seconds = direct.seconds()
            taken[count] = seconds * 1000 / direct.decoder.written
            for sequence in range(model.shape.sequences):
                model.keep(sequence, 0)
        found.append((taken[1] / taken[PARALLEL], taken[1], taken[PARALLEL]))
    _, one, four = sorted(found)[1]
    return [Figure("4 sessions at once, a token of any", four, "ms", one / 1.8, "one alone", one)]


async def _one(engine: Engine, prompt: str, tools: tuple[ToolSpec, ...], tokens: int) -> tuple[float, Done, list[float]]:
    """Seconds to the first token, the end, and when each token came."""
    begun, times = time.perf_counter(), list[float]()
    done: Done | None = None
    conversation = Conversation(SYSTEM, tools, (Turn(prompt),))
    async for output in engine.generate(conversation, max_tokens=tokens, temperature=0.0, seed=0):
        if isinstance(output, Delta):
            times.append(time.perf_counter() - begun)
        done = output if isinstance(output, Done) else done
    assert done is not None
    return (times[0] if times else time.perf_counter() - begun), done, times


async def prefixes(path: Path, folder: Path) -> list[Figure]:
    """First token with a long preamble: never decoded before, in a second session, after a restart."""
    settings = EngineSettings(path, CONTEXT, BATCH, 0, "off", 300, parallel=PARALLEL, prefixes=folder / "prefixes")
    tools = specs()
    engine = Engine(settings)
    await engine.load()
    cold, done, _ = await _one(engine, "hello", tools, 2)
    preamble, prefill_s = done.prompt_tokens, done.prefill_ms / 1000
    await _one(engine, "what else", tools, 2)
    _, short, _ = await _one(engine, "what more", (), 2)
    assert engine.pid
    steady = memory_mib(engine.pid)
    await engine.stop()
    begun = time.perf_counter()
    engine = Engine(settings)
    loaded = time.perf_counter()
    await engine.load()
    load_s = time.perf_counter() - loaded
    _first, again, _ = await _one(engine, "hello", tools, 2)
    restart = time.perf_counter() - begun
    await engine.stop()
    return [
        Figure(f"first token, {preamble} tokens of preamble never decoded before", cold, "s"),
        Figure("first token after a restart of the engine", restart, "s", 0.05 * prefill_s, "decoding the preamble", prefill_s),
        Figure("of that loading the model", load_s, "s"),
        Figure("tokens decoded again after the restart", again.prompt_tokens - again.cached_tokens, ""),
        Figure("engine with Q4_0, anonymous", steady["RssAnon"], "MiB"),
        Figure("engine with Q4_0, resident after 3 prompts", steady["VmRSS"], "MiB", 1480.0),
        Figure("engine with Q4_0, peak", steady["VmHWM"], "MiB", steady["VmRSS"] * 1.01),
        Figure("tokens of a prompt a second", short.prompt_tokens / max(1e-9, short.prefill_ms / 1000), "tok/s"),
    ]


async def small(path: Path) -> list[Figure]:
    """The mix for phones: what it takes. Its kernel is slow on PCs, so it reads and writes little."""
    engine = Engine(EngineSettings(path, CONTEXT, BATCH, 0, "off", 300, parallel=PARALLEL))
    await engine.load()
    await _one(engine, "hello", (), 16)
    assert engine.pid
    taken = memory_mib(engine.pid)
    await engine.stop()
    return [
        Figure("engine with FFN in Q2_0, anonymous", taken["RssAnon"], "MiB"),
        Figure("engine with FFN in Q2_0, resident", taken["VmRSS"], "MiB", 1000.0),
        Figure("engine with FFN in Q2_0, peak", taken["VmHWM"], "MiB", taken["VmRSS"] * 1.01),
    ]


def _spent(client: Client, prompt: str, tokens: int) -> tuple[int, float, float]:
    """Tokens, seconds from the first piece of text to the end, seconds of llama.cpp."""
    budget = run_pb2.Run.Budget(tokens=tokens)
    seen = [(time.perf_counter(), event) for event in client.run(prompt, budget=budget)]
    ended = seen[-1][1].run
    first = next(when for when, event in seen if event.WhichOneof("event") in ("text", "call_started", "run"))
    return ended.usage.generated_tokens, seen[-1][0] - first, ended.usage.seconds


def streaming(model: str, folder: Path, prompt: str, few: int, many: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a token as a client sees it, and of it llama.cpp: a long answer less a short one, the medians."""
    extra = f'[engine]\nmodel = "{model}"\nwarm = false\n[runs]\nsteps = 1\nseconds = 600\n'
    daemon = DaemonProcess(folder / f"daemon-{few}", extra, "bundled = []\n")
    daemon.root.mkdir()
    found = []
    with daemon.running(), Client(daemon.socket) as client:
        _spent(client, prompt, 2)
        for _ in range(rounds):
            short, long = _spent(client, prompt, few), _spent(client, prompt, many)
            wrote = long[0] - short[0]
            found.append(((long[1] - short[1]) * 1000 / wrote, (long[2] - short[2]) * 1000 / wrote))
    return statistics.median(wall for wall, _ in found), statistics.median(own for _, own in found)


def overhead(path: Path, folder: Path) -> list[Figure]:
    """What agentd adds to a token: sampling at E2B's vocabulary, bytes, bookkeeping, messages, gRPC."""
    logits = np.random.default_rng(0).normal(size=262_144).astype(np.float32)
    picked = []
    for temperature in (0.0, 1.0):
        sampler = Sampler(temperature, 0)
        begun = time.perf_counter()
        for _ in range(200):
            sampler.pick(logits)
        picked.append((time.perf_counter() - begun) * 5)
    wall, own = streaming(str(path), folder, "go on and on", 16, 64, 1)
    tiny = synthetic(folder, "--shape", "tiny")  # so fast that what is around it shows, and it has no end
    each, tinys_own = streaming(str(tiny), folder, "go on and on", 20, 220, 5)
    return [
        Figure("a token, streamed over gRPC", wall, "ms", own / 0.97, "llama.cpp in the same run", own),
        Figure("what agentd adds to a token, with a tiny model", each - tinys_own, "ms", 0.6),
        Figure("of that taking the likeliest of 262,144 tokens", picked[0], "ms"),
        Figure("or one at random", picked[1], "ms"),
    ]


def own_tool(path: Path) -> list[Figure]:
    """llama.cpp's benchmark tool, where LLAMA_BENCH names it."""
    tool = os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench")
    if not tool:
        return []
    threads = os.cpu_count() or 1
    command = [
        tool,
        "-m",
        str(path),
        "-t",
        str(threads),
        "-ctk",
        "q8_0",
        "-ctv",
        "q8_0",
        "-fa",
        "1",
        "--repack",
        "0",
        "-lzm",
        "on",
        "-p",
        "0",
        "-n",
        "48",
        "-r",
        "2",
    ]
    said = subprocess.run([*command, "-o", "csv"], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        print(said.stderr[-300:], file=sys.stderr)
        return []
    head, *rows = [line.split(",") for line in said.stdout.splitlines() if "," in line]
    speed = float(rows[-1][head.index("avg_ts")].strip('"'))
    return [Figure("llama-bench: tokens a second", speed, "tok/s"), Figure("the same, for a token", 1000 / speed, "ms")]


def figures() -> list[Figure]:
    """Takes a few minutes. E2B_GGUF and E2B_Q2_GGUF name files that are there already, LLAMA_BENCH llama.cpp's own tool."""
    found = []
    print(C.llama_print_system_info().decode(), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="agentd-bench-") as name:
        folder = Path(name)
        path = Path(os.environ["E2B_GGUF"]) if "E2B_GGUF" in os.environ else synthetic(folder)
        found += own_tool(path)
        with console.status("decoding"), model_of(path) as model:
            bare = bare_ms(model)
            found += [Figure("llama.cpp alone, a token", bare, "ms"), *tool_call(model), *together(model), *sharing(model)]
        with console.status("prefixes"):
            found += asyncio.run(prefixes(path, folder))
        with console.status("streaming"):
            found += overhead(path, folder)
        with console.status("2 bits"):
            found += asyncio.run(
                small(Path(os.environ["E2B_Q2_GGUF"]) if "E2B_Q2_GGUF" in os.environ else synthetic(folder, *_SMALL))
            )
    return found


if __name__ == "__main__":
    show(figures())
