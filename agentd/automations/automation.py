"""An automation as it stands in its file, `automations/NAME.toml`: when it does what, with which tools and grants."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentd.automations import schedule, template
from agentd.config import GrantConfig
from agentd.errors import ConfigError, Reason, RequestError, first_mistake
from agentd.grants import Conditions, Grant

if TYPE_CHECKING:
    from pathlib import Path

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_LARGEST_FILE = 256 << 10
_DAY_S = 86400.0
_FILE_FIELDS = frozenset({"path", "name", "folder", "size"})
COMMON_FIELDS = frozenset({"automation", "time", "date"})


def absolute(text: str) -> str:
    """Raises ValueError."""
    if "\0" in text:
        raise ValueError("a path has no NUL character")
    return os.path.abspath(os.path.expanduser(text))


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class FileTrigger(_Strict):
    """A file whose name fits `pattern` is new in the folder (with `on = "changes"`, or has changed), and was left alone for
    `quiet_s`. One that replaces another is new. Hidden files only where the pattern begins with a dot; links never.
    """

    path: Annotated[str, Field(min_length=1), AfterValidator(absolute)]
    pattern: Annotated[str, Field(min_length=1, max_length=255)] = "*"
    on: Literal["appears", "changes"] = "appears"
    quiet_s: float = Field(default=1.0, ge=0, le=_DAY_S)
    recursive: bool = False
    existing: bool = True
    """Whether what lies there already when the automation is new counts."""


class ScheduleTrigger(_Strict):
    """`cron` has five fields, in the time of `zone` (empty: this device's); `every` is a duration such as 15m."""

    cron: str = ""
    every: str = ""
    zone: str = ""
    missed: Literal["skip", "once", "all"] = "once"

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if bool(self.cron) == bool(self.every):
            raise ValueError("a schedule has either cron or every")
        self.clock()
        return self

    def clock(self) -> schedule.Schedule:
        return schedule.Schedule.of(self.cron, self.every, self.zone)


class CallTrigger(_Strict):
    """By `agentd trigger`, or TriggerAutomation; `data` names what has to come with it, `callers` who may beside admins."""

    callers: tuple[str, ...] = ()
    data: tuple[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")], ...] = ()


class Trigger(_Strict):
    file: FileTrigger | None = None
    schedule: ScheduleTrigger | None = None
    call: CallTrigger | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(each is not None for each in (self.file, self.schedule, self.call)) != 1:
            raise ValueError("a trigger is one of file, schedule and call")
        return self


class When(_Strict):
    """All of it must hold before a run begins: `_c` of the device's heat, `_pct` of its battery. Where nothing measures it, it
    does not hold.
    """

    charging: bool = False
    network: bool = False
    hours: str = ""
    below_c: float | None = Field(default=None, ge=0, le=120)
    above_c: float | None = Field(default=None, ge=0, le=120)
    below_pct: float | None = Field(default=None, ge=0, le=100)
    above_pct: float | None = Field(default=None, ge=0, le=100)

    @model_validator(mode="after")
    def _hours(self) -> Self:
        try:
            Conditions(hours=self.hours)
        except RequestError as e:
            raise ValueError(e.message) from None
        return self


class Limits(_Strict):
    """`concurrency` of its runs go on at a time, `debounce_s` is how long further events of the same file or caller join one
    that waits, `deadline_s` how long a run may take, `pause_s` how long to wait after one that succeeded. One that fails is
    tried again `retries` times, after `retry_s`, then twice as long, and so on. An event that could not begin in `wait_s` is
    dropped. A person has `approval_s` to answer.
    """

    concurrency: int = Field(default=1, ge=1, le=8)
    debounce_s: float = Field(default=0, ge=0, le=_DAY_S)
    deadline_s: float = Field(default=300, gt=0, le=_DAY_S)
    pause_s: float = Field(default=0, ge=0, le=_DAY_S)
    retries: int = Field(default=2, ge=0, le=20)
    retry_s: float = Field(default=30, ge=0.1, le=_DAY_S)
    wait_s: float = Field(default=7 * _DAY_S, gt=0, le=366 * _DAY_S)
    approval_s: float = Field(default=_DAY_S, gt=0, le=30 * _DAY_S)


class DirectCall(_Strict):
    """One tool, called without the model. Strings in the arguments are templates."""

    tool: str
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_json(self) -> Self:
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("its arguments have what JSON has not, such as a date without quotes") from None
        return self


class Automation(_Strict):
    """`prompt` is a template over what the trigger knows; `call` instead of it needs no model. `tools` empty: all."""

    name: Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]
    description: str = ""
    on: Trigger
    prompt: str = ""
    call: DirectCall | None = None
    tools: tuple[str, ...] = ()
    when: When = When()
    limits: Limits = Limits()
    priority: Literal["normal", "background"] = "normal"
    grants: tuple[GrantConfig, ...] = ()

    @property
    def principal(self) -> str:
        """Whose grants decide on its calls."""
        return f"automation:{self.name}"

    @property
    def fields(self) -> frozenset[str]:
        """What templates may name."""
        if self.on.file:
            return _FILE_FIELDS | COMMON_FIELDS
        return COMMON_FIELDS | frozenset(self.on.call.data if self.on.call else ())

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        if bool(self.prompt.strip()) == bool(self.call):
            raise ValueError("an automation has either a prompt or a call")
        template.check(self.prompt, self.fields)
        for text in template.texts(self.call.arguments if self.call else {}):
            template.check(text, self.fields)
        if self.call and self.tools:
            raise ValueError("tools go with a prompt; a call names its own")
        for grant in self.grants:
            if grant.principal not in ("*", self.principal):
                raise ValueError(f"its grants are its own; {grant.principal} gets them in agentd.toml")
        return self

    def require_quotable(self, commands: frozenset[str]) -> None:
        """`commands` are the arguments of its call that a shell reads. Raises ConfigError (AUTOMATION_INVALID)."""
        try:
            for name, value in (self.call.arguments if self.call else {}).items():
                if name in commands and isinstance(value, str):
                    template.require_quotable(value)
        except ValueError as e:
            raise invalid(self.name, f"call.arguments.{name}: {e}") from None

    def rules(self) -> list[Grant]:
        """Its grants, for nobody but its own runs. Raises ConfigError."""
        made = []
        for number, grant in enumerate(self.grants, 1):
            where = f"automations/{self.name}.toml, grant {number}"
            try:
                made.append(Grant.configured(where, **grant.model_dump() | {"principal": self.principal}))
            except RequestError as e:
                raise invalid(self.name, f"grants.{number - 1}: {e.message}") from None
        return made


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that is no automation, and why."""

    name: str
    error: ConfigError


def invalid(name: str, why: str) -> ConfigError:
    message = f"automations/{name}.toml is wrong: {why.rstrip('.')}."
    hint = "docs/automations.md lists every key; `agentd automations check` looks again."
    return ConfigError(Reason.AUTOMATION_INVALID, message, hint=hint, metadata={"automation": name, "why": why})


def parsed(name: str, text: str) -> Automation:
    """Raises ConfigError (AUTOMATION_INVALID) naming the key."""
    if not NAME.fullmatch(name):
        raise invalid(name, "its name has other characters than a-z, 0-9, - and _")
    try:
        made = Automation.model_validate({**tomllib.loads(text), "name": name})
    except ValidationError as e:
        where, what = first_mistake(e)
        raise invalid(name, f"{where}: {what}" if where else what) from None
    except (ValueError, RecursionError) as e:  # also of numbers that are too long for Python
        raise invalid(name, str(e)) from None
    made.rules()
    return made


def read(file: Path) -> Automation:
    """No link: a tool could write where it leads, and with that what it is allowed. Raises ConfigError (AUTOMATION_INVALID)."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise invalid(file.stem, "it is no file")
            text = opened.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise invalid(file.stem, f"it is larger than {_LARGEST_FILE >> 10} KiB")
        return parsed(file.stem, text.decode())
    except OSError as e:
        why = "it is a link, and tools might write where it leads" if e.errno == errno.ELOOP else e.strerror or str(e)
        raise invalid(file.stem, why) from None
    except UnicodeDecodeError:
        raise invalid(file.stem, "it is not UTF-8") from None


def read_all(folder: Path) -> tuple[dict[str, Automation], list[Broken]]:
    """By name, in order; one that is broken keeps no other from being read."""
    found: dict[str, Automation] = {}
    broken = []
    for file in sorted(folder.glob("*.toml")):
        try:
            found[file.stem] = read(file)
        except ConfigError as e:
            broken.append(Broken(file.stem, e))
    return found, broken
