"""The model is made ready for the first run: what all prompts begin with is decoded, or comes from the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentd.budgets import Admission, Priority
from agentd.engine.prompt import Conversation, Turn

if TYPE_CHECKING:
    from agentd.engine.client import Engine
    from agentd.runs.loop import ModelSettings


async def warm(engine: Engine, admission: Admission, settings: ModelSettings) -> None:
    """In a turn of the background's, when the budgets allow it one. Raises EngineError."""
    ticket = admission.admit(Priority.BACKGROUND, again=True)
    ticket.begun = True  # it takes no place in the queue
    try:
        async with admission.turn(ticket):
            if engine.model:  # else it was unloaded meanwhile, and is not to be loaded for that
                await engine.warm(Conversation(settings.system, settings.tools, (Turn("Hello"),), settings.thinking))
    finally:
        admission.leave(ticket)
