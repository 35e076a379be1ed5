"""The bundle `shell`: sh with its children, confined as any tool; what it may use is the one folder.

Its exit status says whether the call has failed, and with it whether its changes stay.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from agentd_sandbox.sdk import ToolFailure, tool, variables

OUTPUT_BYTES = 24_000
_LOOK_S = 0.1
_IN_AN_ERROR = 2000  # characters of each stream, the last ones
_MARGIN_S = 0.5  # before the call's own deadline, which would take the output with it


@tool("run")
def run(command: str, folder: str, ok: list[int] | None = None) -> dict[str, Any]:
    if not Path(folder).is_dir():
        raise ToolFailure(f"{folder} is not a folder")
    os.chdir(folder)
    deadline_s = float(variables["deadline_s"]) - _MARGIN_S
    line = ["sh", "-c", command]  # by PATH, which is the sandbox's own: Termux has no /bin/sh
    shell = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors, ended = _read(shell, time.monotonic() + deadline_s)
    said = _said(output[0], errors[0])
    if not ended:
        shell.kill()
        raise ToolFailure(f"the command was still running after {variables['deadline_s']} s and was ended{said}")
    status = shell.wait()
    if status < 0:
        raise ToolFailure(f"the command was ended by {_signal(-status)}{said}")
    if status not in (ok or [0]):
        raise ToolFailure(f"the command ended with status {status}{said}")
    answer: dict[str, Any] = {"exit": status, "output": output[0], "errors": errors[0]}
    return answer | {"truncated": True} if output[1] or errors[1] else answer


def _text(data: bytes, *, cut: bool) -> tuple[str, bool]:
    """As text that is no longer in JSON than as many bytes: what is no text takes several times its length there."""
    text = data.decode("utf-8", "replace")
    while len(json.dumps(text, ensure_ascii=False).encode()) > OUTPUT_BYTES + 2:
        text, cut = text[: len(text) * 3 // 4], True
    return text, cut


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _said(output: str, errors: str) -> str:
    """The end of both streams, for an error: what went wrong stands there."""
    parts = [
        f"{name}: {text.strip()[-_IN_AN_ERROR:]}" for name, text in (("errors", errors), ("output", output)) if text.strip()
    ]
    return "; ".join(["", *parts])


def _read(shell: subprocess.Popen[bytes], deadline: float) -> tuple[tuple[str, bool], tuple[str, bool], bool]:
    """Both streams to their end, the first part of each kept, as text, with whether there was more; and if it has ended."""
    kept = {shell.stdout: b"", shell.stderr: b""}
    cut = dict.fromkeys(kept, False)
    ended = True
    with selectors.DefaultSelector() as ready:
        for stream in kept:
            ready.register(stream, selectors.EVENT_READ)
        last = deadline
        while ready.get_map() or shell.poll() is None:
            found = ready.select(_LOOK_S)
            if shell.poll() is not None:
                last = min(last, time.monotonic() + _MARGIN_S)  # for what it has written; what it left behind may go on writing
                if not found or time.monotonic() > last:
                    break  # what it left running in the background ends with this call
            if time.monotonic() > deadline:
                ended = False
                break
            for key, _ in found:
                stream = key.fileobj
                data = os.read(key.fd, 1 << 16)
                if not data:
                    ready.unregister(stream)
                room = OUTPUT_BYTES - len(kept[stream])
                kept[stream] += data[:room]
                cut[stream] |= len(data) > room
    texts = {stream: _text(data, cut=cut[stream]) for stream, data in kept.items()}
    return texts[shell.stdout], texts[shell.stderr], ended
