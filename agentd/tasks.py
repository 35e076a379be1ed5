"""Work that must not be left half done by whoever waits for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


async def to_its_end(work: Coroutine[object, object, T] | asyncio.Task[T]) -> T:
    """Wait for it whatever cancels come meanwhile; they count when it has ended. Raises what it raises."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
        except Exception:  # raised below, where the task's own end is looked at
            break
    if cancelled:
        if not task.cancelled():
            task.exception()  # it was seen
        raise asyncio.CancelledError
    return task.result()
