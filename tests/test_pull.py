"""Models fetched from a server that breaks: in the end the right file, and never half of one in its place."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from agentd import models
from agentd.cli import cli
from agentd.errors import EngineError, Reason, StoreError
from agentd.models import catalogue, pull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POCKET = models.locate("pocket")
REPOSITORY = "someone/a-model"


@dataclass
class Hub:
    """A server with one file. It breaks after `breaks` bytes of an answer, so many times; `told` are the ranges it was asked for."""

    data: bytes
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    linked: bool = True
    told: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    url: str = ""
    slow_s: float = 0.0
    more: int = 0
    """Bytes that come beside what it has said."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def serve(hub: Hub) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hub.tokens.append(self.headers.get("authorization"))
            if "missing" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(hub.data)))
            self.send_header("ETag", f'"{hub.digest if hub.linked else "abc"}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.end_headers()

        def do_GET(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
            start = int(asked[1]) if asked and hub.ranges else 0
            hub.told.append(self.headers.get("range") or "")
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(hub.data) - start + hub.more))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(hub.data) - 1}/{len(hub.data)}")
            self.end_headers()
            end = start + hub.breaks.pop(0) if hub.breaks else len(hub.data)
            for at in range(start, min(end, len(hub.data)), 1 << 16):
                self.wfile.write(hub.data[at : min(at + (1 << 16), end)])
                time.sleep(hub.slow_s)
            for _ in range(hub.more >> 16):
                self.wfile.write(bytes(1 << 16))
            if end < len(hub.data):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    return server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    made = Hub(POCKET.read_bytes())
    server = serve(made)
    yield made
    server.shutdown()
    server.server_close()


def mine(tmp_path: Path) -> Path:
    """Where files of `hf:` go."""
    return tmp_path / "data" / "agentd" / "models" / REPOSITORY.replace("/", "--")


def entry(hub: Hub, **more: Any) -> catalogue.Entry:
    return catalogue.Entry(name="it", repository=REPOSITORY, file="model.gguf", sha256=hub.digest, **more)


def silent(*_: object) -> None:
    """Told of progress."""


def test_a_file_comes_into_its_place_whole(hub: Hub):
    steps: list[tuple[str, int, int]] = []
    path = pull.pull(entry(hub), hub.url, lambda *step: steps.append(step), 0)
    assert path.read_bytes() == hub.data
    assert {what for what, _, _ in steps} == {"fetching", "verifying"}
    assert steps[-1] == ("verifying", len(hub.data), len(hub.data))
    assert not list(path.parent.glob(".*.part"))
    asked = len(hub.told)
    assert pull.pull(entry(hub), hub.url, silent, 0) == path
    assert len(hub.told) == asked  # it is here


def test_a_server_that_breaks_five_times_and_a_large_file(hub: Hub):
    """200 MB: it goes on where it was cut off each time."""
    hub.data = POCKET.read_bytes() + random.Random(1).randbytes(200_000_000 - len(POCKET.read_bytes()))
    hub.breaks = [30_000_000, 1, 60_000_000, 0, 20_000_000]
    path = pull.pull(entry(hub), hub.url, silent, 0)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hub.digest
    starts = [int(told.removeprefix("bytes=").rstrip("-")) if told else 0 for told in hub.told]
    assert starts == sorted(starts)
    assert starts[-1] >= 80_000_000  # the hub's client writes 10 MiB at a time


def test_a_server_without_ranges_is_asked_for_all_of_it_again(hub: Hub):
    hub.ranges, hub.breaks = False, [2_000_000]
    assert pull.pull(entry(hub), hub.url, silent, 0).read_bytes() == hub.data


