"""Fetching a model file: resumed where it was cut off, compared with its digest, in its place only when it is whole.

huggingface_hub (the extra `pull`) finds the file and moves its bytes. Its own download starts anew after a kill (since its
pull request 4228), so the unfinished file is kept here, under a name that says which version of the file it is part of.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentd import extras
from agentd.errors import EngineError, Reason, StoreError
from agentd.models import gguf, sha256_of
from agentd.store.durable import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from agentd.models.catalogue import Entry

ARCHITECTURE = "gemma4"
_SPARE = 256 << 20  # of the disk stay free
_ROUNDED = 0.05  # so far from the catalogue's size a file may be whose size is not known exactly
_CHUNK = 1 << 20
_ATTEMPTS, _PAUSE_S = 8, 2.0  # without a byte more in between


@dataclass(frozen=True, slots=True)
class Remote:
    """What a server says of a file. `digest` is a SHA-256, or empty."""

    url: str
    size: int
    digest: str
    version: str


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the disk refuses is said in a sentence. Raises StoreError (STORE_FULL)."""
    try:
        yield
    except OSError as e:
        message = f"{e.filename or path} can't be written: {e.strerror or e}."
        hint = "Look at the folder's owner and at the disk, or let XDG_DATA_HOME name another folder."
        raise StoreError(Reason.STORE_FULL, message, hint=hint, metadata={"path": str(path)}) from None


def pull(entry: Entry, mirror: str, tell: Callable[[str, int, int], None], pause_s: float = _PAUSE_S) -> Path:
    """`_pull`, with what the disk refuses as a sentence."""
    with _disk(entry.path):
        return _pull(entry, mirror, tell, pause_s)


def _pull(entry: Entry, mirror: str, tell: Callable[[str, int, int], None], pause_s: float) -> Path:
    """The file in its place. `tell(what, done, of)` tells of progress, in bytes.

    Raises EngineError (DOWNLOAD_FAILED, MODEL_INVALID), StoreError (STORE_FULL).
    """
    target = entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        remote = _find(entry, mirror)
        if target.exists() and target.stat().st_size == remote.size:
            tell("verifying", 0, remote.size)
            if sha256_of(target, lambda _: None) in (remote.digest, entry.sha256):
                return target
        part = target.with_name(f".{target.name}.{remote.version}.part")
        if part.exists() and (part.stat().st_size > remote.size or not remote.version):
            part.unlink()  # more came than there was, or nothing says of which version it is
        for other in target.parent.glob(f".{target.name}.*.part"):
            if other != part:
                other.unlink()  # of another version
        _require_room(target.parent, remote.size - (part.stat().st_size if part.exists() else 0), target.name)

        def again() -> Remote:
            found = _find(entry, mirror)
            if (found.size, found.version) != (remote.size, remote.version):
                raise _failed(entry.file, found.url, "it is another file now than when this began")
            return found

        _fetch(remote, part, lambda done: tell("fetching", done, remote.size), pause_s, again)
        _accept(part, target, remote.digest or entry.sha256, lambda done: tell("verifying", done, remote.size))
    return target


def take(entry: Entry, file: Path, tell: Callable[[str, int, int], None]) -> Path:
    """The same with a file that is on the disk already."""
    with _disk(entry.path):
        return _take(entry, file, tell)


def _take(entry: Entry, file: Path, tell: Callable[[str, int, int], None]) -> Path:
    target = entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        try:
            size = file.stat().st_size
            if file.resolve() == target.resolve():
                _require_right(target, entry.sha256, lambda done: tell("verifying", done, size))
                return target
            require_family(file)  # before gigabytes are copied
            if entry.bytes and not _is_about(size, entry):
                message = (
                    f"{file} has {size / 1e9:.2f} GB, and {entry.name} has {entry.bytes / 1e9:.2f} GB: it is another file."
                )
                hint = "It can be used by its path: agentd models use PATH."
                raise EngineError(Reason.MODEL_INVALID, message, hint=hint, metadata={"path": str(file)})
            part = target.with_name(f".{target.name}.copy.part")
            part.unlink(missing_ok=True)
            try:
                os.link(file.resolve(), part)  # on the same disk nothing is copied
            except OSError:
                _require_room(target.parent, size, target.name)
                _copy(file, part, lambda done: tell("copying", done, size))
        except OSError as e:
            message = f"{file} can't be taken: {e.strerror}."
            raise EngineError(Reason.MODEL_INVALID, message, hint="Give the path of a GGUF file.") from None
        _accept(part, target, entry.sha256, lambda done: tell("verifying", done, size))
    return target


