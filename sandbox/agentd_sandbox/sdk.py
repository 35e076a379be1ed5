"""What a tool program needs: register functions, refuse with a sentence, read the call's variables, have a device operated.

    from agentd_sandbox.sdk import ToolFailure, tool, variables

    @tool("read")
    def read_file(path: str) -> dict[str, object]:
        ...

The name is that of the tool in the manifest; arguments come by keyword. A tool returns a JSON object with
identifiers for keys. `ToolFailure("sentence")` and any OSError become the result
`{"error": "sentence"}`. The program runs once, in a process that can open only what the call's scopes name;
everything else does not exist for it.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import urllib.parse
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound="Callable[..., dict[str, Any]]")

registered: dict[str, Callable[..., dict[str, Any]]] = {}
variables: dict[str, str] = {}
"""Settings of the daemon that a tool may know, such as the folder sysfs is mounted on; and `deadline_s` of the call."""


class ToolFailure(Exception):
    """The call could not be done; the message says why, to the model and to people."""


def tool(name: str) -> Callable[[F], F]:
    """Make a function the tool `name` of its bundle."""

    def register(function: F) -> F:
        registered[name] = function
        return function

    return register


def operate(device: str, **request: Any) -> dict[str, Any]:
    """Have the daemon operate a device of this call's scopes, such as `gpio/17`. What it takes and gives back is the device's.

    Raises ToolFailure with what the daemon says of it.
    """
    proxy = urllib.parse.urlsplit(os.environ["http_proxy"])
    connection = http.client.HTTPConnection(proxy.hostname or "", proxy.port)  # the call's deadline ends the waiting
    try:
        connection.request("POST", "device:" + urllib.parse.quote(device), json.dumps(request).encode())
        response = connection.getresponse()
        said = response.read()
    except (OSError, http.client.HTTPException):
        raise ToolFailure(f"the device {device} can't be reached by this call") from None
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise ToolFailure(said.decode("utf-8", "replace").removeprefix("agentd: ").strip())
    answer: dict[str, Any] = json.loads(said)
    return answer


def explain(error: OSError) -> str:
    """An OSError as a short sentence with the path it is about."""
    path = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename or b"")
    sentences = {
        errno.ENOENT: "does not exist",
        errno.EEXIST: "exists already",
        errno.EISDIR: "is a folder",
        errno.ENOTDIR: "is not a folder",
        errno.ENOTEMPTY: "is not empty",
        errno.EACCES: "may not be used by this call",
        errno.EPERM: "may not be changed by this call",
        errno.EMLINK: "has more than one hard link",
        errno.ENOSPC: "does not fit: the disk is full",
        errno.EFBIG: "is too large",
    }
    return f"{path or 'it'} {sentences.get(error.errno or 0, f'failed: {error.strerror}')}"
