"""A durable JetStream consumer, which delivers messages until they are acknowledged."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from services.runtime.bus import Bus
from services.runtime.streams import StoredMessage, as_unavailable, stored_message

NO_FILES = "no such file or directory"
HAS_ANOTHER_START = "start time can not be updated"


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
        """Return at most `batch` messages; none if none is delivered within `timeout` seconds."""
        assert self._subscription is not None, "ensure() comes first"
        with as_unavailable():
            try:
                messages = await self._subscription.fetch(batch, timeout=timeout)
            except TimeoutError:
                return []
        return [PendingMessage(stored_message(message), message) for message in messages]

    async def progress(self) -> ConsumerProgress:
        info = await self._info()
        floor = (info.ack_floor.stream_seq or 0) if info.ack_floor else 0
        return ConsumerProgress(floor, (info.num_pending or 0) + (info.num_ack_pending or 0))

    async def floor(self) -> int:
        """Return the sequence up to which all messages are acknowledged."""
        return (await self.progress()).floor

    async def unacknowledged(self) -> int:
        """Return how many messages are not acknowledged, delivered or not."""
        return (await self.progress()).unacknowledged

    async def _info(self) -> api.ConsumerInfo:
        with as_unavailable():
            info: api.ConsumerInfo = await self._js.consumer_info(self._stream, self._durable)
        return info
