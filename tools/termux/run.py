"""The bundle `termux`. The daemon runs the programs of Termux:API; text goes to them on their standard input."""

from __future__ import annotations

from typing import Any

from agentd_sandbox.sdk import operate, tool


@tool("battery")
def battery() -> dict[str, Any]:
    return operate("termux/battery")


@tool("read_clipboard")
def read_clipboard() -> dict[str, Any]:
    return operate("termux/clipboard/get")


@tool("set_clipboard")
def set_clipboard(text: str) -> dict[str, Any]:
    return operate("termux/clipboard/set", text=text)


@tool("sms")
def sms(number: str, text: str) -> dict[str, Any]:
    return operate(f"termux/sms/{number}", text=text)


@tool("say")
def say(text: str) -> dict[str, Any]:
    return operate("termux/voice", text=text)


@tool("torch")
def torch(value: str) -> dict[str, Any]:
    return operate("termux/torch", on=value == "on")


@tool("location")
def location(provider: str | None = None) -> dict[str, Any]:
    return operate("termux/location", provider=provider or "network")
