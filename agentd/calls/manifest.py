"""Tool bundles: a manifest and a program each. A manifest that says anything unknown is refused whole."""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentd.devices import Risk, is_known, risk
from agentd.errors import ConfigError, Reason, first_mistake

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.resources.abc import Traversable

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
TEMPLATE = re.compile(r"\{([a-z0-9_]+)\}")
VARIABLES = frozenset({"sysfs", "proc", "folder", "prefix"})
"""Settings of the daemon that needs may name beside arguments."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parameter(_Strict):
    """The part of JSON Schema that Gemma's template can express. `format` is "path" for a path of this
    device, "url" for an http or https address, "command" for a line that a shell reads.
    """

    type: Literal["string", "integer", "number", "boolean", "array", "object"]
    description: str = ""
    format: Literal["path", "url", "command"] | None = None
    enum: tuple[str, ...] | None = None
    nullable: bool = False
    items: Parameter | None = None
    properties: dict[Name, Parameter] | None = None
    required: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        if (self.enum is not None or self.format is not None) and self.type != "string":
            raise ValueError("enum and format are for strings")
        if (self.items is not None) != (self.type == "array"):
            raise ValueError("an array needs items, and only an array has them")
        if (self.properties is not None) != (self.type == "object"):
            raise ValueError("an object needs properties, and only an object has them")
        return self


class Parameters(_Strict):
    type: Literal["object"] = "object"
    properties: dict[Name, Parameter] = {}
    required: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _required_exist(self) -> Self:
        for name in self.required:
            if name not in self.properties:
                raise ValueError(f"required names {name!r}, which is not among the properties")
        return self


class Needs(_Strict):
    """What a call touches, as templates over its arguments.

    `connect` takes host:port or the name of a parameter that is an address; `exec` programs; `use` names of credentials,
    `device` of devices: NAME for nodes that the tool opens itself, KIND/NAME for what the daemon operates for it.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    exec: tuple[str, ...] = ()
    connect: tuple[str, ...] = ()
    use: tuple[str, ...] = ()
    device: tuple[str, ...] = ()

    def templates(self) -> list[tuple[str, str]]:
        """(kind of scope, template) of all of them."""
        return [(kind, template) for kind in type(self).model_fields for template in getattr(self, kind)]


class ToolManifest(_Strict):
    name: Name
    description: str = Field(min_length=1, max_length=400)
    parameters: Parameters = Parameters()
    needs: Needs = Needs()
    effect: Literal["none", "files", "external", "physical"]
    untrusted: bool = False
    """Whether what it gives back may be others' words, wherever it has them from."""
    private: bool = False
    """Whether what it gives back is private, wherever it has it from. So it is where its devices make it so."""
    ask: bool = False
    """Whether a person is asked unless a grant names this very tool. So it is for what is physical, and for some devices."""
    deadline_s: float = Field(default=10, gt=0, le=600)
    output_bytes: int = Field(default=16384, ge=256, le=1 << 20)

    @property
    def asks(self) -> bool:
        return self.ask or self.effect == "physical" or any(each.asks for each in self._risks)

    @property
    def gives_private(self) -> bool:
        return self.private or any(each.private for each in self._risks)

    @property
    def reaches_outside(self) -> bool:
        """Whether what it does can't be taken back."""
        return self.effect in ("external", "physical")

    @property
    def sends(self) -> bool:
        """Whether it could carry what a run knows to others."""
        return self.effect == "external" or any(each.sends for each in self._risks)

    @property
    def _risks(self) -> list[Risk]:
        return [risk(template) for template in self.needs.device]

    @model_validator(mode="after")
    def _needs_are_known(self) -> Self:
        for kind, template in self.needs.templates():
            if kind in ("read", "write", "exec") and template[:1] not in ("/", "{"):
                raise ValueError(f"need {kind} = {template!r} is no absolute path")
            for name in TEMPLATE.findall(template):
                if name not in VARIABLES and name not in self.parameters.properties:
                    raise ValueError(f"need {template!r} names {name!r}, which is no parameter")
        for template in self.needs.device:
            if not is_known(template):
                raise ValueError(f"need device = {template!r} names no device that there is")
            if risk(template).lasts and not self.reaches_outside:
                raise ValueError(f'needs device {template!r}, so its effect is "external" or "physical"')
        if self.needs.write and self.effect == "none":
            raise ValueError('needs write, so its effect is not "none"')
        if self.needs.connect and not self.reaches_outside:
            raise ValueError('needs connect, so its effect is "external" or "physical"')
        return self


