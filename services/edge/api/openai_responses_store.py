"""Finds the responses of `/v1/responses`, and what continues them, in workers and in the log."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import NamedTuple

from services.client.chat_client import ChatClient
from services.contract import responses
from services.contract.errors import ServiceError
from services.contract.history import Branch, BranchRequest, Exchange, RemoveRequest
from services.contract.messages import (
    Done,
    Empty,
    Failed,
    Progress,
    Replay,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.contract.responses import ResponseTurn
from services.edge.api.openai_responses_items import REFERENCE, Item, item_at, place_of
from services.edge.api.openai_responses_objects import (
    CONVERSATION_PREFIX,
    ID_PREFIX,
    ResponseBuilder,
    ResponseObject,
    heading_of,
)
from services.edge.background import CANCELLED, REMOVED, BackgroundResponse
from services.edge.context import Edge
from services.edge.idempotency import stored_events


class FoundResponse(NamedTuple):
    """A response with its exchange from the log, or the events of a worker, or its request."""

    request_id: str
    turn: ResponseTurn
    exchange: Exchange | None = None
    replay: Replay | None = None
    background: BackgroundResponse | None = None

    @property
    def end(self) -> Done | Failed | None:
        """The last event; None while the response is generated."""
        if self.exchange:
            *_, end = stored_events(self.exchange)
            assert isinstance(end, Done | Failed)
            return end
        last = self.replay.events[-1:] if self.replay and self.replay.is_complete else ()
        ends = [event for event in last if isinstance(event, Done | Failed)]
        return ends[0] if ends else self.background.end if self.background else None

    def to_object(self) -> ResponseObject:
        """Return the response as far as it is generated."""
        builder = ResponseBuilder(heading_of(self.request_id, self.turn))
        events = stored_events(self.exchange) if self.exchange else ()
        for event in events or (self.replay.events if self.replay else ()):
            if isinstance(event, Token | ToolCallDelta):
                builder.push(event)
        match self.end:
            case Done() as done:
                builder.close(done.finish_reason)
                at = self.exchange.answered_at if self.exchange else None
                return builder.finished(done, at)
            case Failed(code=code, message=message):
                builder.close("failed")
                return builder.failed(ServiceError(code, message))
        has_slot = self.replay and any(isinstance(e, Started) for e in self.replay.events)
        return builder.response("in_progress" if has_slot else "queued")


class ResponseStore:
    """The responses of one tenant. Each method raises ServiceError."""

    def __init__(self, edge: Edge, tenant: str) -> None:
        self._edge = edge
        self.tenant = tenant
        self._client: ChatClient = edge.chat_client(tenant)

    async def branch(self, tree: str, request_id: str | None, limit: int | None = None) -> Branch:
        """Return the responses up to this one, or all of a conversation. Raises not_found."""
        wanted = BranchRequest(tree, request_id, limit)
        return await self._edge.history.request("branch", self.tenant, wanted, Branch)

    async def find(self, response_id: str) -> FoundResponse:
        """Return a response, stored or running. Raises ServiceError(not_found)."""
        request_id = request_id_of(response_id)
        if exchange := await self._stored(request_id):
            return _of_exchange(exchange)
        replay = await self._client.find_replay(request_id)
        background = await self._edge.background.find(self.tenant, request_id)
        if background and background.request:
            self._edge.background.watch(self.tenant, request_id)
        if replay and replay.request.turn and (background is None or background.end != REMOVED):
            found = FoundResponse(request_id, replay.request.turn, None, replay, background)
            if not (isinstance(found.end, Done) and found.end.stored == "log"):
                return found
        if exchange := await self._stored(request_id):  # it ended meanwhile
            return _of_exchange(exchange)
        if background is None or background.end in (None, REMOVED) and not background.request:
            raise _not_found(response_id)
        return FoundResponse(request_id, background.turn, None, None, background)

    async def events(self, found: FoundResponse) -> AsyncGenerator[StreamEvent, None]:
        """Yield all events of a response; those to come once they come."""
        yield Progress(0, 0, 0)  # the stream begins, also if it ends with a failure
        try:
            while found.exchange is None and not (found.end and found.replay is None):
                async with aclosing(self._client.rejoin(found.request_id)) as events:
                    async for event in events:
                        if isinstance(event, Failed) and event.code == "not_found":
                            break
                        yield event
                    else:
                        return
                yield Progress(0, 0, 0)
                await asyncio.sleep(self._edge.limits.background_poll_seconds)
                found = await self.find(ID_PREFIX + found.request_id)
        except ServiceError as error:
            yield Failed(error.code, error.message, error.retry_after)
            return
        if found.exchange:
            for event in stored_events(found.exchange):
                yield event
        elif found.end:
            yield found.end

    async def cancel(self, response_id: str) -> FoundResponse:
        """Cancel a response, and return it as it has ended."""
        found = await self.find(response_id)
        if found.end:
            return found
        await self._edge.background.end(self.tenant, found.request_id, CANCELLED)
        await self._client.cancel(found.request_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._edge.limits.cancel_seconds):
                async with aclosing(self._client.rejoin(found.request_id)) as events:
                    async for _ in events:
                        pass
        return await self.find(response_id)

    async def remove(self, response_id: str) -> None:
        """Delete a response. One that is being generated is cancelled first."""
        id_ = (await self.cancel(response_id)).request_id
        await self._edge.background.end(self.tenant, id_, REMOVED)
        await self._edge.history.request("remove", self.tenant, RemoveRequest(id_), Empty)

    async def resolve(self, given: list[Item]) -> list[Item]:
        """Replace references to items by the items. Raises ServiceError(not_found)."""
        exchanges: dict[str, Exchange] = {}
        return [
            await self._referenced(item["id"], exchanges) if item["type"] == REFERENCE else item
            for item in given
        ]

    async def _referenced(self, item_id: str, exchanges: dict[str, Exchange]) -> Item:
        """`exchanges` has those that were read already."""
        place = place_of(item_id)
        if place and place.request_id not in exchanges:
            if exchange := await self._stored(place.request_id):
                exchanges[place.request_id] = exchange
        known = exchanges.get(place.request_id) if place else None
        item = item_at(known, place) if known and place else None
        if item is None:
            raise ServiceError("not_found", f"Item with id {item_id!r:.100} not found: send it.")
        return item

    async def _stored(self, request_id: str) -> Exchange | None:
        try:
            found = await self.branch(responses.tree_of(request_id), request_id, 1)
        except ServiceError as error:
            if error.code != "not_found":
                raise
            return None
        return found.exchanges[-1]


def request_id_of(response_id: str) -> str:
    """Return the request id in a response's id. Raises ServiceError(not_found)."""
    request_id = response_id.removeprefix(ID_PREFIX)
    if request_id == response_id or not responses.is_request_id(request_id):
        raise _not_found(response_id)
    return request_id


def _of_exchange(exchange: Exchange) -> FoundResponse:
    turn = exchange.turn or ResponseTurn()
    return FoundResponse(exchange.request_id, turn, exchange)


def _not_found(response_id: str) -> ServiceError:
    return ServiceError("not_found", f"Response with id {response_id!r:.100} not found.")


def tree_of_conversation(conversation_id: str) -> str:
    """Return the tree of a conversation. Raises ServiceError(not_found)."""
    tree = conversation_id.removeprefix(CONVERSATION_PREFIX)
    if tree == conversation_id or not responses.is_tree(tree):
        message = f"Conversation with id {conversation_id!r:.100} not found."
        raise ServiceError("not_found", message)
    return tree
