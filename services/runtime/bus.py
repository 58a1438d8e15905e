"""The connection to NATS, in messages instead of bytes. Knows nothing of what the subjects mean."""

import asyncio
import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import nats
import nats.errors
from msgspec import Struct
from nats import micro
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ErrorCode, ServiceError
from services.contract.version import VERSION
from services.runtime.connection import NOT_AN_INBOX, ErrorReporter, ResilientClient
from services.runtime.deliveries import (
    DEFAULT_INBOX_LIMITS,
    Delivery,
    Endpoint,
    Inbox,
    InboxLimits,
    NoResponders,
    RequestSilent,
    deliver,
    delivery_of,
    unwrap,
)
from services.runtime.logs import RateLimitedLog
from services.runtime.nats_url import parse_servers

REQUEST_TIMEOUT = 2.0  # seconds
JETSTREAM_TIMEOUT = 1.5  # less, so that who asked a service is still told why it can't answer
ANSWER_TIMEOUT = 1  # second that a NATS server has to answer a ping
# A server that is frozen or cut off is left for another of the cluster once so many pings, so many
# seconds apart, were not answered.
PING_INTERVAL, PINGS = 1, 3
TASKS_DEADLINE = 5.0  # seconds that a closing bus waits for what it spawned

RETRY_AFTER_HEADER = "Retry-After"  # seconds
ALIVE_HEADER = "Service-Alive"
"""
On a request: the interval in seconds of the signs of life that the caller wants while a service
works on it. On a reply without data: a sign of life; the real reply is still to come.
"""
SIGNS = 4  # signs of life per time of silence after which a service counts as silent
MIN_SIGN_INTERVAL = 0.02  # seconds

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Struct)


