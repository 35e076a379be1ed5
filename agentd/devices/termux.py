"""An Android phone by the programs of Termux:API (https://wiki.termux.com/wiki/Termux:API)."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any, Literal

from agentd_sandbox import DeviceFailure
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentd.devices.program import Programs

_NUMBER = re.compile(r"\+?[0-9]{3,15}")  # E.164; commas would be several people
_SMS = "sms/"
_LONG_S = 60.0  # a first fix of GPS takes that long, and so may a long text
_MISSING = "install the app Termux:API and `pkg install termux-api`"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Look(_Strict):
    """Nothing to say."""


class Text(_Strict):
    text: str = Field(min_length=1, max_length=4000)


class Clipping(_Strict):
    text: str = Field(max_length=100_000)


class Switch(_Strict):
    on: bool


class Where(_Strict):
    provider: Literal["gps", "network", "passive"] = "network"


class Phone:
    """battery, clipboard/get, clipboard/set, location, torch, voice and sms/NUMBER of this phone."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._does: dict[str, tuple[type[BaseModel], Callable[[Any], dict[str, Any]]]] = {
            "battery": (Look, self._battery),
            "clipboard/get": (Look, lambda _: {"text": self._run("clipboard-get")}),
            "clipboard/set": (Clipping, lambda asked: self._do("clipboard-set", text=asked.text)),
            "location": (Where, self._location),
            "torch": (Switch, lambda asked: self._do("torch", "on" if asked.on else "off")),
            "voice": (Text, lambda asked: self._do("tts-speak", text=asked.text, patience_s=_LONG_S)),
        }

    def request(self, name: str) -> type[BaseModel]:
        if name.startswith(_SMS):
            if not _NUMBER.fullmatch(name.removeprefix(_SMS)):
                raise DeviceFailure(f"{name.removeprefix(_SMS)!r} is no telephone number: write it as +491701234567")
            return Text
        if name not in self._does:
            raise DeviceFailure(f"a phone has no {name!r}; it has {', '.join(self._does)} and sms/NUMBER")
        return self._does[name][0]

    def operate(self, name: str, request: Any) -> dict[str, Any]:
        if name.startswith(_SMS):
            return self._do("sms-send", "-n", name.removeprefix(_SMS), text=request.text)
        return self._does[name][1](request)

    def _run(self, name: str, *arguments: str, text: str = "", patience_s: float = 15.0) -> str:
        program = shutil.which(f"termux-{name}")
        if program is None:
            raise DeviceFailure(f"there is no termux-{name}: {_MISSING}")
        return self._programs.run([program, *arguments], text, patience_s)

    def _do(self, name: str, *arguments: str, text: str = "", patience_s: float = 15.0) -> dict[str, Any]:
        """What says nothing if it was done. Where Android refuses, it says so and ends with status 0."""
        _object(name, self._run(name, *arguments, text=text, patience_s=patience_s) or "{}")
        return {"done": True}

    def _battery(self, _: Look) -> dict[str, Any]:
        found = _object("battery-status", self._run("battery-status"))
        named = {"percentage": "percent", "status": "status", "plugged": "plugged", "temperature": "celsius"}
        return {ours: _plain(found[theirs], 1) for theirs, ours in named.items() if theirs in found}

    def _location(self, asked: Where) -> dict[str, Any]:
        found = _object("location", self._run("location", "-p", asked.provider, "-r", "once", patience_s=_LONG_S))
        return {name: _plain(found[name], 6) for name in ("latitude", "longitude", "accuracy") if name in found}


def _object(name: str, said: str) -> dict[str, Any]:
    """What the programs print is JSON; where Android refuses, an object with `error`."""
    try:
        found = json.loads(said, parse_constant=_no_number)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DeviceFailure(f"termux-{name} did not answer as it should; has Termux:API the permission in Android?")
    if "error" in found or "API_ERROR" in found:
        raise DeviceFailure(f"termux-{name}: {str(found.get('error') or found.get('API_ERROR'))[:200]}")
    return found


def _no_number(constant: str) -> None:
    raise ValueError(constant)


def _plain(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    return value.lower() if isinstance(value, str) else value