def verify(path: Path, sha256: str, tell: Callable[[str, int, int], None]) -> str:
    """The digest of a file that is whole, and of Gemma 4. Raises EngineError (MODEL_INVALID)."""
    size = path.stat().st_size if path.exists() else 0
    return _require_right(path, sha256, lambda done: tell("verifying", done, size))


def require_family(path: Path, name: str = "") -> None:
    """Raises EngineError (MODEL_INVALID) for a file that is none, or of another family."""
    header = gguf.read(path)
    if header.architecture != ARCHITECTURE:
        family = header.architecture
        message = f"{name or path} is of the family {family!r}, and agentd speaks the format of Gemma 4 only."
        raise EngineError(Reason.MODEL_INVALID, message, hint="`agentd models list` shows those that it can use.")


def _find(entry: Entry, mirror: str) -> Remote:
    """Raises EngineError (DOWNLOAD_FAILED)."""
    hub = _hub()
    endpoint = mirror.rstrip("/") or None
    url = hub.hf_hub_url(entry.repository, entry.file, revision=entry.revision, endpoint=endpoint)
    try:
        told = hub.get_hf_file_metadata(url, token=_token(url), endpoint=endpoint)
    except Exception as e:  # whatever the hub's client, its transport or a proxy makes of it
        raise _failed(entry.file, url, e) from None
    if not told.size or told.size < 0:
        raise _failed(entry.file, url, "the server does not say how long the file is")
    if entry.exact and told.size != entry.bytes:
        raise _failed(entry.file, url, f"it has {told.size} bytes, and the one that is known has {entry.bytes}")
    etag = (told.etag or "").lower()
    digest = etag if len(etag) == 64 and not set(etag) - set("0123456789abcdef") else ""
    if entry.sha256 and digest and digest != entry.sha256:
        message = f"{entry.file} at {url} is another file than the one that is known: its SHA-256 is {digest}."
        hint = f"Name it hf:{entry.repository}/{entry.file} if you trust it all the same."
        raise EngineError(Reason.MODEL_INVALID, message, hint=hint, metadata={"url": url, "sha256": digest})
    told_apart = f"{etag}{told.commit_hash or ''}"
    version = (digest or (hashlib.sha256(told_apart.encode()).hexdigest() if told_apart else ""))[:16]
    return Remote(str(told.location), int(told.size), digest, version)


def _fetch(remote: Remote, part: Path, tell: Callable[[int], None], pause_s: float, again: Callable[[], Remote]) -> None:
    """All of it into `part`, from where that ends; `again` asks the server anew.

    Raises EngineError (DOWNLOAD_FAILED), StoreError.
    """
    hub, failures = _hub(), 0
    hub.constants.DOWNLOAD_CHUNK_SIZE = _CHUNK  # it keeps what has come in whole pieces only, of 10 MiB by itself
    while (before := part.stat().st_size if part.exists() else 0) < remote.size:
        try:
            with part.open("ab") as file:
                headers = hub.utils.build_hf_headers(token=_token(remote.url))
                hub.file_download.http_get(
                    *(remote.url, file),
                    resume_size=before,
                    headers=headers,
                    expected_size=remote.size,
                    tqdm_class=_bar(tell, remote.size),
                    _nb_retries=1,
                )
        except _TooMuch as e:
            part.unlink()
            raise _failed(part.name, remote.url, e) from None
        except OSError as e:
            _require_room(part.parent, remote.size - part.stat().st_size, part.name)
            reason: Exception = e
        except Exception as e:  # whatever the transport makes of it
            reason = e
        else:
            continue
        failures = failures + 1 if part.stat().st_size <= before else 0
        if failures >= _ATTEMPTS:
            raise _failed(part.name, remote.url, reason, part.stat().st_size)
        time.sleep(pause_s * min(16, 2**failures))
        remote = again()  # addresses of the servers behind it hold for a while only


