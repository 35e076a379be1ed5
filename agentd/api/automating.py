"""The automations' service."""

from __future__ import annotations

import asyncio
import fnmatch
import json
from typing import TYPE_CHECKING, Any

from agentd.api import convert
from agentd.api.identity import caller
from agentd.automations import State
from agentd.calls import CallRequest
from agentd.errors import AgentdError, Reason, RequestError
from agentd.v1 import automation_pb2 as pb
from agentd.v1 import automation_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentd.automations import Automation, Automations, Checked, Event, Told
    from agentd.calls import Calls
    from agentd.grants import Grants

_LARGEST_TEXT = 256 << 10


class AutomationServicer(automation_pb2_grpc.AutomationServiceServicer):
    def __init__(self, automations: Automations, calls: Calls, grants: Grants) -> None:
        self._automations, self._calls, self._grants = automations, calls, grants

    async def ListAutomations(  # noqa: N802
        self, request: pb.ListAutomationsRequest, context: Any
    ) -> pb.ListAutomationsResponse:
        return pb.ListAutomationsResponse(automations=map(self._message, await self._automations.all()))

    async def GetAutomation(self, request: pb.GetAutomationRequest, context: Any) -> pb.Automation:  # noqa: N802
        return self._message(await self._automations.told(_name(request.name)))

    def _message(self, told: Told) -> pb.Automation:
        message, automation, toolbox = _automation(told), told.automation, self._calls.toolbox
        if automation and not message.trouble:
            named = [automation.call.tool] if automation.call else automation.tools
            if unknown := next((tool for tool in named if tool not in toolbox.tools), ""):
                message.trouble = convert.valid(f"there is no tool {unknown}: {toolbox.why_missing(unknown)}")
        return message

    async def TriggerAutomation(  # noqa: N802
        self, request: pb.TriggerAutomationRequest, context: Any
    ) -> pb.TriggerEvent:
        name, who = _name(request.name), caller()
        if not who.has("admin") and not any(fnmatch.fnmatchcase(who.name, each) for each in self._automations.callers(name)):
            who.require("admin", f"trigger the automation {name}, whose on.call.callers does not name it")
        return _event(await self._automations.trigger(name, dict(request.data), who.name))

    async def PauseAutomation(self, request: pb.PauseAutomationRequest, context: Any) -> pb.Automation:  # noqa: N802
        return self._message(await self._automations.pause(_name(request.name), paused=True))

    async def ResumeAutomation(self, request: pb.ResumeAutomationRequest, context: Any) -> pb.Automation:  # noqa: N802
        return self._message(await self._automations.pause(_name(request.name), paused=False))

    async def ReloadAutomations(  # noqa: N802
        self, request: pb.ReloadAutomationsRequest, context: Any
    ) -> pb.ListAutomationsResponse:
        await self._automations.reload()
        return pb.ListAutomationsResponse(automations=map(self._message, await self._automations.all()))

    async def CheckAutomation(  # noqa: N802
        self, request: pb.CheckAutomationRequest, context: Any
    ) -> pb.CheckAutomationResponse:
        if len(request.text) > _LARGEST_TEXT:
            raise RequestError(Reason.BAD_FIELD, f"text is longer than {_LARGEST_TEXT} characters.", field="text")
        checked = await self._automations.check(_name(request.name), request.text)
        automation = checked.told.automation
        known = self._calls.toolbox.tools
        response = pb.CheckAutomationResponse(
            automation=self._message(checked.told),
            matches=map(convert.valid, checked.matches),
            matching=checked.matching,
            waits_for=checked.waits_for,
        )
        if automation:
            named = [automation.call.tool] if automation.call else automation.tools or list(known)
            response.unknown_tools.extend(convert.valid([tool for tool in named if tool not in known]))
            tools = [tool for tool in named if tool in known]
            response.permissions.extend(await asyncio.to_thread(self._permissions, automation, checked, tools))
        return response

    def _permissions(
        self, automation: Automation, checked: Checked, tools: Iterable[str]
    ) -> list[pb.CheckAutomationResponse.Permission]:
        """As if its own grants were in force, which those of a text are not yet."""
        principal, own = automation.principal, automation.rules()
        supposed = [grant for grant in self._grants.all() if not grant.where.startswith(f"automations/{automation.name}.")]
        supposed += own
        found = []
        for tool in tools:
            permission = pb.CheckAutomationResponse.Permission(tool=tool)
            if checked.call:
                self._decide(permission, CallRequest(principal, *checked.call), supposed)
            else:
                asks = self._calls.asks(tool)
                concerned = [each for each in supposed if each.concerns((principal,), tool)]
                rules = [str(each) for each in concerned if each.is_specific or not asks or each.decision != "allow"]
                permission.grants.extend(convert.valid(rules))
                if not rules:
                    permission.decision = "ask"
                    permission.reason = "no grant speaks of it: each call waits for a person"
            found.append(permission)
        return found

    def _decide(self, permission: pb.CheckAutomationResponse.Permission, request: CallRequest, supposed: Any) -> None:
        try:
            scopes, decision = self._calls.explain(request, supposed)
        except AgentdError as e:
            permission.decision, permission.reason = "deny", convert.valid(e.message)
            return
        permission.decision, permission.reason = decision.verdict, convert.valid(decision.reason)
        permission.scopes.extend(convert.valid([str(scope) for scope in scopes]))
        permission.grants.extend(convert.valid(decision.rules or decision.near))
        if not decision.rules:  # a rule that wants a person asked is stronger than a grant
            permission.missing_scopes.extend(convert.valid([str(scope) for scope in decision.unmet]))

    async def ListTriggerEvents(  # noqa: N802
        self, request: pb.ListTriggerEventsRequest, context: Any
    ) -> pb.ListTriggerEventsResponse:
        size, before = convert.page_size(request.page_size), convert.page_number(request.page_token)
        events = await self._automations.history(_name(request.parent) if request.parent else "", before, size + 1)
        token = convert.page_token(str(events[size - 1].seq)) if len(events) > size else ""
        return pb.ListTriggerEventsResponse(trigger_events=map(_event, events[:size]), next_page_token=token)

    async def GetTriggerEvent(self, request: pb.GetTriggerEventRequest, context: Any) -> pb.TriggerEvent:  # noqa: N802
        name, _, number = request.name.partition("/events/")
        if not number.isdecimal() or len(number) > 18:
            message = f"name must look like automations/NAME/events/NUMBER, not {request.name!r}."
            raise RequestError(Reason.BAD_FIELD, message, field="name")
        return _event(await self._automations.event(_name(name), int(number)))


