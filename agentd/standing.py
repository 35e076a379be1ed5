"""How the daemon stands, in one message: what is loaded, what is confined, what goes on."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from agentd import __version__
from agentd.runs import State
from agentd.v1 import system_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentd_sandbox import Level

    from agentd.calls import Calls
    from agentd.config import Config
    from agentd.engine.client import Engine
    from agentd.runs import Runs


def status(
    config: Config,
    *,
    engine: Engine,
    level: Level,
    calls: Calls,
    runs: Runs,
    zygote_pid: int,
    model_error: str,
    grants: int,
    audit_closed: str,
    recovered: Sequence[str],
) -> system_pb2.Status:
    """`zygote_pid` is 0 where there is none, `model_error` and `audit_closed` empty where all is well."""
    model = engine.model
    return system_pb2.Status(
        version=__version__,
        pid=os.getpid(),
        zygote_pid=zygote_pid,
        engine_pid=engine.pid or 0,
        model=system_pb2.Status.Model(
            name=model.name if model else "",
            path=str(engine.settings.path),
            parameters=model.parameters if model else 0,
            context=model.context if model else 0,
            error=model_error,
        ),
        sandbox=system_pb2.Status.Sandbox(
            level=level.name, architecture=level.architecture, kernel=level.kernel, missing=level.missing
        ),
        state_folder=str(config.state),
        folder=str(config.tools.folder),
        tools=len(calls.toolbox.tools),
        grants=grants,
        audit_closed=audit_closed,
        runs=[
            system_pb2.Status.RunningRun(
                name=f"runs/{run.id}",
                principal=run.principal,
                seconds=(time.time_ns() - run.create_ns) / 1e9,
                queued=run.state is State.QUEUED,
                background=run.deferrable,
            )
            for run in runs.going_on()
        ],
        calls=[
            system_pb2.Status.RunningCall(
                name=f"calls/{call.id}",
                tool=call.tool.name,
                principal=call.request.principal,
                seconds=seconds,
                waits_for=[f"calls/{other}" for other in others],
            )
            for call, seconds, others in [*((call, seconds, ()) for call, seconds in calls.running()), *calls.waiting()]
        ],
        leftovers=calls.undoing.left_count,
        tokens_per_second=engine.meter.speed(),
        recovered_calls=[f"calls/{call}" for call in recovered],
    )
