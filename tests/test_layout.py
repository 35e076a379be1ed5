"""The house: what is installed, and which room may use which."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "extras": set(),
    "places": set(),
    "tasks": set(),
    "untrusted": set(),
    "systemd": set(),
    "config": {"errors", "places"},
    "devices": {"store", "errors", "extras"},
    "store": {"errors"},
    "budgets": {"store", "errors"},
    "engine": {"budgets", "models", "errors", "tasks"},
    "metrics": {"budgets", "engine", "errors", "extras"},
    "models": {"store", "errors", "extras", "places"},
    "audit": {"store", "errors"},
    "journal": {"store", "audit", "errors", "untrusted"},
    "grants": {"store", "audit", "devices", "errors", "untrusted"},
    "principals": {"grants", "store", "audit", "errors"},
    "calls": {"grants", "journal", "audit", "devices", "store", "errors", "config", "tasks"},
    "runs": {"engine", "budgets", "calls", "grants", "store", "errors", "tasks"},
    "automations": {"runs", "budgets", "grants", "store", "config", "errors", "tasks"},
    "api": {
        "automations",
        "runs",
        "engine",
        "calls",
        "grants",
        "principals",
        "journal",
        "audit",
        "budgets",
        "store",
        "v1",
        "errors",
    },
    "client": {"v1", "errors", "places"},
    "cli": {
        "client",
        "v1",
        "errors",
        "extras",
        "config",
        "places",
        "devices",
        "models",
        "store",
        "systemd",
        "daemon",
        "audit",
        "untrusted",
    },
}
"""For each room, the rooms it may import. `daemon` is the composition root and may import all."""


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_downwards(room: str):
    """A room imports only the rooms below it."""
    found = set()
    path = ROOT / "agentd" / room
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agentd."):
                found.add(node.module.split(".")[1])  # type: ignore[union-attr]
    assert found - {room} <= BELOW[room]


def test_no_child_of_ours_takes_modules_from_where_it_is_started():
    """`-m` puts the current directory first: whoever may write there would be run."""
    for file in (ROOT / "agentd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.List | ast.Tuple | ast.Call):
                words = [each.value for each in ast.iter_child_nodes(node) if isinstance(each, ast.Constant)]
                assert "-m" not in words or "-I" in words, f"{file}:{node.lineno}"


def test_every_package_folder_is_declared():
    """A room that is not in pyproject.toml would be missing from the wheel."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "agentd").rglob("__init__.py")}
    assert folders | {"agentd.bundled_tools", "agentd.units", "agentd_sandbox"} == declared


def test_the_sandbox_stands_alone():
    """It loads nothing of agentd and nothing outside the standard library."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import agentd_sandbox, agentd_sandbox.zygote; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "sandbox")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"agentd_sandbox", "__main__"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_the_wheel_holds_our_two_packages_and_nothing_else(tmp_path: Path):
    """Top level: agentd and agentd_sandbox; with filters, tools and model inside."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    beside = [name for name in names if ".dist-info" not in name and name.split("/")[0] not in ("agentd", "agentd_sandbox")]
    assert [name.split(".data/")[-1] for name in beside] == ["data/share/man/man1/agentd.1"]
    for name in (
        "agentd/bundled_tools/files/tool.toml",
        "agentd/models/pocket.gguf",
        "agentd_sandbox/profiles/aarch64.bpf",
        "agentd/units/user/agentd.service",
    ):
        assert name in names


def test_the_pocket_model_is_at_most_8_mb():
    """It travels with the package."""
    assert (ROOT / "agentd" / "models" / "pocket.gguf").stat().st_size <= 8_000_000


def test_the_pocket_model_has_no_chat_template():
    """All tests run without one: the prompt format is ours, whatever a file carries."""
    assert b"tokenizer.chat_template" not in (ROOT / "agentd" / "models" / "pocket.gguf").read_bytes()


def test_nothing_is_said_twice_in_the_errors_table():
    """Each reason has its own name and sentence (an Enum would silently merge equal ones)."""
    from agentd.errors import Reason

    assert len(Reason.__members__) == len(list(Reason))
    assert all(len(name) <= 63 for name in Reason.__members__)


def test_every_reason_is_raised_somewhere():
    """The table promises nothing that never comes."""
    from agentd.errors import Reason

    files = [*(ROOT / "agentd").rglob("*.py")]
    code = "".join(file.read_text() for file in files if file.name != "errors.py" and "_pb2" not in file.name)
    named = {name for name in Reason.__members__ if f"Reason.{name}" in code or f'"{name}"' in code}
    assert named == set(Reason.__members__)


def test_every_reason_is_documented():
    """docs/api.md lists those that a request can meet."""
    from agentd.errors import Reason

    documented = (ROOT / "docs" / "api.md").read_text()
    only_at_start = {
        "CONFIG_INVALID",
        "MANIFEST_INVALID",
        "CREDENTIAL_INVALID",
        "STORE_LOCKED",
        "SOCKET_TAKEN",
        "SOCKET_INVALID",
        "DAEMON_UNREACHABLE",
        "DOWNLOAD_FAILED",
    }
    assert {name for name in Reason.__members__ if f"`{name}`" not in documented} == only_at_start
