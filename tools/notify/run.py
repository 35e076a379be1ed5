"""The bundle `notify`: ntfy's protocol, a POST made by the daemon's proxy; or this device's own screen."""

from __future__ import annotations

import base64
import http.client
import os
import urllib.parse
from typing import Any

from agentd_sandbox.sdk import ToolFailure, operate, tool

_LONGEST_TEXT, _LONGEST_TITLE = 4000, 200
"""ntfy makes an attachment of a longer text."""


@tool("send")
def send(
    url: str, text: str, title: str | None = None, priority: str | None = None, credential: str | None = None
) -> dict[str, Any]:
    if not text.strip():
        raise ToolFailure("the message is empty")
    headers = {"User-Agent": "agentd", "Content-Type": "text/plain; charset=utf-8"}
    if title:
        words = base64.b64encode(title[:_LONGEST_TITLE].encode()).decode()
        headers["Title"] = f"=?UTF-8?B?{words}?="  # RFC 2047: a header has no other way to say what is not ASCII
    if priority:
        headers["Priority"] = priority
    if credential:
        headers["Authorization"] = f"Bearer cred://{credential}"
    proxy = urllib.parse.urlsplit(os.environ["http_proxy"])
    connection = http.client.HTTPConnection(proxy.hostname or "", proxy.port, timeout=35)
    try:
        connection.request("POST", url, text[:_LONGEST_TEXT].encode(), headers)
        response = connection.getresponse()
        said = response.read(500).decode("utf-8", "replace")
    finally:
        connection.close()
    if response.status >= 300:
        raise ToolFailure(f"the server answered {response.status}: {said[:200]}")
    return {"sent": True, "status": response.status}


@tool("show")
def show(text: str, title: str | None = None, priority: str | None = None) -> dict[str, Any]:
    if not text.strip():
        raise ToolFailure("the message is empty")
    text, title = text[:_LONGEST_TEXT], (title or "")[:_LONGEST_TITLE]
    return operate("screen/message", text=text, title=title, priority=priority or "default")
