"""`agentd eval`: how well models do a suite of prompts, so that the smallest file that does can be chosen."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agentd import config as configuration
from agentd import models
from agentd.cli.output import console, json_option, print_json, short, shown
from agentd.cli.scratch import daemon_of_its_own, scratch_folder, settings_for, wait_for_model
from agentd.cli.suite import Case, Suite, Verdict, interval, judge, load
from agentd.errors import AgentdError, EngineError, Reason
from agentd.v1 import run_pb2

if TYPE_CHECKING:
    from agentd.client import Client

BASIC = Path(__file__).parent / "basic.toml"


@dataclass(frozen=True, slots=True)
class Result:
    """Of one model: a verdict for each case, and what it did where that was wrong."""

    path: Path
    verdicts: tuple[Verdict, ...]
    wrong: tuple[tuple[str, str], ...]
    broke_off: str = ""
    """Why not all cases could be tried."""

    @property
    def passed(self) -> int:
        return sum(verdict.passed for verdict in self.verdicts)

    def of(self, what: str) -> tuple[int, int]:
        """How many are right of those that say anything of it."""
        said = [value for verdict in self.verdicts if (value := getattr(verdict, what)) is not None]
        return sum(said), len(said)


@click.command("eval", epilog="Example: agentd eval ~/models/e2b-q2.gguf ~/models/e2b-q4.gguf --suite my-work.toml --need 0.9")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--suite", type=click.Path(path_type=Path), default=BASIC, metavar="FILE", help="Prompts, and what is right.")
@click.option("--need", type=click.FloatRange(0, 1), default=0.8, show_default=True, help="Share of the cases it must do.")
@click.option("--show", is_flag=True, help="Show what was wrong.")
@json_option
def evaluate(files: tuple[str, ...], suite: Path, need: float, *, show: bool, as_json: bool) -> None:
    """Give each model FILE the prompts of a suite, with real tools in a scratch folder, and count what is right.

    Without --suite it is a basic one that comes with agentd; without FILE the configured model. Exit status 0 if one of them
    does at least the share that is needed, with 95 % confidence; the smallest that does is named.
    """
    wanted = load(suite)
    paths = sorted((models.locate(file) for file in files or [configuration.load(None).engine.model]), key=_size)
    results = [_judge_model(path, wanted, quiet=as_json) for path in paths]
    good = [each for each in results if not each.broke_off and interval(each.passed, len(each.verdicts))[0] >= need]
    if as_json:
        for result in results:
            print_json(_as_json(result))
    else:
        _show(results, good[0] if good else None, need, show=show)
    sys.exit(0 if good else 1)


def _size(path: Path) -> int:
    """Raises EngineError."""
    if not path.is_file():
        raise EngineError(Reason.MODEL_INVALID, f"There is no model file {path}.", hint="Give the path of a GGUF file.")
    return path.stat().st_size


def _judge_model(path: Path, suite: Suite, *, quiet: bool) -> Result:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    verdicts, wrong = list[Verdict](), list[tuple[str, str]]()
    config = configuration.load(None).engine
    try:
        with scratch_folder("eval") as folder, daemon_of_its_own(folder, _config(folder, path, suite)) as client:
            wait_for_model(client, config.load_timeout_s)
            with Progress(*columns, disable=quiet, console=Console(stderr=True)) as bar:
                for case in bar.track(suite.case, description=shown(path.name)):
                    verdict, did = _try(client, case, folder / "home")
                    verdicts.append(verdict)
                    if not verdict.passed:
                        wrong.append((case.prompt, did))
    except AgentdError as e:
        return Result(path, tuple(verdicts), tuple(wrong), e.message)
    return Result(path, tuple(verdicts), tuple(wrong))


def _config(folder: Path, model: Path, suite: Suite) -> str:
    home = folder / "home"
    scopes = (f"read:{home}", f"write:{home}", "call:*")
    grants = [*({"tool": "*", "scope": scope} for scope in scopes), {"tool": "system.*", "scope": "*"}]
    return settings_for(folder, {"model": str(model)}, tools={"bundled": suite.bundled}, grants=grants)


def _try(client: Client, case: Case, home: Path) -> tuple[Verdict, str]:
    """The verdict, and in words what the model did. Raises AgentdError where the run could not be made."""
    _lay_out(case, home)
    begun, made, ended = time.monotonic(), list[tuple[str, dict[str, Any]]](), run_pb2.Run()
    for event in client.run(case.prompt):
        match event.WhichOneof("event"):
            case "call_started":
                made.append((event.call_started.tool, json.loads(event.call_started.arguments_json)))
            case "run":
                ended = event.run
    if ended.state == run_pb2.Run.STATE_FAILED:
        raise EngineError(Reason.ENGINE_CRASHED, f"The run of {short(case.prompt, 40)!r} failed: {ended.error.message}")
    words = "; ".join([*(f"{tool}{json.dumps(arguments)}" for tool, arguments in made), ended.answer])
    by_itself = ended.stop_reason == run_pb2.Run.STOP_REASON_ANSWERED
    seconds, tokens = time.monotonic() - begun, ended.usage.generated_tokens
    return judge(case, made, ended.answer, ended=by_itself, seconds=seconds, tokens=tokens), words


def _lay_out(case: Case, home: Path) -> None:
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, text in case.files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)


def _as_json(result: Result) -> dict[str, Any]:
    low, high = interval(result.passed, len(result.verdicts))
    return {
        "model": str(result.path),
        "bytes": result.path.stat().st_size,
        "cases": len(result.verdicts),
        "passed": result.passed,
        "interval": [round(low, 4), round(high, 4)],
        "broke_off": result.broke_off,
        "verdicts": [asdict(verdict) for verdict in result.verdicts],
        "wrong": [{"prompt": prompt, "did": did} for prompt, did in result.wrong],
    }


def _show(results: list[Result], best: Result | None, need: float, *, show: bool) -> None:
    table = Table(box=None, header_style="bold")
    for title in ("model", "size", "right", "95 % interval", "calls", "answers", "came to an end", "a case"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for result in (each for each in results if each.verdicts):
        count = len(result.verdicts)
        low, high = interval(result.passed, count)
        colour = "green" if low >= need else "red" if high < need else "yellow"
        shares = [f"{right} of {of}" if of else "" for right, of in map(result.of, ("calls", "answer", "ended"))]
        seconds = sum(verdict.seconds for verdict in result.verdicts) / count
        size = f"{result.path.stat().st_size / 1e6:,.0f} MB"
        share = f"[{colour}]{result.passed / count:.0%}[/]"
        table.add_row(shown(result.path.name), size, share, f"{low:.0%} to {high:.0%}", *shares, f"{seconds:.1f} s")
    console.print(table)
    for result in (each for each in results if show and each.wrong):
        console.print(f"\n[bold]{shown(result.path.name)}[/]")
        for prompt, did in result.wrong:
            console.print(f"  [red]wrong[/]  {shown(short(prompt, 60))}\n         [dim]{shown(short(did))}[/]")
    for result in (each for each in results if each.broke_off):
        console.print(f"\n[red]broke off:[/] {shown(result.path.name)}: {shown(result.broke_off)}")
    if best:
        console.print(f"\n[green]the smallest that does {need:.0%}:[/] {shown(str(best.path))}")
    else:
        console.print(f"\n[yellow]none of them does {need:.0%} with 95 % confidence[/]; more cases make the interval narrower")
