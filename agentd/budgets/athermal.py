"""What an Android phone says of its heat (NDK, thermal.h), in a process of its own: the library may not load, or crash.

    python -I -m agentd.budgets.athermal [LIBRARY] [SECONDS]     a line of JSON every 10 s: {"status": 1, "headroom": 0.82}

Headroom is 1 where the phone throttles severely. It is NaN where a phone has none, or where it is asked for more often than
once a second; 10 s is the usual pause. Not tried on a phone yet.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time

LIBRARY = "libandroid.so"
EVERY_S = 10.0
_STATUSES = range(7)  # ATHERMAL_STATUS_NONE to _SHUTDOWN
_FORECAST_S = 0
_SETPOINT_C, _SETPOINT_HEADROOM, _C_PER_HEADROOM = 38.0, 0.8, 30.0
_HOTTEST_C = 120.0


def celsius(headroom: float) -> float:
    """The temperature that thresholds for a phone's battery are for: 0.1 of headroom is about 3 C of its skin, and 0.8 is where
    it is to be held.
    """
    return min(_HOTTEST_C, _SETPOINT_C + (headroom - _SETPOINT_HEADROOM) * _C_PER_HEADROOM)


def parse(line: str) -> tuple[int | None, float | None]:
    """Status and headroom, where they can be true."""
    try:
        told = json.loads(line)
        status, headroom = told["status"], told["headroom"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None
    known = status if type(status) is int and status in _STATUSES else None
    number = isinstance(headroom, int | float) and not isinstance(headroom, bool)
    return known, float(headroom) if number and 0 <= headroom <= 10 else None  # NaN is within nothing


def main() -> None:
    library = ctypes.CDLL(sys.argv[1] if len(sys.argv) > 1 else LIBRARY)
    every_s = float(sys.argv[2]) if len(sys.argv) > 2 else EVERY_S
    library.AThermal_acquireManager.restype = ctypes.c_void_p
    library.AThermal_getCurrentThermalStatus.argtypes = [ctypes.c_void_p]
    manager = library.AThermal_acquireManager()
    forecast = getattr(library, "AThermal_getThermalHeadroom", None)  # since API 31
    if forecast:
        forecast.argtypes, forecast.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_float
    while manager:
        headroom = float(forecast(manager, _FORECAST_S)) if forecast else math.nan
        told = {
            "status": library.AThermal_getCurrentThermalStatus(manager),
            "headroom": round(headroom, 4) if math.isfinite(headroom) else None,
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        time.sleep(every_s)


if __name__ == "__main__":
    main()
