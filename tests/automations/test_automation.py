"""The files of automations: what is one, what is wrong with the others, what templates may say."""

from __future__ import annotations

import os
import string
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.automations import template
from agentd.automations.automation import parsed, read_all
from agentd.errors import AgentdError, ConfigError, Reason

if TYPE_CHECKING:
    from pathlib import Path

FILE = '[on.file]\npath = "/tmp/inbox"\n'
CALL = '[call]\ntool = "files.append"\narguments = { path = "/tmp/log", text = "{name}" }\n'
PROMPT = 'prompt = "read {path}"\n'


def test_a_file_says_all_of_an_automation():
    found = parsed(
        "inbox",
        PROMPT
        + 'tools = ["files.read"]\n'
        + FILE
        + 'pattern = "*.pdf"\nquiet_s = 3\n[when]\ncharging = true\nhours = "22:00-06:00"\n[limits]\nretries = 1\n'
        + '[[grants]]\ntool = "files.read"\nscope = "read:/tmp/inbox"\n',
    )
    assert found.principal == "automation:inbox"
    assert found.on.file
    assert (found.on.file.pattern, found.on.file.quiet_s, found.limits.retries) == ("*.pdf", 3, 1)
    (grant,) = found.rules()
    assert (grant.principal, grant.tool, grant.where) == ("automation:inbox", "files.read", "automations/inbox.toml, grant 1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "on"),
        (FILE, "either a prompt or a call"),
        (PROMPT + CALL + FILE, "either a prompt or a call"),
        (PROMPT, "on"),
        (PROMPT + "[on]\n", "one of file, schedule and call"),
        (PROMPT + FILE + "[on.call]\n", "one of file, schedule and call"),
        (PROMPT + FILE + "colour = 1\n", "on.file.colour: is unknown"),
        (PROMPT + FILE + "quiet_s = -1\n", "on.file.quiet_s"),
        (PROMPT + '[on.file]\npath = ""\n', "on.file.path"),
        (PROMPT + FILE + 'on = "vanishes"\n', "on.file.on"),
        ('prompt = "read {nonsense}"\n' + FILE, "{nonsense}"),
        ('prompt = "read {path.__class__}"\n' + FILE, "{path.__class__}"),
        ('prompt = "read {path!r}"\n' + FILE, "known are"),
        ('prompt = "read {path:>99}"\n' + FILE, "known are"),
        ('prompt = "read {0}"\n' + FILE, "{0}"),
        ('prompt = "read {"\n' + FILE, "broken"),
        (CALL.replace("{name}", "{nobody}") + FILE, "{nobody}"),
        ('prompt = "hello"\n[on.schedule]\n', "either cron or every"),
        ('prompt = "hello"\n[on.schedule]\ncron = "61 * * * *"\n', "Bad minute"),
        ('prompt = "hello"\n[on.schedule]\ncron = "* * *"\n', "five fields"),
        ('prompt = "hello"\n[on.schedule]\ncron = "0 0 31 2 *"\n', "no cron expression"),
        ('prompt = "hello"\n[on.schedule]\nevery = "1s"\n', "no interval"),
        ('prompt = "hello"\n[on.schedule]\nevery = "soon"\n', "no interval"),
        ('prompt = "hello"\n[on.schedule]\nevery = "1h"\nzone = "Mars/Olympus"\n', "no time zone"),
        ('prompt = "hello"\n[on.schedule]\nevery = "1h"\nzone = "../../etc/passwd"\n', "no time zone"),
        ('prompt = "hello"\n[on.call]\ndata = ["A b"]\n', "on.call.data"),
        (PROMPT + FILE + '[when]\nhours = "25:00-26:00"\n', "are no hours"),
        (PROMPT + FILE + "[limits]\nconcurrency = 99\n", "limits.concurrency"),
        (PROMPT + FILE + '[[grants]]\ntool = "x"\nscope = "nonsense"\n', "grants.0"),
        (PROMPT + FILE + '[[grants]]\nprincipal = "unix:pi"\ntool = "x"\nscope = "*"\n', "its own"),
        ("[[[", "line 1"),
        (FILE + "[call]\ntool = 'x.y'\narguments = { day = 2024-01-01 }\n", "JSON"),
        (FILE + "[call]\ntool = 'x.y'\narguments = { n = nan }\n", "JSON"),
        (PROMPT + "[limits]\nretries = " + "9" * 5000 + "\n" + FILE, "digits"),
        (PROMPT + '[on.file]\npath = "/tmp/a\\u0000b"\n', "NUL"),
        (PROMPT + FILE + "[on.file.deeper]\n", "unknown"),
    ],
)
def test_what_is_wrong_is_said_with_the_key(text: str, said: str):
    with pytest.raises(ConfigError) as caught:
        parsed("inbox", text)
    assert caught.value.reason is Reason.AUTOMATION_INVALID
    assert "automations/inbox.toml" in caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize("name", ["", "Inbox", "../x", "a b", "x" * 64, "-a", "é"])
def test_a_name_is_one_that_can_stand_anywhere(name: str):
    with pytest.raises(ConfigError):
        parsed(name, PROMPT + FILE)


def test_a_broken_file_keeps_no_other_from_being_read(tmp_path: Path):
    (tmp_path / "good.toml").write_text(PROMPT + FILE)
    (tmp_path / "bad.toml").write_text("prompt =")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "huge.toml").write_text("# " + "x" * (1 << 20))
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "gone.toml").symlink_to("nowhere")
    (tmp_path / "linked.toml").symlink_to("good.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    found, broken = read_all(tmp_path)
    assert list(found) == ["good"]
    assert {each.name for each in broken} == {"bad", "binary", "huge", "folder", "gone", "linked", "pipe"}


def test_without_a_folder_there_are_none(tmp_path: Path):
    assert read_all(tmp_path / "nowhere") == ({}, [])


@given(st.dictionaries(st.sampled_from(["path", "name"]), st.text(string.printable, max_size=40), min_size=2))
def test_what_is_put_in_is_text_and_never_a_template(data: dict[str, str]):
    """Braces in a file's name are braces."""
    assert template.filled("a {path} {{x}} {name}", data) == f"a {data['path']} {{x}} {data['name']}"


@given(st.text(max_size=60))
def test_any_text_is_a_template_or_refused(text: str):
    try:
        template.check(text, frozenset({"path"}))
    except ValueError:
        return
    template.filled(text, {"path": "x"})


def test_templates_reach_into_lists_and_tables():
    arguments = {"a": ["{x}", {"b": "{x}{x}", "c": 1}], "d": None}
    assert list(template.texts(arguments)) == ["{x}", "{x}{x}"]
    assert template.filled_all(arguments, {"x": "y"}) == {"a": ["y", {"b": "yy", "c": 1}], "d": None}


@pytest.mark.parametrize("value", ["Screenshot at 9.41\u202fPM.png", "a\u00a0b", "grüße 日本"])
def test_names_as_people_have_them_are_fine(value: str):
    template.require_fit({"name": value})


@pytest.mark.parametrize("value", ["a\x1b[2J", "a\0", "a\u202eb", "x" * 5000, "line\nline"])
def test_names_that_could_do_harm_are_refused(value: str):
    with pytest.raises(AgentdError) as caught:
        template.require_fit({"path": value})
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
