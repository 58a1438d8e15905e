"""JetStream consumers: durable ones, and one that lists the sizes of all messages."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple
from uuid import uuid4

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from services.runtime.bus import Bus
from services.runtime.streams import (
    StoredMessage,
    StreamUnavailable,
    as_unavailable,
    stored_message,
)

NO_FILES = "no such file or directory"
HAS_ANOTHER_START = "start time can not be updated"

MAX_FETCH_BYTES = 4 * 2**20  # of one fetch; a single message may be larger
STATUS_SECONDS = 0.5  # for the server to report the end of a fetch
SCAN_BATCH = 1000
MSG_SIZE = "Nats-Msg-Size"  # the header of a message that is delivered without its data


class PendingMessage(NamedTuple):
    """A message that was delivered and is not acknowledged yet."""

    stored: StoredMessage
    message: Msg

    async def ack(self) -> None:
        with as_unavailable():
            await self.message.ack()

    async def give_back(self) -> None:
        """Have it redelivered at once, to this process or another."""
        with as_unavailable():
            await self.message.nak()


class ConsumerProgress(NamedTuple):
    """All messages up to the sequence `floor` are acknowledged."""

    floor: int
    unacknowledged: int  # messages, delivered or not


class Consumer:
    """A durable pull consumer with explicit acknowledgements; any number of processes share it."""

    def __init__(self, bus: Bus, stream: str, durable: str) -> None:
        self._js: JetStreamContext = bus.jetstream
        self._bus = bus
        self._stream = stream
        self._durable = durable
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def ensure(
        self, ack_wait: float, max_ack_pending: int, since: datetime | None = None
    ) -> None:
        """
        Create the consumer, or update its limits. `ack_wait` in seconds.

        With `since`, a new consumer starts with the messages of that time, and an existing one is
        not updated: nats-server rejects every update of a consumer that has a start time.
        """
        config = api.ConsumerConfig(
            name=self._durable,
            durable_name=self._durable,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ack_wait,
            max_ack_pending=max_ack_pending,
        )
        if since is not None:
            config.deliver_policy = api.DeliverPolicy.BY_START_TIME
            config.opt_start_time = since
        with as_unavailable():
            if since is None or not await self._exists():
                await self._add(config)
            if self._subscription is None:
                self._subscription = await self._js.pull_subscribe_bind(
                    durable=self._durable, stream=self._stream
                )

    async def _add(self, config: api.ConsumerConfig) -> None:
        """
        Create or update the consumer.

        Not reported: if an update meets a deletion by another process, nats-server 2.15 keeps the
        consumer without its files. It delivers nothing and rejects updates until it is deleted.

        A consumer with another start time was created by another process at the same time, and is
        used as it is.
        """
        try:
            await self._js.add_consumer(self._stream, config)
        except nats.js.errors.ServerError as error:
            description = error.description or ""
            if HAS_ANOTHER_START in description:
                return
            if NO_FILES not in description:
                raise
            await self.delete()
            await self._js.add_consumer(self._stream, config)

    async def _exists(self) -> bool:
        try:
            await self._js.consumer_info(self._stream, self._durable)
        except nats.js.errors.NotFoundError:
            return False
        return True

    async def delivered(self) -> int:
        """Return the sequence of the last delivered message, or 0."""
        last = (await self._info()).delivered
        return (last.stream_seq or 0) if last else 0

    async def delete(self) -> None:
        """Delete the consumer, if it exists. `ensure` then creates one that starts anew."""
        with as_unavailable(), suppress(nats.js.errors.NotFoundError):
            await self._js.delete_consumer(self._stream, self._durable)

    async def close(self) -> None:
        """
        Unsubscribe; to be called before the bus is closed.

        Not reported: nats-py's `drain` waits 30 s for messages that a fetch left in its queue.
        """
        if self._subscription is not None:
            with suppress(nats.errors.Error):
                await self._subscription.unsubscribe()
            self._subscription = None

    async def fetch(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        """
        Return at most `batch` messages, and fewer large ones, so that a batch never makes a slow
        consumer of this process; none if none is delivered within `timeout` seconds.
        """
        assert self._subscription is not None, "ensure() comes first"
        max_bytes = max(MAX_FETCH_BYTES, 2 * self._bus.max_payload)
        messages = await _pull(self._subscription, batch, timeout, max_bytes)
        return [PendingMessage(stored_message(message), message) for message in messages]

    async def progress(self) -> ConsumerProgress:
        info = await self._info()
        floor = (info.ack_floor.stream_seq or 0) if info.ack_floor else 0
        return ConsumerProgress(floor, (info.num_pending or 0) + (info.num_ack_pending or 0))

    async def floor(self) -> int:
        """Return the sequence up to which all messages are acknowledged."""
        return (await self.progress()).floor

    async def _info(self) -> api.ConsumerInfo:
        with as_unavailable():
            info: api.ConsumerInfo = await self._js.consumer_info(self._stream, self._durable)
        return info


class MessageSize(NamedTuple):
    seq: int
    subject: str
    bytes: int  # of the data
    expires: bool = False  # before the others of its stream


async def message_sizes(bus: Bus, stream: str) -> AsyncIterator[MessageSize]:
    """
    Yield the sequences, subjects and sizes of all messages of a stream, oldest first. The server
    sends no data. Raises StreamUnavailable.
    """
    js, name = bus.jetstream, f"sizes-{uuid4().hex}"
    config = api.ConsumerConfig(
        name=name,
        ack_policy=api.AckPolicy.NONE,
        headers_only=True,
        inactive_threshold=30,
        mem_storage=True,
    )
    with as_unavailable():
        left = (await js.add_consumer(stream, config)).num_pending or 0
        subscription = await js.pull_subscribe_bind(durable=name, stream=stream)
    try:
        while left > 0:
            messages = await _pull(subscription, min(left, SCAN_BATCH), timeout=1.0)
            if not messages:
                if (await _pending(js, stream, name)) > 0:
                    raise StreamUnavailable("messages were not delivered in time")
                return  # the rest was deleted meanwhile
            left -= len(messages)
            for message in messages:
                headers = message.headers or {}
                yield MessageSize(
                    message.metadata.sequence.stream,
                    message.subject,
                    int(headers.get(MSG_SIZE, 0)),
                    api.Header.MSG_TTL in headers,
                )
    finally:
        with as_unavailable(), suppress(nats.errors.Error):
            await subscription.unsubscribe()
            await js.delete_consumer(stream, name)


async def _pending(js: JetStreamContext, stream: str, consumer: str) -> int:
    with as_unavailable():
        return (await js.consumer_info(stream, consumer)).num_pending or 0


async def _pull(
    subscription: JetStreamContext.PullSubscription,
    batch: int,
    timeout: float,
    max_bytes: int | None = None,
) -> list[Msg]:
    """
    Return the messages that a pull consumer delivers within `timeout` seconds, at most `batch`.

    Not reported: nats-py's `fetch` can't limit the bytes of a batch. The request is that of
    https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-37.md.
    """
    left_over = subscription._sub._pending_queue.qsize()  # by a fetch that was cancelled
    if found := await _receive(subscription, min(left_over, batch), timeout=0.0):
        return found
    request: dict[str, object] = {"batch": batch, "no_wait": True}
    if max_bytes is not None:
        request["max_bytes"] = max_bytes
    if found := await _request(subscription, request, batch, STATUS_SECONDS):
        return found
    # the first one that comes: the server would hold it back until a larger batch is complete
    request = {"batch": 1, "expires": int(timeout * 1e9)}
    return await _request(subscription, request, 1, timeout + STATUS_SECONDS)


async def _request(
    subscription: JetStreamContext.PullSubscription,
    request: dict[str, object],
    batch: int,
    timeout: float,
) -> list[Msg]:
    with as_unavailable():
        data = json.dumps(request).encode()
        await subscription._nc.publish(subscription._nms, data, subscription._deliver)
    return await _receive(subscription, batch, timeout)


async def _receive(
    subscription: JetStreamContext.PullSubscription, batch: int, timeout: float
) -> list[Msg]:
    """Return what arrives until the server reports the end, at most `batch` messages."""
    found: list[Msg] = []
    deadline = time.monotonic() + timeout
    with as_unavailable(), suppress(TimeoutError):
        while len(found) < batch:
            message = await subscription._sub.next_msg(max(0.01, deadline - time.monotonic()))
            if not _is_status(message):
                found.append(message)
            elif found or _status(message) != api.StatusCode.SERVICE_UNAVAILABLE:
                break
            else:
                raise nats.js.errors.ServiceUnavailableError
    return found


def _is_status(message: Msg) -> bool:
    """Return whether the server reports the end of a pull request."""
    return not message.data and bool(_status(message))


def _status(message: Msg) -> str:
    return (message.headers or {}).get(api.Header.STATUS, "")
