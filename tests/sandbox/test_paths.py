"""The walker finds what the kernel finds, follows every link itself, and leaves no descriptor open."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from agentd_sandbox.nearby import Walker
from agentd_sandbox.paths import Sight, WalkError, everything, resolve
from hypothesis import example, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("a", "b", "c")
parts = st.sampled_from((*NAMES, *NAMES, ".", "..", ""))
relative = st.lists(parts, min_size=1, max_size=5).map("/".join)
targets = st.lists(st.sampled_from((*NAMES, ".", "..")), min_size=1, max_size=4).map("/".join)
kinds = st.one_of(
    st.just("folder"),
    st.just("folder"),
    st.just("file"),
    targets.map(lambda t: "link:" + t),
    targets.map(lambda t: "absolute:" + t),
)
trees = st.lists(st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), kinds), max_size=12)


@contextmanager
def planted(tree: list[tuple[list[str], str]]) -> Iterator[Path]:
    """A real folder with these entries; entries that have no place are left out."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made).resolve()
        for names, kind in tree:
            place = root.joinpath(*names)
            try:
                match kind.partition(":"):
                    case ("folder", _, _):
                        place.mkdir()
                    case ("file", _, _):
                        place.touch(exist_ok=False)
                    case ("link", _, target):
                        place.symlink_to(target)
                    case (_, _, target):
                        place.symlink_to(f"{root}/{target}")
            except OSError:
                continue
        yield root


