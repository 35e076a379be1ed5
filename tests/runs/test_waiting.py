"""Runs that wait: for a turn, for a model that can't be loaded yet, past a stop. The model is scripted, the store is real."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from agentd.budgets import Admission, Allowance, Priority, Quota, Quotas, Usage
from agentd.budgets import State as BudgetState
from agentd.budgets.policy import AdmissionPolicy
from agentd.engine.link import Delta, Done, Progress
from agentd.engine.meter import Meter
from agentd.errors import DaemonError, EngineError, Reason, StoreError
from agentd.runs import Limits, ModelSettings, RunRequest, Runs, State, StopReason
from agentd.runs.live import Live
from agentd.runs.record import RunRecords
from agentd.store import Store
from tests.runs.test_loop import ScriptedCaller

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from agentd.engine.prompt import Conversation
    from agentd.runs import Run

BACKGROUND = RunRequest("unix:pi", "later", priority=Priority.BACKGROUND)


@dataclass
class Slow:
    """Says a word a moment, without end; what it has said is on the meter, also if it is cancelled."""

    used: Usage = field(default_factory=Usage)
    times: int = 0

    async def generate(
        self, conversation: Conversation, *, max_tokens: int, temperature: float, seed: int, spent: Callable[[Done], None]
    ) -> AsyncGenerator[Any, None]:
        self.times += 1
        wrote, counts = 0, {"prompt_tokens": 3, "cached_tokens": 0, "prefill_ms": 0, "decode_ms": 0}
        try:
            for n in range(max_tokens):
                yield Delta(id=1, thought=False, text=f"{n} ")
                self.used += Usage(1, 0.01)
                wrote += 1
                await asyncio.sleep(0.001)
        finally:
            done = Done(id=1, reason="stop", ids=tuple(range(wrote)), busy_s=0.01 * wrote, **counts)
            spent(done)
        yield done


@dataclass
class Desk:
    """Runs over a real store. `ready` is what loading the model says, time after time."""

    store: Store
    quotas: Quotas | None = None
    ready: list[bool | Exception] = field(default_factory=list)
    recorded: list[Run] = field(default_factory=list)
    limits: Allowance = field(default_factory=Allowance)
    model: Slow = field(default_factory=Slow)

    def __post_init__(self) -> None:
        self.records = RunRecords(self.store)
        self.admission = Admission(AdmissionPolicy(), lambda: self.limits)
        settings = ModelSettings("system", (), thinking=False, temperature=0, seed=0)
        self.runs = Runs(
            *(self.records, self.model, ScriptedCaller(), settings, Limits(3, 20, 5, 2)),
            record=self.recorded.append,
            admission=self.admission,
            quotas=self.quotas,
            used=lambda: self.model.used,
            prepare=self.prepare,
        )

    async def prepare(self) -> bool:
        said = self.ready.pop(0) if self.ready else True
        if isinstance(said, Exception):
            raise said
        return said

    async def ended(self, run: Run) -> Run:
        async with asyncio.timeout(20):
            async for _ in self.runs.watch(run.id, 0):
                pass
            return await self.runs.get(run.id)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def test_what_can_wait_waits_for_a_model_that_can_not_be_loaded_yet(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Held back, and refused for memory, between its turn and its beginning: it is not used up by that."""
    monkeypatch.setattr("agentd.runs.service._NOT_READY_S", 0.01)

    async def go() -> None:
        short = EngineError(Reason.BUDGET_MEMORY, "Not now.")
        desk = Desk(store, ready=[False, short, False])
        run = await desk.ended(await desk.runs.create(BACKGROUND))
        assert (run.state, run.stop_reason) == (
            State.SUCCEEDED,
            StopReason.TOKEN_LIMIT if not run.answer else StopReason.ANSWERED,
        )
        assert desk.model.times == 1
        await desk.runs.stop()  # waits for what is still being kept
        assert [each.state for each in desk.recorded] == [State.QUEUED, State.RUNNING, State.SUCCEEDED]

    asyncio.run(go())


def test_others_are_told_at_once(store: Store):
    async def go() -> None:
        desk = Desk(store, ready=[EngineError(Reason.BUDGET_MEMORY, "Not now.")])
        run = await desk.ended(await desk.runs.create(RunRequest("unix:pi", "now")))
        assert (run.state, run.error and run.error[0]) == (State.FAILED, "BUDGET_MEMORY")

    asyncio.run(go())


def test_runs_at_once_do_not_count_on_the_same_tokens(store: Store):
    """Two of one principal with a turn each: what is left of its quota is spent once. Others go on beside it."""

    async def go() -> None:
        quotas = Quotas([Quota("unix:pi", "day", tokens=12)], store)
        desk = Desk(store, quotas)
        desk.admission.parallel = 4
        asked = [RunRequest(who, "talk") for who in ("unix:pi", "unix:pi", "unix:other")]
        runs = [await desk.runs.create(each) for each in asked]
        ended = [await desk.ended(run) for run in runs]
        assert sum(run.generated_tokens for run in ended[:2]) == 12
        assert ended[2].generated_tokens == 20
        assert quotas.tokens_left("unix:pi") == 0

    asyncio.run(go())


