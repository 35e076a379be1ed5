"""What no broad grant covers: agentd's own files, by which files they are; and what runs later, unconfined."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentd.grants import Book, Grant, Later, Moment, Own, Request, Scope, parse, programs, real

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = Moment(1, 0)
HOME = Path("/h")


@pytest.fixture
def places(tmp_path: Path) -> Path:
    root = tmp_path.resolve()
    for name in ("state/objects", "code", "home", "other"):
        (root / name).mkdir(parents=True)
    (root / "state" / "db").touch()
    return root


@pytest.fixture
def alias(places: Path) -> Iterator[Path]:
    """The same directories by another mount."""
    there = places / "other"
    if subprocess.run(["mount", "--bind", places, there], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield there
    finally:
        subprocess.run(["umount", "-l", there], check=False)


TABLE = [
    ("read", "state", True),
    ("read", "state/db", True),
    ("write", "state/new", True),
    ("exec", "state/objects/deep/file", True),
    ("read", "code/module.py", False),
    ("write", "code", True),
    ("write", "code/new.pth", True),
    ("write", "home", False),
    ("read", "home/file", False),
    ("call", "state", False),
]


@pytest.mark.parametrize(("kind", "path", "forbidden"), TABLE)
@pytest.mark.parametrize("called", ["its name", "an alias"])
def test_own_files_are_forbidden_whatever_they_are_called(
    places: Path, kind: str, path: str, called: str, request: pytest.FixtureRequest, *, forbidden: bool
):
    own = Own([places / "state"], [places / "code"])
    top = places if called == "its name" else request.getfixturevalue("alias")
    assert bool(own.forbids(Scope(kind, str(top / path)))) == forbidden


def test_what_lies_right_in_the_state_is_known_by_identity_too(places: Path):
    """A mount of that alone leads past no directory of ours."""
    known = Own([places / "state"]).identities()
    for path in ("state", "state/objects", "state/db"):
        status = (places / path).stat()
        assert (status.st_dev, status.st_ino) in known.absent
    assert not known.protected


def test_what_runs_this_very_test_is_protected():
    own = Own((), programs())
    for module in (parse, Later):
        assert own.forbids(Scope("write", str(Path(__file__).parents[2] / module.__module__.replace(".", "/")) + ".py"))
    assert own.forbids(Scope("write", pytest.__file__))


LATER = [
    ("/h/.bashrc", True),
    ("/h/.ssh", True),
    ("/h/.ssh/authorized_keys", True),
    ("/h/.config/systemd/user/x.service", True),
    ("/h/bin/tool", True),
    ("/h/repo/.git/hooks/pre-commit", True),
    ("/h/repo/.git/config", True),
    ("/h/repo/.envrc", True),
    ("/h/repo/.git", True),
    ("/h/repo/.git/commondir", True),
    ("/h/repo/.git/modules/x/config", True),
    ("/h/repo/.git/worktrees/x/gitdir", True),
    ("/h/lib/x.pth", True),
    ("/h/lib/sitecustomize.py", True),
    ("/h/repo/.git/index", False),
    ("/h/repo/.github/config", False),
    ("/h/notes/bashrc", False),
    ("/h/.bashrc.txt", False),
    ("/h/x.pth.txt", False),
]


@pytest.mark.parametrize(("path", "later"), LATER)
def test_what_runs_later_is_covered_only_by_a_grant_that_names_it(path: str, *, later: bool):
    def verdict(*patterns: str) -> str:
        grants = [Grant("*", "*", parse(pattern, resolved=True), "allow", "config", "") for pattern in patterns]
        decision = Book.of(grants, {}, Later(HOME)).decide(Request("p", "files.write", (Scope("write", path),)), NOW)
        assert decision.verdict != "ask" or not later or "runs later" in decision.reason
        return decision.verdict

    broad = "ask" if later else "allow"
    assert (verdict("*"), verdict("write:/h"), verdict("write:/h/**")) == (broad, broad, broad)
    assert verdict(f"write:{path}") == "allow"
    assert verdict(f"read:{path}") == "ask"
    if "/.git/" in path:
        assert verdict("write:/h/repo/.git") == "allow"


@pytest.mark.parametrize(("path", "later"), LATER)
def test_the_sandbox_has_the_same_rules(path: str, *, later: bool):
    """For calls that may use a directory around it."""
    assert any(rule.covers(path.encode()) for rule in Later(HOME).rules) == later
    scope = Scope("write", path)
    assert Later(HOME).is_touched(scope) == later
    assert not Later(HOME).is_touched(Scope("read", path))


def test_an_answer_for_a_directory_is_none_for_what_runs_later_in_it():
    answer = Grant("*", "*", parse("write:/h", resolved=True), "allow", "approval", "")
    book = Book.of([answer], {}, Later(HOME))
    assert book.decide(Request("p", "t", (Scope("write", "/h/.bashrc"),)), NOW).verdict == "ask"
    assert book.named(Request("p", "t", ()), NOW) == ()
    naming = Grant("*", "t", parse("write:/h/.bashrc", resolved=True), "allow", "approval", "")
    assert [str(p) for p in Book.of([naming], {}, Later(HOME)).named(Request("p", "t", ()), NOW)] == ["write:/h/.bashrc"]
    assert Book.of([naming], {}, Later(HOME)).named(Request("p", "other", ()), NOW) == ()


def test_a_path_leads_where_the_file_system_says_as_far_as_there_is_something(tmp_path: Path):
    top = tmp_path.resolve()
    (top / "deep" / "er").mkdir(parents=True)
    (top / "link").symlink_to("deep/er")
    (top / "out").symlink_to("/proc/self/root")
    for path, leads in (
        ("link/x", "deep/er/x"),
        ("link/../x", "deep/x"),
        ("missing/../link/y", "deep/er/y"),
        ("missing/a/../../link", "deep/er"),
        ("deep//./er/", "deep/er"),
    ):
        assert real(str(top / path) if not path.endswith("/") else f"{top}/{path}") == str(top / leads)


@pytest.mark.parametrize("path", ["/proc/self/root/etc", "/proc/self/cwd", "/proc/1/exe", "/proc/thread-self/root"])
def test_what_belongs_to_a_process_leads_nowhere(path: str):
    """It would lead through the daemon, or be an error."""
    assert real(path) == path
