"""What a trigger knows goes into a command as words, and never as more of the command."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.automations import template
from agentd.automations.automation import parsed
from agentd.errors import ConfigError

HOSTILE = (
    "a.txt;id>x;echo .txt",
    "$(id)",
    "`id`",
    "a'b",
    'a"b',
    "a\\",
    "*",
    "-rf",
    " ",
    "",
    "~",
    "#x",
    "a b",
    "$HOME",
    "!x",
    "{x}",
)
QUOTABLE = (
    ("printf '%s|' {name}", "{}|"),
    ("printf '%s|' pre{name}post {name}", "pre{0}post|{0}|"),
    ('printf "%s|" "it\'s" {name} \'say "x"\'', 'it\'s|{}|say "x"|'),
    ("printf '%s|' \\' {name} # it's fine\n", "'|{}|"),
    ("x=$(printf '%s' {name}; printf .); printf '%s|' \"$x\"", "{}.|"),
    ("for f in {name}; do printf '%s|' \"$f\"; done", "{}|"),
    ('printf \'%s|\' "a\\"b" {name}', 'a"b|{}|'),
    ("printf '%s|' a#b {name}", "a#b|{}|"),
)


def run(command: str) -> str:
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True, cwd="/")
    return done.stdout.decode()


@pytest.mark.parametrize(("command", "said"), QUOTABLE)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_is_a_word_whatever_it_says(command: str, said: str, value: str):
    template.require_quotable(command)
    expected = said.format(value)
    assert run(template.filled(command, {"name": value}, quoted=True)) == expected


def test_without_quotes_it_would_be_more():
    """The control: what the daemon did before."""
    assert run(template.filled("printf '%s|' {name}", {"name": "a; echo b"})) == "a|b\n"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_any_value_is_a_word(value: str):
    assert run(template.filled("printf '%s|' x{name}", {"name": value}, quoted=True)) == f"x{value}|"


REFUSED = (
    "echo '{name}'",
    'echo "{name}"',
    'sh -c "echo {name}"',
    "sh -c 'echo {name}'",
    "echo `echo {name}`",
    "cat <<END\n{name}\nEND",
    "echo $(({name}))",
    "echo $'{name}'",
    "echo \\{name}",
    "echo 'it'\"{name}\"",
    "true # {name}",
    'echo "$(echo {name})"',
    'echo "a\\"{name}"',
    'x="$(basename "{name}")"',
    'x="${{y:-"{name}"}}"',
    "echo {name}#'\n{name}\n'",
    "(make)# it's {name}",
    "[[ {name} -gt 1 ]]",
    "eval echo {name}",
)


@pytest.mark.parametrize("command", REFUSED)
def test_a_command_that_no_value_can_be_quoted_in_is_refused_when_it_is_read(command: str):
    with pytest.raises(ValueError, match=r"quoted|alone"):
        template.require_quotable(command)
    text = f'[on.file]\npath = "/h"\n[call]\ntool = "shell.run"\narguments = {{ command = {_toml(command)}, folder = "/h" }}\n'
    made = parsed("filing", text)
    with pytest.raises(ConfigError, match=r"automations/filing.toml is wrong: call.arguments.command: "):
        made.require_quotable(frozenset({"command"}))
    made.require_quotable(frozenset())  # what is no command is text


def test_without_values_a_command_is_as_it_stands():
    template.require_quotable('echo "it\'s" `date` <<END\nEND')


def test_only_command_lines_are_quoted():
    filled = template.filled_call(
        {"command": "rm {name}", "folder": "/h/{name}", "ok": [1]}, {"name": "a b"}, frozenset({"command"})
    )
    assert filled == {"command": "rm 'a b'", "folder": "/h/a b", "ok": [1]}


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
