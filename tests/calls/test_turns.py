"""Principals take turns: nobody keeps the others waiting, however much is asked for."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from agentd.calls.turns import Turns
from agentd.errors import Reason, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Asking:
    """Calls that wait for a place, and those that have one."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.running: list[tuple[str, Callable[[], None]]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.order: list[str] = []

    def ask(self, principal: str, count: int = 1) -> None:
        async def go() -> None:
            give_up = await self.turns.take(principal)
            self.order.append(principal)
            self.running.append((principal, give_up))

        self.tasks += [asyncio.create_task(go()) for _ in range(count)]

    def end(self) -> None:
        self.running.pop(0)[1]()


def test_places_go_round_by_round():
    async def go() -> None:
        asking = Asking(Turns(3))
        asking.ask("flood", 50)
        await settle()
        assert Counter(name for name, _ in asking.running) == {"flood": 2}  # one is always for somebody else
        asking.ask("one", 3)
        asking.ask("two", 3)
        await settle()
        assert Counter(name for name, _ in asking.running) == {"flood": 2, "one": 1}
        while asking.running:
            asking.end()
            await settle()
        assert asking.order.index("two") < 6
        assert {"one", "two"} <= set(asking.order[:6])
        last = max(n for n, name in enumerate(asking.order) if name != "flood")
        assert last < 20
        assert len(asking.order) == 56

    asyncio.run(go())


@pytest.mark.parametrize("moment", ["waiting", "just given"])
def test_whoever_gives_up_waiting_leaves_its_place_to_others(moment: str):
    async def go() -> None:
        asking = Asking(Turns(1))
        asking.ask("a")
        await settle()
        asking.ask("a", 2)
        await settle()
        if moment == "just given":
            asking.end()
        asking.tasks[1].cancel()
        await settle()
        if moment == "waiting":
            asking.end()
            await settle()
        assert asking.tasks[1].cancelled()
        assert asking.tasks[2].done()
        assert len(asking.running) == 1

    asyncio.run(go())


def test_each_principal_has_so_many_and_is_told_when_to_come_again():
    async def go() -> None:
        turns = Turns(2, most=3)
        with turns.admitted("a"), turns.admitted("a"), turns.admitted("a"):
            with pytest.raises(ToolError) as caught, turns.admitted("a"):
                pass
            assert caught.value.reason is Reason.QUEUE_FULL
            assert 0 < caught.value.retry_s < 1
            with turns.admitted("b"):
                pass
        with turns.admitted("a"):
            pass

    asyncio.run(go())
