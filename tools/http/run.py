"""The bundle `http`. Requests go to the daemon's proxy, which makes them in its own name and adds credentials there."""

from __future__ import annotations

import contextlib
import http.client
import os
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentd_sandbox.sdk import ToolFailure, tool

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_BYTES = 48_000
REDIRECTS = 5
_CHUNK = 1 << 16


@contextlib.contextmanager
def _request(
    method: str, url: str, credential: str | None, body: bytes | None = None, kind: str | None = None
) -> Iterator[http.client.HTTPResponse]:
    """The answer to one request; follows redirects on the same host only, as nothing else is granted."""
    headers = {"User-Agent": "agentd", "Accept": "*/*"}
    if credential:
        headers["Authorization"] = f"Bearer cred://{credential}"
    if kind:
        headers["Content-Type"] = kind
    proxy = urllib.parse.urlsplit(os.environ["http_proxy"])
    for _ in range(REDIRECTS):
        connection = http.client.HTTPConnection(proxy.hostname or "", proxy.port, timeout=35)
        try:
            connection.request(method, url, body, headers)
            response = connection.getresponse()
            leads = response.getheader("Location")
            if method != "GET" or response.status not in (301, 302, 303, 307, 308) or not leads:
                yield response
                return
            following = urllib.parse.urljoin(url, leads)
            if urllib.parse.urlsplit(following)[:2] != urllib.parse.urlsplit(url)[:2]:
                raise ToolFailure(f"{url} leads to {following}, which is another host: ask for that address itself")
            url = following
        finally:
            connection.close()
    raise ToolFailure(f"{url} leads in circles")


def _text(response: http.client.HTTPResponse) -> dict[str, Any]:
    data = response.read(READ_BYTES + 1)
    charset = response.headers.get_content_charset() or "utf-8"
    try:
        text = data[:READ_BYTES].decode(charset, "replace")
    except LookupError:
        text = data[:READ_BYTES].decode("utf-8", "replace")
    answer: dict[str, Any] = {"status": response.status, "text": text}
    return answer | {"truncated": True} if len(data) > READ_BYTES else answer


@tool("fetch")
def fetch(url: str, credential: str | None = None) -> dict[str, Any]:
    with _request("GET", url, credential) as response:
        return _text(response)


@tool("post")
def post(url: str, text: str, type: str | None = None, credential: str | None = None) -> dict[str, Any]:  # noqa: A002
    with _request("POST", url, credential, text.encode(), f"{type or 'text/plain'}; charset=utf-8") as response:
        return _text(response)


@tool("download")
def download(url: str, path: str, credential: str | None = None) -> dict[str, Any]:
    with _request("GET", url, credential) as response:
        if response.status != http.client.OK:
            raise ToolFailure(f"{url} answered {response.status} {response.reason}")
        size = 0
        with Path(path).open("wb") as file:
            while chunk := response.read(_CHUNK):
                size += file.write(chunk)
    return {"bytes": size, "type": response.headers.get_content_type()}
