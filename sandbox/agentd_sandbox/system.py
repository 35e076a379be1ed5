"""What may be read without any scope: Python's own library, and with programs to start what those need to run at all."""

from __future__ import annotations

import os
import sysconfig
from functools import cache

from agentd_sandbox import network
from agentd_sandbox.access import PathRule, Rules

_ZONES = ("/usr/share/zoneinfo", "/etc/localtime")
_PROGRAMS = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/ca-certificates", "/etc/pki/tls/certs"),
    *("/etc/localtime", "/etc/timezone", "/etc/mime.types", "/etc/magic", "/etc/inputrc", "/etc/terminfo"),
    *("/system", "/apex", "/vendor/lib", "/vendor/lib64", "/linkerconfig"),  # Android's own linker and libraries
)
"""Nothing here is anybody's own: files that a distribution installs."""


_IN_PREFIX = ("bin", "lib", "libexec", "share", "etc/alternatives", "etc/tls", "etc/terminfo", "etc/inputrc", "etc/mime.types")
"""Of Termux's $PREFIX. Not: host keys and configuration in the rest of its etc, tmp, var."""
_PACKAGES = frozenset({"site-packages", "dist-packages"})


@cache
def python_rules() -> tuple[PathRule, ...]:
    """Python's own modules; not the packages that somebody has installed beside them, the daemon's own for one."""
    folders = {path for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name))}
    modules = [os.path.join(folder, name) for folder in folders for name in sorted(set(_listed(folder)) - _PACKAGES)]
    spelled = dict.fromkeys((*folders, *map(os.path.realpath, folders)))
    themselves = (PathRule(os.fsencode(folder), glob=True) for folder in spelled if "*" not in folder)
    return (*themselves, *_rules((*modules, *_ZONES)))


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


@cache
def program_rules() -> tuple[PathRule, ...]:
    prefix = os.environ.get("PREFIX")  # Termux: /data/data/com.termux/files/usr
    own = [os.path.join(prefix, name) for name in _IN_PREFIX] if prefix else []
    return _rules((*_PROGRAMS, *own))


@cache
def system_rules(*, programs: bool) -> Rules:
    """What every call may read: Python's own modules, and with `programs` what these need to run."""
    return Rules((*python_rules(), *(program_rules() if programs else ())))


def is_part_of_system(path: bytes) -> bool:
    """Whether a path lies where distributions, and nobody else, keep things."""
    return _all_rules().cover(path)


@cache
def _all_rules() -> Rules:
    return Rules((*program_rules(), *python_rules()))


def _rules(paths: tuple[str, ...]) -> tuple[PathRule, ...]:
    """By their real paths, and as they are spelled: both lead to the same, but a link itself is seen by its spelling."""
    spelled = dict.fromkeys((*paths, *(os.path.realpath(path) for path in paths)))
    return tuple(PathRule(os.fsencode(path)) for path in spelled)


def environment(folder: str) -> dict[str, str]:
    """All that tools and the programs they start get to see of ours."""
    zone = {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}
    proxy = "http://{}:{}".format(*network.PROXY)
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), proxy)
    path = os.environ.get("PREFIX", "/usr") + "/bin:/usr/bin:/bin"
    # No LANG: in C.utf8 all but the characters is as in C, and each category costs every program two calls to the broker.
    return {"PATH": path, "LC_CTYPE": "C.utf8", "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1", **proxies, **zone}