def _accept(part: Path, target: Path, sha256: str, tell: Callable[[int], None]) -> None:
    """Into its place, durable, if it is right; gone if it is not. Raises EngineError (MODEL_INVALID)."""
    try:
        _require_right(part, sha256, tell, target.name)
    except EngineError:
        part.unlink(missing_ok=True)
        raise
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    sync_folder(target.parent)


def _require_right(path: Path, sha256: str, tell: Callable[[int], None], name: str = "") -> str:
    """Its digest. Raises EngineError (MODEL_INVALID) if it is another, or the file is none that agentd can use."""
    name = name or str(path)
    require_family(path, name)
    found = sha256_of(path, tell)
    if sha256 and found != sha256:
        message = f"{name} is damaged, or another file: its SHA-256 is {found}, and should be {sha256}."
        raise EngineError(Reason.MODEL_INVALID, message, hint="Fetch it anew.", metadata={"sha256": found})
    return found


def _is_about(size: int, entry: Entry) -> bool:
    return size == entry.bytes if entry.exact else abs(size - entry.bytes) <= _ROUNDED * entry.bytes


def _copy(source: Path, target: Path, tell: Callable[[int], None]) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        while chunk := old.read(_CHUNK):
            new.write(chunk)
            tell(new.tell())


def _require_room(folder: Path, wanted: int, name: str) -> None:
    """Raises StoreError (STORE_FULL)."""
    free = shutil.disk_usage(folder).free
    if wanted + _SPARE > free:
        message = f"{name} needs {wanted / 1e9:.2f} GB more, and {folder} has {free / 1e9:.2f} GB left."
        hint = "Free some space, or let XDG_DATA_HOME name a folder on another disk. What has come so far is kept."
        raise StoreError(Reason.STORE_FULL, message, hint=hint, metadata={"free": str(free), "wanted": str(wanted)})


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Nobody else fetches the same file meanwhile. Raises EngineError (DOWNLOAD_FAILED)."""
    lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        message = f"{target.name} is being fetched by another agentd."
        raise EngineError(Reason.DOWNLOAD_FAILED, message, hint="Wait for it, or end it.") from None
    try:
        yield
    finally:
        os.close(lock)


class _TooMuch(Exception):
    """More came than the server had said."""


def _bar(tell: Callable[[int], None], most: int) -> Any:
    """What the hub's client takes for a bar of tqdm: told of each piece, it tells us, and ends what has no end."""
    from tqdm import tqdm  # comes with huggingface_hub

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **more: Any) -> None:
            more["disable"] = True
            more.pop("name", None)
            super().__init__(*arguments, **more)
            self.done = int(more.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.done += int(n or 0)
            if self.done > most:
                raise _TooMuch("more came than the server had said")
            tell(self.done)
            return None

    return Bar


def _token(url: str) -> bool | None:
    """A person's token is for the hub itself: no mirror, and no server that the file really lies on, gets it."""
    split = urlsplit(url)
    return None if (split.scheme, split.netloc) == ("https", "huggingface.co") else False


def _hub() -> Any:
    """Raises EngineError (DOWNLOAD_FAILED) where the extra is not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # it has no way to go on with half a file
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.file_download
    except ImportError:
        message = "Fetching models needs huggingface_hub, which is not installed."
        hint = f"Install it: {extras.install('pull')}. Or take a file you have: agentd models pull NAME --file FILE."
        raise EngineError(Reason.DOWNLOAD_FAILED, message, hint=hint) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each break is told of here, if it is not overcome
    return huggingface_hub


def _failed(name: str, url: str, why: object, done: int = 0) -> EngineError:
    words = " ".join(str(why).split())[:300] or type(why).__name__
    kept = f" {done / 1e6:,.0f} MB have come and are kept: the next pull goes on there." if done else ""
    hint = f"Look at the network, or name another server with --mirror.{kept}"
    return EngineError(Reason.DOWNLOAD_FAILED, f"{name} can't be fetched from {url}: {words}", hint=hint, metadata={"url": url})
