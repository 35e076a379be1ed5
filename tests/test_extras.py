"""Optional parts: what is missing is told with the command that brings it, in the way agentd was installed."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from agentd import extras

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.mark.parametrize(
    ("note", "command"),
    [
        ("pipx_metadata.json", "pipx inject agentd"),
        ("uv-receipt.toml", f"uv pip install --python {sys.executable}"),
        ("pyvenv.cfg", f"{sys.executable} -m pip install"),
    ],
)
def test_what_brings_an_extra_fits_how_agentd_came(note: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / note).touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert extras.install("gpio") == f"{command} 'gpiozero<3,>=2.0.1' 'lgpio<0.3,>=0.2.2'"


def test_every_extra_that_people_install_is_known_and_in_the_readme():
    declared = set(tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]) - {"dev", "train"}
    assert declared == set(extras.MODULES)
    readme = (PYPROJECT.parent / "README.md").read_text()
    assert not [extra for extra in declared if f"`{extra}`" not in readme]


@pytest.mark.parametrize("extra", extras.MODULES)
def test_what_is_told_names_packages_and_never_agentd(extra: str):
    """Another project has the name on PyPI: whoever follows a hint is not to get that."""
    words = extras.install(extra).split("pip install ")[1]
    assert words
    assert "agentd" not in words


def test_what_is_not_installed_is_not_there(monkeypatch: pytest.MonkeyPatch):
    """Neither a package nor one above it."""
    for module in ("nothing_of_that_name", "nothing_of_that_name.below"):
        monkeypatch.setitem(extras.MODULES, "gpio", module)
        assert not extras.is_there("gpio")
    monkeypatch.setitem(extras.MODULES, "gpio", "json")
    assert extras.is_there("gpio")
