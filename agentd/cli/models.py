"""`agentd models`: what a model file holds, and what it takes to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from agentd import config as configuration
from agentd import models as known
from agentd.cli.files import memory_mib, require_there
from agentd.cli.lazy import Lazy
from agentd.cli.output import console, json_option, print_json, shown
from agentd.errors import EngineError, Reason
from agentd.models import gguf
from agentd.models.pull import ARCHITECTURE

_MIB = 1 << 20
_TIMEOUT_S = 120
_PYTHON_MIB = 28.0
_OF_A_TOKEN, _OF_A_MERGE = 180, 150
"""Bytes that llama.cpp takes for an entry of the vocabulary: 80 MiB for 262,144 tokens with as many merges (measured)."""


@click.group(
    cls=Lazy,
    commands_in={
        "list": "files:list_",
        "pull": "files:pull",
        "verify": "files:verify",
        "use": "files:use",
        "remove": "files:remove",
    },
)
def models() -> None:
    """Model files: which fit this device, fetched, looked into, chosen."""


@models.command(epilog="Example: agentd models inspect ~/models/gemma-4-E2B_q4_0-it.gguf")
@click.argument("model", default="", metavar="[FILE]")
@click.option(
    "--context", type=click.IntRange(256, 131072), help="Tokens of context to reckon with.  [default: the configured]"
)
@json_option
def inspect(model: str, context: int | None, *, as_json: bool) -> None:
    """What FILE holds, by groups of tensors, and the memory that the engine takes with it. Nothing is loaded.

    Without FILE it is the configured model. What is mapped is read from the file when it is wanted, and given back when
    others need the memory; what is anonymous is taken for good.
    """
    engine = configuration.load(None).engine
    path = known.locate(model or engine.model)
    require_there(path, model or engine.model)
    header = gguf.read(path)
    tokens = context or engine.context
    found = {
        "file": str(path),
        "name": str(header.metadata.get("general.name", "")),
        "architecture": header.architecture,
        "parameters": header.parameters,
        "bytes": header.size,
        "groups": {
            name: {"parameters": group.parameters, "bytes": group.size, "kinds": sorted(group.kinds)}
            for name, group in sorted(header.groups.items(), key=lambda item: -item[1].size)
        },
        "context": tokens,
        "memory_mib": _memory(path, header, tokens, engine.batch, engine.parallel),
        "available_mib": memory_mib()[1],
    }
    if as_json:
        print_json(found)
    else:
        _show(found)


def _memory(path: Path, header: gguf.Header, context: int, batch: int, parallel: int) -> dict[str, float]:
    """MiB. The cache is what llama.cpp itself reckons, in a process of its own: the file may be hostile."""
    sizes = map(str, (context, batch, parallel))
    command = [sys.executable, "-I", "-m", "agentd.engine.footprint", str(path), *sizes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        said = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        said = {"error": "llama.cpp died of this file, or did not come to an end with it"}
    if "error" in said:
        raise EngineError(Reason.MODEL_INVALID, f"{path}: {said['error']}.", hint="Use another file.")
    counts = header.counts
    entries = counts.get("tokenizer.ggml.tokens", 0) * _OF_A_TOKEN + counts.get("tokenizer.ggml.merges", 0) * _OF_A_MERGE
    parts = {"mapped": header.hot / _MIB, "cache": said["mib"], "vocabulary": entries / _MIB, "program": _PYTHON_MIB}
    return {**parts, "anonymous": sum(parts.values()) - parts["mapped"], "resident": sum(parts.values())}


def _show(found: dict[str, Any]) -> None:
    console.print(f"[bold]{shown(found['name'] or Path(found['file']).stem)}[/], {shown(found['architecture'])}")
    console.print(
        f"[dim]{shown(found['file'])}, {found['bytes'] / 1e6:,.0f} MB, {found['parameters'] / 1e6:,.0f} M parameters[/]\n"
    )
    table = Table(box=None, header_style="bold")
    for title, side in (
        ("tensors", "left"),
        ("parameters", "right"),
        ("MiB", "right"),
        ("kinds", "left"),
        ("in memory", "left"),
    ):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for name, group in found["groups"].items():
        where = "[dim]on the disk, read row by row[/]" if name == gguf.LAZY else "mapped"
        size = f"{group['bytes'] / _MIB:,.1f}"
        table.add_row(name, f"{group['parameters'] / 1e6:,.1f} M", size, ", ".join(group["kinds"]), where)
    console.print(table)
    memory = found["memory_mib"]
    console.print(f"\nwith {found['context']:,} tokens of context, reckoned:")
    console.print(f"  {memory['mapped']:8,.0f} MiB mapped, given back when others need it")
    parts = (
        f"cache and workspace {memory['cache']:,.0f}, vocabulary {memory['vocabulary']:,.0f}, program {memory['program']:,.0f}"
    )
    console.print(f"  {memory['anonymous']:8,.0f} MiB anonymous: {parts}")
    enough = found["available_mib"] >= memory["resident"]
    verdict = "[green]it fits[/]" if enough else "[yellow]it would have to be read again and again[/]"
    if found["available_mib"] < memory["anonymous"]:
        verdict = "[red]it does not fit[/]"
    if found["architecture"] != ARCHITECTURE:
        verdict = f"[red]agentd runs models of the architecture gemma4, not {shown(found['architecture'])}[/]"
    console.print(f"  {memory['resident']:8,.0f} MiB in all; {found['available_mib']:,.0f} MiB are available now: {verdict}")
