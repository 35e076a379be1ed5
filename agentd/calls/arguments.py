"""Arguments of a call: checked against the manifest, paths normalised, needs filled in to scopes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, Optional

from agentd_sandbox.network import split_authority, split_url
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from agentd.calls.manifest import TEMPLATE
from agentd.errors import Reason, RequestError, first_mistake
from agentd.grants import PATH_KINDS, Scope, normalise, real

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentd.calls.manifest import Parameter, Tool

_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool}
LONGEST_PATH = 4096


class Arguments:
    """Checks and fills in the arguments of one tool. Built once per tool."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        parameters = tool.manifest.parameters
        self._model = _model(tool.name, parameters.properties, parameters.required)
        self._paths = [name for name, p in parameters.properties.items() if p.format == "path"]
        self._urls = [name for name, p in parameters.properties.items() if p.format == "url"]

    def check(self, arguments: Mapping[str, Any], folder: str) -> dict[str, Any]:
        """The arguments as the tool will get them: complete, typed, paths absolute.

        Raises RequestError (BAD_ARGUMENTS) that says which one is wrong and how.
        """
        try:
            checked = self._model.model_validate(dict(arguments), strict=True).model_dump(exclude_unset=True)
        except ValidationError as e:
            field, what = first_mistake(e)
            raise self._bad(field or "arguments", what) from None
        _no_hidden_characters(self, checked, "")
        for name in self._paths:
            if name in checked:
                if not checked[name].strip():
                    raise self._bad(name, "is empty")
                if len(os.fsencode(checked[name])) > LONGEST_PATH:
                    raise self._bad(name, f"is longer than {LONGEST_PATH} bytes")
                checked[name] = normalise(checked[name], folder)
        for name in self._urls:
            if name in checked:
                try:
                    checked[name] = str(split_url(checked[name]))
                except ValueError as e:
                    raise self._bad(name, str(e)) from None
        return checked

    def scopes(self, checked: Mapping[str, Any], variables: Mapping[str, str]) -> tuple[Scope, ...]:
        """What this one call needs. A path that is a link stands for itself and for where it leads."""
        found: list[Scope] = []
        for kind, template in self._tool.manifest.needs.templates():
            names = TEMPLATE.findall(template)
            if any(name in self._tool.manifest.parameters.properties and name not in checked for name in names):
                continue  # an optional argument that was not given
            own = [name for name in names if name in checked]
            value = TEMPLATE.sub(lambda m: str(checked.get(m[1], variables.get(m[1], ""))), template)
            found.append(Scope(kind, _peer(value) if kind == "connect" else value, glob="*" in template and not own))
            if kind in PATH_KINDS and own and os.path.islink(value):
                found.append(Scope(kind, real(value)))
        return tuple(dict.fromkeys(found))

    def _bad(self, field: str, why: str) -> RequestError:
        return RequestError(
            Reason.BAD_ARGUMENTS,
            f"{self._tool.name} can't be called like this: {field}: {why}.",
            hint=f"It takes {', '.join(self._tool.manifest.parameters.properties) or 'no arguments'}.",
            field=f"arguments.{field}",
            metadata={"tool": self._tool.name, "argument": field},
        )


def _peer(value: str) -> str:
    """host:port of an address, or of what says just that."""
    if "://" in value:
        url = split_url(value)
        return _spelled(url.host, url.port)
    return _spelled(*split_authority(value, None))


def _spelled(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _no_hidden_characters(arguments: Arguments, value: Any, field: str) -> None:
    match value:
        case str():
            if "\0" in value:
                raise arguments._bad(field, "contains a NUL character")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise arguments._bad(field, "is not valid Unicode") from None
        case dict():
            for key, item in value.items():
                _no_hidden_characters(arguments, item, f"{field}.{key}" if field else key)
        case list():
            for i, item in enumerate(value):
                _no_hidden_characters(arguments, item, f"{field}[{i}]")


def _model(name: str, properties: Mapping[str, Parameter], required: tuple[str, ...]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for key, parameter in properties.items():
        kind = _type(f"{name}.{key}", parameter)
        fields[key] = (kind, ...) if key in required else (Optional[kind], Field(default=None))  # noqa: UP045
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _type(name: str, parameter: Parameter) -> Any:
    kind: Any
    if parameter.enum is not None:
        kind = Literal[parameter.enum]
    elif parameter.type == "array" and parameter.items is not None:
        kind = list[_type(f"{name}[]", parameter.items)]  # type: ignore[misc] # the type is data here
    elif parameter.type == "object" and parameter.properties is not None:
        kind = _model(name, parameter.properties, parameter.required)
    else:
        kind = _SCALARS[parameter.type]
    return Optional[kind] if parameter.nullable else kind  # noqa: UP045
