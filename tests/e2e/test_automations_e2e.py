"""Automations through the real daemon: files that come, kills in between, approvals that park, what is wrong and what is told."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from agentd.client import Client
from agentd.errors import AgentdError, Reason
from agentd.v1 import approval_pb2, run_pb2, token_pb2
from agentd.v1 import automation_pb2 as pb
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 60
Event = pb.TriggerEvent


class House(DaemonProcess):
    """A daemon with automations."""

    @property
    def inbox(self) -> Path:
        return self.home / "inbox"

    def write(self, name: str, text: str) -> None:
        self.inbox.mkdir(parents=True, exist_ok=True)
        (self.root / "automations").mkdir(exist_ok=True)
        (self.root / "automations" / f"{name}.toml").write_text(text.replace("HOME", str(self.home)))


NOTE = """
[on.file]
path = "HOME/inbox"
quiet_s = 0.2
[call]
tool = "files.append"
arguments = { path = "HOME/log.txt", text = "{name}\\n" }
"""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    if made.process and made.process.poll() is None:
        assert made.stop() == 0
        assert "Traceback" not in made.log, made.log


def until(true: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(client: Client, name: str = "") -> list[int]:
    return [event.state for event in client.automations.events(name)]


def lines(house: House) -> list[str]:
    log = house.home / "log.txt"
    return log.read_text().splitlines() if log.exists() else []


def test_a_file_that_comes_is_handled_once_and_can_be_explained_and_undone(house: House):
    house.write("note", NOTE)
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "letter.txt").write_text("hello")
        until(lambda: states(client) == [Event.STATE_SUCCEEDED])
        (event,) = client.automations.events("note")
        assert event.subject == str(house.inbox / "letter.txt")
        assert lines(house) == ["letter.txt"]
        run = client.get_run(event.run)
        assert run.principal == "automation:note"
        assert list(run.labels) == ["untrusted"]
        told = [entry for entry in client.audit_events() if dict(entry.body).get("run") == run.name.removeprefix("runs/")]
        assert [entry.kind for entry in told] == ["run.queue", "run.start", "call.intent", "call.end", "run.end"]
        assert [entry.body["detail"]["triggered_by"] for entry in told[:2]] == ["file", "file"]
        assert told[0].body["cause"] == event.name
        house.command("rollback", "--run", event.run.removeprefix("runs/"), "--yes")
        assert lines(house) == []
        (house.inbox / "letter.txt").write_text("hello again")  # the same file: it has appeared before
        (house.inbox / "other.txt").write_text("hello")
        until(lambda: len(states(client)) == 2)
    house.stop()
    (house.inbox / "third.txt").write_text("while nobody looked")
    house.start()
    with Client(house.socket) as client:
        until(lambda: states(client) == [Event.STATE_SUCCEEDED] * 3)
        assert lines(house) == ["other.txt", "third.txt"]
        (told,) = client.automations.list()
        assert (told.succeeded, told.failed, told.waiting) == (3, 0, 0)


def test_a_prompt_over_a_file_uses_the_model_and_only_its_tools(house: House):
    house.write(
        "reader",
        'prompt = "read inbox/{name}"\ntools = ["files.read"]\n[on.file]\npath = "HOME/inbox"\nquiet_s = 0.2\n',
    )
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "todo.txt").write_text("buy milk")
        until(lambda: Event.STATE_SUCCEEDED in states(client))
        (event,) = client.automations.events()
        run = client.get_run(event.run)
        assert run.prompt == "read inbox/todo.txt"
        assert run.usage.calls == 1
        assert "milk" in run.answer


@pytest.mark.parametrize("files", [1000])
def test_a_thousand_files_at_once_are_each_handled_once_in_order_over_three_kills(house: House, files: int):
    house.write("note", NOTE)
    house.start()
    names = [f"{n:04}.txt" for n in range(files)]
    for name in names:
        (house.inbox / name).touch()
    chance = random.Random(5)
    for part in (0.2, 0.5, 0.8):
        until(lambda part=part: len(lines(house)) >= files * part, 120)
        time.sleep(chance.random() * 0.05)
        house.kill()
        house.start()
    until(lambda: len(lines(house)) >= files, 120)
    with Client(house.socket) as client:
        until(lambda: client.automations.get("note").waiting + client.automations.get("note").running == 0)
        assert set(states(client)) == {Event.STATE_SUCCEEDED}
        assert client.verify().first_bad_sequence == 0
    assert sorted(lines(house)) == names
    came = [(house.inbox / name).stat().st_ctime_ns for name in lines(house)]
    assert came == sorted(came)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_of_several_calls_that_is_cut_off_is_taken_back_and_done_again(house: House, seed: int):
    """Killed at any moment of it, its calls have been made once in the end."""
    prompt = 'prompt = "append {name} to log.txt"\n'
    house.write("note", prompt + NOTE.split("[call]", maxsplit=1)[0])
    house.start()
    chance = random.Random(seed)
    (house.inbox / "a").touch()
    time.sleep(0.3 + chance.random() * 0.7)
    house.kill()
    house.start()
    with Client(house.socket) as client:
        until(lambda: client.automations.get("note").succeeded + client.automations.get("note").failed == 1)
        assert lines(house) in (["a"], [])
        (event,) = client.automations.events()
        assert (lines(house) == ["a"]) == (event.state == Event.STATE_SUCCEEDED), event


def test_a_run_that_needs_an_answer_waits_for_it_and_holds_up_nobody(house: House):
    house.tools = ""
    house.extra = f'[[grants]]\ntool = "files.append"\nscope = "write:{house.home}/log.txt"\ndecision = "ask"\n[approvals]\nnotify = false\n'
    house.write("ask", NOTE)
    house.write("other", NOTE.replace("log.txt", "other.txt"))
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "a").touch()
        (house.inbox / "b").touch()
        until(lambda: len(client.approvals()) == 2)
        until(lambda: client.automations.get("ask").parked == 2)
        until(lambda: client.automations.get("other").succeeded == 2)
        first, second = sorted(client.approvals(), key=lambda each: each.arguments_json)
        client.resolve(approval_pb2.ResolveApprovalRequest(name=second.name, allow=True))
        until(lambda: client.automations.get("ask").succeeded == 1)
        client.resolve(approval_pb2.ResolveApprovalRequest(name=first.name, allow=False))
        until(lambda: client.automations.get("ask").failed == 1)
        assert lines(house) == ["b"]
        (failed,) = [event for event in client.automations.events("ask") if event.state == Event.STATE_FAILED]
        assert "said no" in failed.note
        (house.inbox / "c").touch()
        until(client.approvals)
    house.kill()
    house.start()
    with Client(house.socket) as client:
        until(client.approvals)  # it is asked again: nobody has answered yet
        client.resolve(approval_pb2.ResolveApprovalRequest(name=client.approvals()[0].name, allow=True))
        until(lambda: client.automations.get("ask").succeeded == 2)
        assert lines(house) == ["b", "c"]


def test_a_folder_that_is_not_there_is_told_of_and_watched_when_it_comes(house: House):
    house.write("note", NOTE)
    os.rmdir(house.inbox)
    house.start()
    with Client(house.socket) as client:
        until(lambda: "is not there" in client.automations.get("note").trouble)
        assert "is not there" in house.json("automations", "list")[0]["trouble"]
        house.inbox.mkdir()
        (house.inbox / "a").touch()
        until(lambda: client.automations.get("note").succeeded == 1)
        assert client.automations.get("note").trouble == ""


def test_what_it_writes_itself_does_not_trigger_it(house: House):
    house.write("note", NOTE.replace("HOME/log.txt", "HOME/inbox/log.txt").replace("quiet_s", 'on = "changes"\nquiet_s'))
    house.start()
    with Client(house.socket) as client:
        for name in "abc":
            (house.inbox / name).touch()
            until(lambda: client.automations.get("note").running + client.automations.get("note").waiting == 0)
        until(lambda: client.automations.get("note").succeeded == 3)
        time.sleep(0.6)
        assert client.automations.get("note").succeeded == 3
        assert (house.inbox / "log.txt").read_text() == "a\nb\nc\n"


def test_calls_pauses_reloads_and_what_is_broken(house: House):
    bell = '[on.call]\ndata = ["who"]\ncallers = ["token:*"]\n[call]\ntool = "files.append"\narguments = { path = "HOME/log.txt", text = "{who}\\n" }\n'
    house.write("bell", bell)
    house.write("broken", "prompt = ")
    house.start()
    with Client(house.socket) as client:
        done = house.command("automations", "run", "bell", "who=postman")
        assert "succeeded" in done.stdout
        assert lines(house) == ["postman"]
        for data, said in (({}, "needs who"), ({"who": "x", "y": "z"}, "knows no y"), ({"who": "\x1b"}, "can't be printed")):
            with pytest.raises(AgentdError, match=said) as caught:
                client.automations.trigger("bell", data)
            assert caught.value.reason is Reason.BAD_FIELD
        with pytest.raises(AgentdError) as caught:
            client.automations.trigger("nobody")
        assert caught.value.reason is Reason.AUTOMATION_NOT_FOUND
        with pytest.raises(AgentdError) as caught:
            client.automations.trigger("broken")
        assert caught.value.reason is Reason.AUTOMATION_INVALID
        assert client.automations.pause("bell").paused
        with pytest.raises(AgentdError) as caught:
            client.automations.trigger("bell", {"who": "x"})
        assert caught.value.reason is Reason.AUTOMATION_PAUSED
    house.stop()
    house.start()
    with Client(house.socket) as client:
        assert client.automations.get("bell").paused
        assert not client.automations.resume("bell").paused
        house.write("broken", bell)
        again = client.automations.reload()
        assert [(each.name, each.error) for each in again.automations] == [("automations/bell", ""), ("automations/broken", "")]
        made = client.create_token(token_pb2.Token(label="phone", roles=["user"]))
        plain = client.create_token(token_pb2.Token(label="other", roles=["auditor"]))
        with Client(house.socket, token=made.secret) as phone:
            rung = phone.automations.trigger("bell", {"who": "phone"})
            assert rung.triggered_by == "token:phone"
            for refused in (
                phone.automations.list,
                lambda: phone.automations.pause("bell"),
                phone.automations.reload,
            ):
                with pytest.raises(AgentdError) as caught:
                    refused()
                assert caught.value.reason is Reason.ROLE_REQUIRED
        with Client(house.socket, token=plain.secret) as reader:
            assert reader.automations.list()
            with pytest.raises(AgentdError) as caught:
                reader.automations.trigger("bell", {"who": "x"})
            assert caught.value.reason is Reason.ROLE_REQUIRED
        until(lambda: "phone" in lines(house))
        (house.root / "automations" / "bell.toml").unlink()
        assert [each.name for each in client.automations.reload().automations] == ["automations/broken"]


def test_grants_are_its_own_and_come_with_the_file(house: House):
    outside = house.root / "outside"
    outside.mkdir()
    text = f'[on.call]\n[call]\ntool = "files.append"\narguments = {{ path = "{outside}/log.txt", text = "x" }}\n[limits]\napproval_s = 0.2\nretries = 0\n'
    grant = "".join(f'[[grants]]\ntool = "files.append"\nscope = "{kind}:{outside}"\n' for kind in ("read", "write"))
    house.write("it", text)
    house.start()
    with Client(house.socket) as client:
        checked = client.automations.check("it")
        assert [(each.tool, each.decision) for each in checked.permissions] == [("files.append", "ask")]
        assert [each.decision for each in client.automations.check("it", text + grant).permissions] == ["allow"]
        assert house.command("automations", "run", "it", check=False).returncode == 1
        house.write("it", text + grant)
        client.automations.reload()
        house.command("automations", "run", "it")
        assert (outside / "log.txt").read_text() == "x\n"
        with pytest.raises(AgentdError):  # nobody else has got them
            client.call("files.append", {"path": f"{outside}/log.txt", "text": "y"})
        assert any(entry.kind == "policy.change" for entry in client.audit_events())
        with pytest.raises(AgentdError):  # tools can't make themselves automations
            client.call("files.write", {"path": f"{house.root}/automations/evil.toml", "text": "x"})


def test_what_fails_is_tried_again_and_then_given_up(house: House):
    house.write("note", NOTE.replace("HOME/log.txt", "HOME/none/log.txt") + "[limits]\nretries = 2\nretry_s = 0.2\n")
    (house.home / "none").write_text("a file where a folder should be")
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "a").touch()
        until(lambda: client.automations.get("note").failed == 1)
        (event,) = client.automations.events()
        assert event.attempts == 3
        assert event.note
        (house.home / "none").unlink()
        (house.home / "none").mkdir()
        (house.inbox / "b").touch()
        until(lambda: client.automations.get("note").succeeded == 1)
        told = house.command("automations", "history", "note").stdout
        assert "failed" in told


def test_an_event_whose_file_has_gone_is_dropped(house: House):
    house.write("note", NOTE + '[when]\nhours = "00:00-00:01"\n')
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "a").touch()
        until(lambda: "hours" in client.automations.get("note").waits_for)
        (house.inbox / "a").unlink()
        house.write("note", NOTE)
        client.automations.reload()
        until(lambda: states(client) == [Event.STATE_DROPPED])


def test_debounced_events_become_one(house: House):
    house.write("note", NOTE.replace("quiet_s", 'on = "changes"\nquiet_s') + "[limits]\ndebounce_s = 1.5\n")
    house.start()
    with Client(house.socket) as client:
        for n in range(4):
            (house.inbox / "a").write_text("x" * n)
            time.sleep(0.4)
        until(lambda: states(client) == [Event.STATE_SUCCEEDED])
        assert lines(house) == ["a"]
        assert next(client.automations.events()).joined >= 1


def test_commands_check_a_file_that_is_not_loaded(house: House, tmp_path: Path):
    house.start()
    house.inbox.mkdir()
    (house.inbox / "a").touch()
    new = tmp_path / "new.toml"
    new.write_text(NOTE.replace("HOME", str(house.home)))
    told = house.command("automations", "check", str(new))
    for word in ("inbox/a", "files.append", "allow", "automation:new"):
        assert word in told.stdout
    assert lines(house) == []
    new.write_text("prompt = 3")
    done = house.command("automations", "check", str(new), check=False)
    assert done.returncode == 1
    assert "automations/new.toml is wrong" in done.stderr
    assert house.json("automations", "list") == []


def test_an_automation_that_is_removed_does_nothing_more(house: House):
    """Not even what a person says yes to later: the question is taken back with it."""
    house.extra = f'[[grants]]\ntool = "files.append"\nscope = "write:{house.home}/log.txt"\ndecision = "ask"\n[approvals]\nnotify = false\n'
    house.write("ask", NOTE)
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "a").touch()
        until(client.approvals)
        until(lambda: client.automations.get("ask").parked == 1)
        (event,) = client.automations.events("ask")
        assert event.note == "waits for an answer: agentd approvals"
        question = client.approvals()[0].name
        (house.root / "automations" / "ask.toml").unlink()
        client.automations.reload()
        assert client.approvals() == []
        with pytest.raises(AgentdError):
            client.resolve(approval_pb2.ResolveApprovalRequest(name=question, allow=True))
        (event,) = client.automations.events()
        assert (event.state, event.note) == (Event.STATE_DROPPED, "the automation was removed")
        assert client.get_run(event.run).state == run_pb2.Run.STATE_CANCELLED
    assert lines(house) == []


def test_reading_the_files_again_accepts_where_a_folder_leads_now(house: House):
    """As its trouble says: a person has looked at it."""
    house.write("note", NOTE)
    house.start()
    with Client(house.socket) as client:
        until(lambda: client.automations.get("note").trouble == "")
        house.inbox.rename(house.home / "moved")
        house.inbox.symlink_to(house.home / "moved")
        (house.home / "moved" / "a").touch()
        until(lambda: "reload" in client.automations.get("note").trouble)
        assert lines(house) == []
        client.automations.reload()
        until(lambda: client.automations.get("note").succeeded == 1)
        assert client.automations.get("note").trouble == ""
        assert lines(house) == ["a"]


def test_tools_that_are_not_there_are_told_of_with_what_to_do(house: House):
    house.write("typo", 'prompt = "x"\ntools = ["files.raed"]\n[on.call]\n')
    house.write("bundle", NOTE.replace("files.append", "notify.show"))
    house.start()
    with Client(house.socket) as client:
        assert (
            client.automations.get("typo").trouble
            == "there is no tool files.raed: `agentd tools list` shows those that there are"
        )
        assert client.automations.get("bundle").trouble.endswith('tools.bundled in agentd.toml has to name "notify"')
        with pytest.raises(AgentdError) as caught:
            client.call("gpio.set", {})
        assert caught.value.hint == 'tools.bundled in agentd.toml has to name "gpio".'


def test_what_the_model_says_is_done_and_was_not_is_on_record(house: House):
    """It answers whatever its tool says; the history has the tool's word."""
    house.tools = f'sysfs = "{house.root}/sys"\n'
    house.write("look", 'prompt = "how is the battery"\n[on.file]\npath = "HOME/inbox"\n')
    house.start()
    with Client(house.socket) as client:
        (house.inbox / "a.txt").touch()
        until(lambda: states(client) == [Event.STATE_SUCCEEDED])
        (event,) = client.automations.events()
        assert event.note == "system.battery: no battery found"


