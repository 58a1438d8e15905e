"""Publish, request, subscribe and serve over one NATS connection, in messages instead of bytes."""

import asyncio
import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import nats
import nats.errors
from msgspec import Struct
from nats import micro
from nats.js import JetStreamContext

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ErrorCode, ServiceError
from services.contract.version import VERSION
from services.runtime import trace_context
from services.runtime.access import NO_CREDENTIALS, NatsAccess
from services.runtime.connection import (
    NOT_AN_INBOX,
    ErrorReporter,
    ResilientClient,
    drain_service,
    unsubscribe,
)
from services.runtime.deliveries import (
    DEFAULT_INBOX_LIMITS,
    NO_HEADERS,
    Delivery,
    Endpoint,
    Inbox,
    InboxLimits,
    NoResponders,
    RequestSilent,
    SharedTimers,
    delivery_of,
)
from services.runtime.logs import RateLimitedLog
from services.runtime.nats_url import parse_servers

NO_METADATA: Mapping[str, str] = MappingProxyType({})
REQUEST_TIMEOUT = 2.0  # seconds
JETSTREAM_TIMEOUT = 1.5  # shorter, so that a service can still tell its caller what failed
MAX_READ_BYTES = 32 * 2**20
"""
Maximum bytes of replies to reads of JetStream that are on their way to this process: half of
nats-server's default `max_pending`, beyond which it disconnects a slow consumer.
"""
BASE64_SIZE = 4 / 3  # of a message in the reply to a read, relative to its own
TASKS_DEADLINE = 5.0  # seconds that a closing bus waits for its tasks

# A client moves to another server of a cluster after MAX_OUTSTANDING_PINGS pings without an answer,
# PING_INTERVAL seconds apart: the server is frozen or unreachable.
PING_INTERVAL, MAX_OUTSTANDING_PINGS = 1, 3
DEFAULT_FLUSH_TIMEOUT = 1.0  # seconds in which a responsive server answers a ping

RETRY_AFTER_HEADER = "Retry-After"  # seconds
ALIVE_HEADER = "Service-Alive"
"""
In a request: the interval in seconds at which the caller wants keep-alives while a service works on
it. In a reply without data: a keep-alive; the actual reply is still to come.
"""
KEEP_ALIVES_PER_SILENCE = 4
MIN_KEEP_ALIVE_SECONDS = 0.02

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Struct)
Unsubscribe = Callable[[], Awaitable[None]]


