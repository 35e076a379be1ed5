"""What the daemon itself puts on record: its start, its runs, its budgets, wrong tokens."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentd import __version__
from agentd.audit import Event, Payload
from agentd.runs import State

if TYPE_CHECKING:
    from agentd_sandbox import Level

    from agentd.audit import AuditLog
    from agentd.budgets import Budgets
    from agentd.budgets.governor import Budget
    from agentd.budgets.state import Name
    from agentd.grants import Grants
    from agentd.runs import Run
    from agentd.store import Store

_FROM_CONFIGURATION = re.compile(r" \((agentd\.toml|automations/[a-z0-9_-]+\.toml), grant \d+\)$")


@dataclass(frozen=True, slots=True)
class Chronicle:
    store: Store
    audit: AuditLog
    budgets: Budgets

    def boot(self, level: Level, grants: Grants, tools: dict[str, str], recovered: list[str], key: str) -> None:
        """What is in force from here on. Raises AgentdError."""
        detail = {
            "version": __version__,
            "pid": os.getpid(),
            "sandbox": level.name,
            "profile": level.filter_digest,
            "kernel": level.kernel,
            "grants": [str(grant) for grant in grants.all()],
            "policy": grants.policy,
            "tools": tools,
            "recovered": recovered,
            "key": key,
        }
        self.audit.record(Event(kind="boot", principal="agentd", detail=detail))

    def changed_rules(self, former: object, grants: Grants) -> None:
        """Rules of agentd.toml that were not there at the last start, and those that were: people edit it while nobody looks.

        `former` is the detail of the event of that start.
        """
        now = _configured([str(grant) for grant in grants.all()])
        then = _configured(former.get("grants", [])) if isinstance(former, dict) else now
        added, removed = [rule for rule in now if rule not in then], [rule for rule in then if rule not in now]
        if added or removed:
            self.audit.record(Event(kind="policy.change", principal="agentd", detail={"added": added, "removed": removed}))

    def run(self, run: Run, model: dict[str, Any]) -> None:
        """That it was asked for, began from which prompt with which model, or how it ended. Raises AgentdError."""
        self.audit.record(_run_event(run, model))

    def budget(self, name: Name, before: Budget, after: Budget) -> None:
        """Nobody waits for this to be durable."""
        detail = {"budget": name, "from": before.state.name.lower(), "to": after.state.name.lower(), "reason": after.reason}
        event = Event(kind="budget.change", principal="agentd", detail=detail, budget=self.device())
        self.store.submit(lambda db: self.audit.append(db, event))

    def wrong_token(self, peer: str, why: str) -> None:
        """Nobody waits for this to be durable."""
        event = Event(kind="auth.fail", principal=peer, error=why)
        self.store.submit(lambda db: self.audit.append(db, event))

    def device(self) -> dict[str, Any]:
        """How it is, for the events of calls."""
        readings = self.budgets.readings
        known = {"temperature_c": readings.temperature_c, "battery_pct": readings.battery_pct, "charging": readings.charging}
        known |= {"available_mib": round(readings.available_mib) if readings.available_mib else None}
        told = {name: value for name, value in known.items() if value is not None}
        return {"state": self.budgets.limits.state.name.lower(), **told}


def _configured(rules: object) -> list[str]:
    """Without their numbers, which move when one is put in between."""
    told = []
    for rule in map(str, rules) if isinstance(rules, list) else ():
        if found := _FROM_CONFIGURATION.search(rule):
            where = "" if found[1] == "agentd.toml" else f" ({found[1]})"
            told.append(rule[: found.start()] + where)
    return told


def _run_event(run: Run, model: dict[str, Any]) -> Event:
    who: dict[str, Any] = {"principal": run.principal, "session": run.session, "run": run.id, "labels": run.labels.names}
    who |= {"cause": run.trigger} if run.trigger else {}
    asked: dict[str, Any] = {"prompt": Payload(run.prompt), "priority": run.priority.name.lower()}
    asked |= {"triggered_by": run.triggered_by} if run.triggered_by else {}
    if run.state is State.QUEUED:
        return Event(kind="run.queue", **who, detail={**asked, "start_by_ns": run.start_by_ns})
    if run.state is State.RUNNING:
        return Event(kind="run.start", **who, detail=asked | ({} if run.direct else model))
    used: dict[str, float] = {"prompt_tokens": run.prompt_tokens, "generated_tokens": run.generated_tokens, "calls": run.calls}
    used |= {"seconds": run.seconds, "joules": run.joules}
    stop = run.stop_reason.value if run.stop_reason else ""
    ended: dict[str, Any] = {"state": run.state.value, "stop_reason": stop, "answer": Payload(run.answer), **used}
    return Event(kind="run.end", **who, error=run.error[1] if run.error else "", detail=ended)
