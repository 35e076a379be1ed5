"""The budgets' service. It answers in every state."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from google.protobuf import duration_pb2

from agentd.api import convert
from agentd.budgets import Readings
from agentd.v1 import budget_pb2, budget_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentd.budgets import Budgets

_VALUES = tuple(each.name for each in fields(Readings) if each.name not in ("sources", "faults", "at"))


class BudgetServicer(budget_pb2_grpc.BudgetServiceServicer):
    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets

    async def GetBudgets(  # noqa: N802
        self, request: budget_pb2.GetBudgetsRequest, context: Any
    ) -> budget_pb2.Budgets:
        return _message(self._budgets)

    async def WatchBudgets(  # noqa: N802
        self, request: budget_pb2.WatchBudgetsRequest, context: Any
    ) -> AsyncIterator[budget_pb2.Budgets]:
        async for _ in self._budgets.watch():
            yield _message(self._budgets)


def _message(budgets: Budgets) -> budget_pb2.Budgets:
    limits, readings, now = budgets.limits, budgets.readings, budgets.clock()
    return budget_pb2.Budgets(
        state=_state(limits.state),
        cause=limits.cause or "",
        reason=convert.valid(limits.reason),
        duty=limits.duty,
        threads=limits.threads,
        background=limits.background,
        retry_delay=duration_pb2.Duration(seconds=round(limits.retry_s)),
        budgets=[
            budget_pb2.Budgets.Budget(
                name=name,
                state=_state(each.state),
                reason=convert.valid(each.reason) if each.state else "",
                lasting=duration_pb2.Duration(seconds=int(now - (now if each.since is None else each.since))),
            )
            for name, each in budgets.situation.budgets.items()
        ],
        readings=[
            budget_pb2.Budgets.Reading(name=name, value=float(value), source=convert.valid(readings.sources.get(name, "")))
            for name in _VALUES
            if (value := getattr(readings, name)) is not None
        ],
        faults=convert.valid(readings.faults),
        device=budgets.policy.device,
    )


def _state(state: int) -> budget_pb2.Budgets.State.ValueType:
    return budget_pb2.Budgets.State.Value(f"STATE_{_NAMES[state]}")


_NAMES = ("NOMINAL", "REDUCED", "PAUSED", "SHED")
