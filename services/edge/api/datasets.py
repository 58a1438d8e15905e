"""`/datasets/sft` and `/datasets/preferences`: training data from conversations and feedback."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from typing import Annotated, Literal, TypeVar

from litestar.response import Stream
from msgspec import UNSET, Meta, Struct

from services.contract.errors import ErrorCode, ServiceError
from services.contract.history import (
    Exchange,
    ExchangeRequest,
    ExportPage,
    ExportRequest,
    SessionPage,
    SessionsRequest,
)
from services.contract.messages import SessionId
from services.contract.subjects import HistoryVerb
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.datasets import (
    AnswerFilter,
    Conversation,
    Find,
    Line,
    Origin,
    PreferenceConversation,
    RatingFilter,
    SftConversation,
    lines_as_json,
)
from services.edge.errors import AnyRequest
from services.edge.json_lines import json_lines
from services.edge.keys import check_tenant
from services.edge.parameters import get, read_query

ALL_TENANTS = "*"
TEMPORARY: tuple[ErrorCode, ...] = ("overloaded", "history_unavailable", "bus_unavailable")
"""Errors of a page after which it is read again: a long read should survive a restart."""

Reply = TypeVar("Reply", bound=Struct)
Kind = Literal["sft", "preferences"]
Time = Annotated[datetime, Meta(tz=True)]


class DatasetQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """
    The query: filters of sessions and answers. `tenant` needs the key of an admin. Unknown
    parameters are rejected, as a mistyped filter would select everything.
    """

    session_id: SessionId | None = None
    since: Time | None = None
    until: Time | None = None
    model: str | None = None
    adapter: str | None = None
    rating: RatingFilter | None = None
    tenant: str | None = None

    @property
    def wanted(self) -> AnswerFilter:
        return AnswerFilter(self.since, self.until, self.model, self.adapter, self.rating)


@get("/datasets/sft", query=DatasetQuery)
async def sft(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Stream:
    """Send conversations as JSON Lines, for supervised fine-tuning."""
    return await _dataset(request, edge, tenant, "sft")


@get("/datasets/preferences", query=DatasetQuery)
async def preferences(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Stream:
    """Send pairs of answers as JSON Lines, for DPO and reward models."""
    return await _dataset(request, edge, tenant, "preferences")


async def _dataset(request: AnyRequest, edge: Edge, tenant: str, kind: Kind) -> Stream:
    """An error before the first session has its own status; a later one breaks the connection."""
    query = read_query(request, DatasetQuery)
    tenants = [tenant]
    if query.tenant is not None:
        edge.api_keys.admin(request.headers)
        tenants = _tenants(edge, query.tenant)
    reader = DatasetReader(edge, kind, query)
    first = await reader.session_ids(tenants[0])
    lines = reader.lines(tenants, first)
    return json_lines(request, lines)


def _tenants(edge: Edge, name: str) -> list[str]:
    """Return the tenants of this name, or, for `*`, those of all keys. Raises ServiceError."""
    if name == ALL_TENANTS:
        return edge.api_keys.tenants
    check_tenant(name, "URL parameter `tenant`")
    return [name]


class DatasetReader:
    """Reads sessions one after the other, a page at a time, in the order of their ids."""

    def __init__(self, edge: Edge, kind: Kind, query: DatasetQuery) -> None:
        self._edge = edge
        self._kind = kind
        self._query = query
        self._is_streaming = False

    async def lines(self, tenants: list[str], first: list[str]) -> AsyncGenerator[bytes, None]:
        """Yield lines of all sessions; `first` are those of the first tenant."""
        self._is_streaming = True
        sessions = first
        for number, tenant in enumerate(tenants):
            if number:
                sessions = await self.session_ids(tenant)
            for session_id in sessions:
                async for lines in self._of_session(tenant, session_id):
                    yield lines

    async def session_ids(self, tenant: str) -> list[str]:
        """
        Return the ids of the tenant's sessions, sorted. A session that gets a record meanwhile
        moves to the begin of the list, so that is read again until it has no other session, but
        not for ever while new ones begin.
        """
        if self._query.session_id is not None:
            return [self._query.session_id]
        found: set[str] = set()
        async for page in self._session_pages(tenant):
            found |= page
        for _ in range(self._edge.limits.dataset_lists):
            if not await self._add_moved(tenant, found):
                break
        return sorted(found)

    async def _add_moved(self, tenant: str, found: set[str]) -> bool:
        known = len(found)
        async for page in self._session_pages(tenant):
            if page <= found:
                break
            found |= page
        return len(found) > known

    async def _session_pages(self, tenant: str) -> AsyncIterator[set[str]]:
        before: str | None = None
        while True:
            request = SessionsRequest(self._edge.limits.dataset_sessions, before)
            page = await self._request("sessions", tenant, request, SessionPage)
            yield {session.id for session in page.sessions}
            if (before := page.next) is None:
                return

    async def _of_session(self, tenant: str, session_id: str) -> AsyncIterator[bytes]:
        """Yield the lines of a session, about a page at a time."""
        conversation: Conversation | None = None
        after: str | None = None
        while True:
            page = await self._page(tenant, session_id, after)
            conversation = conversation or self._conversation(tenant, session_id, page)
            lines: list[Line] = []
            for exchange in page.exchanges:
                lines += [line async for line in conversation.push(exchange)]
            if (after := page.next) is None:
                lines += [line async for line in conversation.end()]
            if lines:
                yield lines_as_json(lines)
            if after is None:
                return

    async def _page(self, tenant: str, session_id: str, after: str | None) -> ExportPage:
        request = ExportRequest(session_id, after)
        return await self._request("export", tenant, request, ExportPage)

    def _conversation(self, tenant: str, session_id: str, page: ExportPage) -> Conversation:
        named = UNSET if self._query.tenant is None else tenant
        origin = Origin(session_id, page.system_prompt, named)
        if self._kind == "sft":
            return SftConversation(origin, self._query.wanted)
        return PreferenceConversation(origin, self._query.wanted, find=self._finder(tenant))

    def _finder(self, tenant: str) -> Find:
        async def find(session_id: str, request_id: str) -> Exchange | None:
            request = ExchangeRequest(request_id, session_id)
            try:
                return await self._request("exchange", tenant, request, Exchange)
            except ServiceError as error:
                if error.code != "not_found":
                    raise
                return None

        return find

    async def _request(
        self, verb: HistoryVerb, tenant: str, message: Struct, kind: type[Reply]
    ) -> Reply:
        """Ask history; once lines are sent, again after an error that may be over soon."""
        tries = self._edge.limits.dataset_tries if self._is_streaming else 1
        for _ in range(tries - 1):
            try:
                return await self._edge.history.request(verb, tenant, message, kind)
            except ServiceError as error:
                if error.code not in TEMPORARY:
                    raise
                await asyncio.sleep(error.retry_after or 1.0)
        return await self._edge.history.request(verb, tenant, message, kind)
