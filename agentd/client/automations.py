"""Automations, as a client sees them: `Client().automations`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from agentd.v1 import automation_pb2 as pb
from agentd.v1 import automation_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import grpc

T = TypeVar("T")


class _Call(Protocol):
    def __call__(self, method: Callable[..., T], request: Any) -> T: ...


class AutomationsClient:
    """Names are those of the files, without `automations/`. Raises AgentdError, as all clients do."""

    def __init__(self, channel: grpc.Channel, call: _Call) -> None:
        self._stub, self._call = automation_pb2_grpc.AutomationServiceStub(channel), call

    def list(self) -> list[pb.Automation]:
        return [*self._call(self._stub.ListAutomations, pb.ListAutomationsRequest()).automations]

    def get(self, name: str) -> pb.Automation:
        return self._call(self._stub.GetAutomation, pb.GetAutomationRequest(name=_full(name)))

    def trigger(self, name: str, data: Mapping[str, str] | None = None) -> pb.TriggerEvent:
        """Put an event into its line."""
        return self._call(self._stub.TriggerAutomation, pb.TriggerAutomationRequest(name=_full(name), data=data or {}))

    def pause(self, name: str) -> pb.Automation:
        return self._call(self._stub.PauseAutomation, pb.PauseAutomationRequest(name=_full(name)))

    def resume(self, name: str) -> pb.Automation:
        return self._call(self._stub.ResumeAutomation, pb.ResumeAutomationRequest(name=_full(name)))

    def check(self, name: str, text: str = "") -> pb.CheckAutomationResponse:
        """What it would do; with a text, what the automation in it would do."""
        return self._call(self._stub.CheckAutomation, pb.CheckAutomationRequest(name=_full(name), text=text))

    def reload(self) -> pb.ListAutomationsResponse:
        """Read all files again."""
        return self._call(self._stub.ReloadAutomations, pb.ReloadAutomationsRequest())

    def event(self, name: str) -> pb.TriggerEvent:
        return self._call(self._stub.GetTriggerEvent, pb.GetTriggerEventRequest(name=name))

    def events(self, name: str = "") -> Iterator[pb.TriggerEvent]:
        """Newest first; of one automation, or of all."""
        token = ""
        while True:
            request = pb.ListTriggerEventsRequest(parent=_full(name) if name else "", page_token=token)
            page = self._call(self._stub.ListTriggerEvents, request)
            yield from page.trigger_events
            if not (token := page.next_page_token):
                return


def _full(name: str) -> str:
    return f"automations/{name}"
