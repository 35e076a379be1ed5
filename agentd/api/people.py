"""The services by which people decide: grants, approvals, tokens."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agentd.api import convert
from agentd.api.identity import caller
from agentd.calls import CallRequest
from agentd.errors import Reason, RequestError
from agentd.grants import Answer, Conditions, Extent, Grant, parse
from agentd.principals import Token
from agentd.v1 import approval_pb2, approval_pb2_grpc, grant_pb2, grant_pb2_grpc, token_pb2, token_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentd.api.ending import Ending
    from agentd.calls import Calls
    from agentd.grants import Approval, Approvals, Grants
    from agentd.principals import Tokens

_PRINCIPAL = re.compile(r"(token|unix|tls|automation):.{1,128}")  # compared as it stands, never as a pattern
_DECISIONS = {grant_pb2.Grant.DECISION_ASK: "ask", grant_pb2.Grant.DECISION_DENY: "deny"}


class GrantServicer(grant_pb2_grpc.GrantServiceServicer):
    def __init__(self, grants: Grants, calls: Calls, propose: Callable[[int], tuple[list[Grant], int]]) -> None:
        self._grants, self._calls, self._propose = grants, calls, propose

    async def CreateGrant(self, request: grant_pb2.CreateGrantRequest, context: Any) -> grant_pb2.Grant:  # noqa: N802
        wanted = _grant(request.grant)
        return self._message(await asyncio.to_thread(self._grants.add, wanted, caller().name))

    async def ListGrants(  # noqa: N802
        self, request: grant_pb2.ListGrantsRequest, context: Any
    ) -> grant_pb2.ListGrantsResponse:
        size, start = convert.page_size(request.page_size), convert.page_number(request.page_token)
        grants = self._grants.all()
        token = convert.page_token(str(start + size)) if len(grants) > start + size else ""
        messages = map(self._message, grants[start : start + size])
        return grant_pb2.ListGrantsResponse(grants=messages, next_page_token=token)

    async def RevokeGrant(self, request: grant_pb2.RevokeGrantRequest, context: Any) -> grant_pb2.Grant:  # noqa: N802
        identity = convert.identifier(request.name, "grants")
        return self._message(await asyncio.to_thread(self._grants.revoke, identity, caller().name))

    async def CheckCall(  # noqa: N802
        self, request: grant_pb2.CheckCallRequest, context: Any
    ) -> grant_pb2.CheckCallResponse:
        who = caller()
        if request.principal not in ("", who.name):
            who.require("admin", "ask what others may do")
        within = () if request.principal not in ("", who.name) else who.within
        arguments = convert.plain(request.arguments)
        asked = CallRequest(request.principal or who.name, convert.identifier(request.tool, "tools"), arguments, within=within)
        scopes, decision = await asyncio.to_thread(self._calls.explain, asked)
        return grant_pb2.CheckCallResponse(
            decision=grant_pb2.Grant.Decision.Value(f"DECISION_{decision.verdict.upper()}"),
            reason=convert.valid(decision.reason),
            scopes=convert.valid([str(scope) for scope in scopes]),
            rules=convert.valid(decision.rules),
            almost=convert.valid(decision.near) if who.has("admin") else (),  # they name what others may do
        )

    async def ProposeGrants(  # noqa: N802
        self, request: grant_pb2.ProposeGrantsRequest, context: Any
    ) -> grant_pb2.ProposeGrantsResponse:
        since = request.since.ToNanoseconds() if request.HasField("since") else 0
        proposed, calls = await asyncio.to_thread(self._propose, since)
        return grant_pb2.ProposeGrantsResponse(grants=map(self._message, proposed), calls=calls)

    def _message(self, grant: Grant) -> grant_pb2.Grant:
        message = grant_pb2.Grant(
            name=f"grants/{grant.id}" if grant.id else "",
            principal=grant.principal,
            tool=grant.tool,
            scope=convert.valid(grant.pattern.text),
            decision=grant_pb2.Grant.Decision.Value(f"DECISION_{grant.decision.upper()}"),
            max_uses=grant.max_uses,
            uses=self._grants.used(grant) if grant.max_uses else 0,
            while_charging=grant.conditions.charging,
            hours=grant.conditions.hours,
            while_nominal=grant.conditions.nominal,
            source=grant_pb2.Grant.Source.Value(f"SOURCE_{grant.source.upper()}"),
            created_by=grant.created_by,
            rehearse=grant.rehearse,
            text=convert.valid(str(grant)),
        )
        if grant.expire_ns:
            message.expire_time.CopyFrom(convert.timestamp(grant.expire_ns))
        if grant.create_ns:
            message.create_time.CopyFrom(convert.timestamp(grant.create_ns))
        return message


def _grant(message: grant_pb2.Grant) -> Grant:
    """Raises RequestError (GRANT_INVALID)."""
    expire = message.expire_time.ToNanoseconds() if message.HasField("expire_time") else 0
    conditions = Conditions(message.while_charging, message.hours, message.while_nominal)
    decision: Any = _DECISIONS.get(message.decision, "allow")
    return Grant(
        *(message.principal or "*", message.tool, parse(message.scope), decision, "cli", "", message.scope),
        expire_ns=max(expire, 0),
        max_uses=message.max_uses,
        conditions=conditions,
        rehearse=message.rehearse,
    )


class ApprovalServicer(approval_pb2_grpc.ApprovalServiceServicer):
    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    async def ListApprovals(  # noqa: N802
        self, request: approval_pb2.ListApprovalsRequest, context: Any
    ) -> approval_pb2.ListApprovalsResponse:
        return approval_pb2.ListApprovalsResponse(approvals=map(approval_message, self._approvals.pending()))

    async def WatchApprovals(  # noqa: N802
        self, request: approval_pb2.WatchApprovalsRequest, context: Any
    ) -> AsyncIterator[approval_pb2.Approval]:
        await context.send_initial_metadata(())  # from here on the client counts as somebody who can be asked
        async for approval in self._approvals.watch():
            yield approval_message(approval)

    async def ResolveApproval(  # noqa: N802
        self, request: approval_pb2.ResolveApprovalRequest, context: Any
    ) -> approval_pb2.Approval:
        extent = approval_pb2.Approval.Extent.Name(request.extent).removeprefix("EXTENT_").lower()
        answer = Answer(
            allow=request.allow,
            extent=Extent.ONCE if extent == "unspecified" else Extent(extent),
            until_ns=request.until.ToNanoseconds() if request.HasField("until") else 0,
            offers=dict(request.grant),
            comment=request.comment[:500],
        )
        identity = convert.identifier(request.name, "approvals")
        return approval_message(self._approvals.resolve(identity, answer, caller().name))


def approval_message(approval: Approval) -> approval_pb2.Approval:
    return approval_pb2.Approval(
        name=f"approvals/{approval.id}",
        call=f"calls/{approval.call}",
        principal=approval.principal,
        tool=approval.tool,
        description=approval.description,
        arguments_json=convert.json_text(approval.arguments),
        effect=approval.effect,
        scopes=convert.valid([str(scope) for scope in approval.scopes]),
        reason=convert.valid(approval.reason),
        not_undoable=convert.valid(approval.not_undoable),
        run=f"runs/{approval.run}" if approval.run else "",
        labels=approval.labels,
        read=convert.valid(approval.read),
        almost=convert.valid(approval.near),
        sends_out=approval.sends_out,
        offers=[
            approval_pb2.Approval.Offer(scope=convert.valid(scope), patterns=convert.valid(patterns))
            for scope, patterns in approval.offers.items()
        ],
        extents=[approval_pb2.Approval.Extent.Value(f"EXTENT_{extent.name}") for extent in approval.extents],
        create_time=convert.timestamp(approval.create_ns),
        expire_time=convert.timestamp(approval.expire_ns),
        state=approval_pb2.Approval.State.Value(f"STATE_{approval.state.name}"),
        outcome=convert.valid(approval.said),
    )


class TokenServicer(token_pb2_grpc.TokenServiceServicer):
    def __init__(self, tokens: Tokens, ending: Ending) -> None:
        self._tokens, self._ending = tokens, ending

    async def CreateToken(  # noqa: N802
        self, request: token_pb2.CreateTokenRequest, context: Any
    ) -> token_pb2.CreateTokenResponse:
        asked = request.token
        roles: Any = tuple(asked.roles) or ("user",)
        expire = asked.expire_time.ToNanoseconds() if asked.HasField("expire_time") else 0
        wanted = Token(asked.label, roles, tuple(asked.scopes), expire)
        token, secret = await asyncio.to_thread(self._tokens.create, wanted, caller().name)
        return token_pb2.CreateTokenResponse(token=_token_message(token), secret=secret)

    async def ListTokens(  # noqa: N802
        self, request: token_pb2.ListTokensRequest, context: Any
    ) -> token_pb2.ListTokensResponse:
        return token_pb2.ListTokensResponse(tokens=map(_token_message, self._tokens.all()))

    async def RevokeToken(self, request: token_pb2.RevokeTokenRequest, context: Any) -> token_pb2.Token:  # noqa: N802
        identity = convert.identifier(request.name, "tokens")
        token = await asyncio.to_thread(self._tokens.revoke, identity, caller().name)
        if all(other.label != token.label for other in self._tokens.all()):
            await self._ending.end(token.principal().name, caller().name)
        return _token_message(token)

    async def RevokePrincipal(  # noqa: N802
        self, request: token_pb2.RevokePrincipalRequest, context: Any
    ) -> token_pb2.RevokePrincipalResponse:
        if not (_PRINCIPAL.fullmatch(request.principal) and request.principal.isprintable()):
            hint = "`agentd token list` shows tokens; other principals are unix:USER, tls:NAME and automation:NAME."
            raise RequestError(Reason.BAD_FIELD, f"{request.principal!r} is no principal.", hint=hint, field="principal")
        ended = await self._ending.end(request.principal, caller().name)
        return token_pb2.RevokePrincipalResponse(**asdict(ended))


def _token_message(token: Token) -> token_pb2.Token:
    message = token_pb2.Token(
        name=f"tokens/{token.id}",
        label=token.label,
        roles=token.roles,
        scopes=token.scopes,
        created_by=token.created_by,
        create_time=convert.timestamp(token.create_ns),
    )
    if token.expire_ns:
        message.expire_time.CopyFrom(convert.timestamp(token.expire_ns))
    return message