def test_killed_in_the_middle_it_goes_on_where_it_was(hub: Hub, tmp_path: Path):
    """With the command itself, and kill -9."""
    hub.data += bytes(60_000_000)
    hub.slow_s = 0.003
    command = [sys.executable, "-m", "agentd", "models", "pull", f"hf:{REPOSITORY}/model.gguf", "--mirror", hub.url]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = mine(tmp_path)
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size > 20_000_000 for part in folder.glob(".*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    assert not (folder / "model.gguf").exists()
    (part,) = folder.glob(".*.part")
    had = part.stat().st_size
    hub.slow_s = 0
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.gguf").read_bytes() == hub.data
    assert 20_000_000 <= had < len(hub.data)
    assert f"bytes={had}-" in hub.told


def test_a_file_with_another_digest_is_not_taken(hub: Hub):
    """Said before a byte is fetched where the server tells it, and after the last one where it does not."""
    other = entry(hub).model_copy(update={"sha256": "0" * 64})
    with pytest.raises(EngineError, match="another file") as caught:
        pull.pull(other, hub.url, silent, 0)
    assert caught.value.reason is Reason.MODEL_INVALID
    assert not hub.told
    hub.linked = False
    with pytest.raises(EngineError, match="damaged, or another file"):
        pull.pull(other, hub.url, silent, 0)
    assert not [path for path in other.path.parent.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("data", [b"GGUF", b"<html>sign in</html>" * 100, POCKET.read_bytes()[:100_000]])
def test_what_is_no_model_is_not_taken(hub: Hub, data: bytes):
    hub.data = data
    with pytest.raises(EngineError) as caught:
        pull.pull(entry(hub), hub.url, silent, 0)
    assert caught.value.reason is Reason.MODEL_INVALID
    assert not entry(hub).path.exists()


def test_another_family_is_refused_with_its_name(hub: Hub):
    hub.data = hub.data.replace(b"gemma4", b"llamas")
    with pytest.raises(EngineError, match="family 'llamas'"):
        pull.pull(entry(hub), hub.url, silent, 0)


def test_a_server_that_is_not_there_or_has_no_such_file(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pull, "_ATTEMPTS", 2)
    for one, url in ((entry(hub), "http://127.0.0.1:9"), (entry(hub).model_copy(update={"file": "missing.gguf"}), hub.url)):
        with pytest.raises(EngineError) as caught:
            pull.pull(one, url, silent, 0)
        assert caught.value.reason is Reason.DOWNLOAD_FAILED
        assert "Traceback" not in str(caught.value)
    hub.breaks = [0] * 10
    with pytest.raises(EngineError) as caught:
        pull.pull(entry(hub), hub.url, silent, 0)
    assert caught.value.reason is Reason.DOWNLOAD_FAILED


def test_a_server_that_sends_without_end_is_stopped_and_leaves_nothing(hub: Hub):
    hub.more = 50_000_000
    with pytest.raises(EngineError) as caught:
        pull.pull(entry(hub), hub.url, silent, 0)
    assert caught.value.reason is Reason.DOWNLOAD_FAILED
    assert not list(entry(hub).path.parent.glob(".*.part"))


def test_a_folder_that_can_not_be_written_is_a_sentence(hub: Hub, tmp_path: Path):
    (tmp_path / "data").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="can't be written"):
        pull.pull(entry(hub), hub.url, silent, 0)


@pytest.mark.parametrize("url", ["http://huggingface.co/x", "https://huggingface.co.evil.org/x", "https://cdn.example.org/x"])
def test_a_token_is_sent_to_nobody_else(url: str):
    assert pull._token(url) is False
    assert pull._token("https://huggingface.co/x") is None


def test_a_full_disk_is_said_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pull, "_SPARE", 1 << 60)
    with pytest.raises(StoreError) as caught:
        pull.pull(entry(hub), hub.url, silent, 0)
    assert caught.value.reason is Reason.STORE_FULL
    assert not hub.told


def test_two_at_once_do_not_write_into_one_file(hub: Hub):
    target = entry(hub).path
    target.parent.mkdir(parents=True)
    with pull._alone(target), pytest.raises(EngineError, match="by another agentd"):
        pull.pull(entry(hub), hub.url, silent, 0)


