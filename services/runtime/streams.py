"""
JetStream: a stream, a consumer of it, a key-value bucket. Knows bytes and sequences, not records.
"""

from collections.abc import Sequence
from typing import NamedTuple

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from services.runtime.bus import Bus

WRONG_LAST_SEQUENCE = (10071, 10164)  # nats-server's error codes for a failed compare-and-set
DUPLICATE_WINDOW = 120.0  # seconds in which the server itself drops a repeated message id


class StreamUnavailable(Exception):
    """JetStream did not answer, or not with success."""


class Conflict(Exception):
    """Someone else appended first: the expected sequence is no longer the last."""


class Stored(NamedTuple):
    seq: int
    subject: str
    data: bytes


class StreamState(NamedTuple):
    first_seq: int
    last_seq: int
    messages: int
    bytes: int


class Stream:
    """A file stream in which every subject is a sequence of its own, checked on append."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._js: JetStreamContext = bus.jetstream
        self.name = name

    async def ensure(self, subjects: str, max_bytes: int, max_age: float) -> None:
        """Makes the stream, or updates its limits. `max_age` in seconds, 0: for ever."""
        config = api.StreamConfig(
            name=self.name,
            subjects=[subjects],
            storage=api.StorageType.FILE,
            allow_direct=True,
            max_bytes=max_bytes,
            max_age=max_age,
            duplicate_window=min(DUPLICATE_WINDOW, max_age or DUPLICATE_WINDOW),
        )
        try:
            await self._js.add_stream(config)
        except nats.js.errors.BadRequestError:  # it is there, with other limits
            await self._js.update_stream(config)

    async def append(self, subject: str, data: bytes, message_id: str, previous: int) -> int:
        """
        The sequence of the new message, once the stream has acknowledged it.

        `previous` is the sequence of the subject's last message (0: none). Raises Conflict if it is
        no longer the last, StreamUnavailable if nothing was acknowledged: it may be stored or not.
        """
        return await _publish(self._js, subject, data, previous, {"Nats-Msg-Id": message_id})

    async def last(self, subject: str) -> Stored | None:
        return await _get(self._js, self.name, subject=subject)

    async def get(self, seq: int) -> Stored | None:
        """The message with this sequence; None if there is none (any more)."""
        return await _get(self._js, self.name, seq=seq)

    async def state(self) -> StreamState:
        try:
            state = (await self._js.stream_info(self.name)).state
        except (nats.errors.Error, TimeoutError) as error:
            raise StreamUnavailable(str(error)) from error
        return StreamState(state.first_seq, state.last_seq, state.messages, state.bytes)


class Pending(NamedTuple):
    """A message that a consumer was given and has not acknowledged."""

    stored: Stored
    message: Msg

    async def ack(self) -> None:
        await self.message.ack()

    async def set_aside(self) -> None:
        """Never again: it can't be read."""
        await self.message.term()


class Consumer:
    """A durable pull consumer with explicit acknowledgements; any number of processes share it."""

    def __init__(self, bus: Bus, stream: str, durable: str) -> None:
        self._js: JetStreamContext = bus.jetstream
        self._stream = stream
        self._durable = durable
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def open(self, ack_wait: float, max_ack_pending: int) -> None:
        self._subscription = await self._js.pull_subscribe(
            "",
            durable=self._durable,
            stream=self._stream,
            config=api.ConsumerConfig(
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=ack_wait,
                max_ack_pending=max_ack_pending,
            ),
        )

    async def fetch(self, batch: int, timeout: float) -> Sequence[Pending]:
        """At most `batch` messages; none if none came in `timeout` seconds."""
        assert self._subscription is not None, "open() comes first"
        try:
            messages = await self._subscription.fetch(batch, timeout=timeout)
        except TimeoutError:
            return []
        except nats.errors.Error as error:
            raise StreamUnavailable(str(error)) from error
        return [Pending(Stored(m.metadata.sequence.stream, m.subject, m.data), m) for m in messages]

    async def floor(self) -> int:
        """Every message up to this sequence has been acknowledged."""
        try:
            info = await self._js.consumer_info(self._stream, self._durable)
        except (nats.errors.Error, TimeoutError) as error:
            raise StreamUnavailable(str(error)) from error
        return (info.ack_floor.stream_seq or 0) if info.ack_floor else 0


class Value(NamedTuple):
    data: bytes
    revision: int


class Bucket:
    """A key-value bucket that is written by compare-and-set."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._js: JetStreamContext = bus.jetstream
        self._name = name

    async def ensure(self, ttl: float) -> None:
        """`ttl` in seconds, 0: for ever."""
        config = api.KeyValueConfig(bucket=self._name, history=1, ttl=ttl, direct=True)
        try:
            await self._js.create_key_value(config)
        except nats.js.errors.BadRequestError:  # it is there, with another ttl
            stream = (await self._js.stream_info(f"KV_{self._name}")).config
            stream.max_age = ttl
            await self._js.update_stream(stream)

    async def get(self, key: str) -> Value | None:
        stored = await _get(self._js, f"KV_{self._name}", subject=f"$KV.{self._name}.{key}")
        return stored and Value(stored.data, stored.seq)

    async def put(self, key: str, data: bytes, revision: int) -> None:
        """
        `revision` is the one that was read (0: none). Raises Conflict if it is the last no
        more.
        """
        await _publish(self._js, f"$KV.{self._name}.{key}", data, revision, {})


async def _publish(
    js: JetStreamContext, subject: str, data: bytes, previous: int, headers: dict[str, str]
) -> int:
    headers["Nats-Expected-Last-Subject-Sequence"] = str(previous)
    try:
        ack = await js.publish(subject, data, headers=headers)
    except nats.js.errors.APIError as error:
        if error.err_code in WRONG_LAST_SEQUENCE:
            raise Conflict from error
        raise StreamUnavailable(str(error)) from error
    except (nats.errors.Error, TimeoutError) as error:
        raise StreamUnavailable(str(error)) from error
    return ack.seq


async def _get(
    js: JetStreamContext, stream: str, seq: int | None = None, subject: str | None = None
) -> Stored | None:
    try:
        raw = await js.get_msg(stream, seq=seq, subject=subject, direct=True)
    except nats.js.errors.NotFoundError:
        return None
    except (nats.errors.Error, TimeoutError) as error:
        raise StreamUnavailable(str(error)) from error
    return Stored(raw.seq or 0, raw.subject or "", raw.data or b"")
