import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import nats.js.errors
import pytest

from services.runtime.bus import Bus
from services.runtime.consumers import Consumer, MessageSize, message_sizes
from services.runtime.streams import Bucket, Conflict, Stream, StreamFull, StreamUnavailable
from tests.history.samples import until
from tests.servers import NATS_VERSIONS, nats_server, running

MEBIBYTE = 1024**2
Append = Callable[[str, bytes], Awaitable[int]]


@pytest.fixture(scope="module", params=NATS_VERSIONS)
def nats_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    server = nats_server(tmp_path_factory.mktemp("nats"), version=request.param)
    with running(server):
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture
async def stream(bus: Bus) -> AsyncIterator[Stream]:
    """Create a stream for the test, whose subjects start with its name."""
    stream = Stream(bus, f"S{uuid4().hex}")
    await stream.ensure(f"{stream.name}.>", MEBIBYTE, 0)
    yield stream
    await bus.jetstream.delete_stream(stream.name)


@pytest.fixture
def append(stream: Stream) -> Append:
    """Append after the last message of the subject."""

    async def append(subject: str, data: bytes) -> int:
        last = await stream.last(f"{stream.name}.{subject}")
        previous = last.seq if last else 0
        subject = f"{stream.name}.{subject}"
        return (await stream.append(subject, data, uuid4().hex, previous)).seq

    return append


@pytest.fixture
async def consumer(bus: Bus, stream: Stream) -> AsyncIterator[Consumer]:
    consumer = Consumer(bus, stream.name, "reader")
    await consumer.ensure(ack_wait=30, max_ack_pending=100)
    yield consumer
    await consumer.close()


async def test_ensure_keeps_settings_of_an_operator(bus: Bus, stream: Stream) -> None:
    config = (await bus.jetstream.stream_info(stream.name)).config
    config.description, config.max_bytes = "by the operator", 3 * MEBIBYTE
    await bus.jetstream.update_stream(config)
    await stream.ensure(f"{stream.name}.>", 2 * MEBIBYTE, 60)
    config = (await bus.jetstream.stream_info(stream.name)).config
    assert (config.description, config.max_bytes, config.max_age) == (
        "by the operator",
        3 * MEBIBYTE,
        60,
    )


async def test_appended_message_is_readable(stream: Stream) -> None:
    seq, _ = await stream.append(f"{stream.name}.a", b"one", "id1", previous=0)
    stored = await stream.get(seq)
    assert stored is not None and stored == await stream.last(f"{stream.name}.a")
    assert (stored.seq, stored.subject, stored.data) == (seq, f"{stream.name}.a", b"one")
    assert stored.time.tzinfo is not None


async def test_append_with_a_wrong_last_sequence_is_a_conflict(stream: Stream) -> None:
    await stream.append(f"{stream.name}.a", b"one", "id1", previous=0)
    with pytest.raises(Conflict):
        await stream.append(f"{stream.name}.a", b"two", "id2", previous=0)
    with pytest.raises(Conflict):
        await stream.append(f"{stream.name}.b", b"two", "id2", previous=1)


async def test_each_subject_has_its_own_last_message(stream: Stream, append: Append) -> None:
    first, second = await append("a", b"one"), await append("b", b"two")
    assert [
        stored.seq
        for subject in ("a", "b", "*")
        if (stored := await stream.last(f"{stream.name}.{subject}"))
    ] == [first, second, second]


async def test_message_with_a_repeated_id_is_stored_once(stream: Stream) -> None:
    first = await stream.append(f"{stream.name}.a", b"one", "id1", previous=0)
    again = await stream.append(f"{stream.name}.a", b"other", "id1", previous=first.seq)
    assert (first.is_new, again.is_new) == (True, False) and first.seq == again.seq
    assert (await stream.state()).messages == 1


