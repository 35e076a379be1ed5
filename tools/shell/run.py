"""The bundle `shell`: sh with its children, confined as any tool; what it may use is the one folder."""

from __future__ import annotations

import os
import selectors
import subprocess
from pathlib import Path
from typing import Any

from agentd_sandbox.sdk import ToolFailure, tool

OUTPUT_BYTES = 24_000
_LOOK_S = 0.1


@tool("run")
def run(command: str, folder: str) -> dict[str, Any]:
    if not Path(folder).is_dir():
        raise ToolFailure(f"{folder} is not a folder")
    os.chdir(folder)
    line = ["sh", "-c", command]  # by PATH, which is the sandbox's own: Termux has no /bin/sh
    shell = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = _read(shell)
    answer: dict[str, Any] = {"exit": shell.wait(), "output": output[0], "errors": errors[0]}
    return answer | {"truncated": True} if output[1] or errors[1] else answer


def _read(shell: subprocess.Popen[bytes]) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Both streams to their end, the first part of each kept: as text, and whether there was more."""
    kept = {shell.stdout: b"", shell.stderr: b""}
    cut = dict.fromkeys(kept, False)
    with selectors.DefaultSelector() as ready:
        for stream in kept:
            ready.register(stream, selectors.EVENT_READ)
        while ready.get_map():
            found = ready.select(_LOOK_S)
            if not found and shell.poll() is not None:
                break  # what it left running in the background ends with this call
            for key, _ in found:
                stream = key.fileobj
                data = os.read(key.fd, 1 << 16)
                if not data:
                    ready.unregister(stream)
                room = OUTPUT_BYTES - len(kept[stream])
                kept[stream] += data[:room]
                cut[stream] |= len(data) > room
    texts = {stream: (data.decode("utf-8", "replace"), cut[stream]) for stream, data in kept.items()}
    return texts[shell.stdout], texts[shell.stderr]
