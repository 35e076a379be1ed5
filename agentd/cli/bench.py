"""`agentd bench`: how fast a model is on this device, and what it takes, seen from a client."""

from __future__ import annotations

import contextlib
import statistics
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from agentd import config as configuration
from agentd import models
from agentd.cli.output import console, json_option, print_json, shown
from agentd.cli.rival import Answer, Rival
from agentd.cli.scratch import daemon_of_its_own, scratch_folder, settings_for, wait_for_model
from agentd.errors import AgentdError, EngineError, Reason
from agentd.models import gguf, residency
from agentd.v1 import budget_pb2, run_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.client import Client
    from agentd.v1 import tool_pb2

PROMPT = "Write a story about a lighthouse keeper and the storm."
CALL = "what time is it"
WORD = "and "
_TOGETHER, _CALL_TOKENS = 4, 256
_MIB = 1 << 20
_ROUND_S = 15.0
"""In that time the sensors have seen the engine."""
_MEMORY = {
    "anonymous_mib": "engine, of its own",
    "mapped_mib": "weights, resident",
    "cached_mib": "weights, in the page cache",
}
_GRANTS = [{"tool": "system.*", "scope": "*"}]
_aside = Console(stderr=True, highlight=False)
"""For what is no figure."""


@dataclass(slots=True)
class Figure:
    """`name` is stable, for programs; `theirs` is what another server took for the same."""

    name: str
    what: str
    value: float
    unit: str
    theirs: float | None = None


@dataclass(slots=True)
class Seen:
    """A run as its client sees it. Seconds from the request to the first token and to the end; `streamed` is whether it wrote
    text, which comes token by token: a call comes when it is whole.
    """

    first_s: float
    end_s: float
    streamed: bool
    calls: list[float]
    run: run_pb2.Run

    @property
    def per_s(self) -> float:
        """Tokens a second behind the first one; 0 where that can't be seen."""
        wrote = self.run.usage.generated_tokens - 1
        return wrote / (self.end_s - self.first_s) if self.streamed and not self.calls and wrote > 0 else 0.0


def see(client: Client, prompt: str, tokens: int) -> Seen:
    """Raises EngineError if the run fails."""
    begun, first, calls = time.perf_counter(), 0.0, list[float]()
    for event in client.run(prompt, budget=run_pb2.Run.Budget(tokens=tokens)):
        now = time.perf_counter() - begun
        kind = event.WhichOneof("event")
        if kind in ("text", "thought") and not first:
            first = now
        if kind == "call":
            calls.append(now)
        if kind == "run":
            if event.run.state == run_pb2.Run.STATE_FAILED:
                raise EngineError(Reason.ENGINE_CRASHED, f"A run failed: {event.run.error.message}")
            return Seen(first or now, now, bool(first), calls, event.run)
    raise EngineError(Reason.ENGINE_CRASHED, "A run had no end.")


