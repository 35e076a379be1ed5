"""The bundle `files`. Paths arrive absolute and normalised; what is outside the call's scopes does not exist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from agentd_sandbox.sdk import ToolFailure, tool

READ_BYTES = 24_000
ENTRIES = 200
MATCHES = 50
SEARCHED_BYTES = 1 << 20


def _text(path: Path, limit: int) -> tuple[str, bool]:
    """The first `limit` bytes of a text file, and whether there is more."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if b"\0" in data:
        raise ToolFailure(f"{path} is not a text file")
    cut = len(data) > limit
    try:
        return data[:limit].decode("utf-8", "ignore" if cut else "strict"), cut
    except UnicodeDecodeError:
        raise ToolFailure(f"{path} is not a text file") from None


@tool("read")
def read_file(path: str) -> dict[str, Any]:
    text, cut = _text(Path(path), READ_BYTES)
    return {"text": text, "truncated": True} if cut else {"text": text}


@tool("write")
def write_file(path: str, text: str) -> dict[str, Any]:
    data = (text if text.endswith("\n") else text + "\n").encode()
    Path(path).write_bytes(data)
    return {"bytes": len(data)}


@tool("append")
def append_line(path: str, text: str) -> dict[str, Any]:
    line = (text.rstrip("\n") + "\n").encode()
    with Path(path).open("ab") as file:
        if file.tell() and _last_byte(Path(path)) != b"\n":
            file.write(b"\n")  # the line is to stand on its own
        file.write(line)
    return {"bytes": len(line)}


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


@tool("list")
def list_folder(path: str) -> dict[str, Any]:
    with os.scandir(path) as entries:
        names = sorted(entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "") for entry in entries)
    listing: dict[str, Any] = {"count": len(names), "entries": names[:ENTRIES]}
    return listing | {"truncated": True} if len(names) > ENTRIES else listing


@tool("search")
def search_files(path: str, text: str) -> dict[str, Any]:
    root, wanted = Path(path), text.casefold()
    matches: list[str] = []
    count = 0
    for file in _files(root):
        try:
            content, _ = _text(file, SEARCHED_BYTES)
        except (OSError, ToolFailure):
            continue
        shown = file.name if file == root else str(file.relative_to(root))
        for number, line in enumerate(content.splitlines(), 1):
            if wanted in line.casefold():
                count += 1
                if len(matches) < MATCHES:
                    matches.append(f"{shown}:{number}: {line.strip()[:200]}")
    return {"count": count, "matches": matches}


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        root.stat()  # says which path it is that does not exist
        return [root]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names)]
    return found


@tool("move")
def move_file(path: str, to: str) -> dict[str, Any]:
    source, target = Path(path), Path(to)
    if source.is_dir():
        raise ToolFailure(f"{path} is a folder: only files can be moved")
    if target.is_dir():
        raise ToolFailure(f"{to} is a folder: give the new name of the file too")
    if target.exists():
        raise ToolFailure(f"{to} exists already")
    source.rename(target)
    return {"moved": True}


@tool("delete")
def delete(path: str) -> dict[str, Any]:
    target = Path(path)
    if target.is_dir() and not target.is_symlink():
        target.rmdir()
    else:
        target.unlink()
    return {"deleted": True}
