"""Whether an automation may begin now, in words: power, time of day, network, heat."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from agentd.grants import Conditions

if TYPE_CHECKING:
    from agentd.automations.automation import When
    from agentd.budgets import Readings
    from agentd.grants import Moment


def unmet(when: When, moment: Moment, readings: Readings) -> str:
    """The first of its conditions that does not hold; empty if all do. What nothing measures does not hold."""
    if when.charging and not moment.charging:
        return "waits until the device is charging" + (", and nothing here says so" if moment.charging is None else "")
    if Conditions(hours=when.hours).unmet(moment):
        return f"waits for the hours {when.hours}"
    if why := _beyond("device", "C", readings.temperature_c, when.below_c, when.above_c):
        return why
    if why := _beyond("battery", "%", readings.battery_pct, when.below_pct, when.above_pct):
        return why
    if when.network and not is_online():
        return "waits for the network"
    return ""


def _beyond(what: str, unit: str, measured: float | None, below: float | None, above: float | None) -> str:
    now = "and nothing measures it" if measured is None else f"it has {measured:.0f} {unit}"
    if below is not None and (measured is None or measured >= below):
        return f"waits until the {what} is below {below:g} {unit}, {now}"
    if above is not None and (measured is None or measured <= above):
        return f"waits until the {what} is above {above:g} {unit}, {now}"
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