def by_the_kernel(path: bytes, *, follow: bool) -> bytes | int:
    """The real path of what the kernel opens there, or its error."""
    try:
        descriptor = os.open(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
    except OSError as e:
        return e.errno or 0
    try:
        return os.readlink(b"/proc/self/fd/%d" % descriptor)
    finally:
        os.close(descriptor)


def by_the_walker(path: bytes, *, follow: bool) -> bytes | int:
    """The same from `resolve`, which must also keep its promises about parent and name."""
    try:
        with resolve(path, follow=follow) as found:
            if not found.exists:
                assert not os.path.lexists(found.real)
                return errno.ENOENT
            assert os.path.samestat(os.fstat(found.descriptor), os.lstat(found.real))
            assert os.path.samestat(os.fstat(found.parent), os.stat(os.path.dirname(found.real)))
            assert found.name == (os.path.basename(found.real) or b".")
            return found.real
    except WalkError as e:
        return e.errno or 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@settings(max_examples=250, deadline=None)
@given(tree=trees, path=relative, follow=st.booleans())
@example(tree=[(["a"], "link:a")], path="a", follow=True)
@example(tree=[(["a"], "link:b"), (["b"], "link:a")], path="a/c", follow=False)
@example(tree=[(["a"], "link:b/c")], path="a", follow=True)
@example(tree=[(["a"], "folder"), (["b"], "link:a")], path="b/", follow=False)
@example(tree=[(["a"], "file")], path="a/", follow=True)
@example(tree=[(["a"], "link:c/."), (["c"], "file")], path="a", follow=True)
@example(tree=[(["a"], "link:c/"), (["c"], "file")], path="a", follow=False)
@example(tree=[(["a"], "link:c/"), (["c"], "link:d"), (["d"], "file")], path="a", follow=True)
@example(tree=[(["a"], "file")], path="a/..", follow=True)
@example(tree=[(["a"], "link:.")], path="a/a/a", follow=True)
def test_any_path_leads_where_the_kernel_says(tree: list[tuple[list[str], str]], path: str, *, follow: bool):
    """Folders, files, links in all directions, dots and slashes: the same real path or error, and nothing stays open."""
    with planted(tree) as root:
        full = os.fsencode(f"{root}/{path}")
        before = descriptors()
        found = by_the_walker(full, follow=follow)
        assert descriptors() == before
        assert found == by_the_kernel(full, follow=follow)
        if follow and isinstance(found, bytes):
            assert found == os.path.realpath(full)


@pytest.mark.parametrize("links", [1, 39, 40, 41, 60])
def test_a_chain_of_links_ends_where_the_kernels_ends(tmp_path: Path, links: int):
    """Forty are followed, the next one is ELOOP."""
    (tmp_path / "0").touch()
    for n in range(links):
        (tmp_path / str(n + 1)).symlink_to(str(n))
    path = os.fsencode(tmp_path.resolve() / str(links))
    assert by_the_walker(path, follow=True) == by_the_kernel(path, follow=True)


@pytest.mark.parametrize("climb", ["/..", "/../..", "/../../../../../../../../.."])
def test_nothing_lies_above_the_root(tmp_path: Path, climb: str):
    """`..` of / is /, at the start and by way of a link."""
    (tmp_path / "up").symlink_to("../" * 40)
    for path in (f"{climb}{tmp_path.resolve()}", f"{tmp_path.resolve()}/up{climb}{tmp_path.resolve()}"):
        assert by_the_walker(path.encode(), follow=True) == os.fsencode(tmp_path.resolve())
    assert by_the_walker(climb.encode(), follow=True) == b"/"


@pytest.mark.parametrize("tail", ["missing", "missing/", "missing/."])
def test_a_missing_last_name_is_a_place_to_make_something(tmp_path: Path, tail: str):
    """Its folder is open, its real path is known, and whether a folder was meant."""
    with resolve(os.fsencode(f"{tmp_path.resolve()}/{tail}"), follow=True) as found:
        assert (found.exists, found.name, found.trailing_slash) == (False, b"missing", tail != "missing")
        assert found.real == os.fsencode(tmp_path.resolve() / "missing")
        assert os.path.samestat(os.fstat(found.parent), tmp_path.stat())


def test_a_dangling_link_names_the_place_it_points_to(tmp_path: Path):
    """Followed, that is where a file would be made; not followed, it is the link."""
    root = tmp_path.resolve()
    (root / "folder").mkdir()
    (root / "dangling").symlink_to("folder/new")
    with resolve(os.fsencode(root / "dangling"), follow=True) as found:
        assert (found.exists, found.real) == (False, os.fsencode(root / "folder" / "new"))
    with resolve(os.fsencode(root / "dangling"), follow=False) as found:
        assert (found.exists, found.real) == (True, os.fsencode(root / "dangling"))


@pytest.mark.parametrize(
    ("path", "code", "reached"),
    [
        ("missing/x", errno.ENOENT, "missing"),
        ("file/x", errno.ENOTDIR, "file"),
        ("file/", errno.ENOTDIR, "file"),
        ("to-file/x", errno.ENOTDIR, "file"),
        ("away/x/y", errno.ENOENT, "elsewhere"),
        ("loop", errno.ELOOP, "loop"),
        ("loop/x", errno.ELOOP, "loop"),
    ],
)
def test_a_broken_way_says_how_far_it_led(tmp_path: Path, path: str, code: int, reached: str):
    """The error carries the real path reached, so that a hidden one can be told from a visible one."""
    root = tmp_path.resolve()
    (root / "file").touch()
    (root / "to-file").symlink_to("file")
    (root / "away").symlink_to("elsewhere/deep")
    (root / "loop").symlink_to("loop")
    before = descriptors()
    with pytest.raises(WalkError) as caught:
        resolve(os.fsencode(f"{root}/{path}"), follow=True)
    assert (caught.value.errno, caught.value.reached) == (code, os.fsencode(root / reached))
    assert descriptors() == before


@pytest.mark.parametrize(
    "path", ["/proc/self", "/proc/self/environ", "/proc/thread-self/x", "/proc/1", "/proc/1/root", "/proc/mounts", "/dev/fd/0"]
)
@pytest.mark.parametrize("follow", [True, False])
def test_what_belongs_to_a_process_does_not_exist(path: str, *, follow: bool):
    """Not by name, not by links to it: they would lead into the process that walks."""
    if not follow and path == "/proc/mounts":
        assert by_the_walker(path.encode(), follow=False) == b"/proc/mounts"  # the link itself is but text
        return
    before = descriptors()
    with pytest.raises(WalkError) as caught:
        resolve(path.encode(), follow=follow)
    assert caught.value.errno == errno.ENOENT
    assert descriptors() == before


def test_names_like_those_of_processes_are_ordinary_elsewhere(tmp_path: Path):
    """The type of the file system decides, not the name; the rest of procfs is there."""
    for name in ("self", "thread-self", "123"):
        (tmp_path / name).mkdir()
        assert by_the_walker(os.fsencode(tmp_path.resolve() / name), follow=True) == os.fsencode(tmp_path.resolve() / name)
    assert by_the_walker(b"/proc/uptime", follow=True) == b"/proc/uptime"


@pytest.mark.parametrize("path", [b"", b"relative", b"./x", b"~"])
def test_only_absolute_paths_lead_anywhere(path: bytes):
    """What a relative path starts from is not the walker's to know."""
    with pytest.raises(WalkError) as caught:
        resolve(path, follow=True)
    assert caught.value.errno == errno.ENOENT


@settings(max_examples=60, deadline=None)
@given(name=st.binary(min_size=1, max_size=60).filter(lambda n: not {0, 47} & set(n) and n not in {b".", b".."}))
def test_names_are_bytes(name: bytes):
    """Any name a file can have is walked as it is."""
    with tempfile.TemporaryDirectory() as made:
        path = os.path.realpath(os.fsencode(made)) + b"/" + name
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        assert by_the_walker(path, follow=True) == path


def test_what_is_steady_is_looked_up_once_and_what_is_not_each_time(tmp_path: Path):
    """A system's library stays what it was for the call; a user's file that is replaced is the new one."""
    root = tmp_path.resolve()
    for name in ("system", "own"):
        (root / name).mkdir()
        (root / name / "file").write_text("old")
        (root / name / "link").symlink_to("file")
    walker = Walker(Sight(), steady=lambda path: path.startswith(os.fsencode(root / "system")))

    def inode(path: str) -> int:
        with walker.existing(os.fsencode(root / path), follow=True) as found:
            return found.status.st_ino if found.exists else 0

    names = ["system/file", "system/link", "system/missing", "own/file", "own/link", "own/missing"]
    before = {name: inode(name) for name in names}
    for name in ("system", "own"):
        (root / name / "new").write_text("new")
        (root / name / "new").replace(root / name / "file")
        (root / name / "missing").touch()
    changed = {name for name in names if inode(name) != before[name]}
    assert changed == {"system/link", "own/file", "own/link", "own/missing"}  # a link is walked, whatever it leads to
    walker.close()


def test_what_is_kept_open_has_a_limit_and_an_end(tmp_path: Path):
    """Descriptors are the daemon's own: 32 for a call at most, none after it."""
    with Walker(Sight(), steady=lambda _: False).existing(b"/", follow=True):
        pass  # what the process opens once and for all
    before = descriptors()
    walker = Walker(Sight(), steady=everything)
    for number in range(100):
        (tmp_path / str(number)).touch()
        for _ in range(2):
            with walker.existing(os.fsencode(tmp_path.resolve() / str(number)), follow=True) as found:
                assert found.exists
    assert descriptors() == before + 24 + 1  # and the directory that they lie in
    walker.close()
    assert descriptors() == before