def test_a_flood_of_calls_is_taken_or_refused_and_harms_nobody(house: House):
    """Eight callers as fast as they can: each event once, or an error that says why not; the daemon answers others."""
    call = NOTE[NOTE.index("[call]") :].replace("{name}", "{who}")
    house.write("bell", f'[on.call]\ndata = ["who"]\n{call}[limits]\nconcurrency = 8\n')
    house.start()

    def ring(number: int) -> int:
        with Client(house.socket) as client:
            return sum(bool(client.automations.trigger("bell", {"who": f"{number}-{n}"}).name) for n in range(60))

    with ThreadPoolExecutor(8) as pool, Client(house.socket) as client:
        rung = [pool.submit(ring, number) for number in range(8)]
        assert client.status().pid
        assert sum(each.result() for each in rung) == 480
        until(lambda: client.automations.get("bell").succeeded == 480)
    assert sorted(lines(house)) == sorted(f"{number}-{n}" for number in range(8) for n in range(60))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_makes_files_wait_and_loses_none(house: House):
    """What lands meanwhile is handled when there is room, each once and in order; until then it is said why not."""
    house.extra = "[journal]\nlow_space_mib = 0\n"
    house.write("note", NOTE)
    house.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", house.state], check=True)
    try:
        house.start()
        with Client(house.socket) as client:
            (house.inbox / "0").touch()
            until(lambda: client.automations.get("note").succeeded == 1)
            filler = house.state / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
            for n in range(1, 40):
                (house.inbox / str(n)).touch()
            until(lambda: client.automations.get("note").trouble or client.automations.get("note").waits_for)
            filler.unlink()
            until(lambda: client.automations.get("note").succeeded == 40)
            assert client.automations.get("note").trouble == ""
        assert lines(house) == [str(n) for n in range(40)]
        assert house.stop() == 0
    finally:
        house.kill()
        subprocess.run(["umount", "-l", house.state], check=True)