class Bus:
    """
    One NATS connection: publish, request, subscribe, serve.

    Handlers must be short: those of `subscribe` run before the next message is read, and nats-py
    awaits those of an endpoint one after another. `spawn` runs longer work in a task, which the bus
    awaits when it closes.
    """

    def __init__(
        self,
        client: ResilientClient,
        errors: ErrorReporter,
        inbox_limits: InboxLimits,
        flush_timeout: float,
    ) -> None:
        self._client = client
        self._errors = errors
        self._inbox_limits = inbox_limits
        self._timers = SharedTimers()
        self._flush_timeout = flush_timeout
        self._reads: asyncio.Semaphore | None = None
        self._reconnected_at = -math.inf
        self._closing = False
        self._lost, self._unreadable, self._not_replied = (RateLimitedLog(log) for _ in range(3))
        self._services: list[micro.Service] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._disconnected: list[Callable[[], None]] = []
        self._reconnected: list[Callable[[], Awaitable[None]]] = []

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        name: str,
        access: NatsAccess = NO_CREDENTIALS,
        inbox_limits: InboxLimits = DEFAULT_INBOX_LIMITS,
        flush_timeout: float = DEFAULT_FLUSH_TIMEOUT,
    ) -> AsyncIterator["Bus"]:
        """
        Connect, waiting until a server is available, and later reconnect without limit.

        `url` has the format of NATS_URL (nats_url.parse_servers), `name` is shown by monitoring
        tools of NATS. Raises InvalidSetting if the URL is invalid, or a server rejects the
        credentials at the first connect.
        """
        servers = parse_servers(url)
        client = ResilientClient(servers, access)
        bus = cls(client, ErrorReporter(servers), inbox_limits, flush_timeout)
        await client.open(
            name=name,
            connect_timeout=2,
            ping_interval=PING_INTERVAL,
            max_outstanding_pings=MAX_OUTSTANDING_PINGS,
            reconnect_time_wait=0.25,
            max_reconnect_attempts=-1,
            error_cb=bus._errors.on_error,
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
    def max_payload(self) -> int:
        """Return the maximum bytes of a message on this server."""
        return self._client.max_payload

    @property
    def reads(self) -> asyncio.Semaphore:
        """
        Return what each read of a message of JetStream must hold, so that a process that reads many
        large ones at once does not become a slow consumer of its own replies.
        """
        if self._reads is None:  # `max_payload` is known after the first connect
            count = int(MAX_READ_BYTES / (BASE64_SIZE * self.max_payload))
            self._reads = asyncio.Semaphore(max(1, count))
        return self._reads

    @property
    def dropped_frames(self) -> int:
        """Return how many messages were dropped because they could not be parsed."""
        return self._client.dropped_frames

    @property
    def seconds_since_reconnect(self) -> float:
        """Return the seconds since the last reconnect; infinite if there was none."""
        return time.monotonic() - self._reconnected_at

    @property
    def jetstream(self) -> JetStreamContext:
        """Return nats-py's JetStream API; streams.py and consumers.py build on it."""
        return self._client.jetstream(timeout=JETSTREAM_TIMEOUT)

    def new_inbox(self) -> str:
        """Return a new subject on which only this process may receive replies."""
        return self._client.new_inbox()

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback`, which must not raise, after the connection is lost."""
        self._disconnected.append(callback)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Await `callback` after each reconnect."""
        self._reconnected.append(callback)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` in a task. Its exception is logged, and closing the bus awaits it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def publish(
        self,
        subject: str,
        message: Struct,
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """
        Send the message at most once. A message that begins or ends work for a request has the
        headers of trace_context.

        It is dropped with a warning if it is too large, or if the buffer of a lost connection is
        full.
        """
        await self.send(subject, encode(message), reply, headers)

    async def send(
        self,
        subject: str,
        data: bytes = b"",
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Like `publish`, with encoded data."""
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except nats.errors.Error as error:
            self._lost.warning("message dropped subject=%r: %s", subject, error)

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
        Send a request to a service, with the headers of the current trace, and return its reply.

        Raises the ServiceError that the service replied with, or ServiceError(payload_too_large) or
        (internal) if the request is too large or the reply can't be decoded; NoResponders;
        TimeoutError. With `silence`, the service sends keep-alives, and RequestSilent (a
        TimeoutError) is raised after `silence` seconds without one: this distinguishes a slow
        request from one that no process works on.
        """
        data = encode(message)
        headers = (headers or {}) | trace_context.headers()
        try:
            if silence is None:
                reply = delivery_of(
                    await self._client.request(
                        subject, data, timeout=timeout, headers=headers or None
                    )
                )
            else:
                reply = await self._request_with_keep_alives(
                    subject, data, timeout, headers, silence
                )
        except nats.errors.NoRespondersError as error:
            raise NoResponders from error
        except nats.errors.MaxPayloadError as error:
            raise _too_large("request", self._client.max_payload) from error
        if refusal := _error_in(reply.headers):
            raise refusal
        try:
            return decode(reply.data, kind)
        except ServiceError as error:  # its code, invalid_request, would blame the caller
            raise ServiceError(
                "internal", f"The service at {subject} sent an invalid reply: {error}"
            ) from error

    async def _request_with_keep_alives(
        self, subject: str, data: bytes, timeout: float, headers: dict[str, str], silence: float
    ) -> Delivery:
        inbox = self._client.new_inbox()
        headers = headers | {ALIVE_HEADER: str(silence / KEEP_ALIVES_PER_SILENCE)}
        deadline = time.monotonic() + timeout
        async with self.inbox(inbox) as replies:
            await self._client.publish(subject, data, reply=inbox, headers=headers)
            while True:
                left = deadline - time.monotonic()
                try:
                    reply = await replies.next(min(silence, left))
                except TimeoutError as error:
                    if silence < left:
                        raise RequestSilent from error
                    raise
                if ALIVE_HEADER not in reply.headers:
                    return reply

    @asynccontextmanager
    async def inbox(self, subject: str) -> AsyncIterator[Inbox]:
        """Subscribe to the subject during the body, which takes its messages from the inbox."""
        inbox = Inbox(self._inbox_limits, self._timers)
        subscription = await self._client.subscribe_directly(subject, inbox.receive)
        try:
            yield inbox
        finally:
            inbox.take = None  # it refers to the reader, which may refer to the inbox
            self.spawn(unsubscribe(subscription))  # a cancelled reader can't await it

    async def subscribe(self, subject: str, handler: Callable[[Delivery], None]) -> Unsubscribe:
        """
        Call `handler`, which must be short, for each message that is published. It and the tasks
        that it starts work on the trace of the message. Return what ends the subscription.
        """

        def handle(
            subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] = NO_HEADERS
        ) -> None:
            delivery = Delivery(subject, data, reply, headers)
            try:
                with trace_context.received(delivery.headers):
                    handler(delivery)
            except ServiceError as error:
                self._unreadable.warning("invalid message subject=%r: %s", delivery.subject, error)
            except Exception:
                log.exception("message handler failed subject=%r", delivery.subject)

        subscription = await self._client.subscribe_directly(subject, handle)
        return partial(unsubscribe, subscription)

    async def serve(
        self,
        name: str,
        description: str,
        endpoints: list[Endpoint],
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> str:
        """
        Serve the endpoints as one NATS service, in the queue group `name`. Return its id.

        https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-32.md
        """
        service = await micro.add_service(
            self._client,
            name=name,
            version=VERSION,
            description=description,
            stats_handler=lambda _: {"dropped_frames": self.dropped_frames},
            # for services/runtime/health.py
            metadata={"host": socket.gethostname(), **metadata},
        )
        self._services.append(service)
        for endpoint in endpoints:
            await service.add_endpoint(
                name=endpoint.name,
                subject=endpoint.subject,
                queue_group=name,
                handler=endpoint.handle_request,
                metadata=endpoint.metadata,
            )
        await self._client.flush()
        return service.id

    def endpoint(
        self, name: str, subject: str, kind: type[R], handler: Callable[[str, R], Awaitable[Struct]]
    ) -> Endpoint:
        """
        Return an endpoint that decodes requests of one `kind` and replies with one message.

        The handler gets the subject and the request. A ServiceError that it raises is the reply.
        """

        async def work(delivery: Delivery) -> Struct:
            return await handler(delivery.subject, decode(delivery.data, kind))

        async def hand_over(delivery: Delivery) -> None:
            self.respond(delivery, work)

        return Endpoint(name, subject, hand_over)

    def respond(self, delivery: Delivery, work: Callable[[Delivery], Awaitable[Struct]]) -> None:
        """
        Reply with the message that `work` returns, or with the ServiceError that it raises.

        A request is dropped if its reply subject is not an inbox (see subjects.may_reply).
        """
        if self.has_reply_inbox(delivery):
            self.spawn(self._reply(delivery, work))

    def has_reply_inbox(self, delivery: Delivery) -> bool:
        """
        Return whether the reply subject is an inbox, and not of another tenant than the request's.
        Log a request that has none.
        """
        tenant = subjects.asking_tenant(delivery.subject)
        if subjects.may_reply(tenant, delivery.reply):
            return True
        self._not_replied.warning(NOT_AN_INBOX, delivery.subject, delivery.reply)
        return False

    async def _reply(
        self, delivery: Delivery, work: Callable[[Delivery], Awaitable[Struct]]
    ) -> None:
        try:
            with self._keep_alive(delivery):
                reply = encode(await work(delivery))
            if len(reply) > self._client.max_payload:
                raise _too_large("reply", self._client.max_payload)
        except ServiceError as error:
            await self._reply_error(delivery, error)
        except Exception:
            log.exception("request failed subject=%s", delivery.subject)
            message = "The service failed. Its log has the error."
            await self._reply_error(delivery, ServiceError("internal", message))
        else:
            await self.send(delivery.reply, reply)

    @contextmanager
    def _keep_alive(self, delivery: Delivery) -> Iterator[None]:
        """Send keep-alives during the body, to a caller that asked for them."""
        try:
            # in this order, a NaN gives the minimum
            interval = max(MIN_KEEP_ALIVE_SECONDS, float(delivery.headers[ALIVE_HEADER]))
        except (KeyError, ValueError):
            yield
            return
        sending = asyncio.create_task(self._send_keep_alives(delivery.reply, interval))
        try:
            yield
        finally:
            sending.cancel()

    async def _send_keep_alives(self, reply: str, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            with suppress(nats.errors.Error):
                await self._client.publish(reply, headers={ALIVE_HEADER: "1"})

    async def serve_retries(self, endpoints: list[Endpoint]) -> None:
        """Serve retries (subjects.retry) outside the queue group: every process gets a copy."""
        for endpoint in endpoints:
            await self._client.subscribe(
                subjects.retry(endpoint.subject), cb=endpoint.handle_message
            )

    async def stop_serving(self, service_id: str | None = None) -> None:
        """
        Take no more requests, of one service or of all. Those that were already delivered are still
        handled.
        """
        services = [each for each in self._services if service_id in (None, each.id)]
        self._services = [each for each in self._services if each not in services]
        if await self.is_responsive():  # a frozen server does not delay the shutdown
            for service in services:
                await drain_service(service)

    async def _reply_error(self, delivery: Delivery, error: ServiceError) -> None:
        headers = {
            micro.request.ERROR_CODE_HEADER: error.code,
            micro.request.ERROR_HEADER: error.message.replace("\n", " "),
        }
        if error.retry_after is not None:
            headers[RETRY_AFTER_HEADER] = str(error.retry_after)
        await self.send(delivery.reply, b"", headers=headers)

    async def _close(self) -> None:
        """Close the subscriptions, then await the tasks they started, then close the connection."""
        self._closing = True
        await self.stop_serving()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=TASKS_DEADLINE)
            for task in late:
                log.error("task cancelled after %.0f s: %s", TASKS_DEADLINE, task.get_coro())
                task.cancel()
        if await self.is_responsive():
            await self._client.drain()
        else:
            # pending data is written to a broken transport, which raises with uvloop
            with suppress(RuntimeError, OSError):
                await self._client.close()

    async def is_responsive(self) -> bool:
        """Return whether the server answers a ping, and so has all that was published before."""
        if not self._client.is_connected:
            return False
        try:
            await self._client.flush(self._flush_timeout)  # type: ignore[arg-type]
        except (nats.errors.Error, TimeoutError):
            return False
        return self._client.is_connected

    @property
    def confirmed_at(self) -> float:
        """
        Return the time, of time.monotonic(), up to which the server surely has what was published,
        as its answers to pings show: also to one that came too late for `is_responsive`, because
        this process was busy.
        """
        return self._client.confirmed_at

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("task failed", exc_info=error)

    async def _on_disconnected(self) -> None:
        if not self._closing:
            log.warning("NATS disconnected")
        for callback in self._disconnected:
            callback()

    async def _on_reconnected(self) -> None:
        log.info("NATS reconnected")
        self._errors.on_connected()
        self._reconnected_at = time.monotonic()
        for callback in self._reconnected:
            try:
                await callback()
            except Exception:
                log.exception("reconnect callback failed")


def _too_large(what: str, max_bytes: int) -> ServiceError:
    return ServiceError(
        "payload_too_large",
        f"The {what} exceeds the maximum message size of {max_bytes:,} bytes: ask for less at"
        " once.",
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
