"""A daemon whose device is made of files that the test writes: heat, battery, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentd.v1 import budget_pb2
from tests.e2e.conftest import DaemonProcess

if TYPE_CHECKING:
    from pathlib import Path

    from agentd.client import Client

BudgetState = budget_pb2.Budgets.State
QUICK = """
[budgets]
device = "pi5"
[budgets.states]
poll_s = 0.1
reduced_s = 0.4
paused_s = 0.4
shed_s = 0.4
"""


class Device(DaemonProcess):
    """Its sysfs and procfs are files that the test writes."""

    @property
    def zone(self) -> Path:
        return self.root / "sys/class/thermal/thermal_zone0"

    @property
    def battery(self) -> Path:
        return self.root / "sys/class/power_supply/BAT0"

    def made(self) -> Device:
        for folder in (self.zone, self.battery, self.root / "proc"):
            folder.mkdir(parents=True)
        (self.root / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
        (self.zone / "type").write_text("cpu-thermal\n")
        (self.battery / "type").write_text("Battery\n")
        self.heat(50)
        self.charge(80, "Discharging")
        self.tools = f'sysfs = "{self.root}/sys"\nproc = "{self.root}/proc"\n'
        return self

    def heat(self, celsius: float) -> None:
        (self.zone / "new").write_text(f"{celsius * 1000:.0f}\n")
        (self.zone / "new").rename(self.zone / "temp")

    def charge(self, level: int, status: str) -> None:
        (self.battery / "capacity").write_text(f"{level}\n")
        (self.battery / "status").write_text(f"{status}\n")


def seen(client: Client, *wanted: BudgetState.ValueType) -> list[budget_pb2.Budgets]:
    """All budgets from now on until the states have come, in this order."""
    found, left = [], list(wanted)
    for budgets in client._budgets.WatchBudgets(budget_pb2.WatchBudgetsRequest(), timeout=30):
        found.append(budgets)
        if budgets.state == left[0]:
            left.pop(0)
        if not left:
            return found
    raise AssertionError(found)
