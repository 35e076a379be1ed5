"""The bundle `time`."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from typing import Any

from agentd_sandbox.sdk import ToolFailure, tool


def _day(text: str | None) -> dt.date:
    if not text:
        return dt.datetime.now().astimezone().date()
    try:
        return dt.date.fromisoformat(text.strip())
    except ValueError:
        raise ToolFailure(f"{text!r} is no date; write it as 2026-11-21") from None


@tool("now")
def now(zone: str) -> dict[str, Any]:
    try:
        there = dt.datetime.now(zoneinfo.ZoneInfo(zone))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ToolFailure(f"there is no time zone {zone!r}") from None
    return {"date": there.date().isoformat(), "time": there.strftime("%H:%M"), "weekday": there.strftime("%A")}


@tool("shift")
def shift(days: int, date: str | None = None) -> dict[str, Any]:
    try:
        day = _day(date) + dt.timedelta(days=days)
    except OverflowError:
        raise ToolFailure("that is too far away") from None
    return {"date": day.isoformat(), "weekday": day.strftime("%A")}


@tool("until")
def until(date: str) -> dict[str, Any]:
    days = (_day(date) - _day(None)).days
    return {"days": days}
