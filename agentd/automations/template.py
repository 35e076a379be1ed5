"""Templates: text with `{name}` for what a trigger knows. Nothing else: no attributes, no formats, no code.

What is put in comes from file names and callers, so it is hostile: characters that are not printable are refused, and the
engine reads it as text, never as its own markup. What goes into a command is quoted for the shell, so a value is one word;
where that can't be done, within quotes say, the template is refused.
"""

from __future__ import annotations

import shlex
import string
import unicodedata
from typing import TYPE_CHECKING, Any

from agentd.errors import Reason, ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LONGEST_VALUE = 4096
_OTHER_RULES = ("`", "<<", "((", "$'", "$[", "[[", "let ", "eval ")
_FORMATTER = string.Formatter()


def check(text: str, fields: frozenset[str]) -> None:
    """Raises ValueError for what names something else than `fields`, or is more than a name."""
    try:
        parts = list(_FORMATTER.parse(text))
    except ValueError as e:
        raise ValueError(f"the template {_short(text)!r} is broken: {e}; a brace itself is written twice") from None
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if form or conversion or name not in fields:
            known = ", ".join(f"{{{field}}}" for field in sorted(fields))
            raise ValueError(f"the template {_short(text)!r} names {{{name}}}; known are {known}")


def require_quotable(text: str) -> None:
    """Raises ValueError for a command in which a value could be more than a word: it has to stand outside of quotes, and of
    what the shell reads by other rules (sh(1): backquotes, here-documents, arithmetic).
    """
    parts = [(literal, name) for literal, name, _, _ in _FORMATTER.parse(text)]
    if not any(name is not None for _, name in parts):
        return
    whole = "".join(literal for literal, _ in parts)
    for mark in _OTHER_RULES:
        if mark in whole:
            raise ValueError(f"{_short(text)!r} has {mark} in it, where no value can be quoted: use $( ) or a script")
    quote, before = "", " "
    for literal, name in parts:
        quote = _open_quote(literal, quote, before)
        before = "x" if name is not None else literal[-1:]
        if name is not None and quote:
            where = {"#": "in a comment", "\\": "behind a backslash"}.get(quote, f"within {quote}")
            raise ValueError(f"the command {_short(text)!r} has {{{name}}} {where}: write it alone, it is quoted by itself")


def _open_quote(text: str, quote: str, before: str) -> str:
    """What is open after a piece of a command: a quotation mark, a backslash, a comment, or nothing. Raises ValueError for what
    begins anew within quotation marks, `"$(...)"`: where it ends, only a shell can tell.
    """
    for character in text:
        if quote == '"' and before == "$" and character in "({":
            raise ValueError(
                f"the command has ${character} within quotation marks, where no value can be quoted: use a variable"
            )
        if quote == "\\":
            quote = ""
        elif quote == '"\\':
            quote = '"'
        elif quote == "#":
            quote = "" if character == "\n" else quote
        elif quote == '"' and character == "\\":
            quote = '"\\'
        elif quote in ("'", '"'):
            quote = "" if character == quote else quote
        elif character in "'\"\\" or (character == "#" and before in " \t\n;&|()"):
            quote = character
        before = character
    return quote


def filled(text: str, data: Mapping[str, str], *, quoted: bool = False) -> str:
    """A template that was checked, with what the trigger knows; `quoted` for the shell. Raises ToolError (BAD_FIELD) for what
    it did not know then.
    """
    missing = {name for _, name, _, _ in _FORMATTER.parse(text) if name is not None} - set(data)
    if missing:
        message = f"The automation was changed since this came: it had no {{{min(missing)}}} then."
        raise ToolError(Reason.BAD_FIELD, message, field="data")
    value = (lambda name: shlex.quote(data[name])) if quoted else data.__getitem__
    return "".join(literal + (value(name) if name is not None else "") for literal, name, _, _ in _FORMATTER.parse(text))


def filled_call(arguments: Mapping[str, Any], data: Mapping[str, str], commands: frozenset[str]) -> dict[str, Any]:
    """The arguments of a call; those that are `commands` are for the shell."""
    return {
        name: filled(value, data, quoted=True) if name in commands and isinstance(value, str) else filled_all(value, data)
        for name, value in arguments.items()
    }


def filled_all(value: Any, data: Mapping[str, str]) -> Any:
    """The same for all texts in a JSON value."""
    match value:
        case str():
            return filled(value, data)
        case dict():
            return {key: filled_all(each, data) for key, each in value.items()}
        case list():
            return [filled_all(each, data) for each in value]
    return value


def texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from texts(each)
        case list():
            for each in value:
                yield from texts(each)


def require_fit(data: Mapping[str, str]) -> None:
    """Raises ToolError (BAD_FIELD) for what may not stand in a prompt."""
    for name, value in data.items():
        if len(value) > LONGEST_VALUE:
            why = f"has {len(value)} characters; {LONGEST_VALUE} are the most"
        elif any(not _harmless(character) and character not in "\n\t" for character in value):
            why = "has characters that can't be printed"
        elif name in ("path", "name", "folder") and not all(map(_harmless, value)):
            why = "is a file name of several lines"
        else:
            continue
        shown = ascii(_short(value))
        raise ToolError(Reason.BAD_FIELD, f"What the trigger says of {name!r} {why}: {shown}.", field=name)


def _harmless(character: str) -> bool:
    """Also the spaces that Python does not print, as in the names that macOS gives to pictures of a screen."""
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
