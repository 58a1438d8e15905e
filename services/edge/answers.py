"""An answer that was asked for before: from the worker that gives it, or from history."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.client.chat import ChatClient
from services.client.transcript import after
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeRequest
from services.contract.messages import ChatRequest, Done, Failed, Prompt, StreamEvent, Token
from services.edge.claims import Claims
from services.edge.routes import ask_history
from services.runtime.bus import Bus

CLAIM_TIME = 2.0  # seconds after which who claimed a request should have found a worker for it
LOOK_INTERVAL = 0.05  # seconds


class Answers:
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
            if untold := after(event, at):
                yield untold

    async def once(
        self, claims: Claims, prompt: Prompt, asked: ChatRequest
    ) -> AsyncGenerator[StreamEvent, None]:
        """
        The answer to a request that may have been asked already, also this very moment at another
        edge. One that failed is asked anew. Raises ServiceError(conflict) if it was another one.
        """
        request_id = str(asked.request_id)
        if await claims.take(self._tenant, request_id, prompt):
            return self._client.stream(asked)
        while True:
            held = await claims.held(self._tenant, request_id, prompt)
            if await self._client.is_answered(request_id) or await self._is_stored(request_id):
                return self.again(request_id, 0)
            if held is None or held.age >= CLAIM_TIME:
                revision = held.revision if held else 0
                if await claims.take(self._tenant, request_id, prompt, revision):
                    return self._client.stream(asked)
            await asyncio.sleep(LOOK_INTERVAL)

    async def _is_stored(self, request_id: str) -> bool:
        try:
            exchange = await self._stored(request_id)
        except ServiceError as error:
            if error.code != "not_found":
                raise
            return False
        return exchange.finish_reason != "failed"

    async def _stored(self, request_id: str) -> Exchange:
        subject = subjects.history_exchange(self._tenant)
        return await ask_history(self._bus, subject, ExchangeRequest(request_id), Exchange)


def _told(exchange: Exchange) -> list[StreamEvent]:
    end: StreamEvent = Done(
        exchange.finish_reason,
        exchange.usage,
        exchange.timings,
        exchanges_dropped=0,
        stored="log",
        length=len(exchange.response),
    )
    if exchange.finish_reason == "failed":
        end = Failed("worker_lost", "The answer could not be finished; ask again.")
    return [Token(0, exchange.response, ()), end]
