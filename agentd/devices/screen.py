"""This device's own screen: Android's notifications through Termux, a desktop's through notify-send."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

from agentd_sandbox import DeviceFailure
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from agentd.devices.program import Programs


_LONGEST_TITLE, _LONGEST_TEXT = 200, 4000
_URGENCY = {"low": "low", "default": "normal", "high": "critical"}


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1, max_length=_LONGEST_TEXT)
    title: str = Field(default="", max_length=_LONGEST_TITLE)
    priority: Literal["low", "default", "high"] = "default"


class Screen:
    """Which programs there are is looked at when this is made. They are called by full path."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.termux = shutil.which("termux-notification")
        self.desktop = shutil.which("notify-send")

    @property
    def there(self) -> bool:
        """Whether there is a screen to show anything on."""
        return bool(self.termux or (self.desktop and os.environ.get("DBUS_SESSION_BUS_ADDRESS")))

    def request(self, name: str) -> type[Message]:
        if name != "message":
            raise DeviceFailure(f"a screen has no {name!r}; it has screen/message")
        return Message

    def operate(self, name: str, request: Message) -> dict[str, Any]:
        title = f"Message: {request.title}"  # not to be taken for a question of agentd's own
        if self.termux:
            self._programs.run([self.termux, "--title", title, "--priority", request.priority], request.text)
        elif self.there and self.desktop:
            urgency = f"--urgency={_URGENCY[request.priority]}"
            self._programs.run([self.desktop, "--app-name=agentd", urgency, "--", title, request.text])
        else:
            raise DeviceFailure("there is no screen: neither termux-notification nor notify-send with a session of a desktop")
        return {"shown": True}
