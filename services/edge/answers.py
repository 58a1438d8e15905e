"""An answer that was asked for before: from the worker that gives it, or from history."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal, NamedTuple

from services.client.chat_client import ChatClient, new_request_id
from services.client.transcript import after_offset
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeRequest
from services.contract.messages import Done, Failed, PromptRequest, StreamEvent, Token
from services.edge.claims import HeldClaim, IdempotencyKeys, conflict, identify
from services.edge.routes import ask_history
from services.runtime.bus import Bus

CLAIM_TIME = 2.0  # seconds after which who claimed a request should have found a worker for it
LOOK_INTERVAL = 0.05  # seconds
PATIENCE = 9.0  # seconds for history to come back, as long as a worker waits for it
RETRY_INTERVAL = 0.3  # seconds


class Claimed(NamedTuple):
    """`is_mine`: it is to be asked now; else it was, and can be joined."""

    request_id: str
    is_mine: bool


class StoredAnswers:
    """Of one tenant."""

    def __init__(self, bus: Bus, tenant: str, client: ChatClient) -> None:
        self._bus = bus
        self._tenant = tenant
        self._client = client

    async def again(self, request_id: str, at: int) -> AsyncGenerator[StreamEvent, None]:
        """From character `at` on; Failed(not_found) if nobody knows of it."""
        async with aclosing(self._client.resume(request_id, at)) as events:
            async for event in events:
                if isinstance(event, Failed) and event.code == "not_found":
                    break
                yield event
            else:
                return
        try:
            exchange = await self._stored(request_id)
        except ServiceError as error:
            yield Failed(error.code, error.message, error.retry_after)
            return
        for event in _told(exchange):
            if untold := after_offset(event, at):
                yield untold

    async def once(self, claims: IdempotencyKeys, key: str, prompt: PromptRequest) -> Claimed:
        """
        Return the request id of a key, claimed here or, even at this moment, by another edge. A
        failed request is repeated. Raises ServiceError(conflict) if the key belongs to another
        request, or if its answer no longer exists.
        """
        keyed, began = identify(self._tenant, key, prompt), time.monotonic()
        while True:
            held = await claims.held(keyed)
            request_id = held.request_id
            found = await self._found(claims, held, prompt)
            if found == "whole":
                return Claimed(request_id, is_mine=False)
            if found == "failed":  # what is stored under its id stays
                request_id = new_request_id()
            waited = max(held.age, time.monotonic() - began)  # its clock may be ahead of ours
            if found == "failed" or waited >= CLAIM_TIME:
                if await claims.take(keyed, request_id, held.revision):
                    return Claimed(request_id, is_mine=True)
            await asyncio.sleep(LOOK_INTERVAL)

    async def begun(self, claims: IdempotencyKeys, key: str, prompt: PromptRequest) -> str:
        """
        Return the request id of a claimed key. Raises ServiceError(not_found) if there is none: a
        client that has a part of an answer must not get another one.
        """
        held = await claims.held(identify(self._tenant, key, prompt))
        if not held.is_claimed:
            raise ServiceError(
                "not_found",
                "No request with this Idempotency-Key in the last day. Leave out Last-Event-ID to"
                " start one.",
            )
        return held.request_id

    async def _found(
        self, claims: IdempotencyKeys, held: HeldClaim, prompt: PromptRequest
    ) -> Literal["whole", "failed", "nothing"]:
        """
        Return the state of an answer; a running one counts as whole. The log may have it although
        the claim expired or was lost. Raises ServiceError(conflict).
        """
        if held.is_claimed and (replay := await self._client.find_replay(held.request_id)):
            failed = any(isinstance(event, Failed) for event in replay.events)
            return "failed" if failed else "whole"
        exchange = await self._logged(claims, held.request_id)
        if exchange is None:
            return "nothing"
        if exchange.prompt != prompt.prompt:
            raise conflict()
        return "failed" if exchange.finish_reason == "failed" else "whole"

    async def _logged(self, claims: IdempotencyKeys, request_id: str) -> Exchange | None:
        """Raises ServiceError(conflict) if the log had the exchange and no longer has it."""
        # before the lookup: an exchange that is logged in between was not erased
        was_answered = await claims.was_answered(self._tenant, request_id)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await self._stored(request_id)
            except ServiceError as error:
                if error.code == "not_found":
                    break
                if error.code != "history_unavailable" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_INTERVAL)
        if was_answered:
            raise ServiceError(
                "conflict",
                "The answer of this Idempotency-Key was erased, or is no longer kept: use a new key"
                " to ask again.",
            )
        return None

    async def _stored(self, request_id: str) -> Exchange:
        subject = subjects.history("exchange", self._tenant)
        return await ask_history(self._bus, subject, ExchangeRequest(request_id), Exchange)


def _told(exchange: Exchange) -> list[StreamEvent]:
    end: StreamEvent = Done(
        exchange.finish_reason,
        exchange.usage,
        exchange.timings,
        exchanges_dropped=0,
        stored="log",
        length=len(exchange.response),
        stop_string=exchange.stop_string,
    )
    if exchange.finish_reason == "failed":
        end = Failed("worker_lost", "The answer could not be finished; ask again.")
    return [Token(0, exchange.response, ()), end] if exchange.response else [end]
