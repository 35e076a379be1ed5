"""Lines of a Raspberry Pi's GPIO header, by gpiozero. An output stays as it was set until the daemon ends; then it is an input.

The kernel of a Pi leaves an output as it is when whoever held it has died (unless `dtparam=strict_gpiod`): what is held is on
disk, and the next daemon makes inputs of it. gpiozero's own GPIOZERO_PIN_FACTORY chooses another library than lgpio, such as
`mock` for tests without a board.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Any, Literal

from agentd_sandbox import DeviceFailure
from pydantic import BaseModel, ConfigDict, Field

from agentd import extras
from agentd.store.durable import arriving

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LONGEST_PULSE_S = 60.0
_AT_A_TIME = 2  # pulses: each keeps a call waiting, and others are to be made meanwhile
_NAME = re.compile(r"(0|[1-9][0-9]?)(/read)?")
_log = logging.getLogger(__name__)


class Reading(BaseModel):
    """Of an output it tells what that was set to; any other line becomes an input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: Literal["read"] = "read"
    pull: Literal["up", "down", "none"] = "none"


class Switching(BaseModel):
    """`on` is 3.3 V. A `pulse` sets the line, waits, and sets it back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: Literal["set", "pulse"]
    on: bool = True
    seconds: float = Field(default=1.0, gt=0, le=LONGEST_PULSE_S)


class Lines:
    """`17` may be switched, `17/read` be read. Safe to use from several threads. `folder` is where it is kept what is held."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._kept = folder, folder / "gpio.json"
        self._outputs: dict[int, Any] = {}
        self._pulses: dict[int, threading.Event] = {}
        self._stuck: set[int] = set()
        """What nobody could let go of yet."""
        self._lock = threading.Lock()
        self._closed = False
        self._gpiozero: Any = None

    def request(self, name: str) -> type[BaseModel]:
        match = _NAME.fullmatch(name)
        if match is None:
            raise DeviceFailure(f"{name.removesuffix('/read')!r} is no line: write the number of GPIO17 as 17")
        return Reading if match[2] else Switching

    def operate(self, name: str, request: Reading | Switching) -> dict[str, Any]:
        line = int(name.partition("/")[0])
        gpiozero = self._library()
        try:
            if isinstance(request, Reading):
                on = self._read(gpiozero, line, request.pull)
            else:
                on = self._switch(gpiozero, line, request)
        except DeviceFailure:
            raise
        except Exception as e:  # of gpiozero's and of lgpio's many kinds: no such line, one that others hold
            raise DeviceFailure(f"GPIO{line} can't be used: {str(e).strip(chr(39)) or type(e).__name__}") from None
        return {"line": line, "value": "on" if on else "off"}

    def recover(self) -> None:
        """Make inputs of what a daemon held that was killed. What can't be let go of is tried again at the next start."""
        try:
            self._stuck = {int(line) for line in json.loads(self._kept.read_text())}
        except FileNotFoundError:
            return
        except Exception as e:  # whatever somebody has written there: the daemon starts all the same
            _log.warning("%s can't be read: %s; look at the lines yourself", self._kept, e)
            return
        for line in sorted(self._stuck):
            try:
                self._library().InputDevice(line).close()
            except Exception as e:  # a library's
                _log.warning("GPIO%d may still be as a daemon that was killed has left it: %s", line, e)
            else:
                _log.warning("GPIO%d is an input again: a daemon that held it was killed", line)
                self._stuck.discard(line)
        with contextlib.suppress(OSError):  # then they are made inputs once more at the next start
            self._keep(())

    def close(self) -> None:
        """All outputs become inputs, and pulses end."""
        with self._lock:
            self._closed = True
            for ended in self._pulses.values():
                ended.set()
            for line, output in self._outputs.items():
                try:
                    output.close()
                except Exception:  # the others are to be let go of all the same
                    _log.exception("GPIO%d could not be let go of", line)
                    self._stuck.add(line)
            self._outputs.clear()
            with contextlib.suppress(OSError):
                self._keep(())

    def _keep(self, outputs: Iterable[int]) -> None:
        """On disk, what the next daemon has to let go of. Raises OSError."""
        if lines := sorted({*outputs, *self._stuck}):
            with arriving(self._kept) as file:
                file.write(json.dumps(lines).encode())
        else:
            self._kept.unlink(missing_ok=True)

    def _library(self) -> Any:
        """Loaded once. Raises DeviceFailure."""
        with self._lock:  # one thread: the working folder is everybody's
            if self._gpiozero is None:
                os.environ.setdefault("LG_WD", str(self._folder))  # lgpio makes pipes in the working folder, which may be `/`,
                here = os.getcwd()  # and goes there itself
                try:
                    self._gpiozero = _load()
                finally:
                    os.chdir(here)
            return self._gpiozero

    def _read(self, gpiozero: Any, line: int, pull: str) -> bool:
        with self._lock:
            if output := self._outputs.get(line):
                return bool(output.value)
            pull_up = {"up": True, "down": False, "none": None}[pull]
            with gpiozero.InputDevice(line, pull_up=pull_up, active_state=True if pull_up is None else None) as opened:
                return bool(opened.pin.state)

    def _switch(self, gpiozero: Any, line: int, request: Switching) -> bool:
        with self._lock:
            if pulse := self._pulses.get(line):
                if request.do == "pulse":
                    raise DeviceFailure(f"GPIO{line} is in the middle of a pulse")
                pulse.set()  # whoever switches it now has the last word
                del self._pulses[line]
            if request.do == "pulse" and len(self._pulses) >= _AT_A_TIME:
                raise DeviceFailure(f"{_AT_A_TIME} pulses go on; there can be no more at a time")
            self._put(gpiozero, line, on=request.on)
            if request.do == "set":
                return request.on
            self._pulses[line] = ended = threading.Event()
        ended.wait(request.seconds)
        with self._lock:
            if self._pulses.get(line) is ended and not self._closed:
                del self._pulses[line]
                self._put(gpiozero, line, on=not request.on)
            output = self._outputs.get(line)
            return bool(output.value) if output else not request.on

    def _put(self, gpiozero: Any, line: int, *, on: bool) -> None:
        if self._closed:
            raise DeviceFailure("agentd is stopping")
        if line in self._outputs:
            self._outputs[line].value = on
            return
        self._keep((*self._outputs, line))  # before it is an output
        try:
            self._outputs[line] = gpiozero.OutputDevice(line, initial_value=on)
        except BaseException:
            self._keep(self._outputs)
            raise


def _load() -> Any:
    """Without a choice of the user's it is lgpio: what gpiozero falls back to claims no line, and others use it, too."""
    try:
        import gpiozero  # noqa: PLC0415 - an extra, and half a second on a Pi

        if gpiozero.Device.pin_factory is None and "GPIOZERO_PIN_FACTORY" not in os.environ:
            from gpiozero.pins.lgpio import LGPIOFactory  # noqa: PLC0415

            gpiozero.Device.pin_factory = LGPIOFactory()
    except ImportError as e:
        raise DeviceFailure(f"{e.name} is not installed: `{extras.install('gpio')}`, then restart agentd") from None
    except Exception as e:  # a library's, and of many kinds: no board, no right to use it
        raise DeviceFailure(f"this device's GPIO can't be used: {e}") from None
    return gpiozero
