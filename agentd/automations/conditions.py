"""Whether an automation may begin now, in words: power, time of day, network, heat."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from agentd.grants import Conditions

if TYPE_CHECKING:
    from agentd.automations.automation import When
    from agentd.grants import Moment


def unmet(when: When, moment: Moment, temperature_c: float | None) -> str:
    """The first of its conditions that does not hold; empty if all do. What nothing measures does not hold."""
    if when.charging and not moment.charging:
        return "waits until the device is charging" + (", and nothing here says so" if moment.charging is None else "")
    if Conditions(hours=when.hours).unmet(moment):
        return f"waits for the hours {when.hours}"
    if when.below_c is not None and (temperature_c is None or temperature_c >= when.below_c):
        now = "and nothing measures it" if temperature_c is None else f"it has {temperature_c:.0f} C"
        return f"waits until the device is below {when.below_c:g} C, {now}"
    if when.above_c is not None and (temperature_c is None or temperature_c <= when.above_c):
        now = "and nothing measures it" if temperature_c is None else f"it has {temperature_c:.0f} C"
        return f"waits until the device is above {when.above_c:g} C, {now}"
    if when.network and not is_online():
        return "waits for the network"
    return ""


def is_online() -> bool:
    """Whether there is a way out: connecting a datagram socket asks the routing table and sends nothing (udp(7)).

    The addresses are those kept for documentation (RFC 5737, RFC 3849): nobody's.
    """
    for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return True
    return False