class BundleManifest(_Strict):
    bundle: Name
    version: str
    description: str
    program: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*\.py$")]
    tool: tuple[ToolManifest, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as the daemon knows it. `name` is bundle and tool with a dot; `digest` covers manifest and program."""

    name: str
    bundle: str
    version: str
    manifest: ToolManifest
    digest: str

    def schema(self) -> dict[str, Any]:
        """The parameters as JSON Schema."""
        return self.manifest.parameters.model_dump(exclude_defaults=True) | {"type": "object"}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """All loaded tools by name, and the programs by bundle. `offered` are the bundles that come with agentd, loaded or not."""

    tools: dict[str, Tool]
    programs: dict[str, bytes]
    offered: frozenset[str] = frozenset()

    def commands(self, tool: str) -> frozenset[str]:
        """The arguments that a shell reads."""
        found = self.tools.get(tool)
        properties = found.manifest.parameters.properties if found else {}
        return frozenset(name for name, parameter in properties.items() if parameter.format == "command")

    def why_missing(self, tool: str) -> str:
        """What to do about a tool that is not there."""
        bundle = tool.partition(".")[0]
        if bundle in self.offered and bundle not in self.programs:
            return f'tools.bundled in agentd.toml has to name "{bundle}"'
        return "`agentd tools list` shows those that there are"


def load(folders: Iterable[Traversable], bundled: Traversable | None = None, chosen: Iterable[str] = ()) -> Toolbox:
    """Read every bundle (a folder with a `tool.toml`) below `folders`, and those of `bundled` that are `chosen`.

    Raises ConfigError (MANIFEST_INVALID).
    """
    tools: dict[str, Tool] = {}
    programs: dict[str, bytes] = {}
    entries = [bundled.joinpath(name) for name in sorted(chosen)] if bundled else []
    for folder in folders:
        entries += sorted(folder.iterdir(), key=lambda e: e.name)
    for entry in entries:
        if entry.is_dir() and (file := entry.joinpath("tool.toml")).is_file():
            _load_bundle(entry, file, tools, programs)
    offered = frozenset(entry.name for entry in bundled.iterdir() if entry.is_dir()) if bundled else frozenset[str]()
    return Toolbox(dict(sorted(tools.items())), programs, offered)


def _load_bundle(entry: Traversable, file: Traversable, tools: dict[str, Tool], programs: dict[str, bytes]) -> None:
    text = file.read_bytes()
    try:
        bundle = BundleManifest.model_validate(tomllib.loads(text.decode()), strict=False)
        program = entry.joinpath(bundle.program).read_bytes()
        compile(program, str(entry.joinpath(bundle.program)), "exec", dont_inherit=True)
    except ValidationError as e:
        raise _invalid(file, ": ".join(filter(None, first_mistake(e)))) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, SyntaxError, OSError, ValueError) as e:
        raise _invalid(file, str(e)) from None
    if bundle.bundle in programs:
        raise _invalid(file, f"there is already a bundle {bundle.bundle!r}")
    programs[bundle.bundle] = program
    digest = hashlib.sha256(text + b"\0" + program).hexdigest()
    for tool in bundle.tool:
        name = f"{bundle.bundle}.{tool.name}"
        if name in tools:
            raise _invalid(file, f"there is already a tool {name!r}")
        tools[name] = Tool(name, bundle.bundle, bundle.version, tool, digest)


def _invalid(file: Traversable, why: str) -> ConfigError:
    return ConfigError(
        Reason.MANIFEST_INVALID,
        f"The manifest {file} is wrong: {why}.",
        hint="Mend it or remove the bundle; docs/tools.md lists every key.",
        metadata={"file": str(file), "why": why},
    )