async def test_one_of_concurrent_appends_succeeds(stream: Stream) -> None:
    appends = (stream.append(f"{stream.name}.a", b"x", f"id{n}", previous=0) for n in range(20))
    results = await asyncio.gather(*appends, return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 19
    assert (await stream.state()).messages == 1


async def test_missing_message_is_none(stream: Stream) -> None:
    assert await stream.get(7) is None
    assert await stream.last(f"{stream.name}.a") is None
    assert await stream.next(f"{stream.name}.a", 1) is None
    assert await stream.before(f"{stream.name}.a", 9) is None


async def test_before_finds_every_message_of_a_subject(stream: Stream, append: Append) -> None:
    pattern = [n % 7 == 3 or 40 < n < 45 for n in range(100)]
    rare = [await append("rare", b"") for n in pattern if n or not await append("often", b"")]
    found, seq = [], 101
    while stored := await stream.before(f"{stream.name}.rare", seq):
        found.append(seq := stored.seq)
    assert found == rare[::-1]


async def test_ensure_updates_an_existing_stream(bus: Bus, stream: Stream) -> None:
    await stream.append(f"{stream.name}.a", b"one", "id1", previous=0)
    await stream.ensure(f"{stream.name}.>", MEBIBYTE, 60)
    assert (await bus.jetstream.stream_info(stream.name)).config.max_age == 60
    await stream.ensure(f"{stream.name}.>", MEBIBYTE, 0)
    assert (await bus.jetstream.stream_info(stream.name)).config.max_age == 0
    assert await stream.get(1) is not None


async def test_full_stream_drops_old_messages_or_rejects_new_ones(
    stream: Stream, append: Append
) -> None:
    for _ in range(20):
        await append("a", b"x" * 100_000)
    state = await stream.state()
    assert state.first_seq > 1 and state.drops_old and state.limit == MEBIBYTE
    await stream.refuse_when_full()
    with pytest.raises(StreamFull, match="maximum bytes exceeded"):
        await append("a", b"x" * 100_000)
    assert not (await stream.state()).drops_old
    await stream.ensure(f"{stream.name}.>", MEBIBYTE, 0)
    assert not (await stream.state()).drops_old


async def test_delete_of_a_missing_message_has_no_effect(stream: Stream) -> None:
    subject = f"{stream.name}.a"
    first, _ = await stream.append(subject, b"1", "m1", 0)
    middle, _ = await stream.append(subject, b"2", "m2", first)
    last, _ = await stream.append(subject, b"3", "m3", middle)
    for seq in (middle, middle, first, first, last + 1):
        await stream.delete(seq)
    left = await stream.last(subject)
    assert left is not None and left.seq == last and await stream.next(subject, 1) == left


async def test_delete_keeps_unacknowledged_messages(
    consumer: Consumer, stream: Stream, append: Append
) -> None:
    for data in (b"one", b"two", b"three", b"four"):
        await append(data.decode(), data)
    first, second, third, fourth = await consumer.fetch(10, timeout=5)
    await first.ack()
    for seq in (1, 2, 2, 99):
        await stream.delete(seq)
    await third.give_back()
    (again,) = await consumer.fetch(10, timeout=5)
    assert again.stored.data == b"three"
    assert (await consumer.progress()).unacknowledged == 2
    await again.ack()
    await fourth.ack()

    async def is_acknowledged() -> bool:
        return await consumer.floor() == 4

    await until(is_acknowledged)
    assert (await stream.state()).first_seq == 3


@pytest.mark.xfail(strict=True, reason="nats-server forgets b2: messages are deleted one by one")
async def test_purge_of_a_subject_keeps_unacknowledged_messages(
    bus: Bus, consumer: Consumer, stream: Stream, append: Append
) -> None:
    for data in (b"a1", b"b2", b"a3", b"b4"):
        await append(data.decode()[0], data)
    first, *pending = await consumer.fetch(4, timeout=5)
    await first.ack()
    await bus.jetstream.purge_stream(stream.name, seq=4, subject=f"{stream.name}.a")
    for message in pending:
        await message.give_back()
    redelivered: set[bytes] = set()
    while batch := await consumer.fetch(10, timeout=0.5):
        for message in batch:
            redelivered.add(message.stored.data)
            await message.ack()
    assert redelivered == {b"b2", b"b4"}


async def test_append_at_with_a_wrong_end_is_a_conflict(stream: Stream) -> None:
    first = await stream.append_at(f"{stream.name}.a", b"one", 0)
    for end in (0, first.seq + 1):
        with pytest.raises(Conflict):
            await stream.append_at(f"{stream.name}.b", b"two", end)
    await stream.append_at(f"{stream.name}.b", b"two", first.seq)


async def test_missing_stream_is_unavailable(bus: Bus) -> None:
    stream = Stream(bus, f"S{uuid4().hex}")
    with pytest.raises(StreamUnavailable):
        await stream.state()
    with pytest.raises(StreamUnavailable):
        await stream.append("nobody.listens", b"", "id1", previous=0)


async def test_bucket_is_written_by_compare_and_set(bus: Bus) -> None:
    bucket = Bucket(bus, f"B{uuid4().hex}")
    await bucket.ensure(ttl=0)
    assert await bucket.get("key") is None
    await bucket.put("key", b"one", revision=0)
    value = await bucket.get("key")
    assert value is not None and value.data == b"one"
    await bucket.put("key", b"two", value.revision)
    with pytest.raises(Conflict):
        await bucket.put("key", b"three", value.revision)
    value = await bucket.get("key")
    assert value is not None and value.data == b"two"


async def test_ensure_updates_the_ttl_of_a_bucket(bus: Bus) -> None:
    bucket = Bucket(bus, name := f"B{uuid4().hex}")
    for ttl in (0, 60, 0):
        await bucket.ensure(ttl)
        assert (await bus.jetstream.stream_info(f"KV_{name}")).config.max_age == ttl


async def test_value_with_a_ttl_expires(bus: Bus) -> None:
    bucket = Bucket(bus, f"B{uuid4().hex}")
    await bucket.ensure(0)
    await bucket.ensure(0, allows_ttl=True)  # as a bucket of an earlier version
    await bucket.put("kept", b"1", 0)
    await bucket.put("gone", b"1", 0, ttl=1)
    await bucket.put("replaced", b"1", 0, ttl=1)
    await bucket.put("replaced", b"2", 3)
    async with asyncio.timeout(10):
        while await bucket.get("gone"):
            await asyncio.sleep(0.05)
    assert {key: value.data for key, value in (await bucket.readable()).items()} == {
        "kept": b"1",
        "replaced": b"2",
    }
    await bucket.put("gone", b"3", 0)


async def test_write_to_one_key_can_not_roll_up_a_bucket(bus: Bus) -> None:
    """Users of NATS may write some keys of a bucket only, and purge none."""
    bucket = Bucket(bus, name := f"B{uuid4().hex}")
    await bucket.ensure(0)
    await bucket.put("other", b"1", 0)
    for scope in ("all", "sub"):
        with pytest.raises(nats.js.errors.APIError, match="rollup not permitted"):
            await bus.jetstream.publish(f"$KV.{name}.own", b"x", headers={"Nats-Rollup": scope})
    assert await bucket.get("other")


async def test_consumer_redelivers_until_acknowledged(
    consumer: Consumer, stream: Stream, append: Append
) -> None:
    for data in (b"one", b"two", b"three"):
        await append("a", data)
    first, second, third = await consumer.fetch(10, timeout=5)
    assert (first.stored.seq, first.stored.subject) == (1, f"{stream.name}.a")
    assert await consumer.floor() == 0
    await first.ack()
    await second.give_back()
    await third.ack()
    (again,) = await consumer.fetch(10, timeout=5)
    assert (again.stored.data, (await consumer.progress()).unacknowledged) == (b"two", 1)
    await again.ack()
    assert await consumer.fetch(10, timeout=0.1) == []
    assert await consumer.progress() == (3, 0)


async def test_undelivered_message_counts_as_unacknowledged(
    consumer: Consumer, append: Append
) -> None:
    await append("a", b"one")
    assert await consumer.progress() == (0, 1)


async def test_consumer_recovers_after_its_stream_was_lost(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            stream, consumer = Stream(bus, "S"), Consumer(bus, "S", "reader")
            for _ in range(2):
                await stream.ensure("s.>", MEBIBYTE, 0)
                await consumer.ensure(ack_wait=30, max_ack_pending=100)
                await stream.append("s.a", b"one", uuid4().hex, previous=0)
                (pending,) = await consumer.fetch(10, timeout=5)
                await pending.ack()
                await bus.jetstream.delete_stream("S")
                with pytest.raises(StreamUnavailable):
                    await consumer.floor()
            await consumer.close()


async def test_bus_with_a_closed_consumer_closes_at_once(
    nats_url: str, stream: Stream, append: Append
) -> None:
    async with Bus.connect(nats_url, "test") as bus:
        consumer = Consumer(bus, stream.name, "reader")
        await consumer.ensure(ack_wait=30, max_ack_pending=100)
        assert await consumer.fetch(10, timeout=0.05) == []
        await append("a", b"one")
        await consumer.fetch(10, timeout=0.05)
        await consumer.close()
        closing = time.monotonic()
    assert time.monotonic() - closing < 3


async def test_consumer_deleted_during_an_update_is_recreated(
    bus: Bus, stream: Stream, append: Append, nats_url: str
) -> None:
    async with Bus.connect(nats_url, "another") as other:
        one, another = (Consumer(each, stream.name, "reader") for each in (bus, other))
        for n in range(30):
            seq = await append("s", b"%d" % n)
            await one.ensure(6, 100)
            await asyncio.gather(one.delete(), another.ensure(6, 100), return_exceptions=True)
            await one.ensure(6, 100)
            fetched = await one.fetch(100, 1)
            assert [pending.stored.seq for pending in fetched][-1] == seq
        await one.close()
        await another.close()


async def test_processes_create_a_consumer_concurrently(
    bus: Bus, stream: Stream, append: Append
) -> None:
    since = datetime.now(UTC) - timedelta(days=1)
    consumers = [Consumer(bus, stream.name, "reader") for _ in range(5)]
    starts = [since + timedelta(milliseconds=n) for n in range(5)]
    await asyncio.gather(
        *(each.ensure(6, 100, at) for each, at in zip(consumers, starts, strict=True))
    )
    seq = await append("s", b"one")
    (pending,) = await consumers[-1].fetch(10, timeout=5)
    assert pending.stored.seq == seq
    for consumer in consumers:
        await consumer.close()


async def test_message_sizes_come_without_data(bus: Bus, stream: Stream) -> None:
    sizes = (10, 100_000, 0)
    for number, size in enumerate(sizes):
        await stream.append(f"{stream.name}.{number}", bytes(size), f"id {number}", 0)
    found = [each async for each in message_sizes(bus, stream.name)]
    expected = [MessageSize(n + 1, f"{stream.name}.{n}", size) for n, size in enumerate(sizes)]
    assert found == expected
    assert await stream.count(f"{stream.name}.1") == 1
    assert (await bus.jetstream.stream_info(stream.name)).state.consumer_count == 0