def test_cancelled_work_was_used_all_the_same(store: Store):
    """Of the run, and of the quota."""

    async def go() -> None:
        quotas = Quotas([Quota("*", "day", tokens=100)], store)
        desk = Desk(store, quotas)
        run = await desk.runs.create(RunRequest("unix:pi", "talk"))
        while desk.model.used.tokens < 5:  # noqa: ASYNC110 - a scripted model tells nobody
            await asyncio.sleep(0.001)
        cancelled = await desk.runs.cancel(run.id)
        assert cancelled.state is State.CANCELLED
        assert cancelled.generated_tokens >= 5
        assert cancelled.seconds > 0
        assert quotas.tokens_left("unix:pi") <= 95

    asyncio.run(go())


def test_a_stop_leaves_what_has_not_begun_and_a_start_takes_it_up(store: Store):
    """Once: it is not started before, and whoever watches is let go."""

    async def go() -> None:
        desk = Desk(store, limits=Allowance(BudgetState.PAUSED, "thermal", "hot", background=False))
        run = await desk.runs.create(BACKGROUND)
        watching = asyncio.create_task(desk.ended(run))
        await asyncio.sleep(0.01)
        await desk.runs.stop()
        with pytest.raises(DaemonError):
            await watching
        assert (await desk.runs.get(run.id)).state is State.QUEUED
        assert desk.model.times == 0
        again = Desk(store)
        assert again.records.close_lost() == []
        again.runs.resume(again.records.deferred())
        assert (await again.ended(run)).state is State.SUCCEEDED
        assert again.records.deferred() == []

    asyncio.run(go())


def test_a_cancel_that_can_not_be_kept_is_an_error_and_the_run_waits_on(store: Store, monkeypatch: pytest.MonkeyPatch):
    async def go() -> None:
        desk = Desk(store, limits=Allowance(BudgetState.PAUSED, "thermal", "hot", background=False))
        run = await desk.runs.create(BACKGROUND)

        async def full(_: Run) -> None:
            raise StoreError(Reason.STORE_FULL, "The disk is full.")

        with monkeypatch.context() as patched:
            patched.setattr(desk.records, "keep", full)
            with pytest.raises(StoreError):
                await desk.runs.cancel(run.id)
        assert (await desk.runs.get(run.id)).state is State.QUEUED
        assert (await desk.runs.cancel(run.id)).state is State.CANCELLED
        assert desk.records.deferred() == []

    asyncio.run(go())


def test_a_failure_in_passing_burns_no_request_id(store: Store):
    """The next request of that name starts the run."""

    async def go() -> None:
        desk = Desk(store)
        desk.runs._record = lambda _run: (_ for _ in ()).throw(StoreError(Reason.STORE_FULL, "The disk is full."))
        asked = RunRequest("unix:pi", "now", request_id="r")
        with pytest.raises(StoreError):
            await desk.runs.create(asked)
        desk.runs._record = desk.recorded.append
        assert (await desk.ended(await desk.runs.create(asked))).state is State.SUCCEEDED

    asyncio.run(go())


async def outlive(live: Live) -> None:
    async with asyncio.timeout(0.01) as short:
        live.time(short)
        try:
            await asyncio.sleep(5)
        finally:
            live.hold("budget", on=True)
            live.hold("budget", on=False)


def test_time_that_has_run_out_can_be_held_no_more():
    """While what was cancelled by it still winds up."""

    async def go() -> None:
        live = Live(None, None)  # type: ignore[arg-type]
        live.hold("turn", on=True)
        async with asyncio.timeout(60) as limit:
            live.time(limit)
            assert limit.when() is None
            live.hold("turn", on=False)
            assert limit.when() is not None
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await outlive(live)

    asyncio.run(go())


@pytest.mark.parametrize("field_name", ["generated", "passes", "busy_s", "rest_s"])
@pytest.mark.parametrize("value", [-1, 10**400, 1.5e308])
def test_what_an_engine_says_of_itself_is_bounded(field_name: str, value: float):
    with pytest.raises(ValueError):
        Progress(**{"prefilled": 0, "generated": 0, "passes": 0, "busy_s": 0, "rest_s": 0, field_name: value})  # type: ignore[arg-type]


def test_a_meter_adds_up_over_processes():
    meter = Meter()
    for _ in range(3):
        meter.begin()
        meter.told(Progress(prefilled=5, generated=2, passes=3, busy_s=1, rest_s=0.5))
    assert (meter.total.generated, meter.total.passes, meter.total.busy_s) == (6, 9, 3)