def test_a_persons_token_goes_to_the_hub_only(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull.pull(entry(hub), hub.url, silent, 0)
    assert hub.tokens
    assert not any(hub.tokens)


def test_a_file_of_ones_own_is_taken_verified_used_and_removed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The commands, one after another."""
    own = tmp_path / "mine.gguf"
    own.write_bytes(hub.data)
    link = tmp_path / "link.gguf"
    link.symlink_to("mine.gguf")

    def agentd(*arguments: str, ok: bool = True) -> Any:
        done = CliRunner().invoke(cli, ["models", *arguments, "--json"])
        assert (done.exit_code == 0) is ok, done.output
        return json.loads(done.output.splitlines()[-1]) if ok else done.exception

    listed = agentd("list")
    assert {"e2b", "e4b", "12b", "26b-a4b", "31b"} <= {each["name"] for each in listed["models"]}
    assert listed["advice"]
    assert "it is another file" in str(agentd("pull", "e2b", "--file", str(own), ok=False))
    of_this_size = tuple(each.model_copy(update={"bytes": len(hub.data)}) for each in catalogue.entries())
    monkeypatch.setattr(catalogue, "entries", lambda: of_this_size)
    assert "should be 0a5bbc20" in str(agentd("pull", "e2b-2bit", "--file", str(own), ok=False))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(hub.data[:3000])
    assert str(cut) in str(agentd("pull", "e2b", "--file", str(cut), ok=False))
    for command in ("verify", "inspect"):
        assert "agentd models pull e2b" in agentd(command, "e2b", ok=False).hint
    taken = agentd("pull", "e2b", "--file", str(link))
    assert os.path.samefile(taken["path"], own)
    assert not os.path.islink(taken["path"])
    assert agentd("verify", "e2b")["sha256"] == hub.digest
    config = tmp_path / "config" / "agentd" / "agentd.toml"
    config.parent.mkdir(parents=True)
    kept = tmp_path / "dotfiles.toml"
    kept.write_text("# mine\n[engine]\ncontext = 1024  # small\n")
    kept.chmod(0o600)
    config.symlink_to(kept)
    agentd("use", "e2b")
    assert config.is_symlink()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert config.read_text() == '# mine\n[engine]\ncontext = 1024  # small\nmodel = "e2b"\n'
    assert "is the model in use" in str(agentd("remove", "e2b", ok=False))
    agentd("use", "pocket")
    assert agentd("remove", "e2b")["freed_bytes"] == len(hub.data)
    assert own.exists()
    assert "no file" in str(agentd("use", "e2b", ok=False))
    assert "There is no model" in str(agentd("pull", "nonsense", ok=False))
    config.write_text("[engine]\nbroken")
    assert "can't be changed" in str(agentd("use", "pocket", ok=False)) or "wrong" in str(agentd("use", "pocket", ok=False))
    assert config.read_text() == "[engine]\nbroken"


@pytest.mark.parametrize(
    ("total", "free", "name"),
    [(4000, 3000, "e2b"), (8000, 6000, "e4b"), (3000, 1300, "e2b-2bit"), (1000, 400, None), (64_000, 50_000, "31b")],
)
def test_advice_is_the_largest_that_fits_with_what_it_needs(total: float, free: float, name: str | None):
    found = catalogue.advice(total, free)
    assert (found.entry.name if found.entry else None) == name
    assert "GiB" in found.words


def test_the_catalogue_is_in_order():
    """Names are single, files are, what they take falls, and digests are whole where there are any."""
    found = catalogue.entries()
    assert len({each.name for each in found}) == len({each.file for each in found}) == len(found)
    assert found[0].resident_mib > found[-1].resident_mib
    assert all(each.purpose and each.known_by and each.bytes for each in found)
