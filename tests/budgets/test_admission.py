"""Who goes first, who waits, who is turned away."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.budgets import Admission, Allowance, OverBudget, Priority, QueueFull, State
from agentd.budgets.policy import AdmissionPolicy

INTERACTIVE, NORMAL, BACKGROUND = Priority


@dataclass
class Office:
    """An admission whose budgets the test sets, and the work that came to its turn, in order."""

    limits: Allowance = field(default_factory=Allowance)
    policy: AdmissionPolicy = field(default_factory=lambda: AdmissionPolicy(queue_max=3, background_queue_max=2))
    served: list[str] = field(default_factory=list)
    counted: list[tuple[Priority, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(self.policy, lambda: self.limits, lambda *each: self.counted.append(each))

    def allow(self, state: State, *, background: bool = True) -> None:
        self.limits = replace(self.limits, state=state, background=background, cause="thermal", reason="it is 86.0 C hot")
        self.admission.look()

    async def work(self, name: str, priority: Priority, turns: int = 1, hold: asyncio.Event | None = None) -> None:
        ticket = self.admission.admit(priority)
        try:
            for _ in range(turns):
                async with self.admission.turn(ticket):
                    self.served.append(name)
                    await (hold.wait() if hold else asyncio.sleep(0))
        finally:
            self.admission.leave(ticket)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_is_interactive_overtakes_the_rest_and_equals_keep_their_order():
    """While one is at work, the others come in another order than they are served."""

    async def go() -> list[str]:
        office, done = Office(policy=AdmissionPolicy()), asyncio.Event()
        at_work = asyncio.create_task(office.work("first", BACKGROUND, hold=done))
        await settle()
        names = [("b1", BACKGROUND), ("n1", NORMAL), ("i1", INTERACTIVE), ("n2", NORMAL), ("i2", INTERACTIVE)]
        tasks = [asyncio.create_task(office.work(*each)) for each in names]
        await settle()
        done.set()
        await asyncio.gather(at_work, *tasks)
        return office.served

    assert asyncio.run(go()) == ["first", "i1", "i2", "n1", "n2", "b1"]


def test_the_queue_has_an_end_and_those_turned_away_come_back_later_and_later():
    """The ones that wait keep their places; each refusal is told a longer time than the one before."""

    async def go() -> None:
        office = Office()
        office.allow(State.PAUSED, background=False)
        waiting = [asyncio.create_task(office.work(f"w{n}", NORMAL)) for n in range(3)]
        await settle()
        refused = []
        for _ in range(20):
            with pytest.raises(QueueFull) as caught:
                office.admission.admit(INTERACTIVE)
            refused.append(caught.value.retry_s)
        assert refused == sorted(set(refused))
        assert refused[0] >= 2
        assert office.admission.waiting()[NORMAL] == 3
        office.admission.leave(office.admission.admit(BACKGROUND))  # another queue
        office.allow(State.NOMINAL)
        await asyncio.gather(*waiting)
        assert office.served == ["w0", "w1", "w2"]
        assert office.counted[-1][:2] == (BACKGROUND, "deferred")

    asyncio.run(go())


def test_whoever_gives_up_frees_the_place():
    """In the queue, and in the very moment of getting the turn."""

    async def go() -> None:
        office = Office()
        office.allow(State.PAUSED)
        tasks = [asyncio.create_task(office.work(f"w{n}", NORMAL)) for n in range(3)]
        await settle()
        tasks[1].cancel()
        await settle()
        assert office.admission.waiting()[NORMAL] == 2
        office.limits = Allowance()
        office.admission.look()
        tasks[0].cancel()  # granted, and not yet begun
        await asyncio.wait(tasks)
        assert office.served == ["w2"]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("state", "background", "goes"),
    [
        (State.NOMINAL, True, {"i", "n", "b"}),
        (State.NOMINAL, False, {"i", "n"}),
        (State.REDUCED, False, {"i", "n"}),
        (State.PAUSED, False, set()),
    ],
)
def test_what_the_budgets_let_go(state: State, background: bool, goes: set[str]):
    async def go() -> set[str]:
        office = Office()
        office.allow(state, background=background)
        tasks = [asyncio.create_task(office.work(*each)) for each in (("i", INTERACTIVE), ("n", NORMAL), ("b", BACKGROUND))]
        await settle()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return set(office.served)

    assert asyncio.run(go()) == goes


def test_where_all_is_unloaded_only_the_background_waits():
    async def go() -> None:
        office = Office()
        office.allow(State.SHED, background=False)
        with pytest.raises(OverBudget):
            office.admission.admit(INTERACTIVE)
        assert office.admission.why_waiting(office.admission.admit(BACKGROUND)) == (0, "it is 86.0 C hot")

    asyncio.run(go())


def test_work_that_had_its_place_before_a_restart_keeps_it():
    office = Office()
    for _ in range(5):
        office.admission.admit(BACKGROUND, again=True)
    with pytest.raises(QueueFull):
        office.admission.admit(BACKGROUND)


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Priority)), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.lists(st.sampled_from(list(State)), max_size=8),
)
def test_whatever_happens_one_at_a_time_is_served_and_nobody_is_forgotten(
    work: list[tuple[Priority, int, bool]], states: list[State]
):
    """Any work, some of it cancelled, under budgets that change: in the end all that stayed has had its turns."""

    async def go() -> None:
        office = Office(policy=AdmissionPolicy())
        at_once = most = 0

        async def one(name: str, priority: Priority, turns: int) -> None:
            nonlocal at_once, most
            with contextlib.suppress(QueueFull, OverBudget):
                ticket = office.admission.admit(priority)
                try:
                    for _ in range(turns):
                        async with office.admission.turn(ticket):
                            at_once += 1
                            most = max(most, at_once)
                            try:
                                await asyncio.sleep(0)
                            finally:
                                at_once -= 1
                            office.served.append(name)
                finally:
                    office.admission.leave(ticket)

        tasks = {f"w{n}": asyncio.create_task(one(f"w{n}", *each[:2])) for n, each in enumerate(work)}
        for (name, task), (_, _, cancelled) in zip(tasks.items(), work, strict=True):
            if states:
                office.allow(states.pop(), background=len(states) % 2 == 0)
            await asyncio.sleep(0)
            if cancelled:
                task.cancel(name)
        office.allow(State.NOMINAL)
        await asyncio.wait(tasks.values(), timeout=5)
        assert all(task.done() for task in tasks.values())
        assert most <= 1
        assert not office.admission._tickets
        assert not office.admission._at_work

    asyncio.run(go())


def test_several_have_a_turn_at_a_time_and_the_background_only_beside_its_like():
    """Three places: two interactive ones go at once, the background waits for both, and then goes with another of its kind."""

    async def go() -> None:
        office = Office()
        office.admission.parallel = 3
        began: list[str] = []
        ends = {name: asyncio.Event() for name in ("a", "b", "low", "lower")}

        async def work(name: str, priority: Priority) -> None:
            ticket = office.admission.admit(priority)
            async with office.admission.turn(ticket):
                began.append(name)
                await ends[name].wait()
            office.admission.leave(ticket)

        tasks = [asyncio.create_task(work(name, Priority.INTERACTIVE)) for name in ("a", "b")]
        tasks += [asyncio.create_task(work(name, Priority.BACKGROUND)) for name in ("low", "lower")]
        await settle()
        assert began == ["a", "b"]
        ends["a"].set()
        await settle()
        assert began == ["a", "b"]
        ends["b"].set()
        await settle()
        assert began == ["a", "b", "low", "lower"]
        for end in ends.values():
            end.set()
        await asyncio.gather(*tasks)

    asyncio.run(go())
