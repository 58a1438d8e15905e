"""A consumer of a JetStream stream: gives out its messages until they are acknowledged."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from services.runtime.bus import Bus
from services.runtime.streams import Stored, as_unavailable, stored_of


class Pending(NamedTuple):
    """A message that a consumer was given and has not acknowledged."""

    stored: Stored
    message: Msg

    async def ack(self) -> None:
        with as_unavailable():
            await self.message.ack()

    async def give_back(self) -> None:
        """It is given to somebody again, without waiting for its time to pass."""
        with as_unavailable():
            await self.message.nak()

    async def set_aside(self) -> None:
        """Never again: it can't be read."""
        with as_unavailable():
            await self.message.term()


class Consumer:
    """A durable pull consumer with explicit acknowledgements; any number of processes share it."""

    def __init__(self, bus: Bus, stream: str, durable: str) -> None:
        self._js: JetStreamContext = bus.jetstream
        self._stream = stream
        self._durable = durable
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def ensure(self, ack_wait: float, max_ack_pending: int) -> None:
        """Makes the consumer, or updates its limits. `ack_wait` in seconds."""
        config = api.ConsumerConfig(
            name=self._durable,
            durable_name=self._durable,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ack_wait,
            max_ack_pending=max_ack_pending,
        )
        with as_unavailable():
            await self._js.add_consumer(self._stream, config)
            if self._subscription is None:
                self._subscription = await self._js.pull_subscribe_bind(
                    durable=self._durable, stream=self._stream
                )

    async def close(self) -> None:
        """
        Before the bus is: nats-py's drain would wait for what a fetch left in its queue, half a
        minute and in vain.
        """
        if self._subscription is not None:
            with suppress(nats.errors.Error):
                await self._subscription.unsubscribe()
            self._subscription = None

    async def fetch(self, batch: int, timeout: float) -> Sequence[Pending]:
        """At most `batch` messages; none if none came in `timeout` seconds."""
        assert self._subscription is not None, "ensure() comes first"
        with as_unavailable():
            try:
                messages = await self._subscription.fetch(batch, timeout=timeout)
            except TimeoutError:
                return []
        return [Pending(stored_of(message), message) for message in messages]

    async def floor(self) -> int:
        """Every message up to this sequence has been acknowledged."""
        floor = (await self._info()).ack_floor
        return (floor.stream_seq or 0) if floor else 0

    async def unacknowledged(self) -> int:
        """How many messages have not been acknowledged, whether they were given out or not."""
        info = await self._info()
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    async def _info(self) -> api.ConsumerInfo:
        with as_unavailable():
            info: api.ConsumerInfo = await self._js.consumer_info(self._stream, self._durable)
        return info
