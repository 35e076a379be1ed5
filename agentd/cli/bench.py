"""`agentd bench`: how fast a model is on this device, and what it takes, seen from a client."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format
from rich.table import Table

from agentd import config as configuration
from agentd import models
from agentd.cli.output import console, json_option, print_json, shown
from agentd.cli.rival import Rival
from agentd.cli.scratch import daemon_of_its_own
from agentd.errors import AgentdError, EngineError, Reason
from agentd.v1 import run_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.client import Client
    from agentd.v1 import tool_pb2


PROMPT = "Write a story about a lighthouse keeper and the storm."
CALL = "what time is it"
WORD = "and "
_ROUND_S = 15.0
"""In that time the sensors have seen the engine."""
_TOGETHER, _CALL_TOKENS = 4, 256
_RUNS = "[runs]\ntokens = 4096\nsteps = {steps}\nseconds = 1800\n"


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
    """A run as its client sees it. Seconds from the request to the first token and to the end."""

    first_s: float
    end_s: float
    calls: list[float] = field(default_factory=list)
    run: run_pb2.Run = field(default_factory=run_pb2.Run)

    @property
    def per_s(self) -> float:
        """Tokens a second behind the first one."""
        wrote = self.run.usage.generated_tokens - 1
        return wrote / (self.end_s - self.first_s) if wrote > 0 and self.end_s > self.first_s else 0.0


def see(client: Client, prompt: str, tokens: int) -> Seen:
    """Raises EngineError if the run fails."""
    begun, first, calls = time.perf_counter(), 0.0, list[float]()
    for event in client.run(prompt, budget=run_pb2.Run.Budget(tokens=tokens)):
        now = time.perf_counter() - begun
        kind = event.WhichOneof("event")
        if kind in ("text", "thought", "call_started") and not first:
            first = now
        if kind == "call":
            calls.append(now)
        if kind == "run":
            if event.run.state == run_pb2.Run.STATE_FAILED:
                raise EngineError(Reason.ENGINE_CRASHED, f"A run failed: {event.run.error.message}")
            return Seen(first or now, now, calls, event.run)
    raise EngineError(Reason.ENGINE_CRASHED, "A run had no end.")


@click.command(epilog="Example: agentd bench ~/models/gemma-4-E2B_q4_0-it.gguf --compare http://localhost:8080")
@click.argument("model", default="", metavar="[FILE]")
@click.option("--tokens", type=click.IntRange(4, 4096), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--context", type=click.IntRange(512, 131072), help="Tokens of context.  [default: the configured]")
@click.option(
    "--minutes", type=click.FloatRange(0, 240), default=0.0, help="Decode for so long at the end, to see what heat does."
)
@click.option("--compare", metavar="URL", help="An OpenAI-compatible server (llama-server, Ollama) to give the same prompts.")
@click.option("--compare-model", default="", help="The model's name there, if it wants one.")
@json_option
def bench(
    model: str, tokens: int, context: int | None, minutes: float, compare: str | None, compare_model: str, *, as_json: bool
) -> None:
    """Measure FILE (or the configured model) with a daemon of its own: start, first token, speed, several at once, memory.

    Let nothing else run meanwhile; a running daemon with a loaded model takes memory and heats, too. All figures are a
    client's: gRPC and the agent loop are in them.
    """
    engine = configuration.load(None).engine
    path = models.locate(model or engine.model)
    if not path.is_file():
        raise EngineError(Reason.MODEL_INVALID, f"There is no model file {path}.", hint="Give the path of a GGUF file.")
    settings = engine.model_dump() | {"model": str(path), "warm": False} | ({"context": context} if context else {})
    rival = Rival(compare, compare_model) if compare else None
    if rival:
        rival.check()
    folder = Path(tempfile.mkdtemp(prefix="agentd-bench-"))
    (folder / "home").mkdir()
    try:
        figures = _Bench(folder, settings, tokens, minutes, rival).all()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json({"model": str(path), "figures": [asdict(figure) for figure in figures]})
    else:
        _show(path, figures, compare or "")


@dataclass(slots=True)
class _Bench:
    folder: Path
    settings: dict[str, Any]
    tokens: int
    minutes: float
    rival: Rival | None
    figures: list[Figure] = field(default_factory=list)

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
        return self.figures

    def _config(self, steps: int) -> str:
        engine = "".join(f"{key} = {json.dumps(value)}\n" for key, value in self.settings.items())
        grant = '[[grants]]\ntool = "system.*"\nscope = "*"\n'
        place = f'state = "{self.folder}/state"\nsocket = "{self.folder}/agentd.sock"\n'
        runs = _RUNS.format(steps=steps)
        return f'{place}[tools]\nfolder = "{self.folder}/home"\n[engine]\n{engine}{runs}{grant}'

    def _add(self, name: str, what: str, value: float, unit: str, theirs: float | None = None) -> None:
        self.figures.append(Figure(name, what, value, unit, theirs))

    def _seen(self, client: Client, prompt: str, what: str, tokens: int = 0) -> Seen:
        with console.status(what):
            return see(client, prompt, tokens or self.tokens)

    def _loaded(self, client: Client, begun: float) -> None:
        self._add("start_s", "daemon started", time.perf_counter() - begun, "s")
        with console.status("loading the model"):
            while not (status := client.status()).model.parameters:
                if status.model.error:
                    raise EngineError(Reason.MODEL_INVALID, status.model.error)
                time.sleep(0.02)
        if self.rival:
            self.rival = replace(self.rival, tools=tuple(map(_as_theirs, client.tools())))
        self._add("load_s", "model loaded", time.perf_counter() - begun, "s")

    def _first(self, client: Client) -> None:
        """A preamble that was never decoded before; the same one in a second session; the speed behind it."""
        cold = self._seen(client, PROMPT, "decoding system text and tools for the first time")
        decoded = cold.run.usage.prompt_tokens
        warm = self._seen(client, f"{PROMPT} And a dog.", "the same in another session")
        theirs = [self._theirs(lambda rival: rival.ask(PROMPT, self.tokens)) for _ in range(2)]
        self._add(
            "first_token_cold_s", f"first token, {decoded:,} tokens never decoded before", cold.first_s, "s", _first(theirs[0])
        )
        self._add("first_token_warm_s", "first token in a second session", warm.first_s, "s", _first(theirs[1]))
        self._add("prompt_tokens_per_s", "tokens of a prompt a second", decoded / cold.first_s, "tok/s")
        speeds = [seen.per_s for seen in (cold, warm) if seen.per_s]
        speed = statistics.median(speeds) if speeds else 0.0
        self._add("tokens_per_s", "tokens of an answer a second", speed, "tok/s", theirs[1].per_s if theirs[1] else None)
        joules = sum(seen.run.usage.joules for seen in (cold, warm))
        if joules:
            wrote = sum(seen.run.usage.generated_tokens for seen in (cold, warm))
            self._add("tokens_per_joule", "tokens of an answer for a joule", wrote / joules, "tok/J")

    def _long(self, client: Client) -> None:
        """Half of the context before the question."""
        words = int(self.settings["context"]) // 4
        prompt = WORD * words + PROMPT
        try:
            seen = self._seen(client, prompt, "a long prompt")
        except AgentdError as e:
            console.print(f"[yellow]no figure for a long prompt:[/] {shown(e.message)}")
            return
        theirs = self._theirs(lambda rival: rival.ask(prompt, self.tokens))
        decoded = seen.run.usage.prompt_tokens
        self._add("long_first_token_s", f"first token behind {decoded:,} more", seen.first_s, "s", _first(theirs))
        if seen.per_s:
            self._add("long_tokens_per_s", "tokens a second behind them", seen.per_s, "tok/s", theirs.per_s if theirs else None)

    def _together(self, client: Client) -> None:
        """Four clients at once: all of them together."""
        prompts = [f"{PROMPT} Story number {n}." for n in range(_TOGETHER)]
        with console.status("four at once"), ThreadPoolExecutor(_TOGETHER) as pool:
            begun = time.perf_counter()
            wrote = sum(
                seen.run.usage.generated_tokens for seen in pool.map(lambda prompt: see(client, prompt, self.tokens), prompts)
            )
            mine = wrote / (time.perf_counter() - begun)
            theirs = self._theirs(lambda rival: rival.together(prompts, self.tokens))
        self._add("together_tokens_per_s", f"{_TOGETHER} answers at once, tokens of all a second", mine, "tok/s", theirs)

    def _memory(self, client: Client) -> None:
        told, until = dict[str, float](), time.monotonic() + _ROUND_S
        while "anonymous_mib" not in told and time.monotonic() < until:
            told = {reading.name: reading.value for reading in client.budgets().readings}
            time.sleep(0.2)
        pid = client.status().engine_pid
        for name, what in (
            ("anonymous_mib", "engine, of its own"),
            ("mapped_mib", "weights, resident"),
            ("cached_mib", "weights, in the page cache"),
        ):
            if name in told:
                self._add(name, what, told[name], "MiB")
        with_peak = (
            [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")] if pid else []
        )
        for line in with_peak:
            self._add("peak_mib", "engine, most that was resident", int(line.split()[1]) / 1024, "MiB")

    def _sustained(self, client: Client) -> None:
        """The speed at the end of so many minutes against that at their beginning, and the heat."""
        if not self.minutes:
            return
        speeds, hottest, begun, n = list[float](), 0.0, time.perf_counter(), 0
        while time.perf_counter() - begun < self.minutes * 60:
            speeds.append(self._seen(client, f"{PROMPT} {n}", f"decoding, {(time.perf_counter() - begun) / 60:.0f} min").per_s)
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
        seen = self._seen(client, CALL, "a tool call", _CALL_TOKENS)
        if seen.calls:
            again = self._seen(client, CALL, "a tool call", _CALL_TOKENS)
            self._add(
                "tool_call_s", f"request to result of the first tool call ({CALL!r})", (again.calls or seen.calls)[0], "s"
            )
        else:
            console.print("[yellow]no figure for a tool call:[/] the model made none")

    def _theirs(self, ask: Callable[[Rival], Any]) -> Any:
        if self.rival is None:
            return None
        with console.status(f"the same at {self.rival.url}"):
            return ask(self.rival)


def _as_theirs(tool: tool_pb2.Tool) -> dict[str, Any]:
    """A tool as OpenAI's protocol has it: both are to read the same before the prompt."""
    parameters = json_format.MessageToDict(tool.parameters)
    name = tool.name.removeprefix("tools/").replace(".", "_")
    return {"type": "function", "function": {"name": name, "description": tool.description, "parameters": parameters}}


def _first(answer: Any) -> float | None:
    return answer.first_s if answer else None


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
