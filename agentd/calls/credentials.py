"""Credentials: secrets that the daemon adds to its own requests, for one place only. No tool ever sees one.

The secret is a file of the credential's name that nobody else can read: in the folder that systemd gives a service
($CREDENTIALS_DIRECTORY, systemd.exec(5)) or in `credentials` below the state folder.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from agentd_sandbox import Credential
from agentd_sandbox.network import canonical_host

from agentd.errors import ConfigError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentd.config import CredentialConfig

LONGEST_SECRET = 8192


def load_credentials(configured: Iterable[CredentialConfig], state: Path) -> dict[str, Credential]:
    """By name. Raises ConfigError (CREDENTIAL_INVALID) naming the credential and the file, never what is in it."""
    found: dict[str, Credential] = {}
    for each in configured:
        host = canonical_host(each.host)
        if host is None:
            raise _invalid(each.name, f"{each.host!r} is no host")
        found[each.name] = Credential(host, each.port, each.path, _secret(each.name, state))
    return found


def _secret(name: str, state: Path) -> str:
    folders = [Path(given)] if (given := os.environ.get("CREDENTIALS_DIRECTORY")) else []
    for folder in (*folders, state / "credentials"):
        file = folder / name
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise _invalid(name, f"{file} can't be read: {e.strerror}") from None
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid not in (os.getuid(), 0):
                raise _invalid(name, f"{file} can be read by others; chmod 600 it")
            return _text(name, file, opened.read(LONGEST_SECRET + 1))
    raise _invalid(name, f"there is no file {state / 'credentials' / name}")


def _text(name: str, file: Path, data: bytes) -> str:
    secret = data.decode("latin-1").strip()
    if not 8 <= len(secret) <= LONGEST_SECRET or not secret.isascii() or not secret.isprintable():
        raise _invalid(name, f"{file} holds no secret of 8 or more printable characters in one line")
    return secret


def _invalid(name: str, why: str) -> ConfigError:
    return ConfigError(
        Reason.CREDENTIAL_INVALID,
        f"The credential {name} can't be used: {why}.",
        hint="docs/configuration.md says where a secret lies and who may read it.",
        metadata={"credential": name},
    )
