"""Messages as NATS delivers them, and the endpoints and inboxes that take them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from nats import micro
from nats.aio.msg import Msg

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Delivery(NamedTuple):
    """A message that was delivered. `reply` is empty if the sender wants no reply."""

    subject: str
    data: bytes
    reply: str
    headers: Mapping[str, str] = NO_HEADERS


class Endpoint(NamedTuple):
    """A subject that a service serves in a queue group. The handler must return at once."""

    name: str
    subject: str
    handler: Callable[[Delivery], Awaitable[None]]
    metadata: dict[str, str] | None = None

    async def handle_message(self, message: Msg) -> None:
        await self.handler(delivery_of(message))

    async def handle_request(self, request: micro.Request) -> None:
        # micro.Request hides the reply subject, which requests with several replies need
        await self.handler(delivery_of(request._msg))


class NoResponders(Exception):
    """Nobody is subscribed to the subject, as NATS reports at once."""


class RequestSilent(TimeoutError):
    """No process sent a keep-alive for the request in time."""


class InboxLimits(NamedTuple):
    """How much an inbox holds for a reader that falls behind."""

    messages: int = 1024
    bytes: int = 1024 * 1024


DEFAULT_INBOX_LIMITS = InboxLimits()


class Inbox:
    """
    The messages of one subscription, in order, taken one at a time.

    Messages beyond the limits are dropped: the reader of an answer notices the gap and asks the
    worker for a replay.
    """

    def __init__(self, limits: InboxLimits = DEFAULT_INBOX_LIMITS) -> None:
        self._limits = limits
        self._queue: asyncio.Queue[Msg] = asyncio.Queue(limits.messages)
        self._bytes = 0

    async def put(self, message: Msg) -> None:
        """Add a message, or drop it if the inbox is full. An empty inbox takes any message."""
        is_too_much = self._bytes + len(message.data) > self._limits.bytes
        if self._queue.full() or (is_too_much and not self._queue.empty()):
            return
        self._bytes += len(message.data)
        self._queue.put_nowait(message)

    async def next(self, timeout: float) -> Delivery:
        """
        Return the next message.

        Raises TimeoutError after `timeout` seconds, NoResponders if a request had no subscriber.
        """
        async with asyncio.timeout(timeout):
            message = await self._queue.get()
        self._bytes -= len(message.data)
        if not message.data and (message.headers or {}).get("Status") == "503":
            raise NoResponders
        return delivery_of(message)


def delivery_of(message: Msg) -> Delivery:
    return Delivery(message.subject, message.data, message.reply, message.headers or NO_HEADERS)
