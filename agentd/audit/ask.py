"""SQL over the log, for questions that nobody has thought of: answered by a process of its own, within bounds.

What a question takes of memory, time and disk is then the process's: the daemon waits for it, and reads so many bytes.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd.audit.asking import LARGEST_ANSWER
from agentd.errors import Reason, RequestError

if TYPE_CHECKING:
    from agentd.audit.index import Index

_SECONDS, _STARTING_S = 10.0, 10.0
_PROGRAM = Path(__file__).with_name("asking.py")


@dataclass(frozen=True, slots=True)
class Answer:
    """`more` says whether there were more rows than are given."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    more: bool


def ask(index: Index, index_file: Path, store_file: Path, sql: str) -> Answer:
    """One statement over the views `events` and `paths`. Blocks. Raises RequestError (BAD_FIELD), StoreError."""
    index.catch_up()
    try:
        asked = json.dumps({"index": str(index_file), "store": str(store_file), "sql": sql, "seconds": _SECONDS}).encode()
        said = _said(asked)
        answer = json.loads(said)
    except subprocess.TimeoutExpired:
        raise _refused(f"It took longer than {_SECONDS:g} seconds") from None
    except ValueError:
        raise _refused("It takes more memory than a question may") from None
    if "refused" in answer:
        raise _refused(str(answer["refused"]))
    rows = tuple(tuple(map(_value, row)) for row in answer["rows"])
    return Answer(tuple(answer["columns"]), rows, bool(answer["more"]))


def _said(asked: bytes) -> bytes:
    """Raises TimeoutExpired; ValueError if it says more than it may."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(asked, timeout=_SECONDS + _STARTING_S)
    finally:
        process.kill()
        process.wait()
    if len(said) > LARGEST_ANSWER:
        raise ValueError("too much")
    return said


def _value(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value


def _refused(why: str) -> RequestError:
    hint = "The views are events (seq, time, kind, principal, session, run, call, tool, decision, boot, body) and paths."
    return RequestError(Reason.BAD_FIELD, f"The question can't be answered: {why}.", hint=hint, field="sql")
