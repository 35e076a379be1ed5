"""`agentd bench` with the pocket model, beside a stand-in for another server."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from agentd.cli.rival import Rival
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

ASKED: list[dict[str, Any]] = []
MISTAKE: list[bytes] = []


class Other(http.server.BaseHTTPRequestHandler):
    """Answers as llama-server and Ollama do, a token every 2 ms."""

    def do_POST(self) -> None:
        ASKED.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        if MISTAKE:
            self.wfile.write(MISTAKE[0])
            return
        for _ in range(ASKED[-1]["max_tokens"]):
            time.sleep(0.002)
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def other() -> Iterator[str]:
    ASKED.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def bench(*arguments: str, home: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agentd", "bench", "pocket", "--tokens", "12", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env=os.environ | {"XDG_CONFIG_HOME": str(home)}
    )


def test_it_measures_start_first_token_speed_and_memory_beside_another_server(other: str, tmp_path: object):
    """Each figure is there and makes sense; the other one gets the same prompts and tools."""
    done = bench("--json", "--context", "4096", "--compare", other, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {figure["name"]: figure for figure in json.loads(done.stdout.splitlines()[-1])["figures"]}
    wanted = {"start_s", "load_s", "first_token_cold_s", "first_token_warm_s", "prompt_tokens_per_s", "tokens_per_s"}
    wanted |= {"long_first_token_s", "together_tokens_per_s", "restart_first_token_s", "anonymous_mib", "tool_call_s"}
    assert wanted <= set(found)
    groups = {name: figure["value"] for name, figure in found.items() if name.startswith("resident_")}
    assert groups["resident_feed_forward_mib"] > 0
    assert sum(groups.values()) < found["peak_mib"]["value"]
    assert all(figure["value"] > 0 for name, figure in found.items() if name not in {"long_tokens_per_s", *groups})
    assert found["first_token_warm_s"]["value"] < found["first_token_cold_s"]["value"]
    assert 50 < found["tokens_per_s"]["theirs"] < 520
    assert found["together_tokens_per_s"]["theirs"] > found["tokens_per_s"]["theirs"]
    assert any("files_read" in json.dumps(asked.get("tools")) for asked in ASKED)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"<html>Not here</html>",
        b'data: {"error": {"message": "no such model"}}\n\n',
        b'data: {"choices": null}\n\n',
        b'data: {"choices": [{"delta": null}]}\n\n',
        b"data: [1, 2]\n\n",
        b"data: {\n\n",
    ],
)
def test_another_server_that_answers_nonsense_is_no_figure(other: str, said: bytes):
    MISTAKE[:] = [said]
    try:
        with pytest.raises(RequestError) as raised:
            Rival(f"{other}/v1").check()
    finally:
        MISTAKE.clear()
    assert raised.value.reason is Reason.BAD_FIELD


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://localhost", "http://[::1", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url: str):
    with pytest.raises(RequestError):
        Rival(url).check()


def test_what_does_not_answer_is_said_before_anything_is_measured(tmp_path: object):
    begun = time.monotonic()
    done = bench("--compare", "http://127.0.0.1:9", home=tmp_path)
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 30


def test_a_file_that_is_not_there_is_said(tmp_path: object):
    done = subprocess.run(
        [sys.executable, "-m", "agentd", "bench", "/nowhere.gguf"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "There is no model file /nowhere.gguf" in done.stderr
