"""
Asks a worker over NATS and reads its answer. Knows no HTTP, and nothing of what a worker does.

    async with Bus.connect("nats://127.0.0.1:4222", "my-service") as bus:
        client = ChatClient(bus)
        async with contextlib.aclosing(client.stream(ChatRequest(prompt="Hello"))) as events:
            async for event in events:
                match event:
                    case Token(text=text):
                        print(text, end="", flush=True)
                    case Failed(message=message):
                        print(message)
"""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import cast
from uuid import UUID

import msgspec

from services.client.offers import first_to_take, offer
from services.client.workers import Workers
from services.contract import prompts, subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import Cancel, ChatRequest, Done, Failed, StreamEvent, Token
from services.runtime.bus import Bus, Inbox, NoResponders

SILENCE_LIMIT = 5.0  # seconds; a worker that lives sends something at least once a second
ACK_TIMEOUT = 1.0  # seconds that a worker has to take a request; it needs a millisecond
RETRY_AFTER = 1.0  # seconds, where the next attempt can meet another worker or a bus that is back


def new_request_id() -> str:
    """A uuid7 (Python has one from 3.14 on): ids sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64
    return str(UUID(int=bits | 0b10 << 62 | secrets.randbits(62)))


class ChatClient:
    """
    Any number of requests at once, all of one tenant. The worker that a session's computed prompts
    are with is asked directly, as far as `workers` has heard reports; without any, NATS picks one,
    which passes the request on.
    """

    def __init__(
        self, bus: Bus, tenant: str = subjects.OPEN_TENANT, workers: Workers | None = None
    ) -> None:
        self._bus = bus
        self._tenant = tenant
        self._workers = workers or Workers()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[StreamEvent, None]:
        """
        The events of the answer. The last one is a Done or a Failed, whatever happens; nothing is
        raised.

        Who leaves earlier (break, cancelled task, closed generator) ends the generation: the worker
        is told at once. Iterate inside `contextlib.aclosing`, so that leaving closes the generator.
        """
        if not self._bus.connected:
            yield _failed(_bus_unavailable())
            return
        request_id = request.request_id or new_request_id()
        request = msgspec.structs.replace(request, request_id=request_id)
        if error := _refusal(request):
            yield _failed(error)
            return
        async with AsyncExitStack() as attempts:
            length = 0  # of the answer so far, in characters
            ended = False  # by the worker, so that there is nothing to cancel
            try:
                inbox = await self._ask(request, attempts)
                while not ended:
                    event = await self._next(inbox, length)
                    length += len(event.text) if isinstance(event, Token) else 0
                    ended = isinstance(event, Done | Failed)
                    yield event
            except NoResponders:
                ended = True
                yield Failed(
                    "no_worker", "No inference worker is there: start one, or wait.", RETRY_AFTER
                )
            except ServiceError as error:
                yield _failed(error)
            finally:
                if not ended:
                    # handed over: whoever is cancelled can't await anything here
                    self._bus.spawn(self.cancel(request_id))

    async def cancel(self, request_id: str) -> None:
        """Stops a request of this tenant, whoever asked it. One that has ended is left alone."""
        await self._bus.publish(subjects.cancel(self._tenant, request_id), Cancel())

    async def _ask(self, request: ChatRequest, attempts: AsyncExitStack) -> Inbox:
        """Where the events come. Raises ServiceError if no worker takes the request."""
        inbox: Inbox

        async def offering(worker_id: str) -> None:
            nonlocal inbox
            reply, inbox = await self._attempt(request, attempts)
            await offer(
                self._bus, self._workers, worker_id, self._tenant, request, reply, ACK_TIMEOUT
            )

        key = prompts.route(self._tenant, request)
        if await first_to_take(self._workers.order(key, request.model), offering) is None:
            reply, inbox = await self._attempt(request, attempts)
            await self._bus.publish(subjects.request(self._tenant), request, reply)
        return inbox

    async def _attempt(self, request: ChatRequest, attempts: AsyncExitStack) -> tuple[str, Inbox]:
        """A reply subject of its own: what an earlier attempt still sends is not heard."""
        assert request.request_id is not None
        reply = subjects.reply(self._tenant, request.request_id, secrets.token_hex(8))
        return reply, await attempts.enter_async_context(self._bus.inbox(reply))

    async def _next(self, inbox: Inbox, length: int) -> StreamEvent:
        """Raises NoResponders, or ServiceError where the rest of the answer is lost."""
        try:
            delivery = await inbox.next(SILENCE_LIMIT)
        except TimeoutError as error:
            raise (_worker_silent() if self._bus.connected else _bus_unavailable()) from error
        event = _read(delivery.data)
        if isinstance(event, Token) and event.at != length:
            raise ServiceError("worker_lost", "A part of the answer was lost.", RETRY_AFTER)
        return event


def _refusal(request: ChatRequest) -> ServiceError | None:
    """
    Why the request could not even be sent. A Struct checks its fields only when it is decoded.
    """
    try:
        prompts.check(decode(encode(request), ChatRequest))
    except ServiceError as error:
        return error
    except UnicodeEncodeError:  # half of a surrogate pair
        return ServiceError("invalid_request", "The prompt has characters that are none.")
    return None


def _read(data: bytes) -> StreamEvent:
    try:
        return decode(data, cast(type[StreamEvent], StreamEvent))
    except ServiceError as error:  # not the caller's mistake, as its code would say
        raise ServiceError("internal", f"The worker sent an unreadable event: {error}") from error


def _failed(error: ServiceError) -> Failed:
    return Failed(error.code, error.message, error.retry_after)


def _bus_unavailable() -> ServiceError:
    return ServiceError("bus_unavailable", "NATS can't be reached; try again soon.", RETRY_AFTER)


def _worker_silent() -> ServiceError:
    message = "The worker went silent before the answer's end; ask again."
    return ServiceError("worker_lost", message, RETRY_AFTER)
