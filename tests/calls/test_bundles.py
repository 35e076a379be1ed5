"""Manifests and arguments: what is wrong is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from agentd.calls import load
from agentd.calls.arguments import Arguments
from agentd.errors import ConfigError, Reason, RequestError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
bundle = "mine"
version = "1"
description = "x"
program = "run.py"
[[tool]]
name = "copy"
description = "Copy"
effect = "files"
[tool.parameters]
required = ["path", "to"]
[tool.parameters.properties.path]
type = "string"
format = "path"
[tool.parameters.properties.to]
type = "string"
format = "path"
[tool.parameters.properties.times]
type = "integer"
[tool.parameters.properties.mode]
type = "string"
enum = ["fast", "slow"]
[tool.needs]
read = ["{path}"]
write = ["{to}"]
"""


def bundle(folder: Path, manifest: str, program: str = "x = 1\n", name: str = "mine") -> Path:
    (folder / name).mkdir()
    (folder / name / "tool.toml").write_text(manifest)
    (folder / name / "run.py").write_text(program)
    return folder


@pytest.mark.parametrize(
    ("device", "asks", "private", "sends"),
    [
        ("gpio/{times}", True, False, False),
        ("gpio/{times}/read", True, False, False),
        ("gpio/{mode}/read", True, False, False),
        ("screen/message", False, False, True),
        ("termux/battery", False, False, True),
        ("termux/clipboard/get", True, True, True),
        ("termux/location", True, True, True),
        ("termux/sms/{mode}", True, False, True),
        ("termux/sms/+49{times}", True, False, True),
        ("termux/torch", True, False, True),
        ("meter", False, False, True),
    ],
)
def test_what_a_device_means_is_not_the_bundles_to_say(tmp_path: Path, device: str, *, asks: bool, private: bool, sends: bool):
    """Whether it asks, is private and sends out follows from the device, whatever the manifest is silent about."""
    effect = "physical" if device == "gpio/{times}" else "none" if device.startswith("gpio") else "external"
    manifest = GOOD.replace('"files"', f'"{effect}"').replace("[tool.needs]", f'[tool.needs]\ndevice = ["{device}"]')
    manifest = manifest.replace('write = ["{to}"]\n', "")
    (tool,) = load([bundle(tmp_path, manifest)]).tools.values()
    assert (tool.manifest.asks, tool.manifest.gives_private, tool.manifest.sends) == (asks, private, sends)


@pytest.mark.parametrize(("ask", "private"), [(True, False), (False, True), (False, False)])
def test_a_bundle_may_say_more_of_itself(tmp_path: Path, *, ask: bool, private: bool):
    """What costs money, or gives back what nobody else is to know, without any device."""
    said = f'effect = "files"\nask = {str(ask).lower()}\nprivate = {str(private).lower()}'
    (tool,) = load([bundle(tmp_path, GOOD.replace('effect = "files"', said))]).tools.values()
    assert (tool.manifest.asks, tool.manifest.gives_private) == (ask, private)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('description = "Copy"', 'descripton = "Copy"', "descripton"),
        ('effect = "files"', 'effect = "none"', "effect"),
        ('effect = "files"', 'effect = "maybe"', "effect"),
        ('"{path}"', '"{pth}"', "pth"),
        ('type = "integer"', 'type = "int"', "type"),
        ('required = ["path", "to"]', 'required = ["path", "too"]', "too"),
        ('name = "copy"', 'name = "Copy It"', "name"),
        ('name = "copy"', 'name = "copy<|tool_call>"', "name"),
        ('program = "run.py"', 'program = "../run.py"', "program"),
        ('program = "run.py"', 'program = "missing.py"', "missing.py"),
        ('format = "path"', 'format = "date"', "format"),
        ("[tool.needs]", '[tool.needs]\nexec = ["sh"]', "exec"),
        ("[tool.needs]", '[tool.needs]\ndevice = ["gpio/{times}"]', "external"),
        ("[tool.needs]", '[tool.needs]\ndevice = ["meter"]', "external"),
        ("[tool.needs]", '[tool.needs]\ndevice = ["{mode}"]', "names no device"),
        ("[tool.needs]", '[tool.needs]\ndevice = ["door/{mode}"]', "names no device"),
        ("[tool.needs]", '[tool.needs]\ndevice = ["termux/{mode}"]', "names no device"),
        ("[tool.needs]", '[tool.needs]\ndevice = ["../gpio"]', "names no device"),
        ("[tool.needs]", '[tool.needs]\ndevice = [""]', "names no device"),
        ('version = "1"', "version = ", "line"),
    ],
)  # fmt: skip
def test_a_manifest_with_a_mistake_is_refused_whole(tmp_path: Path, old: str, new: str, says: str):
    """The error names the file and what is wrong in it."""
    with pytest.raises(ConfigError) as caught:
        load([bundle(tmp_path, GOOD.replace(old, new, 1))])
    assert caught.value.reason is Reason.MANIFEST_INVALID
    assert "tool.toml" in caught.value.message
    assert says in caught.value.message