@click.command(epilog="Example: agentd bench ~/models/gemma-4-E2B_q4_0-it.gguf --compare http://localhost:8080")
@click.argument("model", default="", metavar="[FILE]")
@click.option("--tokens", type=click.IntRange(4, 4096), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--context", type=click.IntRange(512, 131072), help="Tokens of context.  [default: the configured]")
@click.option("--minutes", type=click.FloatRange(0, 240), default=0.0, help="Decode for so long at the end, to see the heat.")
@click.option("--compare", metavar="URL", help="An OpenAI-compatible server (llama-server, Ollama) to give the same prompts.")
@click.option("--compare-model", default="", help="The model's name there, if it wants one.")
@json_option
def bench(
    model: str, tokens: int, context: int | None, minutes: float, compare: str | None, compare_model: str, *, as_json: bool
) -> None:
    """Measure FILE (or the configured model) with a daemon of its own: start, first token, speed, several at once, memory.

    Let nothing else run meanwhile; a running daemon with a loaded model takes memory and heats, too. All figures are a
    client's: gRPC and the agent loop are in them. Another server is measured when agentd's own daemon has ended.
    """
    engine = configuration.load(None).engine
    path = models.locate(model or engine.model)
    if not path.is_file():
        raise EngineError(Reason.MODEL_INVALID, f"There is no model file {path}.", hint="Give the path of a GGUF file.")
    rival = Rival(compare, compare_model, mark=f" ({uuid.uuid4().hex[:8]})") if compare else None
    if rival:
        rival.check()
    asked = {"model": str(path), "context": context or engine.context}
    with scratch_folder("bench") as folder:
        figures = _Bench(folder, asked, tokens, minutes, rival).all()
    if as_json:
        print_json({"model": str(path), "figures": [asdict(figure) for figure in figures]})
    else:
        _show(path, figures, compare or "")


@dataclass(slots=True)
class _Bench:
    folder: Path
    engine: dict[str, Any]
    tokens: int
    minutes: float
    rival: Rival | None
    figures: list[Figure] = field(default_factory=list)
    _later: list[tuple[Figure, Callable[[Rival], float | None]]] = field(default_factory=list)
    """What the other server is asked when all of ours is known."""

    def all(self) -> list[Figure]:
        begun = time.perf_counter()
        with daemon_of_its_own(self.folder, self._config(1)) as client:
            self._loaded(client, begun)
            self._first(client)
            self._long(client)
            self._together(client)
            self._memory(client)
            self._sustained(client)
        begun = time.perf_counter()
        with daemon_of_its_own(self.folder, self._config(1)) as client:
            started = time.perf_counter() - begun
            again = self._seen(client, f"{PROMPT} Once more.", "starting again")
            self._add("restart_first_token_s", "daemon started again to first token", started + again.first_s, "s")
        with daemon_of_its_own(self.folder, self._config(4)) as client:
            self._call(client)
        for figure, ask in self._later if self.rival else ():
            assert self.rival is not None
            with console.status(f"the same at {self.rival.url}"):
                try:
                    figure.theirs = ask(self.rival)
                except AgentdError as e:  # what was measured of ours stays
                    _aside.print(f"[yellow]no figure of theirs for {figure.what}:[/] {shown(e.message)}")
        return self.figures

    def _config(self, steps: int) -> str:
        runs = {"tokens": 4096, "steps": steps, "seconds": 1800}
        return settings_for(self.folder, self.engine, runs=runs, grants=_GRANTS)

    def _add(
        self, name: str, what: str, value: float, unit: str, theirs: Callable[[Rival], float | None] | None = None
    ) -> None:
        self.figures.append(Figure(name, what, value, unit))
        if theirs:
            self._later.append((self.figures[-1], theirs))

    def _seen(self, client: Client, prompt: str, what: str, tokens: int = 0) -> Seen:
        with console.status(what):
            return see(client, prompt, tokens or self.tokens)

    def _loaded(self, client: Client, begun: float) -> None:
        self._add("start_s", "daemon started", time.perf_counter() - begun, "s")
        wait_for_model(client, configuration.load(None).engine.load_timeout_s)
        self._add("load_s", "model loaded", time.perf_counter() - begun, "s")
        context = client.status().model.context
        if context < self.engine["context"]:
            _aside.print(f"[yellow]memory is short:[/] the context has {context:,} tokens, not {self.engine['context']:,}")
        if self.rival:
            self.rival = replace(self.rival, tools=tuple(map(_as_theirs, client.tools())))

    def _first(self, client: Client) -> None:
        """A preamble that was never decoded before; the same one in a second session; the speed behind it."""
        cold = self._seen(client, PROMPT, "decoding system text and tools for the first time")
        decoded, second = cold.run.usage.prompt_tokens, f"{PROMPT} And a dog."
        warm = self._seen(client, second, "the same in another session")
        answers: dict[str, Answer] = {}

        def theirs(rival: Rival, prompt: str) -> Answer:
            if prompt not in answers:
                answers[prompt] = rival.ask(prompt, self.tokens)
            return answers[prompt]

        what = f"first token, {decoded:,} tokens never decoded before"
        self._add("first_token_cold_s", what, cold.first_s, "s", lambda rival: theirs(rival, PROMPT).first_s)
        what = "first token in a second session"
        self._add("first_token_warm_s", what, warm.first_s, "s", lambda rival: theirs(rival, second).first_s)
        self._add("prompt_tokens_per_s", "tokens of a prompt a second", decoded / cold.first_s, "tok/s")
        if speeds := [seen.per_s for seen in (cold, warm) if seen.per_s]:
            what = "tokens of an answer a second"
            self._add("tokens_per_s", what, statistics.median(speeds), "tok/s", lambda rival: theirs(rival, second).per_s)
        else:
            _aside.print("[yellow]no figure for the tokens of an answer:[/] the model wrote no text")
        if joules := sum(seen.run.usage.joules for seen in (cold, warm)):
            wrote = sum(seen.run.usage.generated_tokens for seen in (cold, warm))
            self._add("tokens_per_joule", "tokens of an answer for a joule", wrote / joules, "tok/J")

    def _long(self, client: Client) -> None:
        """About a quarter of the context before the question."""
        prompt = WORD * (int(client.status().model.context) // 4) + PROMPT
        try:
            seen = self._seen(client, prompt, "a long prompt")
        except AgentdError as e:
            _aside.print(f"[yellow]no figure for a long prompt:[/] {shown(e.message)}")
            return
        what = f"first token behind {seen.run.usage.prompt_tokens:,} more"
        self._add("long_first_token_s", what, seen.first_s, "s", lambda rival: rival.ask(prompt, self.tokens).first_s)
        if seen.per_s:
            self._add("long_tokens_per_s", "tokens a second behind them", seen.per_s, "tok/s")

    def _together(self, client: Client) -> None:
        """Four clients at once: all of them together."""
        prompts = [f"{PROMPT} Story number {n}." for n in range(_TOGETHER)]
        with console.status("four at once"), ThreadPoolExecutor(_TOGETHER) as pool:
            begun = time.perf_counter()
            seen = pool.map(lambda prompt: see(client, prompt, self.tokens), prompts)
            mine = sum(each.run.usage.generated_tokens for each in seen) / (time.perf_counter() - begun)
        what = f"{_TOGETHER} answers at once, tokens of all a second"
        self._add("together_tokens_per_s", what, mine, "tok/s", lambda rival: rival.together(prompts, self.tokens))

    def _memory(self, client: Client) -> None:
        told, until = dict[str, float](), time.monotonic() + _ROUND_S
        while "anonymous_mib" not in told and time.monotonic() < until:
            told = {reading.name: reading.value for reading in client.budgets().readings}
            time.sleep(0.2)
        for name, what in _MEMORY.items():
            if name in told:
                self._add(name, what, told[name], "MiB")
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{client.status().engine_pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self._add("peak_mib", "engine, most that was resident", int(line.split()[1]) / 1024, "MiB")
            self._weights(Path(f"/proc/{client.status().engine_pid}"))
        budgets = client.budgets()
        if budgets.state != budget_pb2.Budgets.STATE_NOMINAL:
            _aside.print(f"[yellow]the budgets slow the model down:[/] {shown(budgets.reason)}")

    def _weights(self, process: Path) -> None:
        """What is resident of each group of tensors. Raises OSError."""
        path = Path(self.engine["model"])
        groups = gguf.read(path).groups
        for name, group in sorted(groups.items(), key=lambda item: -item[1].size):
            what = f"  of {name}, {group.size / _MIB:,.0f} MiB in the file"
            self._add(f"resident_{_stable(name)}_mib", what, residency.resident(process, path, group.spans) / _MIB, "MiB")

    def _sustained(self, client: Client) -> None:
        """The speed at the end of so many minutes against that at their beginning, and the heat."""
        if not self.minutes:
            return
        speeds, hottest, begun, n = list[float](), 0.0, time.perf_counter(), 0
        while (passed := (time.perf_counter() - begun) / 60) < self.minutes:
            speeds.append(self._seen(client, f"{PROMPT} {n}", f"decoding, {passed:.0f} min").per_s)
            n += 1
            told = {reading.name: reading.value for reading in client.budgets().readings}
            hottest = max(hottest, told.get("temperature_c", 0.0))
        part = max(1, len(speeds) // 4)
        first, last = statistics.median(speeds[:part]), statistics.median(speeds[-part:])
        self._add("sustained_tokens_per_s", f"tokens a second after {self.minutes:g} min", last, "tok/s")
        self._add("sustained_share", "of that at the beginning", last / first * 100 if first else 0.0, "%")
        if hottest:
            self._add("hottest_c", "hottest", hottest, "C")

    def _call(self, client: Client) -> None:
        self._seen(client, CALL, "a tool call", _CALL_TOKENS)  # with all that is loaded on the way
        seen = self._seen(client, CALL, "a tool call", _CALL_TOKENS)
        if seen.calls:
            self._add("tool_call_s", f"{CALL!r}: request to the call's result", seen.calls[0], "s")
        else:
            _aside.print("[yellow]no figure for a tool call:[/] the model made none")


def _stable(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")


def _as_theirs(tool: tool_pb2.Tool) -> dict[str, Any]:
    """A tool as OpenAI's protocol has it: both are to read the same before the prompt."""
    parameters = json_format.MessageToDict(tool.parameters)
    name = tool.name.removeprefix("tools/").replace(".", "_")
    return {"type": "function", "function": {"name": name, "description": tool.description, "parameters": parameters}}


def _show(path: Path, figures: list[Figure], other: str) -> None:
    console.print(f"[bold]{shown(str(path))}[/]\n")
    table = Table(box=None, header_style="bold")
    table.add_column("")
    table.add_column("agentd", justify="right")
    if other:
        table.add_column(shown(other), justify="right")
        table.add_column("ratio", justify="right")
    for figure in figures:
        cells = [figure.what, f"{_number(figure.value)} {figure.unit}"]
        if other:
            theirs = figure.theirs
            cells += [f"{_number(theirs)} {figure.unit}" if theirs else "", f"{figure.value / theirs:.2f}" if theirs else ""]
        table.add_row(*cells)
    console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