def _name(full: str) -> str:
    return convert.identifier(full, "automations")


def _automation(told: Told) -> pb.Automation:
    automation, counts = told.automation, told.counts
    message = pb.Automation(
        name=convert.valid(f"automations/{told.name}"),
        description=automation.description if automation else "",
        trigger=convert.valid(_trigger(automation)) if automation else "",
        action=convert.valid(_action(automation)) if automation else "",
        paused=told.paused,
        error=convert.valid(told.error),
        trouble=convert.valid(told.trouble),
        polled=told.polled,
        waits_for=convert.valid(told.waits_for) if counts.get(State.WAITING) else "",
        waiting=counts.get(State.WAITING, 0),
        running=counts.get(State.RUNNING, 0),
        parked=told.parked,
        succeeded=counts.get(State.SUCCEEDED, 0),
        failed=counts.get(State.FAILED, 0),
        principal=automation.principal if automation else "",
    )
    if told.next_due:
        message.next_time.FromDatetime(told.next_due)
    return message


def _trigger(automation: Automation) -> str:
    on = automation.on
    if on.file:
        word = "appears" if on.file.on == "appears" else "appears or changes"
        return f"a file {on.file.pattern} {word} in {on.file.path}{' or below' if on.file.recursive else ''}"
    if on.schedule:
        zone = f" ({on.schedule.zone})" if on.schedule.zone else ""
        return f"{on.schedule.cron}{zone}" if on.schedule.cron else f"every {on.schedule.every}"
    return "a call" + (f" with {', '.join(on.call.data)}" if on.call and on.call.data else "")


def _action(automation: Automation) -> str:
    if call := automation.call:
        return f"{call.tool}({json.dumps(call.arguments, ensure_ascii=False)})"
    return automation.prompt.strip()


def _event(event: Event) -> pb.TriggerEvent:
    message = pb.TriggerEvent(
        name=f"automations/{event.automation}/events/{event.seq}",
        subject=convert.valid(event.subject),
        state=pb.TriggerEvent.State.Value(f"STATE_{event.state.name}"),
        data={key: convert.valid(value) for key, value in event.data.items()},
        attempts=event.attempt,
        run=f"runs/{event.run}" if event.run else "",
        note=convert.valid(event.note),
        joined=event.joined,
        triggered_by=event.by,
    )
    due_ns = event.due_ns if event.state is State.WAITING else 0
    times = ("create_time", event.create_ns), ("begin_time", event.begin_ns), ("end_time", event.end_ns), ("due_time", due_ns)
    for name, time_ns in times:
        if time_ns:
            getattr(message, name).CopyFrom(convert.timestamp(time_ns))
    return message
