"""A grant: who, with which tool, may touch what; allowed, asked for or denied; until when, how often, and when at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import translate
from functools import lru_cache
from re import compile as compile_expression
from typing import TYPE_CHECKING, Literal, Self

from agentd.errors import Reason, RequestError
from agentd.grants.conditions import Conditions
from agentd.grants.patterns import Pattern, parse

if TYPE_CHECKING:
    from re import Pattern as Expression

    from agentd.grants.conditions import Moment

Verdict = Literal["allow", "ask", "deny"]
Source = Literal["config", "cli", "approval"]
_LONGEST_NAME = 128
_ALWAYS = Conditions()


@dataclass(frozen=True, slots=True)
class Grant:
    """Principal and tool are glob patterns. `id` is empty for those of the configuration, which `where` names.

    `expire_ns` and `max_uses` are 0 for no limit; times are nanoseconds since 1970.
    """

    principal: str
    tool: str
    pattern: Pattern
    decision: Verdict
    source: Source
    where: str
    spelled: str = ""
    """The pattern as it was given: where a denial's path leads is looked at again."""
    id: str = ""
    expire_ns: int = 0
    max_uses: int = 0
    conditions: Conditions = _ALWAYS
    create_ns: int = 0
    created_by: str = ""
    rehearse: bool = False
    """Calls that it allows are rehearsed: what they change is put back and kept for a person to look at."""

    @classmethod
    def configured(
        cls,
        where: str,
        *,
        principal: str,
        tool: str,
        scope: str,
        decision: Verdict,
        expires: datetime | None,
        charging: bool,
        hours: str,
        nominal: bool,
        rehearse: bool,
    ) -> Self:
        """A rule as it stands in a file. Raises RequestError (GRANT_INVALID)."""
        return cls(
            *(principal, tool, parse(scope), decision, "config", where, scope),
            expire_ns=int(expires.timestamp() * 1e9) if expires else 0,
            conditions=Conditions(charging, hours, nominal),
            rehearse=rehearse,
        )

    def __post_init__(self) -> None:
        for name, value in (("principal", self.principal), ("tool", self.tool)):
            if not 0 < len(value) <= _LONGEST_NAME or not value.isprintable():
                message = f"The {name} of a grant has 1 to {_LONGEST_NAME} printable characters, not {value!r}."
                raise RequestError(Reason.GRANT_INVALID, message, field=f"grant.{name}", metadata={name: value})
        if self.max_uses < 0 or self.expire_ns < 0:
            message = "Uses and expiry of a grant can't be negative."
            raise RequestError(Reason.GRANT_INVALID, message, field="grant.max_uses", metadata={})

    def __str__(self) -> str:
        limits = ["rehearsed"] if self.rehearse else []
        limits += [str(self.conditions)] if str(self.conditions) else []
        if self.max_uses:
            limits.append(f"{self.max_uses} times at most")
        if self.expire_ns:
            limits.append(f"until {_time(self.expire_ns)}")
        who = f"{self.principal} " if self.principal != "*" else ""
        also = f", {', '.join(limits)}" if limits else ""
        return f"{self.decision} {who}{self.tool} {self.pattern}{also} ({self.where})"

    @property
    def answers(self) -> bool:
        """Whether a person made it as an answer: it is stronger than a rule that wants one asked."""
        return self.source == "approval" and self.decision == "allow"

    @property
    def is_specific(self) -> bool:
        """Whether somebody who wrote it has meant one tool, and not whatever there is."""
        return "*" not in self.tool and bool(self.pattern.kind)

    def concerns(self, principals: tuple[str, ...], tool: str) -> bool:
        return any(_fits(name, self.principal) for name in principals) and _fits(tool, self.tool)

    def idle(self, principals: tuple[str, ...], tool: str, moment: Moment, used: int) -> str:
        """Why it says nothing about this call although its scope fits, in words; empty if it does."""
        if not any(_fits(name, self.principal) for name in principals):
            return f"it is for {self.principal}"
        if not _fits(tool, self.tool):
            return f"it is for the tool {self.tool}"
        return self.asleep(moment, used)

    def asleep(self, moment: Moment, used: int) -> str:
        """Why it does not hold now, whoever asks."""
        if self.expire_ns and moment.now_ns >= self.expire_ns:
            return f"it expired at {_time(self.expire_ns)}"
        if self.max_uses and used >= self.max_uses:
            return f"its {self.max_uses} uses are used up"
        return self.conditions.unmet(moment)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"pattern": self.pattern.text})

    @classmethod
    def from_json(cls, text: str) -> Grant:
        """The pattern is as it was when the grant was made: links are not looked at again."""
        fields = json.loads(text)
        fields["pattern"] = kept(fields["pattern"])
        fields["conditions"] = Conditions(**fields["conditions"])
        return cls(**fields)


def kept(text: str) -> Pattern:
    return parse(text, resolved=True)


@lru_cache(maxsize=4096)
def _expression(glob: str) -> Expression[str]:
    return compile_expression(translate(glob))


def _fits(name: str, glob: str) -> bool:
    return glob in ("*", name) or ("*" in glob and _expression(glob).match(name) is not None)


def _time(time_ns: int) -> str:
    try:
        return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "the end of time"
