"""Lines of a Raspberry Pi's GPIO header, by gpiozero. An output stays as it was set until the daemon ends: then the kernel
takes the line back, and it is an input.

gpiozero finds the library that fits the board (lgpio on all that are made today); its own GPIOZERO_PIN_FACTORY chooses
another, such as `mock` for tests without a board.
"""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, Any, Literal

from agentd_sandbox import DeviceFailure
from pydantic import BaseModel, ConfigDict, Field

from agentd import extras

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_PULSE_S = 60.0
_NUMBER = re.compile(r"0|[1-9][0-9]?")


class Request(BaseModel):
    """`on` is 3.3 V. A `pulse` sets the line, waits, and sets it back. Reading an output tells what it was set to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: Literal["read", "set", "pulse"]
    on: bool = True
    seconds: float = Field(default=1.0, gt=0, le=LONGEST_PULSE_S)
    pull: Literal["up", "down", "none"] = "none"


class Lines:
    """The lines that are held as outputs. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._outputs: dict[int, Any] = {}
        self._pulsing: set[int] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def request(self, name: str) -> type[Request]:
        if not _NUMBER.fullmatch(name):
            raise DeviceFailure(f"{name!r} is no line: write the number of GPIO17 as 17")
        return Request

    def operate(self, name: str, request: Request) -> dict[str, Any]:
        os.environ.setdefault("LG_WD", str(self._folder))  # lgpio makes pipes in the working folder, which may be `/`
        try:
            import gpiozero  # noqa: PLC0415 - an extra, and half a second on a Pi

            return self._do(gpiozero, int(name), request)
        except ImportError as e:
            raise DeviceFailure(f"{e.name} is not installed: `{extras.install('gpio')}`, then restart agentd") from None

    def _do(self, gpiozero: Any, line: int, request: Request) -> dict[str, Any]:
        try:
            match request.do:
                case "read":
                    on = self._read(gpiozero, line, request.pull)
                case "set":
                    on = self._set(gpiozero, line, on=request.on)
                case "pulse":
                    on = self._pulse(gpiozero, line, request)
        except gpiozero.GPIOZeroError as e:
            raise DeviceFailure(f"GPIO{line} can't be used: {e or type(e).__name__}") from None
        except OSError as e:
            raise DeviceFailure(f"GPIO{line} can't be used: {e.strerror or e}") from None
        return {"line": line, "value": "on" if on else "off"}

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for output in self._outputs.values():
                output.close()
            self._outputs.clear()

    def _read(self, gpiozero: Any, line: int, pull: str) -> bool:
        with self._lock:
            if output := self._outputs.get(line):
                return bool(output.value)
            pull_up = {"up": True, "down": False, "none": None}[pull]
            with gpiozero.InputDevice(line, pull_up=pull_up, active_state=True if pull_up is None else None) as opened:
                return bool(opened.pin.state)

    def _set(self, gpiozero: Any, line: int, *, on: bool) -> bool:
        with self._lock:
            if line in self._pulsing:
                raise DeviceFailure(f"GPIO{line} is in the middle of a pulse")
            self._put(gpiozero, line, on=on)
        return on

    def _put(self, gpiozero: Any, line: int, *, on: bool) -> None:
        if self._closed.is_set():
            raise DeviceFailure("agentd is stopping")
        if line in self._outputs:
            self._outputs[line].value = on
        else:
            self._outputs[line] = gpiozero.OutputDevice(line, initial_value=on)

    def _pulse(self, gpiozero: Any, line: int, request: Request) -> bool:
        """Set back at its end whatever becomes of the call meanwhile, and at once if the daemon stops."""
        with self._lock:
            if line in self._pulsing:
                raise DeviceFailure(f"GPIO{line} is in the middle of a pulse")
            self._put(gpiozero, line, on=request.on)
            self._pulsing.add(line)
        self._closed.wait(request.seconds)
        with self._lock:
            self._pulsing.discard(line)
            if not self._closed.is_set():
                self._put(gpiozero, line, on=not request.on)
        return not request.on
