"""All devices by the first word of their names."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from agentd_sandbox import DeviceFailure
from pydantic import BaseModel, ValidationError

from agentd.devices.gpio import Lines
from agentd.devices.program import Programs
from agentd.devices.screen import Screen
from agentd.devices.termux import Phone
from agentd.errors import first_mistake

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Protocol

    class Kind(Protocol):
        """One kind of device. `request` says what may be asked of the device `name`; `operate` does it, on any thread."""

        def request(self, name: str) -> type[BaseModel]: ...

        def operate(self, name: str, request: Any) -> dict[str, Any]: ...


_AT_A_TIME = 8  # of all calls: each is a thread, and may be a program (Android takes an app down that has 32)
_log = logging.getLogger(__name__)


class Devices:
    """`folder` is where is kept what must be known after a kill. `recover`, then `operate` at any time, then `close`."""

    def __init__(self, folder: Path) -> None:
        self._programs, self._lines = Programs(), Lines(folder)
        self.screen = Screen(self._programs)
        self._kinds: dict[str, Kind] = {"gpio": self._lines, "screen": self.screen, "termux": Phone(self._programs)}
        self._working = threading.BoundedSemaphore(_AT_A_TIME)

    def recover(self) -> None:
        """Let go of what a daemon held that was killed. Blocks."""
        self._lines.recover()

    def operate(self, device: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Do what a tool has asked of `KIND/NAME`; blocks until it is done. Raises DeviceFailure with a sentence."""
        kind, _, name = device.partition("/")
        if kind not in self._kinds:
            raise DeviceFailure(f"there is no device {device!r}; there are those of {', '.join(self._kinds)}")
        if not self._working.acquire(blocking=False):
            raise DeviceFailure(f"{_AT_A_TIME} devices are operated already; there can be no more at a time")
        try:
            request = self._kinds[kind].request(name).model_validate(asked, strict=True)
            return self._kinds[kind].operate(name, request)
        except ValidationError as e:
            raise DeviceFailure(f"{device} can't do that: {': '.join(filter(None, first_mistake(e)))}") from None
        except DeviceFailure:
            raise
        except Exception as e:  # a library's: the tool is told, and the daemon goes on
            _log.exception("operating %s failed", device)
            raise DeviceFailure(f"{device} failed: {type(e).__name__}: {e}") from None
        finally:
            self._working.release()

    def close(self) -> None:
        """Let go of all lines, and end the programs. Blocks."""
        self._lines.close()
        self._programs.close()
