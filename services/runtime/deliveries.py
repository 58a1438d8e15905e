"""Messages as they come from NATS, and who takes them. Opens no connection."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from nats import micro
from nats.aio.msg import Msg

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Delivery(NamedTuple):
    """A message as it came. `reply` is empty where the sender wants no answer."""

    subject: str
    data: bytes
    reply: str
    headers: Mapping[str, str] = NO_HEADERS


class Endpoint(NamedTuple):
    """
    A subject that a service answers, in a queue group. The handler must return at once, or be
    spawned.
    """

    name: str
    subject: str
    handler: Callable[[Delivery], Awaitable[None]]


class NoResponders(Exception):
    """Nobody is subscribed to the subject: NATS says so at once, no time-out passes."""


class RequestSilent(TimeoutError):
    """No service sent a sign of life for the request in time."""


class InboxLimits(NamedTuple):
    """How much an inbox holds for a reader that falls behind."""

    messages: int = 1024
    bytes: int = 1024 * 1024


DEFAULT_INBOX_LIMITS = InboxLimits()


class Inbox:
    """
    The messages of one subscription, in order, taken one at a time. Messages beyond the limits are
    dropped: the reader of an answer notices the gap and asks the worker for a replay.
    """

    def __init__(self, limits: InboxLimits = DEFAULT_INBOX_LIMITS) -> None:
        self._limits = limits
        self._queue: asyncio.Queue[Msg] = asyncio.Queue(limits.messages)
        self._bytes = 0

    async def put(self, message: Msg) -> None:
        is_too_much = self._bytes + len(message.data) > self._limits.bytes
        if self._queue.full() or (is_too_much and not self._queue.empty()):
            return
        self._bytes += len(message.data)
        self._queue.put_nowait(message)

    async def next(self, timeout: float) -> Delivery:
        """
        Raises TimeoutError after `timeout` seconds, NoResponders if nobody took what was
        asked.
        """
        async with asyncio.timeout(timeout):
            message = await self._queue.get()
        self._bytes -= len(message.data)
        if not message.data and (message.headers or {}).get("Status") == "503":
            raise NoResponders
        return delivery_of(message)


def delivery_of(message: Msg) -> Delivery:
    return Delivery(message.subject, message.data, message.reply, message.headers or NO_HEADERS)


def deliver(handler: Callable[[Delivery], Awaitable[None]]) -> Callable[[Msg], Awaitable[None]]:
    async def handle(message: Msg) -> None:
        await handler(delivery_of(message))

    return handle


def unwrap(
    handler: Callable[[Delivery], Awaitable[None]],
) -> Callable[[micro.Request], Awaitable[None]]:
    async def handle(request: micro.Request) -> None:
        # the reply subject is not public in micro.Request, but a request that has many
        # replies needs it
        await handler(delivery_of(request._msg))

    return handle
