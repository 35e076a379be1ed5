"""The manual page and the shells' completion: made from the commands, and current."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from agentd.cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent


PAGE = ROOT / "systemd" / "agentd.1"


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_the_manual_page_has_every_command_and_option():
    """`scripts/man.py` writes it anew."""
    page = PAGE.read_text().replace("\\-", "-")
    for path, command in commands(cli, "agentd"):
        assert f".SS {path} " in page, f"{path}: run scripts/man.py"
        for option in (name for each in command.params if isinstance(each, click.Option) and each.help for name in each.opts):
            assert option in page, f"{path} {option}: run scripts/man.py"


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
def test_the_manual_page_is_roff_without_mistakes():
    command = ["groff", "-man", "-Tutf8", "-ww", "-z", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert not done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell: str):
    done = subprocess.run([sys.executable, "-m", "agentd", "completion", shell], capture_output=True, text=True, check=True)
    assert "_AGENTD_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("typed", "found"), [("agentd auto", "automations"), ("agentd models pu", "pull"), ("agentd audit ver", "verify")]
)
def test_commands_are_completed_that_were_not_loaded(typed: str, found: str):
    asked = {"_AGENTD_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    command = [sys.executable, "-c", "from agentd.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, check=False)
    assert found in done.stdout, done.stderr
