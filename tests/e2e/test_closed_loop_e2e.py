"""Scenario 1 with the real engine: what it computes heats a modelled board, whose sensor the daemon reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentd.client import Client
from agentd.v1 import budget_pb2
from tests.budgets.plant import Board
from tests.e2e.closed_loop import closed_loop, synthetic_model
from tests.e2e.device import Device

if TYPE_CHECKING:
    from pathlib import Path

_State = budget_pb2.Budgets.State


def test_an_engine_without_a_break_never_gets_its_board_to_the_firmwares_limit(tmp_path: Path):
    """A board that would go to 90 C: slowed, never paused, never above 80."""
    limits = "[runs]\ntokens = 100000\nseconds = 600\n[budgets]\ndevice = 'pi5'\n[budgets.states]\npoll_s = 0.5\n"
    extra = f'[engine]\nmodel = "{synthetic_model(tmp_path)}"\n{limits}'
    board = Board()
    board.chip, board.case = 73.0, 66.0
    with Device(tmp_path, extra=extra).made().running() as device, Client(device.socket) as client:
        samples = list(closed_loop(device, client, board, 40))
        assert max(sample.chip for sample in samples) < 80
        states = {sample.budgets.state for sample in samples}
        assert _State.STATE_REDUCED in states
        assert not states & {_State.STATE_PAUSED, _State.STATE_SHED}
        assert any(sample.budgets.duty < 1 or sample.budgets.threads for sample in samples)