def test_a_program_that_is_no_python_is_refused(tmp_path: Path):
    """At load, not at the first call."""
    with pytest.raises(ConfigError):
        load([bundle(tmp_path, GOOD, program="def broken(:\n")])


def test_two_bundles_of_one_name_are_refused(tmp_path: Path):
    """Neither silently wins."""
    bundle(tmp_path, GOOD)
    bundle(tmp_path, GOOD, name="other")
    with pytest.raises(ConfigError, match="already a bundle"):
        load([tmp_path])


def test_the_digest_covers_manifest_and_program(tmp_path: Path):
    """The log says which code ran."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    digests = [
        load([bundle(folders[0], GOOD)]).tools["mine.copy"].digest,
        load([bundle(folders[1], GOOD, program="x = 2\n")]).tools["mine.copy"].digest,
        load([bundle(folders[2], GOOD + "\n# changed\n")]).tools["mine.copy"].digest,
    ]
    assert len(set(digests)) == 3


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    return Arguments(load([bundle(tmp_path, GOOD)]).tools["mine.copy"])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"path": None}, "path"),
        ({"path": 7}, "path"),
        ({"path": "a\0b"}, "path"),
        ({"path": "a\udc80"}, "path"),
        ({"path": " "}, "path"),
        ({"path": "x" * 5000}, "path"),
        ({"times": "3"}, "times"),
        ({"times": 1.5}, "times"),
        ({"times": True}, "times"),
        ({"mode": "medium"}, "mode"),
        ({"more": 1}, "more"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: Arguments, change: dict[str, Any], names: str):
    """Type, range, unknown, hidden characters: each says which argument."""
    with pytest.raises(RequestError) as caught:
        arguments.check({"path": "a", "to": "b"} | change, "/home")
    assert caught.value.reason is Reason.BAD_ARGUMENTS
    assert caught.value.metadata["argument"] == names


def test_a_missing_argument_is_named(arguments: Arguments):
    """And the hint says what there is."""
    with pytest.raises(RequestError) as caught:
        arguments.check({"path": "a"}, "/home")
    assert caught.value.metadata["argument"] == "to"
    assert "times" in caught.value.hint


def test_scopes_follow_from_the_arguments(arguments: Arguments, tmp_path: Path):
    """Templates are filled with absolute paths; a link stands for itself and for where it leads."""
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    checked = arguments.check({"path": "link", "to": "sub/../new"}, str(tmp_path))
    scopes = [str(scope) for scope in arguments.scopes(checked, {})]
    assert scopes == [f"read:{tmp_path}/link", f"read:{tmp_path}/real", f"write:{tmp_path}/new"]


def test_a_template_character_in_an_argument_is_an_ordinary_one(arguments: Arguments, tmp_path: Path):
    """Braces and stars of an argument are not filled in again, nor do they become patterns."""
    checked = arguments.check({"path": "{to}*", "to": "b"}, str(tmp_path))
    read, write = arguments.scopes(checked, {"folder": "/"})
    assert (str(read), read.glob) == (f"read:{tmp_path}/{{to}}*", False)
    assert str(write) == f"write:{tmp_path}/b"
