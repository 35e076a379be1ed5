"""`agentd models list | pull | verify | use | remove`: model files fetched, chosen, and given up."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import tomlkit
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from tomlkit.exceptions import TOMLKitError

from agentd import config as configuration
from agentd import models as known
from agentd import places
from agentd.cli.output import console, json_option, print_json, shown
from agentd.errors import ConfigError, EngineError, Reason
from agentd.models import catalogue
from agentd.models import pull as transfer
from agentd.store.durable import arriving

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_MIB = 1 << 20


@click.command("list", epilog="Example: agentd models list")
@json_option
def list_(*, as_json: bool) -> None:
    """List the models that are known: what they take, whether they are here, which one fits this device."""
    total, free = memory_mib()
    used = known.locate(configuration.load(None).engine.model)
    advice = catalogue.advice(total, free)
    found = [
        {
            **entry.model_dump(),
            "path": str(entry.path),
            "here": entry.path.is_file(),
            "used": entry.path == used,
            "recommended": entry == advice.entry,
        }
        for entry in catalogue.entries()
    ]
    if as_json:
        print_json({"models": found, "recommended": advice.entry.name if advice.entry else "", "advice": advice.words})
        return
    table = Table(box=None, header_style="bold")
    for title, side in (("model", "left"), ("GB", "right"), ("memory", "right"), ("", "left"), ("what it is for", "left")):
        table.add_column(title, justify=side, overflow="fold")  # type: ignore[arg-type]
    for each in found:
        marks = [word for word, on in (("in use", each["used"]), ("here", each["here"] and not each["used"])) if on]
        name = f"[bold green]{each['name']}[/]" if each["recommended"] else f"[cyan]{each['name']}[/]"
        size = f"{each['bytes'] / 1e9:.2f}"
        table.add_row(name, size, f"{each['resident_mib'] / 1024:.1f} GiB", ", ".join(marks), f"[dim]{each['purpose']}[/]")
    console.print(table)
    console.print(f"\n{advice.words[0].upper()}{advice.words[1:]}.")
    if advice.entry and not advice.entry.path.is_file():
        console.print(f"[dim]agentd models pull {advice.entry.name} && agentd models use {advice.entry.name}[/]")


@click.command(epilog="Example: agentd models pull e2b")
@click.argument("model")
@click.option("--mirror", default="", metavar="URL", help="A server with the same paths as huggingface.co.")
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="Take this file, which is on the disk already.")
@json_option
def pull(model: str, mirror: str, file: Path | None, *, as_json: bool) -> None:
    """Fetch MODEL (a name of the catalogue, or hf:OWNER/REPOSITORY/FILE.gguf), or go on where it was cut off.

    It is in its place only when it is whole, right by its SHA-256, and a model of Gemma 4.
    """
    entry = catalogue.entry(model)
    with _Bar(quiet=as_json) as tell:
        path = transfer.take(entry, file, tell) if file else transfer.pull(entry, mirror, tell)
    if as_json:
        print_json({"model": model, "path": str(path), "bytes": path.stat().st_size})
        return
    console.print(f"[green]here:[/] {shown(str(path))}")
    if not entry.sha256:
        held = "nobody can say whether it is the right one" if file else "it was held against the server's, if that names one"
        console.print(f"[dim]its SHA-256 is in no catalogue: {held}[/]")
    console.print(f"[dim]agentd models use {shown(model if known.catalogue.named(model) else str(path))}[/]")


@click.command(epilog="Example: agentd models verify e2b")
@click.argument("model", default="")
@json_option
def verify(model: str, *, as_json: bool) -> None:
    """Read all of MODEL (a name, or a file; without one the model in use): is it whole, and what is its SHA-256?

    Exit status: 0, or 1 if it is damaged or of another family.
    """
    path = known.locate(model or configuration.load(None).engine.model)
    require_there(path, model or configuration.load(None).engine.model)
    entry = next((each for each in catalogue.entries() if each.path == path), None)
    with _Bar(quiet=as_json) as tell:
        digest = transfer.verify(path, entry.sha256 if entry else "", tell)
    if as_json:
        print_json({"path": str(path), "sha256": digest, "known": bool(entry and entry.sha256)})
        return
    word = "as it should be" if entry and entry.sha256 else "whole; what it should be nobody has told"
    console.print(f"[green]{word}[/]  {shown(str(path))}\n[dim]sha256 {digest}[/]")


@click.command(epilog="Example: agentd models use e2b")
@click.argument("model")
@click.option("--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="The agentd.toml to change.")
@json_option
def use(model: str, file: Path | None, *, as_json: bool) -> None:
    """Let the daemon use MODEL (a name, a file, or `pocket`) from its next start: engine.model of agentd.toml is changed."""
    path = known.locate(model)
    require_there(path, model)
    transfer.require_family(path)
    chosen = file or places.default_file()
    value = model if model == known.POCKET or catalogue.named(model) else str(path)
    _set_model(chosen, value)
    if as_json:
        print_json({"model": value, "path": str(path), "config": str(chosen)})
        return
    console.print(f"[green]in use from the next start:[/] {shown(value)}  [dim]({shown(str(chosen))})[/]")


@click.command(epilog="Example: agentd models remove e2b-2bit")
@click.argument("model")
@json_option
def remove(model: str, *, as_json: bool) -> None:
    """Delete the file of MODEL, a name of the catalogue, and what has come of it so far. Not the one in use."""
    entry = catalogue.named(model)
    if entry is None:
        hint = "Files of your own are yours to delete."
        raise EngineError(Reason.MODEL_INVALID, f"{model!r} is not in the catalogue.", hint=hint, metadata={"model": model})
    if known.locate(configuration.load(None).engine.model) == entry.path:
        hint = "Let it use another one first: agentd models use pocket."
        raise EngineError(Reason.MODEL_INVALID, f"{model} is the model in use.", hint=hint, metadata={"model": model})
    gone = [path for path in (entry.path, *entry.path.parent.glob(f".{entry.file}.*")) if path.is_file()]
    freed = sum(path.stat().st_size for path in gone)
    for path in gone:
        path.unlink()
    if as_json:
        print_json({"model": model, "freed_bytes": freed})
    else:
        console.print(f"{freed / 1e9:.2f} GB are free again" if gone else "[dim]it was not here[/]")


def require_there(path: Path, model: str) -> None:
    """Raises EngineError (MODEL_INVALID)."""
    if not path.is_file():
        hint = f"Fetch it: agentd models pull {model}." if catalogue.named(model) else "Give the path of a GGUF file."
        raise EngineError(Reason.MODEL_INVALID, f"There is no file {path}.", hint=hint, metadata={"path": str(path)})


def memory_mib() -> tuple[float, float]:
    """In all, and available now."""
    found = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith("kB"):
            found[name] = int(rest.split()[0]) / 1024
    return found.get("MemTotal", 0.0), found.get("MemAvailable", found.get("MemFree", 0.0))


def _set_model(file: Path, value: str) -> None:
    """Raises ConfigError."""
    try:
        real = file.resolve()  # where people keep their files elsewhere, the link to it stays
        there = real.exists()
        text = real.read_bytes().decode() if there else ""
        document = tomlkit.parse(text)
        document.setdefault("engine", tomlkit.table())["model"] = value
        changed = tomlkit.dumps(document)
        configuration.check(changed, file)
        real.parent.mkdir(parents=True, exist_ok=True)
        with arriving(real) as new:
            if there:
                about = real.stat()
                os.fchmod(new.fileno(), about.st_mode & 0o7777)
                if os.geteuid() == 0:
                    os.fchown(new.fileno(), about.st_uid, about.st_gid)
            new.write(changed.encode())
    except (OSError, TOMLKitError, UnicodeDecodeError, TypeError) as e:
        why = getattr(e, "strerror", None) or str(e)
        hint = f'Write it yourself: model = "{value}" in [engine].'
        raise ConfigError(Reason.CONFIG_INVALID, f"{file} can't be changed: {why}.", hint=hint) from None


class _Bar:
    """A bar for each step, in a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, disable=quiet or not sys.stdout.isatty())
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        return self._tell

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def _tell(self, what: str, done: int, of: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=of)
        self._progress.update(self._tasks[what], completed=done)  # type: ignore[arg-type]
