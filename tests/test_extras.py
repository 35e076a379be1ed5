"""Optional parts: what is missing is told with the command that brings it, in the way agentd was installed."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from agentd import extras

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.mark.parametrize(
    ("prefix", "command"),
    [
        ("/home/pi/.local/share/pipx/venvs/agentd", "pipx runpip agentd install 'agentd[gpio]'"),
        ("/home/pi/.local/share/uv/tools/agentd", "uv tool install --with 'agentd[gpio]' agentd"),
        ("/home/pi/agentd/.venv", f"{sys.executable} -m pip install 'agentd[gpio]'"),
        ("/", f"{sys.executable} -m pip install 'agentd[gpio]'"),
    ],
)
def test_what_brings_an_extra_fits_how_agentd_came(prefix: str, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "prefix", prefix)
    assert extras.install("gpio") == command


def test_every_extra_that_people_install_is_known_and_in_the_readme():
    declared = set(tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]) - {"dev", "train"}
    assert declared == set(extras.MODULES)
    readme = (PYPROJECT.parent / "README.md").read_text()
    assert not [extra for extra in declared if f"`{extra}`" not in readme]


def test_what_is_not_installed_is_not_there(monkeypatch: pytest.MonkeyPatch):
    """Neither a package nor one above it."""
    for module in ("nothing_of_that_name", "nothing_of_that_name.below"):
        monkeypatch.setitem(extras.MODULES, "gpio", module)
        assert not extras.is_there("gpio")
    monkeypatch.setitem(extras.MODULES, "gpio", "json")
    assert extras.is_there("gpio")
