"""Text that others have written, made fit to be shown: models, tools, files, clients and their names.

What is not printable (Unicode: controls, directions, invisible characters) is shown as its number. So nothing takes over a
terminal, turns a line around, adds lines of its own, or pushes away what stands beside it.
"""

from __future__ import annotations

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def one_line(text: str) -> str:
    """On the line where it stands."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _NAMED.get(c) or _number(c) for c in text)


def lines(text: str) -> str:
    """With its own lines and tabs, for where it stands alone."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else _number(c) for c in text)


def _number(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x1_0000 else f"\\U{number:08x}"
