"""What it means to have a device operated: decided here by its name, whatever the manifest of a tool says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NODES = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Risk:
    """`asks`: a person is asked unless a grant names the very tool. `lasts`: it can't be taken back. `sends`: it could carry
    what a run knows to others. `private`: what it gives back is.
    """

    asks: bool = False
    lasts: bool = False
    sends: bool = False
    private: bool = False


_UNKNOWN = Risk(asks=True, lasts=True, sends=True, private=True)
_RISKS = (
    (re.compile(r"gpio/[^/]+/read"), Risk(asks=True)),  # what is not held becomes an input
    (re.compile(r"gpio/[^/]+"), Risk(asks=True, lasts=True)),
    (re.compile(r"screen/message"), Risk(lasts=True)),
    (re.compile(r"termux/battery"), Risk()),
    (re.compile(r"termux/clipboard/get"), Risk(asks=True, private=True)),
    (re.compile(r"termux/clipboard/set"), Risk(lasts=True, sends=True)),
    (re.compile(r"termux/location"), Risk(asks=True, private=True)),
    (re.compile(r"termux/sms/[^/]*"), Risk(asks=True, lasts=True, sends=True)),
    (re.compile(r"termux/torch"), Risk(asks=True, lasts=True)),
    (re.compile(r"termux/voice"), Risk(lasts=True, sends=True)),
)
"""By the name, or by the template for names in a manifest. The first that fits."""


def is_node(name: str) -> bool:
    """Whether it stands for nodes that a tool opens itself."""
    return _NODES.fullmatch(name) is not None


def is_known(name: str) -> bool:
    return is_node(name) or any(pattern.fullmatch(name) for pattern, _ in _RISKS)


def risk(name: str) -> Risk:
    """Of nodes nobody here knows what they do."""
    if is_node(name):
        return Risk(lasts=True, sends=True)
    return next((found for pattern, found in _RISKS if pattern.fullmatch(name)), _UNKNOWN)
