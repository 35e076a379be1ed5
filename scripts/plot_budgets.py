"""Draw docs/budgets.svg: an hour of generating on a modelled Raspberry Pi 5, the firmware alone and with the governor.

python scripts/plot_budgets.py                   (from the repository; needs the development extra)
python scripts/plot_budgets.py --emulated 480    docs/budgets-emulated.svg: for so many seconds the real daemon and the
                                                 real engine, whose CPU time heats the modelled board
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "agentd"  # the same file every time

from matplotlib import pyplot as plt  # noqa: E402

from agentd.budgets import Readings, policy_for  # noqa: E402
from agentd.budgets.governor import Situation, speed, step  # noqa: E402
from agentd.client import Client  # noqa: E402
from tests.budgets.plant import FULL_SPEED, Board  # noqa: E402
from tests.e2e.closed_loop import closed_loop, synthetic_model  # noqa: E402
from tests.e2e.device import Device  # noqa: E402

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


def emulated(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        limits = "[runs]\ntokens = 100000\nseconds = 3600\n[budgets]\ndevice = 'pi5'\n"
        extra = f'[engine]\nmodel = "{synthetic_model(Path(folder))}"\n{limits}'
        board = Board()
        board.chip = board.case = 55.0
        with Device(Path(folder), extra=extra).made().running() as device, Client(device.socket) as client:
            samples = list(track(closed_loop(device, client, board, seconds), "generating", total=int(seconds * 4)))
    second_half = [sample for sample in samples if sample.seconds > seconds / 2]
    print(f"hottest {max(sample.chip for sample in samples):.1f} C")
    print(f"second half: {min(s.chip for s in second_half):.1f} to {max(s.chip for s in second_half):.1f} C")
    print(f"computing {sum(s.share for s in second_half) / len(second_half):.0%} of all processors")
    figure, (heat, rate) = plt.subplots(2, 1, sharex=True, figsize=(8, 5))
    minutes = [sample.seconds / 60 for sample in samples]
    heat.plot(minutes, [sample.chip for sample in samples])
    heat.axhline(80, color="grey", linewidth=0.8)
    heat.axhline(78, color="grey", linewidth=0.8, linestyle=":")
    heat.set_ylabel("modelled chip, degrees Celsius")
    rate.plot(minutes, [sample.share * 100 for sample in samples], linewidth=0.6, label="computed (measured)")
    allowed = [(s.budgets.threads or 2) / 2 * s.budgets.duty * 100 for s in samples]
    rate.plot(minutes, allowed, label="allowed")
    rate.set_ylabel("% of 2 processors")
    rate.set_xlabel("minutes")
    rate.set_ylim(0, 110)
    rate.legend(fontsize=8, loc="lower right")
    heat.set_title("Emulated: real daemon and engine; its CPU time heats a modelled Raspberry Pi 5 (14 K/W)", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "budgets-emulated.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", type=float, metavar="SECONDS")
    if seconds := parser.parse_args().emulated:
        emulated(seconds)
        return
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
