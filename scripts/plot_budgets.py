"""Draw docs/budgets.svg: an hour of generating on a modelled Raspberry Pi 5, the firmware alone and with the governor.

python scripts/plot_budgets.py      (from the repository; needs the development extra)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "agentd"  # the same file every time

from matplotlib import pyplot as plt  # noqa: E402

from agentd.budgets import Readings, policy_for  # noqa: E402
from agentd.budgets.governor import Situation, speed, step  # noqa: E402
from tests.budgets.plant import FULL_SPEED, Board  # noqa: E402

_TICK_S = 2


def hour(ambient: float, *, governed: bool) -> tuple[list[float], list[float]]:
    """Temperatures and tokens a second."""
    board, policy, situation = Board(ambient=ambient), policy_for("pi5", 8000, {}), Situation()
    threads, duty, temperatures, rates = 4, 1.0, list[float](), list[float]()
    for second in range(0, 3600, _TICK_S):
        board.run(_TICK_S, threads, duty)
        temperatures.append(board.chip)
        rates.append(FULL_SPEED * speed(threads, 4) * duty * board.firmware)
        if governed:
            situation, allowed = step(policy, situation, second, Readings(temperature_c=round(board.chip, 1)), 4)
            threads, duty = allowed.threads or 4, allowed.duty
    return temperatures, rates


def main() -> None:
    figure, (heat, rate) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    minutes = [second / 60 for second in range(0, 3600, _TICK_S)]
    for ambient, colour in ((25, "tab:blue"), (35, "tab:red")):
        for governed, style in ((False, ":"), (True, "-")):
            temperatures, rates = hour(ambient, governed=governed)
            name = f"{'agentd' if governed else 'firmware alone'}, {ambient} C in the room"
            heat.plot(minutes, temperatures, style, color=colour, label=name)
            rate.plot(minutes, rates, style, color=colour, label=name)
    heat.axhline(80, color="grey", linewidth=0.8)
    heat.set_ylabel("chip, degrees Celsius")
    rate.set_ylabel("tokens a second")
    rate.set_xlabel("minutes")
    rate.set_ylim(0, FULL_SPEED * 1.1)
    heat.legend(fontsize=8, loc="lower right")
    heat.set_title("Modelled Raspberry Pi 5, 14 K/W, generating without a break", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "budgets.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
