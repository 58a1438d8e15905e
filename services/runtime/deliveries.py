"""Messages as NATS delivers them, and the endpoints and inboxes that take them."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

from nats import micro
from nats.aio.msg import Msg

from services.runtime import trace_context

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Delivery(NamedTuple):
    """A message that was delivered. `reply` is empty if the sender wants no reply."""

    subject: str
    data: bytes
    reply: str
    headers: Mapping[str, str] = NO_HEADERS


class Endpoint(NamedTuple):
    """
    A subject that a service serves in a queue group. The handler must return at once; it and the
    tasks that it starts work on the trace of the message.
    """

    name: str
    subject: str
    handler: Callable[[Delivery], Awaitable[None]]
    metadata: dict[str, str] | None = None

    async def handle_message(self, message: Msg) -> None:
        delivery = delivery_of(message)
        with trace_context.received(delivery.headers):
            await self.handler(delivery)

    async def handle_request(self, request: micro.Request) -> None:
        # micro.Request hides the reply subject, which requests with several replies need
        await self.handle_message(request._msg)


class NoResponders(Exception):
    """Nobody is subscribed to the subject, as NATS reports at once."""


class RequestSilent(TimeoutError):
    """No process sent a keep-alive for the request in time."""


MAX_LATE_SECONDS = 0.1
"""Of a timer, after which a timeout is extended once."""


class InboxLimits(NamedTuple):
    """How much an inbox holds for a reader that falls behind."""

    messages: int = 1024
    bytes: int = 1024 * 1024


DEFAULT_INBOX_LIMITS = InboxLimits()


class SharedTimers:
    """
    Calls back soon after given times. All calls within a tick share one timer of the event loop,
    which costs 5 µs: thousands of answers wait for their next message at the same time.
    """

    TICK_SECONDS = 0.02

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, list[Callable[[], None]]] = {}  # by tick

    def call_at(self, when: float, call: Callable[[], None]) -> None:
        """`when` is a time of the event loop. A call can't be cancelled, and must raise nothing."""
        tick = int(when / self.TICK_SECONDS) + 1
        if (calls := self._calls.get(tick)) is None:
            calls = self._calls[tick] = []
            self._loop.call_at(tick * self.TICK_SECONDS, self._run, tick)
        calls.append(call)

    def _run(self, tick: int) -> None:
        for call in self._calls.pop(tick):
            call()


class Receive(Protocol):
    """Gets each message of a subscription as soon as it is read."""

    def __call__(
        self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] = NO_HEADERS
    ) -> None: ...


class Inbox:
    """
    The messages of one subscription, in order, taken one at a time.

    Messages beyond the limits are dropped: the reader of an answer notices the gap and asks the
    worker for a replay.
    """

    __slots__ = (
        "take",
        "_limits",
        "_loop",
        "_messages",
        "_bytes",
        "_waiter",
        "_timeout",
        "_deadline",
        "_is_extended",
        "_timers",
        "_timer_at",
    )  # thousands of them are used in turn, so their size matters to the CPU's cache

    def __init__(
        self, limits: InboxLimits = DEFAULT_INBOX_LIMITS, timers: SharedTimers | None = None
    ) -> None:
        self.take: Callable[[str, bytes], bool] | None = None
        """
        Is called with the subject and the data of a plain message for which the reader waits. If it
        returns True, it has processed the message, and the reader waits on: waking its task costs
        more than most processing.
        """
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._messages: deque[Delivery] = deque()
        self._bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._timeout = self._deadline = 0.0  # of the waiter
        self._is_extended = False
        self._timers = timers or SharedTimers()
        self._timer_at = math.inf

    def receive(
        self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        """Pass a message without reply subject and headers to `take`, or put it."""
        waiter, is_plain = self._waiter, not (reply or headers)
        if is_plain and self.take is not None and waiter is not None and not waiter.done():
            try:
                if self.take(subject, data):
                    self._deadline = self._loop.time() + self._timeout
                    self._is_extended = False
                    return
            except Exception as error:
                waiter.set_exception(error)
                return
        self.put(Delivery(subject, data, reply, headers))

    def put(self, message: Delivery) -> None:
        """Add a message, or drop it if the inbox is full. An empty inbox takes any message."""
        is_too_much = self._bytes + len(message.data) > self._limits.bytes
        if self._messages and (is_too_much or len(self._messages) >= self._limits.messages):
            return
        self._bytes += len(message.data)
        self._messages.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, timeout: float) -> Delivery:
        """
        Return the next message. Only one task may wait at a time.

        Raises TimeoutError after `timeout` seconds, NoResponders if a request had no subscriber.
        """
        if not self._messages:
            await self._wait(timeout)
        message = self._messages.popleft()
        self._bytes -= len(message.data)
        if not message.data and message.headers.get("Status") == "503":
            raise NoResponders
        return message

    async def _wait(self, timeout: float) -> None:
        """
        Wait for a message. Raises TimeoutError. A timer is only set if none is running, as setting
        one for each message would cost as much as all the rest.
        """
        self._timeout, self._deadline = timeout, self._loop.time() + timeout
        self._is_extended = False
        if self._timer_at > self._deadline:
            self._set_timer()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _set_timer(self) -> None:
        self._timer_at = self._deadline
        self._timers.call_at(self._timer_at, partial(self._on_timer, self._timer_at))

    def _on_timer(self, at: float) -> None:
        if at != self._timer_at:
            return  # an earlier one replaced it
        self._timer_at = math.inf
        if self._waiter is None or self._waiter.done():
            return  # the next one to wait sets a timer
        late = self._loop.time() - self._deadline
        if late > MAX_LATE_SECONDS and not self._is_extended:
            # this process was busy, so that messages may wait in the socket
            self._deadline += 2 * late
            self._is_extended = True
        if self._loop.time() < self._deadline:
            self._set_timer()
        else:
            self._waiter.set_exception(TimeoutError())


def delivery_of(message: Msg) -> Delivery:
    return Delivery(message.subject, message.data, message.reply, message.headers or NO_HEADERS)
