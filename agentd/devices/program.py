"""A program of this device that is run for a tool: by full path, without a shell, with an end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

from agentd_sandbox import DeviceFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST = 64 << 10


def run(command: Sequence[str], text: str = "", patience_s: float = 15.0) -> str:
    """What it prints; `text` is its standard input. Raises DeviceFailure if it fails, or does not end in time.

    Programs of Termux:API hang now and then (termux-api #861): one that does is killed with all it has started.
    """
    name = os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as e:
        raise DeviceFailure(f"{name} can't be started: {e.strerror}") from None
    with process:
        try:
            said, complained = process.communicate(text.encode(), patience_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise DeviceFailure(f"{name} did not answer in {patience_s:g} s") from None
    if process.returncode:
        why = complained.decode("utf-8", "replace").strip().splitlines()
        raise DeviceFailure(f"{name} ended with status {process.returncode}" + (f": {why[-1][:200]}" if why else ""))
    return said[:_LONGEST].decode("utf-8", "replace").strip()
