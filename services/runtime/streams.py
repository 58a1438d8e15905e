"""JetStream streams and key-value buckets, as bytes and sequences."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from typing import NamedTuple

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from services.contract import subjects
from services.runtime import trace_context
from services.runtime.bus import Bus

# https://github.com/nats-io/nats-server/blob/main/server/errors.json
WRONG_LAST_SEQUENCE = (10071, 10164)  # a failed compare-and-set
FULL_CODES = (
    10077,  # the stream has reached its limit
    10023,  # the server has
    10047,  # the server would, with this stream
)
NO_MESSAGE_FOUND = 10037
LAST_OF_SUBJECT = "Nats-Expected-Last-Subject-Sequence"
LAST_OF_STREAM = "Nats-Expected-Last-Sequence"
PROBE_BYTES = 128 * 1024
DUPLICATE_WINDOW = 120.0  # seconds in which nats-server deduplicates by message id


class StreamUnavailable(Exception):
    """JetStream did not reply, or with an error."""


class StreamFull(StreamUnavailable):
    """JetStream rejects messages until space is freed."""


class MessageTooLarge(StreamUnavailable):
    """The data exceeds the maximum message size."""


class StreamDamaged(StreamUnavailable):
    """
    The stream is inconsistent: an acknowledged message can't be read, or has another subject. This
    happens after two nats-servers wrote to one store.
    """


class Conflict(Exception):
    """A compare-and-set failed: the expected sequence is not the last."""


class StoredMessage(NamedTuple):
    seq: int
    subject: str
    data: bytes
    time: datetime  # when the server stored it, to a microsecond


class Appended(NamedTuple):
    """`is_new` is False if a message with its id existed already, maybe with other data."""

    seq: int
    is_new: bool


class StreamState(NamedTuple):
    first_seq: int
    last_seq: int
    messages: int
    deleted: int  # messages between the first and the last
    bytes: int
    limit: int | None  # bytes
    drops_old: bool  # at the limit, instead of rejecting new messages

    @property
    def share(self) -> float:
        """Return how much of the limit is used: 0.0 without a limit."""
        return self.bytes / self.limit if self.limit else 0.0

    @property
    def has_dropped(self) -> bool:
        """Return whether messages may have been dropped to make room, or deleted."""
        return self.drops_old and (self.first_seq > 1 or self.deleted > 0)

    @property
    def is_whole(self) -> bool:
        """Return whether each sequence belongs to a message or to a deleted one."""
        span = self.last_seq - self.first_seq + 1
        return self.messages + self.deleted == span or self.messages == 0


class Stream:
    """A stream in files, whose messages are appended by compare-and-set on their subject."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self._js: JetStreamContext = bus.jetstream
        self.name = name

    async def ensure(
        self, subject: str, max_bytes: int, max_age: float, replicas: int | None = None
    ) -> None:
        """
        Create the stream, or update what differs.

        `max_age` is the age in seconds at which messages are deleted (0: never), `replicas` the
        number of servers of a cluster that keep it (None: unchanged). `max_bytes` only applies to a
        new stream. What an operator changed otherwise, such as placement, is kept.
        """
        with as_unavailable():
            change = self._js.update_stream
            if (config := await self._config()) is None:
                change = self._js.add_stream
                config = api.StreamConfig(
                    name=self.name, storage=api.StorageType.FILE, max_bytes=max_bytes
                )
            config.subjects = [subject]
            await change(_with_limits(config, max_age, replicas))

    async def _info(self) -> api.StreamInfo | None:
        """Return what the server knows, or None if the stream does not exist."""
        with as_unavailable(), suppress(nats.js.errors.NotFoundError):
            return await self._js.stream_info(self.name)
        return None

    async def _config(self) -> api.StreamConfig | None:
        info = await self._info()
        return info.config if info is not None else None

    async def replicas(self) -> int | None:
        """Return how many servers of a cluster keep it; None if it does not exist."""
        config = await self._config()
        return config.num_replicas if config else None

    async def exists(self) -> bool:
        return await self._config() is not None

    async def refuse_when_full(self) -> None:
        """Reject messages at the limit from now on, where a new stream drops its oldest ones."""
        config = await self._config()
        if config and config.discard != api.DiscardPolicy.NEW:
            config.discard = api.DiscardPolicy.NEW
            with as_unavailable():
                await self._js.update_stream(config)

    async def delete(self, seq: int) -> None:
        """
        Delete the message, if it exists.

        Not reported: after a purge of a subject up to a sequence, nats-server (2.11 to 2.15) never
        redelivers older messages of other subjects. Hence messages are deleted one by one.
        """
        with as_unavailable():
            try:
                await self._js.delete_msg(self.name, seq)
            except nats.js.errors.APIError:  # its code does not say whether the message exists
                if await self.get(seq) is not None:
                    raise

    async def append(
        self,
        subject: str,
        data: bytes,
        message_id: str | None,
        previous: int,
        ttl: float | None = None,
    ) -> Appended:
        """
        Append a message and return its place, once the stream has acknowledged it.

        `previous` is the sequence of the subject's last message (0: none). Raises Conflict if it is
        not, since nats-server 2.12 also if the message id is a repeated one (with the right
        `previous`, the place of the first is returned). Raises StreamUnavailable if the stream did
        not acknowledge the message, which may be stored or not. With a `ttl` (seconds) the server
        deletes it then; the stream must allow that.
        """
        headers = {LAST_OF_SUBJECT: str(previous)}
        if ttl is not None:
            headers[api.Header.MSG_TTL] = str(int(ttl))
        if message_id is not None:
            headers["Nats-Msg-Id"] = message_id
        return await self._publish(subject, data, headers)

    async def append_at(self, subject: str, data: bytes, end: int) -> Appended:
        """
        Append a message and return its place.

        `end` is the sequence of the stream's last message (0: none). Raises Conflict if it is not,
        and StreamUnavailable as `append` does.
        """
        return await self._publish(subject, data, {LAST_OF_STREAM: str(end)})

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> Appended:
        with as_unavailable():
            try:
                ack = await self._js.publish(
                    subject, data, headers=headers | trace_context.headers()
                )
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_LAST_SEQUENCE:
                    raise Conflict from error
                raise
        return Appended(ack.seq, not ack.duplicate)

    async def probe(self, subject: str) -> None:
        """
        Append a message, read it and delete it. It is large, to notice a disk that is almost full,
        but not too large for a server with a small `max_payload`.

        Raises StreamUnavailable if that fails: after a failed write, nats-server may still serve
        reads without reporting an error.
        """
        size = min(PROBE_BYTES, self._bus.max_payload // 2)
        seq, _ = await self._publish(subject, bytes(size), {})
        stored = await self.get(seq)
        if stored is None or stored.subject != subject:
            raise StreamDamaged(f"{self.name} acknowledges messages that it does not store")
        await self.delete(seq)

    async def purge(self, until: int) -> None:
        """Delete the messages up to this sequence."""
        with as_unavailable():
            await self._js.purge_stream(self.name, seq=until + 1)

    async def purge_subject(self, subject: str) -> None:
        """Delete the messages of a subject."""
        with as_unavailable():
            await self._js.purge_stream(self.name, subject=subject)

    async def remove(self) -> None:
        """Delete the stream itself, if it exists."""
        with as_unavailable(), suppress(nats.js.errors.NotFoundError):
            await self._js.delete_stream(self.name)

    async def readable(self) -> AsyncIterator[StoredMessage]:
        """Yield all messages by sequence, oldest first, also if subjects are mixed up."""
        state = await self.state()
        for seq in range(max(state.first_seq, 1), state.last_seq + 1):
            if stored := await self.get(seq):
                yield stored

    async def last(self, subject: str) -> StoredMessage | None:
        """Return the last message of the subject, which may have wildcards."""
        return await self._get(subject=subject)

    async def get(self, seq: int) -> StoredMessage | None:
        """Return the message with this sequence; None if it never existed or was deleted."""
        return await self._get(seq=seq)

    async def next(self, subject: str, seq: int) -> StoredMessage | None:
        """Return the first message, from this sequence on, of the subject or pattern."""
        return await self._get(seq=seq, subject=subject)

    async def _get(
        self, seq: int | None = None, subject: str | None = None
    ) -> StoredMessage | None:
        """
        Return a message by sequence, or the last of a subject; with both, the subject's first
        message from that sequence on.

        The stream's leader serves the request. A direct get is a tenth faster, but any server of a
        cluster may serve it, and one that lags behind lacks messages that were acknowledged
        already.
        """
        both = seq is not None and subject is not None
        with as_unavailable():
            try:
                async with self._bus.reads:
                    raw = await self._js.get_msg(self.name, seq=seq, subject=subject, next=both)
            except nats.js.errors.NotFoundError as error:
                if error.err_code != NO_MESSAGE_FOUND:
                    raise  # the stream does not exist
                return None
        assert raw.seq is not None and raw.subject is not None and raw.time is not None
        if subject is not None and not subjects.matches(subject, raw.subject):
            raise StreamDamaged(f"{self.name} returned a message of {raw.subject} for {subject}")
        return StoredMessage(raw.seq, raw.subject, raw.data or b"", raw.time)

    async def walk(self, subject: str, seq: int) -> AsyncIterator[StoredMessage]:
        """Yield the messages of the subject or pattern from this sequence on, oldest first."""
        while (stored := await self.next(subject, seq)) is not None:
            yield stored
            seq = stored.seq + 1

    async def before(self, subject: str, seq: int) -> StoredMessage | None:
        """
        Return the last message, before this sequence, of the subject, which may have wildcards.

        JetStream only searches forwards: so this starts further and further back until it finds a
        message, then bisects the rest. (A direct get of `multi_last` messages up to a sequence
        could answer it at once, but fails for a pattern that matches more than 1024 subjects.)
        """
        end, step = seq, 1
        while end > 1:
            start = max(1, end - step)
            if found := await self._first(subject, start, end):
                return await self._latest(subject, found, end)
            end, step = start, step * 2
        return None

    async def _latest(self, subject: str, found: StoredMessage, end: int) -> StoredMessage:
        while found.seq + 1 < end:
            middle = (found.seq + 1 + end) // 2
            if later := await self._first(subject, middle, end):
                found = later
            else:
                end = middle
        return found

    async def _first(self, subject: str, start: int, end: int) -> StoredMessage | None:
        stored = await self.next(subject, start)
        return stored if stored is not None and stored.seq < end else None

    async def count(self, subject: str) -> int:
        """Return the number of messages of one subject. Raises StreamUnavailable."""
        with as_unavailable():
            info = await self._js.stream_info(self.name, subjects_filter=subject)
        return (info.state.subjects or {}).get(subject, 0)

    async def state(self) -> StreamState:
        """Return sequences, counts and limit. Raises StreamUnavailable, also if it is missing."""
        with as_unavailable():
            return _state_of(await self._js.stream_info(self.name))

    async def state_if_exists(self) -> StreamState | None:
        """Return the state, or None if the stream does not exist. Raises StreamUnavailable."""
        info = await self._info()
        return _state_of(info) if info is not None else None


def _state_of(info: api.StreamInfo) -> StreamState:
    state, limit = info.state, info.config.max_bytes or -1
    return StreamState(
        state.first_seq,
        state.last_seq,
        state.messages,
        state.num_deleted or 0,
        state.bytes,
        limit if limit > 0 else None,
        info.config.discard != api.DiscardPolicy.NEW,
    )


class BucketValue(NamedTuple):
    data: bytes
    revision: int


class BucketVersion(NamedTuple):
    revision: int  # of the last value that was written
    values: int  # fewer with the same revision: some were removed


class Bucket:
    """A key-value bucket, written by compare-and-set. It is a stream with a subject per key."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._js: JetStreamContext = bus.jetstream
        self._name = name
        self._prefix = f"$KV.{name}."
        self._stream = Stream(bus, f"KV_{name}")

    async def ensure(
        self, ttl: float, replicas: int | None = None, allows_ttl: bool = False
    ) -> None:
        """
        Create the bucket or update it. `ttl` is in seconds (0: forever). `allows_ttl`: single
        values may have one of their own. A header that has the server delete other values with a
        write is rejected, since a user of NATS may be allowed to write some keys only.
        """
        new = api.KeyValueConfig(self._name, history=1, ttl=ttl, replicas=replicas or 1)
        with as_unavailable():
            with suppress(nats.js.errors.BadRequestError):  # it exists with another configuration
                await self._js.create_key_value(new)
            config = (await self._js.stream_info(self._stream.name)).config
            changed = _with_limits(copy(config), ttl, replicas)
            changed.allow_msg_ttl = allows_ttl or config.allow_msg_ttl
            changed.allow_rollup_hdrs = False
            if changed != config:
                await self._js.update_stream(changed)

    async def exists(self) -> bool:
        return await self._stream.exists()

    async def get(self, key: str) -> BucketValue | None:
        """Return the last value of the key; None if it was never written or has expired."""
        stored = await self._stream.last(self._prefix + key)
        return stored and BucketValue(stored.data, stored.seq)

    async def readable(self) -> dict[str, BucketValue]:
        """
        Return the last value of each key, also if keys are mixed up. That takes a read per key,
        however often keys were written.
        """
        return dict([self._item(stored) async for stored in self._stream.walk(">", 1)])

    async def version(self) -> BucketVersion | None:
        """
        Return what each change alters; None if nothing was ever written, or there is no bucket.
        Raises StreamUnavailable.
        """
        state = await self._stream.state_if_exists()
        return BucketVersion(state.last_seq, state.messages) if state and state.last_seq else None

    async def remove(self, key: str) -> None:
        """Delete the value of a key, if it has one."""
        await self._stream.purge_subject(self._prefix + key)

    async def purge(self) -> None:
        """Delete all keys."""
        await self._stream.purge((await self._stream.state()).last_seq)

    async def before(self, prefix: str, revision: int | None) -> tuple[str, BucketValue] | None:
        """
        Return the key that was written last (before this revision) and its value, of the keys that
        start with `prefix`, which is empty or ends with a dot.
        """
        subject, stream = f"{self._prefix}{prefix}>", self._stream
        stored = await (stream.before(subject, revision) if revision else stream.last(subject))
        return stored and self._item(stored)

    async def put(self, key: str, data: bytes, revision: int, ttl: float | None = None) -> int:
        """
        Write the value, for `ttl` seconds (None: as long as the bucket keeps values), and return
        its revision. Raises Conflict if `revision` (0: none) is not the key's last one.
        """
        return (await self._stream.append(self._prefix + key, data, None, revision, ttl)).seq

    async def state(self) -> StreamState:
        return await self._stream.state()

    def _item(self, stored: StoredMessage) -> tuple[str, BucketValue]:
        key = stored.subject.removeprefix(self._prefix)
        return key, BucketValue(stored.data, stored.seq)


def _with_limits(
    config: api.StreamConfig, max_age: float, replicas: int | None
) -> api.StreamConfig:
    config.max_age = max_age
    config.num_replicas = replicas or config.num_replicas
    config.duplicate_window = min(DUPLICATE_WINDOW, max_age or DUPLICATE_WINDOW)
    return config


def stored_message(message: Msg) -> StoredMessage:
    metadata = message.metadata
    return StoredMessage(
        metadata.sequence.stream, message.subject, message.data, metadata.timestamp
    )


@contextmanager
def as_unavailable() -> Iterator[None]:
    """Turn the errors of nats-py into StreamUnavailable, StreamFull or MessageTooLarge."""
    try:
        yield
    except nats.js.errors.APIError as error:
        kind = StreamFull if error.err_code in FULL_CODES else StreamUnavailable
        raise kind(error.description or str(error)) from error
    except nats.errors.MaxPayloadError as error:
        raise MessageTooLarge(str(error)) from error
    except (nats.errors.Error, TimeoutError) as error:
        raise StreamUnavailable(str(error) or type(error).__name__) from error