class Bus:
    """
    One NATS connection: publish, request, subscribe, serve.

    nats-py runs a subscription's callbacks one after another, so handlers only hand over: `spawn`
    runs the work beside them, and keeps it until it ends.
    """

    def __init__(self, client: ResilientClient, inbox_limits: InboxLimits) -> None:
        self._client = client
        self._inbox_limits = inbox_limits
        self._reconnected_at = -math.inf
        self._closing = False
        self._lost, self._unreadable, self._not_replied = (RateLimitedLog(log) for _ in range(3))
        self._services: list[micro.Service] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reconnected: list[Callable[[], Awaitable[None]]] = []

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, name: str, inbox_limits: InboxLimits = DEFAULT_INBOX_LIMITS
    ) -> AsyncIterator["Bus"]:
        """
        Wait until a server is there; from then on reconnect without limit. `url` has the format of
        NATS_URL (nats_url.parse_servers). Raises BadSetting.
        """
        client = ResilientClient()
        bus = cls(client, inbox_limits)
        servers = parse_servers(url)
        await client.open(
            servers,
            name=name,
            connect_timeout=2,
            ping_interval=PING_INTERVAL,
            max_outstanding_pings=PINGS,
            reconnect_time_wait=0.25,
            max_reconnect_attempts=-1,
            error_cb=ErrorReporter(servers).on_error,
            disconnected_cb=bus._on_disconnected,
            reconnected_cb=bus._on_reconnected,
        )
        try:
            yield bus
        finally:
            await bus._close()

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def dropped_frames(self) -> int:
        """Return how many messages were dropped because they could not be parsed."""
        return self._client.dropped_frames

    @property
    def seconds_since_reconnect(self) -> float:
        """Seconds since NATS was found again; infinite if it was never lost."""
        return time.monotonic() - self._reconnected_at

    @property
    def jetstream(self) -> JetStreamContext:
        return self._client.jetstream(timeout=JETSTREAM_TIMEOUT)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._reconnected.append(callback)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` beside the caller. An exception that it lets out is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def publish(self, subject: str, message: Struct, reply: str = "") -> None:
        """
        Send it at most once. It is lost, with a warning, if it is too large, or if NATS is away for
        so long that the buffer is full.
        """
        await self._send(subject, encode(message), reply)

    async def _send(
        self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except nats.errors.Error as error:
            self._lost.warning("lost a message to %r: %s", subject, error)

    async def request(
        self,
        subject: str,
        message: Struct,
        kind: type[R],
        timeout: float = REQUEST_TIMEOUT,
        headers: dict[str, str] | None = None,
        silence: float | None = None,
    ) -> R:
        """
        Raises the ServiceError that the service replied with, or one for a message that is too
        large or a reply that can't be decoded (internal); NoResponders; TimeoutError. With
        `silence`: RequestSilent (a TimeoutError) after as many seconds without a sign of life,
        which tells a request that nobody works on from a slow one.
        """
        data = encode(message)
        try:
            if silence is None:
                answer = delivery_of(
                    await self._client.request(subject, data, timeout=timeout, headers=headers)
                )
            else:
                answer = await self._request_alive(subject, data, timeout, headers or {}, silence)
        except nats.errors.NoRespondersError as error:
            raise NoResponders from error
        except nats.errors.MaxPayloadError as error:
            raise _too_large("request", self._client.max_payload) from error
        if refusal := _error_in(answer.headers):
            raise refusal
        try:
            return decode(answer.data, kind)
        except ServiceError as error:  # its code would blame the caller
            raise ServiceError(
                "internal", f"The service at {subject} sent an unreadable reply: {error}"
            ) from error

    async def _request_alive(
        self, subject: str, data: bytes, timeout: float, headers: dict[str, str], silence: float
    ) -> Delivery:
        reply = self._client.new_inbox()
        headers = headers | {ALIVE_HEADER: str(silence / SIGNS)}
        deadline = time.monotonic() + timeout
        async with self.inbox(reply) as replies:
            await self._client.publish(subject, data, reply=reply, headers=headers)
            while True:
                left = deadline - time.monotonic()
                try:
                    answer = await replies.next(min(silence, left))
                except TimeoutError as error:
                    if silence < left:
                        raise RequestSilent from error
                    raise
                if ALIVE_HEADER not in answer.headers:
                    return answer

    @asynccontextmanager
    async def inbox(self, subject: str) -> AsyncIterator[Inbox]:
        inbox = Inbox(self._inbox_limits)
        subscription = await self._client.subscribe(subject, cb=inbox.put)
        try:
            yield inbox
        finally:
            self.spawn(_unsubscribe(subscription))  # a cancelled reader can't await it

    async def subscribe(self, subject: str, handler: Callable[[Delivery], None]) -> None:
        """
        Every subscriber hears every message. The handler runs on the loop, so it must be
        short.
        """

        async def handle(message: Msg) -> None:
            try:
                handler(delivery_of(message))
            except ServiceError as error:
                self._unreadable.warning("unreadable message on %r: %s", message.subject, error)
            except Exception:
                log.exception("failed to handle a message on %r", message.subject)

        await self._client.subscribe(subject, cb=handle)

    async def serve(self, name: str, description: str, endpoints: list[Endpoint]) -> None:
        """Answers the endpoints as one service of NATS's services framework (`nats micro ls`)."""
        service = await micro.add_service(
            self._client,
            name=name,
            version=VERSION,
            description=description,
            stats_handler=lambda _: {"dropped_frames": self.dropped_frames},
            metadata={"host": socket.gethostname()},  # services/runtime/health.py looks for it
        )
        self._services.append(service)
        for endpoint in endpoints:
            await service.add_endpoint(
                name=endpoint.name,
                subject=endpoint.subject,
                queue_group=name,
                handler=unwrap(endpoint.handler),
            )
        await self._client.flush()

    def endpoint(
        self, name: str, subject: str, kind: type[R], handler: Callable[[str, R], Awaitable[Struct]]
    ) -> Endpoint:
        """
        An endpoint that answers one `kind` of request with one message.

        The handler gets the subject and the request; a ServiceError that it raises is the answer.
        """

        async def work(delivery: Delivery) -> Struct:
            return await handler(delivery.subject, decode(delivery.data, kind))

        async def hand_over(delivery: Delivery) -> None:
            self.respond(delivery, work)

        return Endpoint(name, subject, hand_over)

    def respond(self, delivery: Delivery, work: Callable[[Delivery], Awaitable[Struct]]) -> None:
        """
        Replies with the message that `work` gives, or with the ServiceError that it raises. Nothing
        is done if the reply would go anywhere but to an inbox, where the caller may not publish.
        """
        if self.has_reply_inbox(delivery):
            self.spawn(self._answer(delivery, work))

    def has_reply_inbox(self, delivery: Delivery) -> bool:
        """Return whether its reply subject may be published to; log a request whose may not."""
        if subjects.is_reply(delivery.reply):
            return True
        self._not_replied.warning(NOT_AN_INBOX, delivery.subject, delivery.reply)
        return False

    async def _answer(
        self, delivery: Delivery, work: Callable[[Delivery], Awaitable[Struct]]
    ) -> None:
        try:
            with self._alive(delivery):
                reply = encode(await work(delivery))
            if len(reply) > self._client.max_payload:
                raise _too_large("answer", self._client.max_payload)
        except ServiceError as error:
            await self._refuse(delivery, error)
        except Exception:
            log.exception("failed to answer %s", delivery.subject)
            await self._refuse(delivery, ServiceError("internal", "It failed; see its log."))
        else:
            await self._send(delivery.reply, reply)

    @contextmanager
    def _alive(self, delivery: Delivery) -> Iterator[None]:
        """Send signs of life, until the body ends, to a caller that asked for them."""
        try:
            # in this order, a NaN is the minimum
            interval = max(MIN_SIGN_INTERVAL, float(delivery.headers[ALIVE_HEADER]))
        except (KeyError, ValueError):
            yield
            return
        signs = asyncio.create_task(self._sign(delivery.reply, interval))
        try:
            yield
        finally:
            signs.cancel()

    async def _sign(self, reply: str, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            with suppress(nats.errors.Error):
                await self._client.publish(reply, headers={ALIVE_HEADER: "1"})

    async def serve_retries(self, endpoints: list[Endpoint]) -> None:
        """Answers them outside the queue group too: of such a request, every process has a copy."""
        for endpoint in endpoints:
            await self._client.subscribe(
                subjects.retry(endpoint.subject), cb=deliver(endpoint.handler)
            )

    async def stop_serving(self) -> None:
        """Takes no more requests; those already on their way are still handed over."""
        services, self._services = self._services, []
        if await self.is_responsive():  # a server that hangs does not hold up who leaves
            for service in services:
                await _leave(service)

    async def _refuse(self, delivery: Delivery, error: ServiceError) -> None:
        headers = {
            micro.request.ERROR_CODE_HEADER: error.code,
            micro.request.ERROR_HEADER: error.message.replace("\n", " "),
        }
        if error.retry_after is not None:
            headers[RETRY_AFTER_HEADER] = str(error.retry_after)
        await self._send(delivery.reply, b"", headers=headers)

    async def _close(self) -> None:
        """
        Subscriptions first, then the work they started, then the connection: so no reply is
        lost.
        """
        self._closing = True
        await self.stop_serving()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=TASKS_DEADLINE)
            for task in late:
                log.error("did not end in time: %s", task.get_coro())
                task.cancel()
        if await self.is_responsive():
            await self._client.drain()
        else:
            # what is still to be sent goes to a broken transport, which only uvloop complains of
            with suppress(RuntimeError, OSError):
                await self._client.close()

    async def is_responsive(self) -> bool:
        """Whether NATS answers now. What was published before has then arrived."""
        if not self._client.is_connected:
            return False
        try:
            await self._client.flush(ANSWER_TIMEOUT)
        except (nats.errors.Error, TimeoutError):
            return False
        return self._client.is_connected

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task failed", exc_info=error)

    async def _on_disconnected(self) -> None:
        if not self._closing:
            log.warning("lost the connection to NATS")

    async def _on_reconnected(self) -> None:
        log.info("connected to NATS again")
        self._reconnected_at = time.monotonic()
        for callback in self._reconnected:
            try:
                await callback()
            except Exception:
                log.exception("after reconnecting")


async def _leave(service: micro.Service) -> None:
    # micro's own stop unsubscribes at once, and what is in flight would be lost
    endpoints, service._endpoints = service._endpoints, []
    for endpoint in endpoints:
        if endpoint._subscription is not None:
            await endpoint._subscription.drain()
    await service.stop()


async def _unsubscribe(subscription: Any) -> None:
    try:
        await subscription.unsubscribe()
    except (nats.errors.BadSubscriptionError, nats.errors.ConnectionClosedError):
        return  # gone already, with its connection


def _too_large(what: str, most: int) -> ServiceError:
    return ServiceError(
        "payload_too_large",
        f"The {what} is over {most:,} bytes, which no message can hold: ask for less at once.",
    )


def _error_in(headers: Mapping[str, str]) -> ServiceError | None:
    """Return the error that a service replied with, if any."""
    if not (code := headers.get(micro.request.ERROR_CODE_HEADER)):
        return None
    try:
        retry_after = float(headers[RETRY_AFTER_HEADER])
    except (KeyError, ValueError):
        retry_after = None
    message = headers.get(micro.request.ERROR_HEADER, "")
    return ServiceError(_error_code(code), message or "The service gave no reason.", retry_after)


def _error_code(code: str) -> ErrorCode:
    return code if code in ErrorCode.__args__ else "internal"  # type: ignore[attr-defined, return-value]
