"""The budgets' service. It answers in every state."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from google.protobuf import duration_pb2

from agentd.api import convert
from agentd.budgets import Readings
from agentd.errors import Reason, RequestError
from agentd.v1 import budget_pb2, budget_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from agentd.budgets import Budgets
    from agentd.engine.calibrate import Progress

_VALUES = tuple(each.name for each in fields(Readings) if each.name not in ("sources", "faults", "at"))


_LEAST_S, _USUAL_S, _LONGEST_S = 5.0, 600.0, 3600.0


class BudgetServicer(budget_pb2_grpc.BudgetServiceServicer):
    """`calibrate` measures for so many seconds, and keeps what it finds."""

    def __init__(self, budgets: Budgets, calibrate: Callable[[float], AsyncGenerator[Progress, None]]) -> None:
        self._budgets, self._calibrate = budgets, calibrate

    async def GetBudgets(  # noqa: N802
        self, request: budget_pb2.GetBudgetsRequest, context: Any
    ) -> budget_pb2.Budgets:
        return _message(self._budgets)

    async def WatchBudgets(  # noqa: N802
        self, request: budget_pb2.WatchBudgetsRequest, context: Any
    ) -> AsyncIterator[budget_pb2.Budgets]:
        async for _ in self._budgets.watch():
            yield _message(self._budgets)

    async def Calibrate(  # noqa: N802
        self, request: budget_pb2.CalibrateRequest, context: Any
    ) -> AsyncIterator[budget_pb2.CalibrateResponse]:
        asked = request.duration
        seconds = asked.seconds + asked.nanos / 1e9 if request.HasField("duration") else _USUAL_S
        if not _LEAST_S <= seconds <= _LONGEST_S:
            raise RequestError(Reason.BAD_FIELD, f"duration must be {_LEAST_S:g} to {_LONGEST_S:g} s.", field="duration")
        async with contextlib.aclosing(self._calibrate(seconds)) as measuring:
            async for progress in measuring:
                yield _progress(progress)


def _progress(progress: Progress) -> budget_pb2.CalibrateResponse:
    points = [
        budget_pb2.CalibrateResponse.Point(
            threads=point.threads, tokens_per_second=point.tokens_per_s, hottest_celsius=point.hottest_c, watts=point.watts
        )
        for point in progress.points
    ]
    cooling = progress.finished.cooling_c_per_s if progress.finished else None
    return budget_pb2.CalibrateResponse(
        fraction=progress.fraction,
        threads=progress.threads,
        points=points,
        cooling_celsius_per_second=cooling or 0.0,
        saved=progress.finished is not None,
    )


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
        unenforced=budgets.unenforced(),
    )


def _state(state: int) -> budget_pb2.Budgets.State.ValueType:
    return budget_pb2.Budgets.State.Value(f"STATE_{_NAMES[state]}")


_NAMES = ("NOMINAL", "REDUCED", "PAUSED", "SHED")
